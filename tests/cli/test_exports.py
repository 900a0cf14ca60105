"""`keras-tnt` on exported models and on run directories of the trainer."""

import json
import shutil

import keras
import numpy as np
import pytest
from PIL import Image

import keras_tnt
from keras_tnt.cli import main

pytestmark = [pytest.mark.one_backend, pytest.mark.slow]
NAMES = ["cat", "dog", "bird"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Writes the same model in every format, and an image; returns the directory."""
    folder = tmp_path_factory.mktemp("exports")
    keras.utils.set_random_seed(0)
    model = keras_tnt.DeiT(
        input_shape=(32, 32, 3),
        patch_size=16,
        embed_dim=8,
        depth=1,
        num_heads=1,
        class_names=NAMES,
        include_preprocessing=False,
    )
    model.set_weights([4 * w for w in model.get_weights()])
    model.save(folder / "model.keras")
    (folder / "run").mkdir()
    shutil.copy(folder / "model.keras", folder / "run" / "final.keras")
    keras_tnt.export.onnx(model, folder / "model.onnx")
    keras_tnt.export.saved_model(model, folder / "saved")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype="uint8")
    Image.fromarray(pixels).save(folder / "image.png")
    return folder


def shown(arguments, capsys):
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_all_export_formats_predict_the_same(places, capsys):
    image, *models = (
        str(places / name) for name in ("image.png", "model.keras", "run", "model.onnx")
    )
    models += [str(places / "saved"), str(places / "saved" / "1")]
    results = [
        shown([image, f"--model={model}", "--json"], capsys)[0]["predictions"] for model in models
    ]
    for found in results:
        assert [row["name"] for row in found] == [row["name"] for row in results[0]]
        np.testing.assert_allclose(
            [row["score"] for row in found], [row["score"] for row in results[0]], atol=1e-4
        )
    vectors = [
        shown([image, f"--model={model}", "--features", "--json"], capsys)[0]["features"]
        for model in (models[0], models[3])
    ]
    np.testing.assert_allclose(*vectors, atol=1e-3)
    assert main([image, f"--model={places / 'model.onnx'}", "--features"]) == 2
    assert "gives logits and probabilities, not features" in capsys.readouterr().err


def test_info_describes_every_export_format(places, capsys):
    for name in ("model.keras", "run", "model.onnx", "saved"):
        found = shown(["info", str(places / name), "--json"], capsys)
        assert found["class_names"] == NAMES
        assert found["image_size"] == "32x32"
        assert found["classes"] == 3
    found = shown(["info", str(places / "model.keras"), "--json"], capsys)
    assert found["family"] == "deit"
    assert found["parameters"] == 7115
    assert main(["info", str(places / "model.onnx")]) == 0
    assert "cat, dog, bird" in capsys.readouterr().out
