"""Client of TF Serving (REST or gRPC), and of Triton and MLServer (KServe's protocol).

python savedmodels/client.py cat.jpg dog.png --model=tnt_small
python savedmodels/client.py --call=status --model=tnt_small --protocol=grpc
python savedmodels/client.py cat.jpg --model=tnt_small_bytes --protocol=kserve --port=8000
"""

import argparse
import base64
import concurrent.futures
import contextlib
import difflib
import http.client
import io
import json
import math
import os
import re
import stat
import sys
import threading
import time
import urllib.parse

PORTS = {"rest": 8501, "grpc": 8500, "kserve": 8000}
# Limits of a reply, each of which is checked before the data is used.
MAX_REPLY = 2**26  # bytes
MAX_GRPC_REPLY = 2**24  # bytes; in memory a message can be a hundred times larger
MAX_HEADERS = 2**20  # bytes, in addition to the body
MAX_VALUES = 2**21  # JSON values; the json module limits their nesting
MAX_VALUE = 2**16  # bytes of a number or a string
MAX_CLASSES = 2**18  # per image
MAX_NAME = 2**12  # characters
MAX_VERSIONS = 2**16
MAX_DIMENSIONS = 32
MAX_IMAGE = 2**28  # bytes


class ServerError(Exception):
    """Raised if the server cannot be reached or refuses; the message says what to do."""


class HttpClient:
    """HTTP client for JSON with a limit on the time and size of a call.

    Args:
        host: host of the server.
        port: port of the server.
        model: name of the model on the server.
        version: version number. If `None`, the latest that the server serves.
        timeout: time limit of a call in seconds. Defaults to 10.
    """

    def __init__(self, host, port, model, version=None, timeout=10.0):
        """Builds the model's URL path; each call opens its own connection."""
        self.host, self.port, self.address = host, port, f"{host}:{port}"
        self.model, self.version, self.timeout = model, version, timeout
        self.path = "/models/" + urllib.parse.quote(model, safe="", errors="surrogateescape")
        if version is not None:
            self.path += f"/versions/{version}"

    def ask(self, path, body, read):
        """Sends a request, and returns the result of `read` on the JSON of the reply.

        Args:
            path: path of the request.
            body: JSON-serializable body of a POST request. If `None`, the request is a GET.
            read: function of the parsed reply.

        Raises:
            ServerError: if the call fails, or takes longer than the time limit.
        """
        answer = concurrent.futures.Future()
        deadline = time.monotonic() + self.timeout

        def work():
            try:
                answer.set_result(self.understand(*self.exchange(path, body, deadline), read))
            except BaseException as error:
                answer.set_exception(error)

        # A thread, because a DNS lookup has no time limit. The rest has a deadline.
        threading.Thread(target=work, daemon=True).start()
        try:
            return answer.result(self.timeout)
        except TimeoutError as error:
            raise ServerError(no_answer(self.address, self.timeout)) from error
        except http.client.HTTPException as error:  # some are OSErrors as well
            raise ServerError(no_such_server(self.address, self.KIND)) from error
        except (OSError, UnicodeError) as error:
            raise ServerError(unreachable(self.address)) from error

    def exchange(self, path, body, deadline):
        """Returns (status, reason, body) of a reply; redirects are not followed."""
        body = None if body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        is_connected = False
        try:
            connection.connect()
            is_connected = True
            connection.sock = BoundedSocket(connection.sock, deadline)
            headers = {"Content-Type": "application/json"}
            connection.request("GET" if body is None else "POST", path, body, headers)
            with connection.getresponse() as response:
                text = response.read(MAX_REPLY + 1)
                if len(text) > MAX_REPLY:
                    raise TooLong
                return response.status, response.reason, text
        except TooLong as error:
            other = no_such_server(self.address, self.KIND)
            raise ServerError(f"{other} Its reply has more than 67 MB.") from error
        except UnicodeError:  # the host's name cannot be encoded
            raise
        except ValueError as error:  # http.client: a status or length that is not a number
            raise ServerError(no_such_server(self.address, self.KIND)) from error
        except MemoryError as error:
            raise ServerError(no_memory(self.address)) from error
        except http.client.HTTPException:
            raise
        except ConnectionError as error:
            if not is_connected:
                raise
            other = no_such_server(self.address, self.KIND)
            raise ServerError(
                f"{other} It closed the connection before its reply was whole."
            ) from error
        finally:
            connection.close()

    def understand(self, status, reason, text, read):
        """Returns the result of `read` on a reply, or raises the server's error message."""
        with understood(self.address, self.KIND):
            if status == 200:
                return read(parse_json(text))
        try:
            refusal = parse_json(text)["error"]
            refusal = refusal if isinstance(refusal, str) else json.dumps(refusal)
            elsewhere = refusal.startswith(self.UNKNOWN_PATH) or (
                status in (404, 405) and refusal == reason
            )
        except (ValueError, KeyError, TypeError, RecursionError, MemoryError):
            refusal = f"HTTP {status} {reason}: {text[:200].decode(errors='replace')}"
            elsewhere = status in (404, 405)
        if elsewhere:  # the path does not exist, rather than the model
            raise ServerError(f"{no_such_server(self.address, self.KIND)} It says: {refusal[:200]}")
        raise ServerError(f"The server refuses: {refusal[:2000]}")


class TooLong(Exception):
    """Raised if a reply exceeds the size limit."""


class BoundedSocket:
    """Connected socket whose reads have a deadline and a size limit.

    `http.client` limits neither the number of headers, `100 Continue` replies and chunks, nor the
    size of a chunk whose stated size is negative.
    """

    def __init__(self, connected, deadline):
        """Wraps a connected socket; the deadline is in `time.monotonic()` seconds."""
        self.socket, self.deadline = connected, deadline

    def wait(self):
        """Sets the socket's timeout to the remaining time, or raises a TimeoutError."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.socket.settimeout(left)

    def sendall(self, data):
        """Sends data before the deadline."""
        self.wait()
        self.socket.sendall(data)

    def makefile(self, mode):
        """Returns a buffered reader with the limits; `mode` is always "rb"."""
        # The file holds the socket open, even after the socket is closed.
        return io.BufferedReader(BoundedReader(self, self.socket.makefile("rb", 0)), 1 << 16)

    def close(self):
        """Closes the socket; readers that are still open hold the connection."""
        self.socket.close()


class BoundedReader(io.RawIOBase):
    """Raw stream that enforces the limits of a `BoundedSocket`."""

    def __init__(self, bounded, file):
        """Limits the bytes of body and headers together."""
        self.bounded, self.file, self.left = bounded, file, MAX_REPLY + MAX_HEADERS

    def close(self):
        """Closes the socket's file, too."""
        self.file.close()
        super().close()

    def readable(self):
        """Returns True, which `io.BufferedReader` requires."""
        return True

    def readinto(self, buffer):
        """Reads into a buffer; raises TooLong beyond the size limit."""
        self.bounded.wait()
        count = self.file.readinto(buffer)
        self.left -= count
        if self.left < 0:
            raise TooLong
        return count


def parse_json(text):
    """Parses the JSON of a reply.

    Raises:
        ValueError: if it is not JSON, or has too many or too large values, which is checked before
            they take memory.
        RecursionError: if it is nested too deeply.
    """
    # Each value but the first follows one of these characters; those in strings count as well.
    # An escaped character takes as much memory as a value while its string is decoded.
    if sum(map(text.count, (b",", b"[", b"{", b"\\"))) > MAX_VALUES:
        raise ValueError("more values than a reply has")
    place = 0
    while len(text) - place > MAX_VALUE:
        ends = (text.rfind(mark, place, place + MAX_VALUE) for mark in (b'"', b","))
        if (end := max(ends)) < 0:
            raise ValueError("a larger value than a reply has")
        place = end + 1
    return json.loads(text.decode("utf-8"))


class RestClient(HttpClient):
    """Client of TF Serving's REST API; arguments as in `HttpClient`."""

    KIND = "TF Serving"
    UNKNOWN_PATH = ()

    def predict(self, images):
        """Returns a list of (class, score) for each encoded image, by signature serving_bytes."""
        body = {
            "signature_name": "serving_bytes",
            "instances": [{"image_bytes": encoded(image)} for image in images],
        }

        def read(reply):
            predictions = as_list(reply["predictions"], len(images))
            return checked([paired(p["classes"], p["scores"]) for p in predictions], images)

        return self.call(":predict", body, read)

    def classify(self, images):
        """Returns the same as `predict`, by TF Serving's Classify call."""
        body = {
            "signature_name": "classify",
            "examples": [{"image/encoded": encoded(image)} for image in images],
        }
        return self.call(":classify", body, lambda reply: checked(reply["results"], images))

    def metadata(self):
        """Returns inputs and outputs, with dtype and shape, of each signature."""

        def read(reply):
            signatures = reply["metadata"]["signature_def"]["signature_def"]
            return {
                as_name(name): {
                    end: {
                        as_name(key): f"{as_name(tensor['dtype'])} "
                        + dimensions(tensor["tensor_shape"].get("dim", []))
                        for key, tensor in signature[end].items()
                    }
                    for end in ("inputs", "outputs")
                }
                for name, signature in signatures.items()
                if not name.startswith("__")
            }

        return self.call("/metadata", None, read)

    def status(self):
        """Returns the state of each version on the server."""

        def read(reply):
            return {
                as_version(entry["version"]): state_of(
                    entry["state"], entry["status"]["error_message"]
                )
                for entry in as_list(reply["model_version_status"], most=MAX_VERSIONS)
            }

        return self.call("", None, read)

    def call(self, call, body, read):
        """Calls a method of the model, such as ":predict"; arguments as in `ask`."""
        return self.ask(f"/v1{self.path}{call}", body, read)


class KServeClient(HttpClient):
    """Client of KServe's protocol, version 2, for Triton and MLServer, by HTTP."""

    KIND = "server of KServe's protocol"
    UNKNOWN_PATH = "Malformed request"  # TF Serving's answer to an unknown path

    def predict(self, images):
        """Returns a list of (class, score) for each encoded image."""
        body = {
            "parameters": {"content_type": "base64"},
            "inputs": [
                {
                    "name": "image_bytes",
                    "datatype": "BYTES",
                    "shape": [len(images), 1],
                    "data": [base64.b64encode(image).decode() for image in images],
                }
            ],
            "outputs": [{"name": "classes"}, {"name": "scores"}],
        }

        def read(reply):
            outputs = as_list(reply["outputs"], most=MAX_DIMENSIONS)
            tensors = {as_name(output["name"]): output for output in outputs}
            rows = [rows_of(tensors[name], len(images)) for name in ("classes", "scores")]
            return checked([paired(*pair) for pair in zip(*rows, strict=True)], images)

        return self.ask(f"/v2{self.path}/infer", body, read)

    def classify(self, images):
        """Raises a ServerError, because the protocol has no such call."""
        raise ServerError(
            "--call=classify is TF Serving's own; KServe's protocol has --call=predict."
        )

    def metadata(self):
        """Returns inputs and outputs, with dtype and shape."""

        def read(reply):
            return {
                end: {
                    as_name(tensor["name"]): f"{as_name(tensor['datatype'])} "
                    + dimensions([{"size": size} for size in as_list(tensor["shape"])])
                    for tensor in as_list(reply[end])
                }
                for end in ("inputs", "outputs")
            }

        return self.ask(f"/v2{self.path}", None, read)

    def status(self):
        """Returns the state of each version on the server."""

        def read(reply):
            return {
                as_name(entry.get("version") or ""): state_of(entry["state"], entry.get("reason"))
                for entry in as_list(reply, most=MAX_VERSIONS)
                if entry["name"] == self.model
                and self.version in (None, as_version(entry.get("version") or -1))
            }

        states = self.ask("/v2/repository/index", {}, read)
        if not states:
            raise ServerError(f"The server at {self.address} has no such model or version.")
        return states


def rows_of(output, count):
    """Returns the `count` rows of a matrix in KServe's protocol."""
    rows, columns = (as_count(size) for size in as_list(output["shape"], 2))
    if rows != count or columns > MAX_CLASSES:
        raise ValueError("not a row for each image")
    data = as_list(output["data"], rows * columns)
    return [data[row * columns : (row + 1) * columns] for row in range(rows)]


class GrpcClient:
    """Client of TF Serving's gRPC API; arguments and results as in `RestClient`."""

    def __init__(self, host, port, model, version=None, timeout=10.0):
        """Opens a channel; raises a ServerError if gRPC is not installed."""
        try:
            import grpc
            from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc
        except ImportError as error:
            raise ServerError(
                f'gRPC needs {error.name}: pip install "keras-tnt[export]", or use --protocol=rest'
            ) from error
        self.address = f"{host}:{port}"
        self.model, self.version, self.timeout = model, version, timeout
        # Requests contain whole batches of images, so they have no limit.
        lengths = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", MAX_GRPC_REPLY),
            ("grpc.max_metadata_size", MAX_HEADERS // 64),
            # No compressed replies: their decompressed size has no limit.
            ("grpc.compression_enabled_algorithms_bitset", 1),
        ]
        channel = grpc.insecure_channel(self.address, lengths)
        self.predictions = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(channel)

    def predict(self, images):
        """Returns a list of (class, score) for each encoded image, by signature serving_bytes."""
        import tensorflow as tf
        from tensorflow_serving.apis import predict_pb2

        request = self.address_model(predict_pb2.PredictRequest(), "serving_bytes")
        request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto(images, tf.string))
        for name in ("classes", "scores"):
            request.output_filter.append(name)
        outputs = self.ask(self.predictions.Predict, request).outputs
        with understood(self.address):
            if set(outputs) < {"classes", "scores"}:
                raise ValueError("outputs are missing")
            names = tensor_rows(outputs["classes"], len(images), tf.string.as_datatype_enum)
            scores = tensor_rows(outputs["scores"], len(images), tf.float32.as_datatype_enum)
            rows = [paired(*pair) for pair in zip(names, scores, strict=True)]
            return checked([[(name.decode(), s) for name, s in row] for row in rows], images)

    def classify(self, images):
        """Returns the same as `predict`, by TF Serving's Classify call."""
        from tensorflow_serving.apis import classification_pb2

        request = self.address_model(classification_pb2.ClassificationRequest(), "classify")
        for image in images:
            example = request.input.example_list.examples.add()
            example.features.feature["image/encoded"].bytes_list.value.append(image)
        result = self.ask(self.predictions.Classify, request).result
        with understood(self.address):
            if len(result.classifications) != len(images):
                raise ValueError("not a row for each image")
            rows = [[(c.label, c.score) for c in row.classes] for row in result.classifications]
            return checked(rows, images)

    def metadata(self):
        """Returns inputs and outputs, with dtype and shape, of each signature."""
        from tensorflow.core.framework import types_pb2
        from tensorflow_serving.apis import get_model_metadata_pb2

        request = self.address_model(get_model_metadata_pb2.GetModelMetadataRequest())
        request.metadata_field.append("signature_def")
        answer = self.ask(self.predictions.GetModelMetadata, request)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        with understood(self.address):
            if not answer.metadata["signature_def"].Unpack(signatures):
                raise ValueError("no signatures")
            return {
                as_name(name): {
                    end: {
                        as_name(key): f"{types_pb2.DataType.Name(tensor.dtype)} "
                        + dimensions([{"size": d.size} for d in tensor.tensor_shape.dim])
                        for key, tensor in getattr(signature, end).items()
                    }
                    for end in ("inputs", "outputs")
                }
                for name, signature in signatures.signature_def.items()
                if not name.startswith("__")
            }

    def status(self):
        """Returns the state of each version on the server."""
        from tensorflow_serving.apis import get_model_status_pb2

        request = self.address_model(get_model_status_pb2.GetModelStatusRequest())
        answer = self.ask(self.models.GetModelStatus, request)
        state = get_model_status_pb2.ModelVersionStatus.State
        with understood(self.address):
            if len(answer.model_version_status) > MAX_VERSIONS:
                raise ValueError("more versions than a server has")
            return {
                entry.version: state_of(state.Name(entry.state), entry.status.error_message)
                for entry in answer.model_version_status
            }

    def address_model(self, request, signature=None):
        """Sets model, version and signature of a request, and returns it."""
        request.model_spec.name = self.model
        if self.version is not None:
            request.model_spec.version.value = self.version
        if signature:
            request.model_spec.signature_name = signature
        return request

    def ask(self, call, request):
        """Calls a method of a stub, and converts its errors to ServerErrors."""
        import grpc

        try:
            return call(request, timeout=self.timeout)
        except grpc.RpcError as error:
            said = error.details() or ""
            other = "Failed parsing HTTP/2" in said or "http1" in said
            if other or error.code() == grpc.StatusCode.UNIMPLEMENTED:
                raise ServerError(no_such_server(self.address)) from error
            if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in said:
                other = no_such_server(self.address)
                raise ServerError(f"{other} Its reply has more than 17 MB.") from error
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                raise ServerError(unreachable(self.address)) from error
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise ServerError(no_answer(self.address, self.timeout)) from error
            raise ServerError(f"The server refuses: {said[:2000]}") from error
        except MemoryError as error:
            raise ServerError(no_memory(self.address)) from error


CLIENTS = {"rest": RestClient, "grpc": GrpcClient, "kserve": KServeClient}


def encoded(image):
    """Returns the JSON form of an encoded image in TF Serving's REST API."""
    return {"b64": base64.b64encode(image).decode()}


def tensor_rows(tensor, count, dtype):
    """Returns the `count` rows of a matrix in a `TensorProto`.

    `tf.make_ndarray` is not used, because it repeats the last value until the shape is full.

    Args:
        tensor: a `TensorProto`.
        count: number of rows.
        dtype: required dtype as a protobuf enum, string or float32.
    """
    if tensor.dtype != dtype or len(tensor.tensor_shape.dim) != 2:
        raise ValueError("not a matrix of the right dtype")
    rows, columns = (as_count(d.size) for d in tensor.tensor_shape.dim)
    if rows != count or columns > MAX_CLASSES:
        raise ValueError("not a row for each image")
    values = tensor.string_val or tensor.float_val
    if tensor.tensor_content:
        values = memoryview(tensor.tensor_content).cast("f")
    if len(values) != rows * columns:
        raise ValueError("not the values of its shape")
    return [list(values[row * columns : (row + 1) * columns]) for row in range(rows)]


def dimensions(sizes):
    """Returns a shape in words; the size -1 is "batch"."""
    sizes = [int(d["size"]) for d in as_list(sizes, most=MAX_DIMENSIONS)]
    if not all(-1 <= size < 2**63 for size in sizes):
        raise ValueError("not the sizes of a shape")
    return "(" + ", ".join("batch" if size == -1 else str(size) for size in sizes) + ")"


# === The values of a reply ===


def as_list(value, count=None, most=None):
    """Returns a value that must be a list of `count`, or at most `most`, values."""
    if not isinstance(value, list) or count not in (None, len(value)):
        raise ValueError("not a list of that length")
    if most is not None and len(value) > most:
        raise ValueError("more values than there can be")
    return value


def as_count(value):
    """Returns a value that must be an integer from 0 to `MAX_VALUES`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_VALUES:
        raise ValueError("not a size")
    return value


def as_name(value):
    """Returns a value that must be a string of at most `MAX_NAME` characters."""
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise ValueError("not a name")
    return value


def as_version(value):
    """Returns the integer of a value that must be a number or a short string."""
    if isinstance(value, bool) or not isinstance(value, int | str) or len(str(value)) > 20:
        raise ValueError("not a version")
    return int(value)


def state_of(state, message):
    """Returns the state of a version in words."""
    return as_name(state) + (f": {as_name(message)[:2000]}" if message else "")


def paired(names, scores):
    """Returns a list of (name, score)."""
    return list(zip(as_list(names, most=MAX_CLASSES), as_list(scores), strict=True))


@contextlib.contextmanager
def understood(address, kind="TF Serving"):
    """Converts any error from a malformed reply within the block to one ServerError."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ServerError(no_such_server(address, kind)) from error
    except MemoryError as error:
        raise ServerError(no_memory(address)) from error
    except Exception as error:
        if type(error).__name__ != "DecodeError":  # protobuf's, which only gRPC imports
            raise
        raise ServerError(no_such_server(address, kind)) from error


def checked(rows, images):
    """Returns a list of (class, score) for each image, after type checks."""
    rows = [
        [(as_name(name), as_score(score)) for name, score in as_list(row, most=MAX_CLASSES)]
        for row in as_list(rows, len(images))
    ]
    return rows


def as_score(value):
    """Returns the float of a value that must be a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a score")
    return float(value)


def finite(value):
    """Returns a value with `None` for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(text):
    """Returns text on one line, with terminal control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def unreachable(address):
    """Returns the message for a server that cannot be reached."""
    return f"No server can be reached at {address}. Is it running, and are host and port right?"


def no_such_server(address, kind="TF Serving"):
    """Returns the message for a reply that does not follow the protocol."""
    return (
        f"What answers at {address} is no {kind}, or answers as none does. --protocol=rest or grpc "
        "asks TF Serving, kserve Triton or MLServer."
    )


def no_memory(address):
    """Returns the message for a reply that does not fit into memory."""
    return f"There is no memory for the reply of {address}."


def no_answer(address, timeout):
    """Returns the message for a call that exceeds the time limit."""
    return f"No answer from {address} within {timeout:g} s. A longer --timeout may help."


# === The command ===


def main(arguments=None):
    """Runs the command, and prints its results."""
    options = parse(arguments)
    if options.model in ("", ".", "..") or not options.model.isprintable():
        raise ServerError(f"--model: {options.model!r} is no name of a model.")
    if not re.fullmatch(r"[\w.:-]+", options.host):
        raise ServerError(f"--host: {options.host!r} is no name of a host.")
    client = CLIENTS[options.protocol](
        options.host,
        options.port or PORTS[options.protocol],
        options.model,
        options.version,
        options.timeout,
    )
    if options.call in ("metadata", "status"):
        print(json.dumps(getattr(client, options.call)(), indent=2))
        return
    images = read_images(options.images)
    call = getattr(client, options.call)
    if options.benchmark:
        batch = [images[i % len(images)] for i in range(options.batch)]
        found = [benchmark(call, batch, options.benchmark, n) for n in options.concurrency]
        if options.plot:
            plot(found, options.plot)
        print(json.dumps(found if len(found) > 1 else found[0], indent=2))
        return
    results = {}
    for start in range(0, len(images), options.batch):
        paths = options.images[start : start + options.batch]
        try:
            answer = call(images[start : start + options.batch])
        except ServerError as error:
            raise ServerError(f"{error} The batch, from 0: {', '.join(paths)}") from error
        results.update(zip(paths, answer, strict=True))
    if options.json:
        print(json.dumps(finite(results), indent=2, allow_nan=False))
        return
    for path, classes in results.items():
        print(printable(path))
        for name, score in classes:
            print(f"  {score:7.2%}  {printable(name)}")


def parse(arguments):
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="*", help="image files")
    parser.add_argument("--model", help="the name that the server knows it by; required")
    parser.add_argument("--version", type=int, help="default: the latest")
    parser.add_argument("--call", choices=("predict", "classify", "metadata", "status"))
    parser.add_argument("--protocol", choices=tuple(CLIENTS), default="rest")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, help=f"default: {PORTS}")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds a call; default: 10")
    parser.add_argument("--batch", type=int, default=8, help="images a call; default: 8")
    parser.add_argument(
        "--json", action="store_true", help="print JSON; scores of NaN and infinity are null"
    )
    parser.add_argument(
        "--benchmark", type=int, metavar="CALLS", help="time so many calls of full batches"
    )
    parser.add_argument(
        "--concurrency",
        type=lambda numbers: [int(number) for number in numbers.split(",")],
        default=[1],
        help="calls at a time, in a benchmark; several are measured in turn: 1,2,4; default: 1",
    )
    parser.add_argument("--plot", metavar="PNG", help="write a benchmark as a picture as well")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        refuse(parser, unknown[0])
    if options.model is None:
        parser.error("the following arguments are required: --model")
    options.call = options.call or "predict"
    if options.call in ("predict", "classify") and not options.images:
        parser.error(f"--call={options.call} needs image files")
    for name in ("batch", "concurrency", "timeout"):
        given = getattr(options, name)
        if not all(0 < n < math.inf for n in (given if isinstance(given, list) else [given])):
            parser.error(f"--{name} must be positive")
    if options.plot and not options.benchmark:
        parser.error("--plot goes with --benchmark")
    if options.timeout > threading.TIMEOUT_MAX:
        parser.error(f"--timeout must be at most {threading.TIMEOUT_MAX:.0f}")
    if options.port is not None and not 0 < options.port < 2**16:
        parser.error("--port must lie in 1 to 65535")
    if options.version is not None and not 0 <= options.version < 2**63:
        parser.error("--version must not be negative")
    if options.benchmark is not None and options.benchmark < 1:
        parser.error("--benchmark must be positive")
    return options


def refuse(parser, word):
    """Exits with an error that suggests the options closest to an unknown one."""
    if not word.startswith("-"):
        parser.error(f"unrecognized arguments: {printable(word)}; name all images together")
    option = word.partition("=")[0]
    wanted = option.strip("-").lower().replace("-", "_")
    names = [
        name.removeprefix("--")
        for action in parser._actions
        for name in action.option_strings
        if name.startswith("--")
    ]
    found = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    if found:
        advice = f"Did you mean {' or '.join('--' + name for name in found)}?"
    else:
        advice = f"`{parser.prog} --help` lists the options."
    parser.error(f"There is no option {printable(option)}. {advice}")


def read_images(paths):
    """Returns the contents of image files."""
    missing = [path for path in paths if not os.path.exists(os.path.expanduser(path))]
    if missing:
        raise ServerError(f"There is no file {', '.join(missing)}.")
    return [read_image(path) for path in paths]


def read_image(path):
    """Returns the content of a regular file; FIFOs and devices are refused without blocking."""
    found = os.path.expanduser(path)
    if not stat.S_ISREG(os.stat(found).st_mode):
        raise ServerError(f"{path} is no file: images have to be regular files.")
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(found, flags), "rb") as file:
        data = file.read(MAX_IMAGE + 1)
    if len(data) > MAX_IMAGE:
        raise ServerError(f"{path} has more than {MAX_IMAGE // 10**6} MB.")
    return data


def benchmark(call, batch, calls, concurrency):
    """Measures throughput and latency of calls.

    Args:
        call: function of a batch.
        batch: list of encoded images.
        calls: number of calls.
        concurrency: number of threads that call.

    Returns:
        A dict with images per second, and percentiles of the latency in milliseconds.
    """

    def timed(_):
        start = time.perf_counter()
        call(batch)
        return time.perf_counter() - start

    timed(None)  # warm-up
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(concurrency) as pool:
        latencies = sorted(pool.map(timed, range(calls)))
    elapsed = time.perf_counter() - start
    at = {p: latencies[min(calls - 1, calls * p // 100)] for p in (50, 90, 99)}
    return {
        "calls": calls,
        "batch": len(batch),
        "concurrency": concurrency,
        "images_per_second": round(calls * len(batch) / elapsed, 1),
        "latency_ms": {f"p{p}": round(1000 * seconds, 1) for p, seconds in at.items()},
    }


def plot(measured, path):
    """Plots throughput and latency by concurrency.

    Args:
        measured: list of dicts returned by `benchmark`, one for each concurrency.
        path: path of a PNG file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ServerError('--plot needs matplotlib: pip install "keras-tnt[plots]"') from error
    calls = [row["concurrency"] for row in measured]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    throughput, latency = figure.subplots(1, 2)
    throughput.plot(calls, [row["images_per_second"] for row in measured], "o-")
    throughput.set(ylabel="images/s", ylim=(0, None))
    for percentile in ("p99", "p90", "p50"):
        values = [row["latency_ms"][percentile] for row in measured]
        latency.plot(calls, values, "o-", label=percentile)
    latency.set(ylabel="milliseconds a call", ylim=(0, None))
    latency.legend(frameon=False)
    for axes in (throughput, latency):
        axes.set(xlabel="calls at a time", xscale="log", xticks=calls, xticklabels=calls)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Batches of {measured[0]['batch']}")
    figure.savefig(os.path.expanduser(path), dpi=120)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # escapes characters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ServerError, OSError) as error:
        sys.exit(printable(f"client.py: {error}"))
