"""Triton model repositories: contents, errors, and atomic export."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

pytest.importorskip("tensorflow")
pytest.importorskip("onnxruntime")

import keras_tnt
from keras_tnt.export import triton_repository
from keras_tnt.export.pictures import PictureModel
from keras_tnt.export.verification import draw_picture

NAMES = ["ant", "bee", "cat", 'a "quoted" dog', "eel", "fox", "gnü"]
TINY = {
    "input_shape": (32, 32, 3),
    "outer_dim": 16,
    "inner_dim": 8,
    "depth": 1,
    "outer_heads": 2,
    "inner_heads": 2,
}
PICTURES = [draw_picture(20 + seed) for seed in range(11)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = keras_tnt.TNT(**TINY, class_names=NAMES, name="tiny")
    repository = tmp_path_factory.mktemp("models") / "repository"
    keras_tnt.export.triton(model, repository, weights="this test")
    return model, repository


def listed(folder):
    return sorted(os.listdir(folder))


def test_image_bytes_model_matches_the_model(exported):
    model, repository = exported
    assert listed(repository.parent) == ["repository"]
    assert listed(repository) == ["tiny", "tiny_bytes"]
    served = PictureModel(repository / "tiny_bytes" / "1")
    outputs = served.run(served.read(PICTURES))
    expected = model.predict(keras_tnt.load_images(PICTURES, model), verbose=0)
    np.testing.assert_allclose(outputs["probabilities"], expected, atol=1e-5)
    for names, scores, row in zip(outputs["classes"], outputs["scores"], expected, strict=True):
        order = np.argsort(-row)[:5]
        assert [name.decode() for name in names] == [NAMES[i] for i in order]
        np.testing.assert_allclose(scores, row[order], atol=1e-5)
    assert served.card["weights"] == "this test"


@pytest.mark.one_backend
def test_repository_contents(exported):
    _, repository = exported
    for name, more in (("tiny", []), ("tiny_bytes", ["warmup"])):
        home = repository / name
        assert listed(home) == ["1", "config.pbtxt", "labels.txt", *more]
        assert (home / "labels.txt").read_text(encoding="utf-8").splitlines() == NAMES
        assert os.stat(home).st_mode & 0o755 == 0o755
    settings = json.loads((repository / "tiny_bytes" / "1" / "model-settings.json").read_text())
    assert (settings["name"], settings["parameters"]["version"]) == ("tiny_bytes", "1")


WITHOUT_KERAS = """
import sys
for absent in ("keras", "tensorflow", "jax", "torch", "h5py", "safetensors"):
    sys.modules[absent] = None
folder, picture = sys.argv[1:]
sys.path.insert(0, folder)
import keras_tnt
from keras_tnt.export.pictures import PictureModel
assert keras_tnt.__file__.startswith(folder)
model = PictureModel(folder)
print(model.run(model.read([open(picture, "rb").read()]))["probabilities"].tolist())
"""


@pytest.mark.one_backend
def test_version_is_self_contained_and_needs_no_keras(exported, tmp_path):
    model, repository = exported
    version = repository / "tiny_bytes" / "1"
    before = sorted(version.rglob("*"))
    (tmp_path / "picture").write_bytes(PICTURES[0])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_KERAS, version, tmp_path / "picture"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = model.predict(keras_tnt.load_images(PICTURES[:1], model), verbose=0)
    np.testing.assert_allclose(json.loads(done.stdout), expected, atol=1e-5)
    # Nothing is written into it: a polling server would reload it.
    assert sorted(version.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.one_backend
def test_both_models_share_version_numbers_and_keep_an_edited_configuration(exported, tmp_path):
    model, _ = exported
    repository = tmp_path / "repository"
    with_settings = {"max_batch_size": 4, "max_queue_delay": 0.25, "instances": 2}
    keras_tnt.export.triton(model, repository, version=3, name="pets", **with_settings)
    config = repository / "pets_bytes" / "config.pbtxt"
    told = config.read_text()
    for text in ("max_batch_size: 4", "microseconds: 250000", "count: 2", "batch_size: 4"):
        assert text in told
    config.write_text(told.replace("count: 2", "count: 3"))
    (repository / "pets" / "5").mkdir()  # left by an export that was killed between its two models
    keras_tnt.export.triton(model, repository, name="pets")
    assert [p for p in listed(repository / "pets") if p.isdigit()] == ["3", "5", "6"]
    assert [p for p in listed(repository / "pets_bytes") if p.isdigit()] == ["3", "6"]
    assert "count: 3" in config.read_text()
    assert '"version": "6"' in (repository / "pets_bytes/6/model-settings.json").read_text()
    with pytest.raises(FileExistsError, match="/pets/6' exists"):
        keras_tnt.export.triton(model, repository, name="pets", version=6)
    with pytest.raises(ValueError, match="config.pbtxt' exists.*leave `instances` out"):
        keras_tnt.export.triton(model, repository, name="pets", instances=7)


@pytest.mark.one_backend
def test_repository_of_another_model_raises_before_any_work(exported, tmp_path, monkeypatch):
    model, repository = exported
    before = sorted(repository.rglob("*"))
    monkeypatch.setattr(triton_repository, "onnx", None)

    def refused(model, repository=repository, **arguments):
        with pytest.raises((ValueError, OSError)) as caught:
            keras_tnt.export.triton(model, repository, **arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def other(**arguments):
        return keras_tnt.TNT(**{**TINY, "name": "tiny", **arguments})

    assert "another model: 7 classes, 'ant' to 'gnü', instead of 2 classes" in refused(
        other(class_names=["yes", "no"])
    )
    larger = other(class_names=NAMES, input_shape=(48, 48, 3))
    assert "another model: image_size [32, 32] instead of image_size [48, 48]." in refused(larger)
    assert "is the directory of one model, for it holds" in refused(model, repository / "tiny")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "saved_model.pb").write_text("")
    assert "not exported by keras_tnt" in refused(model, tmp_path)
    assert "is a file" in refused(model, repository / "tiny" / "config.pbtxt" / "repository")
    assert "letters, digits and any of" in refused(model, name="../tiny")
    assert "letters, digits and any of" in refused(model, name="")
    assert "`max_batch_size` must be a positive integer" in refused(model, max_batch_size=0)
    assert "`max_queue_delay` must lie in 0 to 60" in refused(model, max_queue_delay=float("nan"))
    assert "`version` must be a positive integer" in refused(model, version=0)
    assert "`labels` must name each of" in refused(model, labels=["one"])
    assert sorted(repository.rglob("*")) == before


@pytest.mark.one_backend
def test_failed_export_leaves_no_files(exported, tmp_path, monkeypatch):
    model, _ = exported

    def broken(model, path, *_, **__):
        Path(path).write_text("")
        raise RuntimeError("differs")

    monkeypatch.setattr(triton_repository, "onnx", broken)
    with pytest.raises(RuntimeError, match="differs"):
        keras_tnt.export.triton(model, tmp_path / "repository")
    assert listed(tmp_path) == ["repository"]
    assert listed(tmp_path / "repository") == []


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "options",
    [
        {"input_shape": (3, 32, 32), "include_preprocessing": False},
        {"input_shape": (32, 48, 1), "include_top": False, "pooling": "avg"},
    ],
    ids=["channels first, normalised outside", "gray, without a classifier"],
)
def test_image_bytes_model_of_other_input_formats(options, tmp_path):
    if options["input_shape"][0] == 3:
        keras.config.set_image_data_format("channels_first")
    model = keras_tnt.TNT(**{**TINY, "classes": 3, **options}, name="other")
    keras_tnt.export.triton(model, tmp_path)
    served = PictureModel(tmp_path / "other_bytes" / "1")
    outputs = served.run(served.read(PICTURES[:3]))
    images = keras_tnt.load_images(PICTURES[:3], model)
    if not options.get("include_preprocessing", True):
        images = keras_tnt.tnt.preprocess_input(images)
    expected = model.predict(images, verbose=0)
    name = "probabilities" if "classes" in outputs else "features"
    np.testing.assert_allclose(outputs[name], expected, atol=1e-4 * np.ptp(expected))


@pytest.mark.one_backend
def test_other_channel_counts_have_no_image_bytes_model(tmp_path):
    model = keras_tnt.TNT(
        **{**TINY, "input_shape": (32, 32, 5)}, classes=3, include_preprocessing=False, name="five"
    )
    keras_tnt.export.triton(model, tmp_path)
    assert listed(tmp_path) == ["five"]
    assert "dims: [32, 32, 5]" in (Path(tmp_path) / "five" / "config.pbtxt").read_text()
