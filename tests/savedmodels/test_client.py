"""The client and a test double of TF Serving understand each other by TF Serving's protocol."""

import importlib.util
import json
import socket
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
