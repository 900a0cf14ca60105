"""End to end on each backend: from a folder of photographs to named predictions."""

import json
import os

import keras
import numpy as np
import pytest
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

import keras_tnt
from keras_tnt.cli import main
from tests.helpers.checks import run_python

SIDE = 32
ARCHITECTURE = {
    "input_shape": (SIDE, SIDE, 3),
    "patch_size": 8,
    "inner_stride": 4,
    "depth": 1,
    "outer_dim": 32,
    "inner_dim": 4,
    "outer_heads": 2,
    "inner_heads": 2,
}

# Queries a SavedModel with encoded images, which requires TensorFlow.
ASK = """
import json, sys
import tensorflow as tf
folder, *paths = sys.argv[1:]
images = tf.constant([open(path, "rb").read() for path in paths])
answer = tf.saved_model.load(folder).signatures["serving_bytes"](image_bytes=images)
print(json.dumps([[name.decode() for name in names] for names in answer["classes"].numpy()]))
"""


def photographs():
    """Returns six photographs by their subject."""
    temple, flower = load_sample_images().images
    shown = ("chelsea", "astronaut", "coffee", "rocket")
    return {"temple": temple, "flower": flower} | {name: getattr(data, name)() for name in shown}


def write_crops(folder, seed, count):
    """Writes `count` crops of each photograph to a folder of its name."""
    rng = np.random.default_rng(seed)
    for name, pixels in photographs().items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            side = int(rng.integers(240, 290))
            top, left = (int(rng.integers(0, n - side)) for n in pixels.shape[:2])
            crop = Image.fromarray(pixels[top : top + side, left : left + side])
            crop.save(folder / name / f"{i}.png")


@pytest.mark.slow
def test_photographs_in_folders_to_named_predictions(tmp_path, capsys):
    write_crops(tmp_path / "train", seed=0, count=12)
    write_crops(tmp_path / "test", seed=1, count=4)
    names = sorted(photographs())

    # A checkpoint of eight classes is adapted to these six.
    keras_tnt.save_pretrained(keras_tnt.TNT(**ARCHITECTURE, classes=8), tmp_path / "eight")
    eight = keras_tnt.TNT(**ARCHITECTURE, classes=8, weights=str(tmp_path / "eight"))
    model = keras_tnt.reset_classifier(eight, class_names=names)

    paths = sorted((tmp_path / "train").rglob("*.png"))
    images = np.stack([keras_tnt.load_image(path, model) for path in paths])
    labels = np.array([names.index(path.parent.name) for path in paths])
    optimizer = keras_tnt.finetuning.layerwise(
        keras.optimizers.AdamW(5e-3, weight_decay=0.05), model, decay=0.9
    )
    model.compile(optimizer, "sparse_categorical_crossentropy")
    model.fit(images, labels, batch_size=24, epochs=25, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")

    out = tmp_path / "predictions.jsonl"
    assert main([str(tmp_path / "test"), f"--model={tmp_path}/model.keras", f"--out={out}"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    best = {row["file"]: [p["name"] for p in row["predictions"]] for row in rows}
    assert len(best) == 24
    right = [found[0] == os.path.basename(os.path.dirname(path)) for path, found in best.items()]
    assert np.mean(right) >= 0.75

    saved = keras_tnt.export.saved_model(loaded, tmp_path / "saved")
    asked = [row["file"] for row in rows][::4]
    assert json.loads(run_python(ASK, saved, *asked)) == [best[path] for path in asked]
    import onnx

    file = onnx.load(keras_tnt.export.onnx(loaded, tmp_path / "model.onnx"))
    metadata = {entry.key: entry.value for entry in file.metadata_props}
    assert json.loads(metadata["labels"]) == names
