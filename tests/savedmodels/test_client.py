"""The serving client, against a fake TF Serving and against malformed responses."""

import contextlib
import gzip
import json
import os
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow_serving")

import keras_tnt
from keras_tnt.export.verification import draw_picture
from tests.helpers.serving_client import client
from tests.helpers.serving_double import Double

pytestmark = pytest.mark.one_backend
ROOT = Path(__file__).parent.parent.parent
LABELS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    model = keras_tnt.TNT(
        input_shape=(32, 32, 3), classes=7, outer_dim=16, inner_dim=8, depth=1, outer_heads=2,
        inner_heads=2,
    )  # fmt: skip
    keras_tnt.export.saved_model(model, folder / "tiny", labels=LABELS)
    with Double({"tiny": folder / "tiny"}) as double:
        yield model, double


@pytest.fixture
def images(tmp_path):
    paths = []
    for seed in range(3):
        paths.append(tmp_path / f"{seed}.img")
        paths[-1].write_bytes(draw_picture(seed))
    return paths


def run(capsys, *arguments):
    client.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


@pytest.fixture(params=["rest", "grpc"])
def reach(request, served):
    """Returns the client's options for the fake server."""
    return [
        "--model=tiny",
        f"--protocol={request.param}",
        f"--port={getattr(served[1], request.param)}",
        "--timeout=60",  # the first call initializes the graph's kernels
    ]


@pytest.mark.parametrize("call", ["predict", "classify"])
def test_predictions_match_keras(call, reach, served, images, capsys):
    answer = json.loads(run(capsys, *images, *reach, f"--call={call}", "--batch=2", "--json"))
    expected = served[0].predict_on_batch(keras_tnt.load_images(images, served[0]))
    assert list(answer) == list(map(str, images))
    for row, probabilities in zip(answer.values(), expected, strict=True):
        order = np.argsort(-probabilities)[:5]
        assert [name for name, _ in row] == [LABELS[i] for i in order]
        np.testing.assert_allclose([s for _, s in row], probabilities[order], atol=2e-3)


def test_output_has_class_names(reach, images, capsys):
    lines = run(capsys, images[0], *reach).splitlines()
    assert lines[0] == str(images[0])
    assert len(lines) == 6
    assert lines[1].split()[1] in LABELS


def test_metadata_and_status(reach, capsys):
    metadata = json.loads(run(capsys, *reach, "--call=metadata"))
    assert metadata["serving_default"] == {
        "inputs": {"images": "DT_FLOAT (batch, 32, 32, 3)"},
        "outputs": {"logits": "DT_FLOAT (batch, 7)", "probabilities": "DT_FLOAT (batch, 7)"},
    }
    assert metadata["classify"]["inputs"] == {"inputs": "DT_STRING (batch)"}
    assert set(metadata) == {"serving_default", "serving_bytes", "classify", "features"}
    assert json.loads(run(capsys, *reach, "--call=status")) == {"1": "AVAILABLE"}


def test_benchmark_reports_throughput_and_percentiles(reach, images, capsys):
    arguments = ["--benchmark=6", "--batch=4", "--concurrency=2"]
    told = json.loads(run(capsys, images[0], *reach, *arguments))
    assert (told["calls"], told["batch"], told["concurrency"]) == (6, 4, 2)
    assert told["images_per_second"] > 0
    latency = told["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]


def test_broken_image_error_names_its_index_and_the_files(reach, images, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(images[0].read_bytes()[:100])
    with pytest.raises(client.ServerError, match=r"\[1\](.|\n)*from 0: .*0.img, .*broken.jpg"):
        client.main([str(images[0]), str(broken), *reach])


def test_unknown_model_or_version_is_an_error(reach, images):
    with pytest.raises(client.ServerError, match="refuses: Servable not found for request: no"):
        client.main([str(images[0]), "--model=no", *reach[1:]])
    with pytest.raises(client.ServerError, match="refuses: Servable not found"):
        client.main([str(images[0]), *reach, "--version=7"])


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_unreachable_server_error_has_the_address(protocol, images):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with pytest.raises(client.ServerError, match=f"No server can be reached at localhost:{port}"):
        client.main([str(images[0]), "--model=x", f"--protocol={protocol}", f"--port={port}"])


def test_missing_file_is_an_error_before_any_call():
    with pytest.raises(client.ServerError, match="There is no file nowhere.jpg"):
        client.main(["nowhere.jpg", "--model=x"])


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_slow_server_times_out(protocol, served, images):
    double = served[1]
    models = double.http.RequestHandlerClass.models
    models.delay = 5.0
    try:
        with pytest.raises(client.ServerError, match="No answer from .* within 0.3 s"):
            client.main(
                [
                    str(images[0]),
                    "--model=tiny",
                    f"--protocol={protocol}",
                    f"--port={getattr(double, protocol)}",
                    "--timeout=0.3",
                ]
            )
    finally:
        models.delay = 0.0


# === Malformed responses ===


def http_reply(body, status="200 OK", headers=""):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def forever(first, again, pause=0.0):
    def parts():
        yield first
        while True:
            time.sleep(pause)
            yield again

    return parts


@contextlib.contextmanager
def server_that_says(parts):
    """Yields the port of a server that answers with bytes, or with those a function yields."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1 << 16)
            with contextlib.suppress(OSError):
                try:
                    for part in parts() if callable(parts) else [parts]:
                        self.request.sendall(part)
                except ConnectionResetError:  # reset the client's connection too
                    linger = struct.pack("ii", 1, 0)
                    self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.request.close()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def tensors(classes=("ant",), scores=(0.5,), shape=(1, 1)):
    found = [("classes", classes), ("scores", scores)]
    return {"outputs": [{"name": n, "shape": shape, "data": data} for n, data in found]}


def row(classes=("ant",), scores=(0.5,)):
    return http_reply({"predictions": [{"classes": classes, "scores": scores}]})


OK = b"HTTP/1.1 200 OK\r\n"
LIES = {
    "nothing": (b"", "no TF Serving"),
    "not HTTP": (b"220 mail.example.com ESMTP\r\n", "no TF Serving"),
    "not JSON": (http_reply(b"<html>"), "no TF Serving"),
    "not text": (http_reply(b"\xff\xfe\x00"), "no TF Serving"),
    "a list": (http_reply([]), "no TF Serving"),
    "deep": (http_reply(b"[" * 100_000), "no TF Serving"),
    "a large number": (http_reply(b"1" * 5000), "no TF Serving"),
    "no images": (http_reply({"predictions": []}), "no TF Serving"),
    "too many images": (http_reply({"predictions": [{"classes": [], "scores": []}] * 2}), "no TF"),
    "strings for lists": (http_reply({"predictions": "ab"}), "no TF Serving"),
    "scores that are missing": (row(("ant", "bee")), "no TF Serving"),
    "scores that are words": (row(scores=("high",)), "no TF Serving"),
    "scores that are too large": (row(scores=(10**400,)), "no TF Serving"),
    "classes that are numbers": (row(classes=(1,)), "no TF Serving"),
    "truncated": (http_reply({"predictions": []})[:-4], "no TF Serving"),
    "truncated headers": (OK + b"Content-Le", "no TF Serving"),
    "headers without end": (forever(OK, b"a: b\r\n"), "no TF Serving"),
    "a header without end": (forever(OK, b"a" * 1000), "no TF Serving"),
    "a body without end": (forever(OK + b"\r\n", bytes(1 << 20)), "more than 67 MB|No answer"),
    "a dripping status": (forever(b"H", b"T", 0.05), "No answer .* within 1 s|no TF Serving"),
    "dripping headers": (forever(OK, b"a", 0.05), "No answer .* within 1 s"),
    "a dripping body": (forever(OK + b"\r\n", b" ", 0.05), "No answer .* within 1 s"),
    "to be continued": (forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01), "No answer"),
    "an error of another shape": (http_reply([1], "500 No"), r"refuses: HTTP 500 No: \[1\]"),
    "an error that is no text": (http_reply({"error": [1]}, "400 No"), r"refuses: \[1\]"),
}


@pytest.mark.parametrize("lie", LIES)
def test_malformed_rest_response_is_one_error(lie, images):
    parts, message = LIES[lie]
    with server_that_says(parts) as port:
        with pytest.raises(client.ServerError, match=message) as caught:
            client.main(
                [str(images[0]), "--model=x", "--host=127.0.0.1", f"--port={port}", "--timeout=1"]
            )
    assert "\n" not in str(caught.value)


KSERVE_LIES = {
    "TF Serving's answer": {"predictions": []},
    "nothing": {"outputs": []},
    "too many images": tensors(["ant", "bee"], [0.5, 0.5], [2, 1]),
    "a shape that is too large": tensors(shape=[1, 10**12]),
    "a shape of one axis": tensors(shape=[1]),
    "a shape that is none": tensors(shape=None),
    "text for a list": tensors("a", "b"),
    "classes that are numbers": tensors([1]),
    "scores that are words": tensors(scores=["high"]),
    "scores that are missing": {"outputs": tensors()["outputs"][:1]},
    "outputs that are none": {"outputs": 1},
}


@pytest.mark.parametrize("lie", KSERVE_LIES)
def test_malformed_kserve_response_is_one_error(lie, images):
    with server_that_says(http_reply(KSERVE_LIES[lie])) as port:
        with pytest.raises(client.ServerError, match="no server of KServe's protocol") as caught:
            ask_kserve(port, images[0])
    assert "\n" not in str(caught.value)


def ask_kserve(port, *arguments):
    named = ["--model=x", "--host=127.0.0.1", f"--port={port}", "--protocol=kserve"]
    client.main([*named, "--timeout=5", *map(str, arguments)])


@pytest.mark.parametrize("call", ["metadata", "status"])
@pytest.mark.parametrize(
    "body", [[1], {}, 1, {"inputs": 1}, [{"name": "x"}], [{"name": "x", "state": []}]]
)
def test_malformed_kserve_metadata_and_status_are_one_error(call, body):
    with server_that_says(http_reply(body)) as port:
        with pytest.raises(client.ServerError, match="no server of KServe's protocol"):
            ask_kserve(port, f"--call={call}")


# === Memory limit ===


def chunks(*sizes_and_data):
    head = OK + b"Transfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%s\r\n%s\r\n" % pair for pair in sizes_and_data)


def reset():
    yield OK + b"Content-Length: 100\r\n\r\n{"
    raise ConnectionResetError


def kserve(**changes):
    return http_reply({"outputs": [output | changes for output in tensors()["outputs"]]})


# These are functions so that only one response is in memory.
LARGE = {
    "a shape of many rows without columns": lambda: kserve(shape=[10**12, 0], data=[]),
    "a shape of many columns without rows": lambda: kserve(shape=[0, 10**12], data=[]),
    "a product that overflows": lambda: kserve(shape=[2**62, 4], data=[]),
    "a shape of negative sizes": lambda: kserve(shape=[-1, -1], data=["ant"]),
    "a shape of fractions": lambda: kserve(shape=[1.0, 1.0], data=["ant"]),
    "a shape of truth": lambda: kserve(shape=[True, True], data=["ant"]),
    "a shape of many axes": lambda: kserve(shape=[1] * 10**6, data=["ant"]),
    "sizes of the binary extension": lambda: kserve(
        parameters={"binary_data_size": 10**12}, data=None
    ),
    "many small values": lambda: http_reply(b"[" + b"0," * (30 << 20) + b"0]"),
    "many lists": lambda: http_reply(b"[" + b"[]," * (20 << 20) + b"[]]"),
    "many keys": lambda: http_reply(b"{" + b",".join(b'"%d":0' % i for i in range(1 << 22)) + b"}"),
    "a wide character in a long text": lambda: http_reply(
        b'["' + b"a" * (60 << 20) + '\U0001f431"]'.encode()
    ),
    "a name without end": lambda: kserve(data=["a" * (40 << 20)]),
    "numbers of many digits": lambda: http_reply(b"[" + b"9" * (30 << 20) + b"]"),
    "quotes that are escaped": lambda: http_reply(b'["' + b'\\"' * (20 << 20) + b"\\"),
    "gzip": lambda: http_reply(
        gzip.compress(bytes(50 << 20)), headers="Content-Encoding: gzip\r\n"
    ),
    "deflate": lambda: http_reply(
        zlib.compress(bytes(50 << 20)), headers="Content-Encoding: deflate\r\n"
    ),
    "a length that is a lie": lambda: OK + b"Content-Length: 99999999999999999999\r\n\r\n{}",
    "a length that is negative": lambda: OK + b"Content-Length: -1\r\n\r\n[0",
    "a length that is no number": lambda: OK + b"Content-Length: many\r\n\r\n[0",
    "a chunk that is too large": lambda: chunks((b"FFFFFFFFFFFFFFF", b"{}")),
    "a chunk of negative size": lambda: forever(chunks((b"-1", b"{")), bytes(1 << 20)),
    "a chunk of no size": lambda: chunks((b"zz", b"{}")),
    "a chunk size without end": lambda: forever(
        OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0" * 9999
    ),
    "chunks without end": lambda: forever(chunks(), b"1\r\n0\r\n"),
    "trailers without end": lambda: forever(chunks((b"0", b"")), b"a: b\r\n"),
    "headers of large size": lambda: OK + b"a: " + b"b" * (1 << 20) + b"\r\n\r\n",
    "a status that is no number": lambda: b"HTTP/1.1 abc OK\r\n\r\n",
    "another type": lambda: http_reply(b"<html>", headers="Content-Type: text/html\r\n"),
    "a redirection to a file": lambda: http_reply(
        b"", "302 Found", "Location: file:///etc/passwd\r\n"
    ),
    "a redirection to itself": lambda: http_reply(b"", "301 Moved", "Location: /\r\n"),
    "a reset": lambda: reset,
    "an error without end": lambda: forever(b"HTTP/1.1 500 No\r\n\r\n", b"x" * (1 << 20)),
    "an error of large size": lambda: http_reply({"error": "x" * (30 << 20)}, "500 No"),
}
LIMITED = """
import importlib.util, json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
spec = importlib.util.spec_from_file_location("client", sys.argv[1])
client = importlib.util.module_from_spec(spec)
spec.loader.exec_module(client)
for port in sys.argv[3:]:
    for protocol in ("kserve", "rest"):
        try:
            client.main([sys.argv[2], "--model=x", "--host=127.0.0.1", f"--port={port}",
                         f"--protocol={protocol}", "--timeout=2"])
            said = "an answer"
        except client.ServerError as error:
            said = str(error)
        print(json.dumps(said))
heavy = {"tensorflow", "numpy", "keras", "keras_tnt"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("part", range(4))
def test_oversized_responses_fail_in_time_and_within_1_gib(part, images):
    names = list(LARGE)[part::4]
    with contextlib.ExitStack() as servers:
        ports = [servers.enter_context(server_that_says(LARGE[name]())) for name in names]
        command = [sys.executable, "-c", LIMITED, client.__file__, images[0], *map(str, ports)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 2 * len(names)
    for name, said in zip([n for n in names for _ in range(2)], answers, strict=True):
        assert said != "an answer" and "\n" not in said and len(said) < 3000, name


@pytest.mark.parametrize("ending", ["length", "close", "chunked"])
def test_response_in_parts_is_read_with_any_framing(ending, images, capsys):
    body = json.dumps({"predictions": [{"classes": ["ant"], "scores": [0.5]}]}).encode()

    def parts():
        yield OK
        if ending == "length":
            yield f"Content-Length: {len(body)}\r\n".encode()
        yield b"Transfer-Encoding: chunked\r\n\r\n" if ending == "chunked" else b"\r\n"
        for part in (body[:20], body[20:]):
            time.sleep(0.1)
            yield b"%x\r\n%s\r\n" % (len(part), part) if ending == "chunked" else part
        if ending == "chunked":
            yield b"0\r\n\r\n"

    with server_that_says(parts) as port:
        named = ["--model=x", "--host=127.0.0.1", f"--port={port}", "--json"]
        found = json.loads(run(capsys, images[0], *named))
    assert found == {str(images[0]): [["ant", 0.5]]}


@pytest.mark.parametrize("scores", [[float("nan"), 0.5], [float("inf"), float("-inf")]])
@pytest.mark.parametrize("protocol", ["rest", "kserve"])
def test_json_output_is_valid_for_non_finite_scores(scores, protocol, images, capsys):
    classes = ["ant", "bee"]
    reply = row(classes, scores)
    if protocol == "kserve":
        reply = http_reply(tensors(classes, scores, [1, 2]))
    with server_that_says(reply) as port:
        named = ["--model=x", "--host=127.0.0.1", f"--port={port}", f"--protocol={protocol}"]
        text = run(capsys, images[0], *named, "--json")
        run(capsys, images[0], *named)

    def refuse(name):
        raise AssertionError(name)

    expected = [score if np.isfinite(score) else None for score in scores]
    found = json.loads(text, parse_constant=refuse)[str(images[0])]
    assert found == [list(pair) for pair in zip(classes, expected, strict=True)]


@pytest.mark.parametrize("kind", ["FIFO", "directory", "device"])
def test_image_that_is_not_a_regular_file_is_an_error(kind, tmp_path):
    path = tmp_path / "image.jpg"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(client.ServerError, match="image.jpg is no file"):
        client.main([str(path), "--model=x"])


# === gRPC ===


def grpc_lies():
    from tensorflow.core.framework import tensor_pb2, types_pb2

    def of(dtype, shape, **values):
        made = tensor_pb2.TensorProto(dtype=dtype, **values)
        for size in shape:
            made.tensor_shape.dim.add(size=size)
        return made

    string, real = types_pb2.DT_STRING, types_pb2.DT_FLOAT
    names = of(string, [1, 2], string_val=[b"ant", b"bee"])
    scores = of(real, [1, 2], float_val=[0.5, 0.25])
    return {
        "a huge shape of one value": (of(string, [1, 10**9], string_val=[b"a"]), scores),
        "huge shapes of one value": (
            of(string, [1, 10**9], string_val=[b"a"]),
            of(real, [1, 10**9], float_val=[0.5]),
        ),
        "no columns and many rows": (of(string, [10**12, 0]), of(real, [10**12, 0])),
        "negative sizes": (of(string, [-1, -2], string_val=[b"ant", b"bee"]), scores),
        "one axis": (of(string, [2], string_val=[b"ant", b"bee"]), scores),
        "another dtype": (names, of(types_pb2.DT_INT64, [1, 2], int64_val=[1, 2])),
        "an unknown dtype": (names, of(types_pb2.DT_INVALID, [1, 2])),
        "content of another size": (names, of(real, [1, 2], tensor_content=bytes(4))),
        "content of half a number": (names, of(real, [1, 2], tensor_content=bytes(7))),
        "names that are no text": (of(string, [1, 2], string_val=[b"\xff", b"b"]), scores),
        "no scores": (names, None),
        "a message that is too large": (of(string, [1, 1], string_val=[bytes(20 << 20)]), scores),
        "no message": b"\xff\xff\xff",
    }


@contextlib.contextmanager
def grpc_server_that_says(reply, compression=None):
    """Yields the port of a server that answers every call with the same bytes."""
    import concurrent.futures

    import grpc

    class Handler(grpc.GenericRpcHandler):
        def service(self, call):
            return grpc.unary_unary_rpc_method_handler(lambda request, context: reply)

    server = grpc.server(
        concurrent.futures.ThreadPoolExecutor(2),
        handlers=[Handler()],
        options=[("grpc.max_send_message_length", -1)],
        compression=compression,
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


def as_grpc_reply(lie):
    from tensorflow_serving.apis import predict_pb2

    if isinstance(lie, bytes):
        return lie
    response = predict_pb2.PredictResponse()
    for name, made in zip(("classes", "scores"), lie, strict=True):
        if made is not None:
            response.outputs[name].CopyFrom(made)
    return response.SerializeToString()


def ask_grpc(port, *arguments):
    named = ["--model=x", "--host=127.0.0.1", f"--port={port}", "--protocol=grpc"]
    client.main([*named, "--timeout=20", *map(str, arguments)])


@pytest.mark.parametrize("lie", list(grpc_lies()))
def test_malformed_grpc_response_is_one_error(lie, images):
    with grpc_server_that_says(as_grpc_reply(grpc_lies()[lie])) as port:
        with pytest.raises(client.ServerError) as caught:
            ask_grpc(port, images[0])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 3000


@pytest.mark.parametrize("call", ["classify", "metadata", "status"])
@pytest.mark.parametrize("reply", [b"\xff\xff", b"", b"\x0a\x02\x08\x01"])
def test_malformed_grpc_response_to_other_calls_is_one_error(call, reply, images, capsys):
    with grpc_server_that_says(reply) as port:
        try:
            ask_grpc(port, f"--call={call}", *([images[0]] if call == "classify" else []))
        except client.ServerError as error:
            assert "\n" not in str(error)
        else:
            assert call == "status" and json.loads(capsys.readouterr().out) is not None


def test_size_of_a_compressed_grpc_response_is_limited(images):
    import grpc
    from tensorflow.core.framework import tensor_pb2, types_pb2

    made = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[bytes(100 << 20)])
    bomb = as_grpc_reply((made, made))
    with grpc_server_that_says(bomb, grpc.Compression.Gzip) as port:
        with pytest.raises(client.ServerError) as caught:
            ask_grpc(port, images[0])
    assert "\n" not in str(caught.value)


def test_kserve_does_not_support_classify(images):
    with pytest.raises(client.ServerError, match="is TF Serving's own.*--call=predict"):
        ask_kserve(1, images[0], "--call=classify")


def test_wrong_protocol_for_a_server_is_a_one_line_error(served, images, capsys):
    double = served[1]
    for protocol, port in (("kserve", double.rest), ("kserve", double.grpc), ("rest", double.grpc),
                           ("grpc", double.rest)):  # fmt: skip
        with pytest.raises(client.ServerError, match="--protocol=rest or grpc asks TF") as caught:
            client.main([str(images[0]), "--model=tiny", f"--protocol={protocol}",
                         f"--port={port}", "--timeout=20"])  # fmt: skip
        assert "\n" not in str(caught.value)
    # Responses of Triton, MLServer and others to unknown paths.
    for body in ({"error": "Not Found"}, {"detail": "Not Found"}, b""):
        with server_that_says(http_reply(body, "404 Not Found")) as port:
            with pytest.raises(client.ServerError, match="no TF Serving.*--protocol"):
                client.main([str(images[0]), "--model=x", "--host=127.0.0.1", f"--port={port}"])


def test_benchmark_by_concurrency_is_plotted(served, images, tmp_path, capsys):
    picture = tmp_path / "benchmark.png"
    arguments = ["--model=tiny", f"--port={served[1].rest}", "--timeout=60", "--batch=1"]
    found = json.loads(run(capsys, images[0], *arguments, "--benchmark=2", "--concurrency=1,2",
                           f"--plot={picture}"))  # fmt: skip
    assert [row["concurrency"] for row in found] == [1, 2]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("call", ["metadata", "status", "classify"])
@pytest.mark.parametrize("body", [[], {}, {"metadata": 1, "model_version_status": 1, "results": 1}])
def test_malformed_response_to_other_calls_is_one_error(call, body, images):
    with server_that_says(http_reply(body)) as port:
        with pytest.raises(client.ServerError, match="no TF Serving"):
            client.main(
                [
                    str(images[0]),
                    "--model=x",
                    "--host=127.0.0.1",
                    f"--port={port}",
                    f"--call={call}",
                ]
            )


def test_redirect_is_not_followed(images):
    asked = []

    def elsewhere():
        asked.append(True)
        yield row()

    with server_that_says(elsewhere) as other:
        location = f"Location: http://127.0.0.1:{other}/\r\n"
        with server_that_says(http_reply(b"", "307 Temporary Redirect", location)) as port:
            with pytest.raises(client.ServerError, match="refuses: HTTP 307 Temporary Redirect"):
                client.main([str(images[0]), "--model=x", "--host=127.0.0.1", f"--port={port}"])
    assert not asked


def test_model_names_are_percent_encoded(images):
    asked = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            asked.append(self.rfile.readline())
            self.wfile.write(http_reply({"model_version_status": []}))

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        for name in ("a b", "a?b", "a#b", "../a", "ä"):
            client.main([f"--model={name}", "--host=127.0.0.1", f"--port={port}", "--call=status"])
        server.shutdown()
    paths = [line.split()[1] for line in asked]
    names = [b"a%20b", b"a%3Fb", b"a%23b", b"..%2Fa", b"%C3%A4"]
    assert paths == [b"/v1/models/" + name for name in names]


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
@pytest.mark.parametrize(
    "bad",
    ["--model=", "--model=..", "--model=a\nb", "--model=\x1b[31m", "--host=a b", "--host=a/b?c#d",
     "--host=a\r\nb", "--host=user@host", "--host="],
)  # fmt: skip
def test_invalid_model_and_host_names_are_errors(bad, protocol):
    with pytest.raises(client.ServerError, match="is no name of a") as caught:
        client.main(["--model=x", bad, f"--protocol={protocol}", "--call=status"])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("host", ["a..b", "x" * 300, "nowhere.invalid"])
def test_unresolvable_host_is_an_error(host):
    with pytest.raises(client.ServerError, match="No server can be reached|No answer"):
        client.main(["--model=x", f"--host={host}", "--timeout=5", "--call=status"])


def test_command_escapes_control_characters(images):
    def command(reply):
        with server_that_says(reply) as port:
            return subprocess.run(
                [sys.executable, ROOT / "savedmodels" / "client.py", images[0], "--model=x",
                 "--host=127.0.0.1", f"--port={port}", "--timeout=5"],
                capture_output=True, text=True, env={**os.environ, "http_proxy": "http://0.0.0.0:1"},
            )  # fmt: skip

    done = command(row(classes=("\x1b[31mred\r\nline",)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "   50.00%  \\x1b[31mred\\r\\nline"
    done = command(http_reply({"error": "\x1b]0;title\x07\nsecond line"}, "400 Bad"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and done.stderr[:-1].isprintable()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--modle=x", "There is no option --modle. Did you mean --model?"),
        ("--time-out=3", "Did you mean --timeout?"),
        ("--lr=1", "There is no option --lr. "),
    ],
)
@pytest.mark.parametrize("others", [[], ["--model=x"]])
def test_unknown_option_suggests_the_closest(option, message, others, capsys):
    with pytest.raises(SystemExit) as ended:
        client.parse(["cat.jpg", option, *others])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_model_is_required(capsys):
    with pytest.raises(SystemExit):
        client.parse(["cat.jpg"])
    assert "required: --model" in capsys.readouterr().err
