"""A process of a tf.data service, which makes training images on machines without accelerators.

    python training/cluster/data_service.py --port=5050
    python training/cluster/data_service.py --port=5051 --dispatcher=host:5050 --host=here

The first is the dispatcher, the second one of its workers. The trainer is told the dispatcher by
--data_service=grpc://host:5050. Workers read the data at the path that the trainer has for it.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True, help="to listen on; 0: any")
    parser.add_argument("--dispatcher", help="host:port of the dispatcher; without: be it")
    parser.add_argument("--host", default="localhost", help="where a worker can be reached")
    server = start(**vars(parser.parse_args(arguments)))
    server.join()


def start(port, dispatcher=None, host="localhost"):
    """A server of the service, listening.

    Args:
        port: to listen on; 0: any.
        dispatcher: host:port of the dispatcher, of which to be a worker; None: be the dispatcher.
        host: name or address by which the trainer reaches a worker.

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
