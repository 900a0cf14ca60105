"""Ask a server about images: TF Serving by REST or gRPC, Triton and MLServer by KServe's protocol.

python savedmodels/client.py cat.jpg dog.png --model=tnt_small
python savedmodels/client.py --call=status --model=tnt_small --protocol=grpc
python savedmodels/client.py cat.jpg --model=tnt_small_bytes --protocol=kserve --port=8000
"""

import argparse
import base64
import concurrent.futures
import contextlib
import http.client
import json
import math
import os
import re
import sys
import threading
import time
import urllib.parse

PORTS = {"rest": 8501, "grpc": 8500, "kserve": 8000}
MAX_REPLY = 2**26  # bytes


class ServerError(Exception):
    """The server cannot be reached, or refuses; the message says which and what to do."""


class HttpClient:
    """Calls by HTTP and JSON, which end in time.

    Args:
        host, port: where the server listens.
        model: the name that the server knows the model by.
        version: integer; None: the latest that the server serves.
        timeout: seconds that a call may take.
    """

    def __init__(self, host, port, model, version=None, timeout=10.0):
        self.host, self.port, self.address = host, port, f"{host}:{port}"
        self.model, self.version, self.timeout = model, version, timeout
        self.path = "/models/" + urllib.parse.quote(model, safe="", errors="surrogateescape")
        if version is not None:
            self.path += f"/versions/{version}"

    def understood(self):
        return understood(self.address, self.KIND)

    def ask(self, path, body=None):
        """The JSON that the server answers with, within the time that a call may take."""
        answer = concurrent.futures.Future()

        def exchange():
            try:
                answer.set_result(self.exchange(path, body))
            except BaseException as error:
                answer.set_exception(error)

        # A thread that is left to itself when time is up: whatever a server drips, and however long
        # its name is looked for. The timeout of a socket begins anew with each byte.
        threading.Thread(target=exchange, daemon=True).start()
        try:
            status, reason, text = answer.result(self.timeout)
        except TimeoutError as error:
            raise ServerError(no_answer(self.address, self.timeout)) from error
        except http.client.HTTPException as error:  # some are OSErrors, too
            raise ServerError(no_such_server(self.address, self.KIND)) from error
        except (OSError, UnicodeError) as error:
            raise ServerError(unreachable(self.address)) from error
        if len(text) > MAX_REPLY:
            other = no_such_server(self.address, self.KIND)
            raise ServerError(f"{other} Its reply has more than 67 MB.")
        if status == 200:
            return json.loads(text)
        try:
            refusal = str(json.loads(text)["error"])
            elsewhere = refusal.startswith(self.UNKNOWN_PATH) or (
                status in (404, 405) and refusal == reason
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            refusal = f"HTTP {status} {reason}: {text[:200].decode(errors='replace')}"
            elsewhere = status in (404, 405)
        if elsewhere:  # there is no such path, and not merely no such model
            raise ServerError(f"{no_such_server(self.address, self.KIND)} It says: {refusal[:200]}")
        raise ServerError(f"The server refuses: {refusal[:2000]}")

    def exchange(self, path, body):
        """(status, reason, the first bytes) of a reply; redirections are not followed."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        try:
            connection.request(
                "GET" if body is None else "POST",
                path,
                None if body is None else json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with connection.getresponse() as response:
                return response.status, response.reason, response.read(MAX_REPLY + 1)
        finally:
            connection.close()


class RestClient(HttpClient):
    """Calls of TF Serving's REST interface; arguments as those of `HttpClient`."""

    KIND = "TF Serving"
    UNKNOWN_PATH = ()

    def predict(self, images):
        """A list of (class, score) for each encoded image, from signature serving_bytes."""
        body = {
            "signature_name": "serving_bytes",
            "instances": [{"image_bytes": encoded(image)} for image in images],
        }
        with self.understood():
            predictions = self.call(":predict", body)["predictions"]
            rows = [list(zip(p["classes"], p["scores"], strict=True)) for p in predictions]
            return checked(rows, images)

    def classify(self, images):
        """The same from TF Serving's Classify call."""
        body = {
            "signature_name": "classify",
            "examples": [{"image/encoded": encoded(image)} for image in images],
        }
        with self.understood():
            return checked(self.call(":classify", body)["results"], images)

    def metadata(self):
        """Inputs and outputs, with dtype and shape, of each signature."""
        with self.understood():
            signatures = self.call("/metadata")["metadata"]["signature_def"]["signature_def"]
            return {
                name: {
                    end: {
                        key: f"{tensor['dtype']} "
                        + dimensions(tensor["tensor_shape"].get("dim", []))
                        for key, tensor in signature[end].items()
                    }
                    for end in ("inputs", "outputs")
                }
                for name, signature in signatures.items()
                if not name.startswith("__")
            }

    def status(self):
        """The state of each version that the server has."""
        with self.understood():
            return {
                int(entry["version"]): entry["state"]
                + (f": {message}" if (message := entry["status"]["error_message"]) else "")
                for entry in self.call("")["model_version_status"]
            }

    def call(self, call, body=None):
        return self.ask(f"/v1{self.path}{call}", body)


class KServeClient(HttpClient):
    """Calls of KServe's protocol, version 2, as Triton and MLServer speak it, by HTTP."""

    KIND = "server of KServe's protocol"
    UNKNOWN_PATH = "Malformed request"  # TF Serving

    def predict(self, images):
        """A list of (class, score) for each encoded image."""
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
        with self.understood():
            outputs = self.ask(f"/v2{self.path}/infer", body)["outputs"]
            tensors = {output["name"]: rows_of(output) for output in outputs}
            pairs = zip(tensors["classes"], tensors["scores"], strict=True)
            return checked([list(zip(*pair, strict=True)) for pair in pairs], images)

    def classify(self, images):
        raise ServerError(
            "--call=classify is TF Serving's own; KServe's protocol has --call=predict."
        )

    def metadata(self):
        """Inputs and outputs, with dtype and shape."""
        with self.understood():
            found = self.ask(f"/v2{self.path}")
            return {
                end: {
                    tensor["name"]: f"{tensor['datatype']} "
                    + dimensions([{"size": size} for size in tensor["shape"]])
                    for tensor in found[end]
                }
                for end in ("inputs", "outputs")
            }

    def status(self):
        """The state of each version that the server has."""
        with self.understood():
            found = self.ask("/v2/repository/index", {})
            if not isinstance(found, list):
                raise ValueError("no list of versions")
            states = {
                entry.get("version") or "": entry["state"]
                + (f": {reason}" if (reason := entry.get("reason")) else "")
                for entry in found
                if entry["name"] == self.model
                and self.version in (None, int(entry.get("version") or -1))
            }
        if not states:
            raise ServerError(f"The server at {self.address} has no such model or version.")
        return states


def rows_of(output):
    """The rows of a tensor of two axes in KServe's protocol."""
    rows, columns = output["shape"]
    data = output["data"]
    if not isinstance(data, list) or len(data) != rows * columns:
        raise ValueError("not the shape that it tells")
    return [data[row * columns : (row + 1) * columns] for row in range(rows)]


class GrpcClient:
    """Calls of TF Serving's gRPC interface; arguments and results as those of `RestClient`."""

    def __init__(self, host, port, model, version=None, timeout=10.0):
        try:
            import grpc
            from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc
        except ImportError as error:
            raise ServerError(
                f'gRPC needs {error.name}: pip install "keras-tnt[export]", or use --protocol=rest'
            ) from error
        self.address = f"{host}:{port}"
        self.model, self.version, self.timeout = model, version, timeout
        # Messages hold whole batches of images.
        lengths = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", MAX_REPLY),
        ]
        channel = grpc.insecure_channel(self.address, lengths)
        self.predictions = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(channel)

    def predict(self, images):
        import tensorflow as tf
        from tensorflow_serving.apis import predict_pb2

        request = self.address_model(predict_pb2.PredictRequest(), "serving_bytes")
        request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto(images, tf.string))
        for name in ("classes", "scores"):
            request.output_filter.append(name)
        outputs = self.ask(self.predictions.Predict, request).outputs
        with understood(self.address):
            names, scores = (tf.make_ndarray(outputs[name]) for name in ("classes", "scores"))
            rows = [
                [(name.decode(), float(score)) for name, score in zip(*row, strict=True)]
                for row in zip(names, scores, strict=True)
            ]
            return checked(rows, images)

    def classify(self, images):
        from tensorflow_serving.apis import classification_pb2

        request = self.address_model(classification_pb2.ClassificationRequest(), "classify")
        for image in images:
            example = request.input.example_list.examples.add()
            example.features.feature["image/encoded"].bytes_list.value.append(image)
        result = self.ask(self.predictions.Classify, request).result
        with understood(self.address):
            rows = [[(c.label, c.score) for c in row.classes] for row in result.classifications]
            return checked(rows, images)

    def metadata(self):
        from tensorflow.core.framework import types_pb2
        from tensorflow_serving.apis import get_model_metadata_pb2

        request = self.address_model(get_model_metadata_pb2.GetModelMetadataRequest())
        request.metadata_field.append("signature_def")
        answer = self.ask(self.predictions.GetModelMetadata, request)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        with understood(self.address):
            answer.metadata["signature_def"].Unpack(signatures)
        return {
            name: {
                end: {
                    key: f"{types_pb2.DataType.Name(tensor.dtype)} "
                    + dimensions([{"size": d.size} for d in tensor.tensor_shape.dim])
                    for key, tensor in getattr(signature, end).items()
                }
                for end in ("inputs", "outputs")
            }
            for name, signature in signatures.signature_def.items()
            if not name.startswith("__")
        }

    def status(self):
        from tensorflow_serving.apis import get_model_status_pb2

        request = self.address_model(get_model_status_pb2.GetModelStatusRequest())
        answer = self.ask(self.models.GetModelStatus, request)
        state = get_model_status_pb2.ModelVersionStatus.State
        return {
            entry.version: state.Name(entry.state)
            + (f": {entry.status.error_message}" if entry.status.error_message else "")
            for entry in answer.model_version_status
        }

    def address_model(self, request, signature=None):
        request.model_spec.name = self.model
        if self.version is not None:
            request.model_spec.version.value = self.version
        if signature:
            request.model_spec.signature_name = signature
        return request

    def ask(self, call, request):
        import grpc

        try:
            return call(request, timeout=self.timeout)
        except grpc.RpcError as error:
            said = error.details() or ""
            other = "Failed parsing HTTP/2" in said or "http1" in said
            if other or error.code() == grpc.StatusCode.UNIMPLEMENTED:
                raise ServerError(no_such_server(self.address)) from error
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                raise ServerError(unreachable(self.address)) from error
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise ServerError(no_answer(self.address, self.timeout)) from error
            raise ServerError(f"The server refuses: {error.details()}") from error


CLIENTS = {"rest": RestClient, "grpc": GrpcClient, "kserve": KServeClient}


def encoded(image):
    return {"b64": base64.b64encode(image).decode()}


def dimensions(sizes):
    return "(" + ", ".join("batch" if int(d["size"]) == -1 else str(d["size"]) for d in sizes) + ")"


@contextlib.contextmanager
def understood(address, kind="TF Serving"):
    """A reply of another shape than the protocol's is one error, wherever it is noticed."""
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


def checked(rows, images):
    """A row of (class, score) for each image."""
    rows = [[(name, float(score)) for name, score in row] for row in rows]
    if len(rows) != len(images) or not all(
        isinstance(name, str) for row in rows for name, _ in row
    ):
        raise ValueError("not a class and a score for each image")
    return rows


def printable(text):
    """Text in one line, without anything that a terminal obeys."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def unreachable(address):
    return f"No server can be reached at {address}. Is it running, and are host and port right?"


def no_such_server(address, kind="TF Serving"):
    return (
        f"What answers at {address} is no {kind}, or answers as none does. --protocol=rest or grpc "
        "asks TF Serving, kserve Triton or MLServer."
    )


def no_answer(address, timeout):
    return f"No answer from {address} within {timeout:g} s. A longer --timeout may help."


# === The command ===


def main(arguments=None):
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
        print(json.dumps(results, indent=2))
        return
    for path, classes in results.items():
        print(printable(path))
        for name, score in classes:
            print(f"  {score:7.2%}  {printable(name)}")


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="*", help="image files")
    parser.add_argument("--model", required=True, help="the name that the server knows it by")
    parser.add_argument("--version", type=int, help="default: the latest")
    parser.add_argument("--call", choices=("predict", "classify", "metadata", "status"))
    parser.add_argument("--protocol", choices=tuple(CLIENTS), default="rest")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, help=f"default: {PORTS}")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds a call; default: 10")
    parser.add_argument("--batch", type=int, default=8, help="images a call; default: 8")
    parser.add_argument("--json", action="store_true", help="print JSON")
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
    options = parser.parse_args(arguments)
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


def read_images(paths):
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise ServerError(f"There is no file {', '.join(missing)}.")
    images = []
    for path in paths:
        with open(path, "rb") as file:
            images.append(file.read())
    return images


def benchmark(call, batch, calls, concurrency):
    """Time calls.

    Returns:
        A dict: images per second over all, and percentiles of a call's latency in milliseconds.
    """

    def timed(_):
        start = time.perf_counter()
        call(batch)
        return time.perf_counter() - start

    timed(None)  # connects
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
    """Write throughput and latency by concurrency as a picture.

    Args:
        measured: what `benchmark` returned, for each concurrency.
        path: of a PNG file.
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
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    try:
        main()
    except (ServerError, OSError) as error:
        sys.exit(printable(f"client.py: {error}"))
