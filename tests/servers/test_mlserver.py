"""MLServer serves the image-bytes model with the settings file stored in each version."""

import json

import keras
import numpy as np
import pytest

import keras_tnt
from keras_tnt.export.verification import draw_picture
from tests.helpers.serving_client import client
from tests.helpers.subprocess_helpers import MLServer, marks

pytestmark = marks
NAMES = ["ant", "bee", "gnü"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlserver")
    keras.utils.set_random_seed(0)
    model = keras_tnt.TNT(
        input_shape=(32, 32, 3), outer_dim=16, inner_dim=8, depth=1, outer_heads=2, inner_heads=2,
        class_names=NAMES, name="tiny",
    )  # fmt: skip
    keras_tnt.export.triton(model, folder / "repository", version=4)
    with MLServer(folder / "repository", folder / "server") as server:
        yield model, server.wait_for("tiny_bytes", 4)


@pytest.fixture
def ask(served, capsys):
    _, server = served

    def ask(*arguments):
        named = ["--model=tiny_bytes", "--protocol=kserve", f"--port={server.http}"]
        client.main([*named, "--timeout=60", *map(str, arguments)])
        return json.loads(capsys.readouterr().out)

    return ask


def test_predictions_match_keras(served, ask, tmp_path):
    model, _ = served
    paths = [tmp_path / f"{seed}.img" for seed in range(11)]
    for seed, path in enumerate(paths):
        path.write_bytes(draw_picture(seed))
    rows = ask(*paths, "--batch=11", "--json")
    expected = model.predict(keras_tnt.load_images(paths, model), verbose=0)
    for path, probabilities in zip(paths, expected, strict=True):
        order = np.argsort(-probabilities)
        assert [name for name, _ in rows[str(path)]] == [NAMES[i] for i in order]
        scores = [score for _, score in rows[str(path)]]
        np.testing.assert_allclose(scores, probabilities[order], atol=1e-5)


def test_metadata_and_status(ask):
    assert ask("--call=status") == {"4": "READY"}
    assert ask("--call=metadata", "--version=4")["inputs"] == {"image_bytes": "BYTES (batch, 1)"}


def test_refused_request_is_a_one_line_error_and_server_keeps_running(ask, tmp_path):
    broken = tmp_path / "broken.img"
    broken.write_bytes(draw_picture(0)[:100])
    good = tmp_path / "good.img"
    good.write_bytes(draw_picture(0))
    for arguments, said in (
        ([good, broken], "refuses: .*Image 1 of the batch cannot be read as an image"),
        ([good, "--version=7"], "refuses: Model tiny_bytes with version 7 not found"),
        ([good, "--model=no"], "refuses: Model no not found"),
        ([good, "--protocol=rest"], "no TF Serving.*--protocol"),
    ):
        with pytest.raises(client.ServerError, match=said) as caught:
            ask(*arguments)
        assert "\n" not in str(caught.value)
    assert len(ask(good, "--json")) == 1
