"""Health check of a tf.data service, before the first step and when images do not arrive."""

import re
import socket
import time

PROBE_SECONDS = 20.0  # timeout of a service before the first step
TRY_SECONDS = 3.0  # timeout of one request
ADDRESS = re.compile(r"grpc://(\[[^\]/]+\]|[^/:\[\]]+):(\d+)")
DISPATCHER = "/tensorflow.data.DispatcherService/"


class NoAnswer(OSError):
    """Raised when a tf.data service does not answer."""


def check_address(address):
    """Raises a ValueError if an address is not of the form grpc://host:port."""
    found = ADDRESS.fullmatch(address)
    if not found or not 0 < int(found[2]) < 65536:
        raise ValueError(
            f"--data_service={address} is no address of a tf.data service. It is written "
            "grpc://HOST:PORT, such as grpc://localhost:5050"
        )


def wait_for(address, seconds=PROBE_SECONDS):
    """Blocks until a service is ready.

    Args:
        address: grpc://host:port of its dispatcher.
        seconds: Timeout. Defaults to 20.

    Raises:
        ValueError: If the address is malformed.
        NoAnswer: If there is no dispatcher, or none of its workers answers.
    """
    check_address(address)
    end = time.monotonic() + seconds
    while True:
        try:
            return probe(address)
        except NoAnswer as error:
            if time.monotonic() > end:
                raise NoAnswer(
                    f"--data_service={address} cannot be used: {error}. Start it with python "
                    "training/cluster/data_service.py, or correct the address"
                ) from error
        time.sleep(0.5)


def probe(address):
    """Asks a service's dispatcher for its workers, and checks that one of them accepts connections.

    Args:
        address: grpc://host:port of the dispatcher.

    Raises:
        NoAnswer: If the dispatcher or all workers are unreachable.
    """
    import grpc

    host, port = ADDRESS.fullmatch(address).groups()
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            reply = channel.unary_unary(f"{DISPATCHER}GetWorkers")(b"", timeout=TRY_SECONDS)
        except grpc.RpcError as error:
            raise NoAnswer(f"no dispatcher answers there ({error.code().name})") from error
    workers = worker_addresses(reply)
    if not workers:
        raise NoAnswer("its dispatcher has no workers")
    if not any(listens(worker) for worker in workers):
        raise NoAnswer(f"none of its workers can be reached: {', '.join(workers)}")


def worker_addresses(reply):
    """Returns the worker addresses in a serialized `GetWorkersResponse`.

    TensorFlow's wheels contain no Python class of this message. It is a list (field 1) of workers,
    whose address is their field 1.
    """
    return [
        address.decode()
        for field, worker in fields(reply)
        if field == 1
        for number, address in fields(worker)
        if number == 1
    ]


def fields(message):
    """Yields (number, bytes) of the length-delimited fields of a serialized protocol buffer."""
    place = 0

    def varint():
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        key = varint()
        if key & 7 == 2:
            length = varint()
            yield key >> 3, message[place : place + length]
            place += length
        elif key & 7 == 0:
            varint()
        else:
            place += 8 if key & 7 == 1 else 4


def listens(address):
    """Returns whether a server accepts connections at host:port."""
    host, _, port = address.removeprefix("grpc://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=TRY_SECONDS):
            return True
    except (OSError, ValueError):
        return False
