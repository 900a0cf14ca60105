"""The client and a test double of TF Serving understand each other by TF Serving's protocol."""

import contextlib
import importlib.util
import json
import os
import socket
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow_serving")

import keras_tnt
from keras_tnt.export.verification import draw_picture
from tests.savedmodels.serving_double import Double

pytestmark = pytest.mark.one_backend
ROOT = Path(__file__).parent.parent.parent
LABELS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


def load_client():
    spec = importlib.util.spec_from_file_location("client", ROOT / "savedmodels" / "client.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


client = load_client()


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
    """The arguments by which the client finds the double."""
    return [
        "--model=tiny",
        f"--protocol={request.param}",
        f"--port={getattr(served[1], request.param)}",
        "--timeout=60",  # the first call makes the graph's kernels, and the machine may be busy
    ]


@pytest.mark.parametrize("call", ["predict", "classify"])
def test_predictions_are_the_models(call, reach, served, images, capsys):
    answer = json.loads(run(capsys, *images, *reach, f"--call={call}", "--batch=2", "--json"))
    expected = served[0].predict_on_batch(keras_tnt.load_images(images, served[0]))
    assert list(answer) == list(map(str, images))
    for row, probabilities in zip(answer.values(), expected, strict=True):
        order = np.argsort(-probabilities)[:5]
        assert [name for name, _ in row] == [LABELS[i] for i in order]
        np.testing.assert_allclose([s for _, s in row], probabilities[order], atol=2e-3)


def test_what_is_printed_names_the_classes(reach, images, capsys):
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


def test_a_benchmark_tells_throughput_and_percentiles(reach, images, capsys):
    arguments = ["--benchmark=6", "--batch=4", "--concurrency=2"]
    told = json.loads(run(capsys, images[0], *reach, *arguments))
    assert (told["calls"], told["batch"], told["concurrency"]) == (6, 4, 2)
    assert told["images_per_second"] > 0
    latency = told["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]


def test_a_broken_image_is_told_by_its_place_and_the_files(reach, images, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(images[0].read_bytes()[:100])
    with pytest.raises(client.ServerError, match=r"\[1\](.|\n)*from 0: .*0.img, .*broken.jpg"):
        client.main([str(images[0]), str(broken), *reach])


def test_an_unknown_model_and_version_are_refused(reach, images):
    with pytest.raises(client.ServerError, match="refuses: Servable not found for request: no"):
        client.main([str(images[0]), "--model=no", *reach[1:]])
    with pytest.raises(client.ServerError, match="refuses: Servable not found"):
        client.main([str(images[0]), *reach, "--version=7"])


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_no_server_is_told_with_the_address(protocol, images):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with pytest.raises(client.ServerError, match=f"No server can be reached at localhost:{port}"):
        client.main([str(images[0]), "--model=x", f"--protocol={protocol}", f"--port={port}"])


def test_a_file_that_is_missing_is_told_before_any_call():
    with pytest.raises(client.ServerError, match="There is no file nowhere.jpg"):
        client.main(["nowhere.jpg", "--model=x"])


@pytest.mark.parametrize("protocol", ["rest", "grpc"])
def test_a_slow_server_runs_into_the_timeout(protocol, served, images):
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


# === Servers that lie ===


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
    """The port of a server that answers with these bytes, or with what a function yields."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1 << 16)
            with contextlib.suppress(OSError):
                for part in parts() if callable(parts) else [parts]:
                    self.request.sendall(part)

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
def test_whatever_a_server_answers_is_one_error(lie, images):
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
def test_whatever_a_kserve_server_answers_is_one_error(lie, images):
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
def test_kserve_replies_of_another_shape_to_each_call(call, body):
    with server_that_says(http_reply(body)) as port:
        with pytest.raises(client.ServerError, match="no server of KServe's protocol"):
            ask_kserve(port, f"--call={call}")


def test_kserve_has_no_call_of_tf_serving(images):
    with pytest.raises(client.ServerError, match="is TF Serving's own.*--call=predict"):
        ask_kserve(1, images[0], "--call=classify")


def test_the_wrong_protocol_for_a_server_is_one_line(served, images, capsys):
    double = served[1]
    for protocol, port in (("kserve", double.rest), ("kserve", double.grpc), ("rest", double.grpc),
                           ("grpc", double.rest)):  # fmt: skip
        with pytest.raises(client.ServerError, match="--protocol=rest or grpc asks TF") as caught:
            client.main([str(images[0]), "--model=tiny", f"--protocol={protocol}",
                         f"--port={port}", "--timeout=20"])  # fmt: skip
        assert "\n" not in str(caught.value)
    # As Triton, MLServer and others answer paths that they do not know.
    for body in ({"error": "Not Found"}, {"detail": "Not Found"}, b""):
        with server_that_says(http_reply(body, "404 Not Found")) as port:
            with pytest.raises(client.ServerError, match="no TF Serving.*--protocol"):
                client.main([str(images[0]), "--model=x", "--host=127.0.0.1", f"--port={port}"])


def test_a_benchmark_is_measured_by_concurrency_and_drawn(served, images, tmp_path, capsys):
    picture = tmp_path / "benchmark.png"
    arguments = ["--model=tiny", f"--port={served[1].rest}", "--timeout=60", "--batch=1"]
    found = json.loads(run(capsys, images[0], *arguments, "--benchmark=2", "--concurrency=1,2",
                           f"--plot={picture}"))  # fmt: skip
    assert [row["concurrency"] for row in found] == [1, 2]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("call", ["metadata", "status", "classify"])
@pytest.mark.parametrize("body", [[], {}, {"metadata": 1, "model_version_status": 1, "results": 1}])
def test_replies_of_another_shape_to_each_call(call, body, images):
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


def test_a_redirection_is_not_followed(images):
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


def test_names_of_models_are_quoted_in_the_address(images):
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
def test_names_that_are_none_are_refused(bad, protocol):
    with pytest.raises(client.ServerError, match="is no name of a") as caught:
        client.main(["--model=x", bad, f"--protocol={protocol}", "--call=status"])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("host", ["a..b", "x" * 300, "nowhere.invalid"])
def test_hosts_that_there_are_not(host):
    with pytest.raises(client.ServerError, match="No server can be reached|No answer"):
        client.main(["--model=x", f"--host={host}", "--timeout=5", "--call=status"])


def test_the_command_prints_no_escapes_and_ends_with_1_in_one_line(images):
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
