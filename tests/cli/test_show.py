"""`keras-tnt` with image files: prints their classes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

import keras_tnt
from keras_tnt.__main__ import main

pytestmark = pytest.mark.one_backend
ROOT = Path(__file__).parent.parent
REPOSITORY = "timm/deit_tiny_patch16_224.fb_in1k"


@pytest.fixture(scope="module")
def model():
    return keras_tnt.DeiTTiny(weights=None)


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    keras_tnt.save_checkpoint(model, path)
    return str(path)


@pytest.fixture
def images(tmp_path):
    """Returns the paths of two images."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / "one.png", tmp_path / "two.jpg"]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype="uint8")).save(path)
    return [str(path) for path in paths]


def expected(model, path, top):
    scores = model.predict(keras_tnt.load_image(path, model)[None], verbose=0)
    return keras_tnt.decode_predictions(scores, top)[0]


def test_each_image_is_printed_with_its_top_classes(model, weights, images, capsys):
    assert main([*images, "--model=DeiTTiny", f"--weights={weights}", "--top=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[4]] == images
    for i, path in enumerate(images):
        for line, (_, name, score) in zip(
            lines[4 * i + 1 : 4 * i + 4], expected(model, path, 3), strict=True
        ):
            assert line.split(maxsplit=1) == [f"{score:.1%}", name]


def test_json_output_has_the_same_predictions(model, weights, images, capsys):
    assert main([*images, "--model=DeiTTiny", f"--weights={weights}", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["file"] for result in results] == images
    for result in results:
        assert len(result["predictions"]) == 5
        for row, (i, name, score) in zip(
            result["predictions"], expected(model, result["file"], 5), strict=True
        ):
            assert (row["id"], row["name"]) == (i, name)
            assert row["score"] == pytest.approx(score, rel=1e-3)


def test_unreadable_image_does_not_stop_the_others(weights, images, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_text("no image")
    status = main([str(broken), "no.jpg", images[0], "--model=DeiTTiny", f"--weights={weights}"])
    printed = capsys.readouterr()
    assert status == 1
    assert printed.out.startswith(images[0])
    first, second = printed.err.splitlines()
    assert first.startswith(f"error: '{broken}' cannot be read as an image")
    assert second == "error: There is no image file 'no.jpg'."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model=ResNet50"], "There is no model 'ResNet50'. There are: .*tnt_small"),
        (["--weights=no/file"], "'no/file', which is no file"),
        (["--model=TNTTiny"], "no public weights of TNTTiny"),
        (["--top=0"], "--top must be 1 or more"),
    ],
)
def test_invalid_option_is_a_one_line_error(options, message, images, capsys):
    assert main([*images, *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)


def test_unnamed_classes_are_numbered(hub, tmp_path, images, capsys):  # noqa: F811
    """Loads a fine-tuned checkpoint of seven classes from the hub."""
    keras_tnt.save_checkpoint(
        keras_tnt.DeiTTiny(weights=None, classes=7), tmp_path / "model.safetensors"
    )
    config = {"architecture": "deit_tiny_patch16_224", "num_classes": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in ("model.safetensors", "config.json"):
        hub.add("someone/flowers", file, tmp_path / file)
    assert main([images[0], "--model=DeiTTiny", "--weights=hf://someone/flowers", "--json"]) == 0
    [result] = json.loads(capsys.readouterr().out)
    assert len(result["predictions"]) == 5
    assert {row["class"] for row in result["predictions"]} <= set(range(7))


@pytest.mark.slow
def test_shell_command_downloads_public_weights(hub, weights, images, tmp_path, model):  # noqa: F811
    hub.add(REPOSITORY, "model.safetensors", weights)
    result = subprocess.run(
        [sys.executable, "-m", "keras_tnt", images[0], "--model=DeiTTiny", "--top=1", "--json"],
        cwd=ROOT,
        env={
            **os.environ,
            "KERAS_BACKEND": keras.backend.backend(),
            "HF_HOME": str(tmp_path / "home"),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    [[row]] = [result["predictions"] for result in json.loads(result.stdout)]
    assert row["id"] == expected(model, images[0], 1)[0][0]
    assert hub.downloads() == 1
