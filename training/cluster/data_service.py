"""Starts a server of a tf.data service, which prepares training images on machines without GPUs.

    python training/cluster/data_service.py --port=5050
    python training/cluster/data_service.py --port=5051 --dispatcher=host:5050 --host=here

The first is the dispatcher, the second one of its workers. The trainer connects to the dispatcher
with --data_service=grpc://host:5050. Workers read the data at the same path as the trainer.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def main(arguments=None):
    """Starts a server and serves until it is stopped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True, help="to listen on; 0: any")
    parser.add_argument("--dispatcher", help="host:port of the dispatcher; without: be it")
    parser.add_argument("--host", default="localhost", help="where a worker can be reached")
    server = start(**vars(parser.parse_args(arguments)))
    server.join()


def start(port, dispatcher=None, host="localhost"):
    """Starts a dispatcher or a worker.

    Args:
        port: Port to listen on; 0 for any free port.
        dispatcher: host:port of a worker's dispatcher. If `None`, a dispatcher is started.
        host: Name or address under which the trainer reaches a worker. Defaults to "localhost".

    Returns:
        A `tf.data.experimental.service.DispatchServer` or `WorkerServer`.
    """
    from tensorflow.data.experimental import service

    if dispatcher is None:
        server = service.DispatchServer(service.DispatcherConfig(port=port))
        print(f"dispatcher at {server.target}", flush=True)
        return server
    address = f"{host}:{port or '%port%'}"
    print(f"worker of {dispatcher} at {address}", flush=True)
    return service.WorkerServer(
        service.WorkerConfig(dispatcher_address=dispatcher, worker_address=address, port=port)
    )


if __name__ == "__main__":
    main()
