"""Families and models by name; user-defined families have all features of the built-in ones."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import keras_tnt
from keras_tnt.models import registry
from keras_tnt.models.registry import Variant
from tests.helpers import toy_family, toy_stages
from tests.helpers.checks import assert_equal, compute, entries, normal
from tests.helpers.golden import assert_close

ROOT = Path(__file__).parent.parent


# === Models by name ===


@pytest.mark.one_backend
def test_list_models_supports_patterns_in_either_spelling():
    names = keras_tnt.list_models()
    assert names[:3] == ["tnt_tiny", "tnt_small", "tnt_base"]
    assert len(names) == len(set(names)) >= 17
    assert keras_tnt.list_models("deit*") == ["deit_tiny", "deit_small", "deit_base"]
    assert keras_tnt.list_models("TNT*") == ["tnt_tiny", "tnt_small", "tnt_base"]
    assert "pyramid_tnt_base" in keras_tnt.list_models("*tnt*")
    assert keras_tnt.list_models("resnet*") == []


@pytest.mark.one_backend
def test_find_model_by_name_or_with_a_suggestion():
    for name in keras_tnt.list_models():
        function = registry.find_model(name)
        assert registry.find_model(function.__name__) is function
        assert getattr(keras_tnt, function.__name__) is function
        assert function.__name__ in dir(keras_tnt)
    assert registry.find_model("tnt") is registry.find_model("TNT") is keras_tnt.TNT
    with pytest.raises(ValueError, match="no model 'tnt_smal'. Did you mean tnt_small"):
        keras_tnt.create_model("tnt_smal")
    with pytest.raises(AttributeError, match="no attribute 'TNTHuge'"):
        _ = keras_tnt.TNTHuge
    with pytest.raises(ValueError, match="no family 'vit'. There are: tnt, "):
        registry.family("vit")


@pytest.mark.one_backend
def test_signatures_and_docstrings_have_every_argument():
    for name in keras_tnt.list_models():
        function = registry.find_model(name)
        parameters = inspect.signature(function).parameters
        assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
        assert parameters["name"].default == name
        assert {"dtype", "class_names", "weights", "input_shape"} <= set(parameters)
        assert "Args:" in function.__doc__
    signature = inspect.signature(keras_tnt.TNTSmall)
    assert signature.parameters["outer_dim"].default == 384
    assert signature.parameters["weights"].default == "imagenet"
    assert inspect.signature(keras_tnt.TNTTiny).parameters["weights"].default is None
    with pytest.raises(TypeError, match=r"TNTSmall\(\).*outer_dimm"):
        keras_tnt.TNTSmall(outer_dimm=3)
    with pytest.raises(TypeError, match=r"DeiT\(\).*depht"):
        keras_tnt.DeiT(depht=3)


@pytest.mark.one_backend
def test_variant_requires_only_a_table_row(monkeypatch):
    from training import configuration, models

    row = Variant({"outer_dim": 16, "inner_dim": 4, "outer_heads": 2, "inner_heads": 2}, 32)
    monkeypatch.setitem(keras_tnt.tnt.VARIANTS, "tnt_nano8", row)
    assert "tnt_nano8" in keras_tnt.list_models("tnt_*")
    function = keras_tnt.TNTNANO8
    assert "outer_dim=16" in function.__doc__ and "32x32" in function.__doc__
    model = keras_tnt.create_model("tnt_nano8", depth=1, classes=3)
    assert model.input_shape == (None, 32, 32, 3) and model.name == "tnt_nano8"
    config = configuration.make("tnt_nano8", data_dir="images")
    assert config.model == "tnt_nano8" and config.mixup == 0.8
    assert models.find_builder("TNTNANO8") is function


@pytest.mark.one_backend
def test_invalid_names_raise():
    with pytest.raises(ValueError, match="lower case"):
        keras_tnt.register_family("Toy", toy_family.ToyNet, {}, toy_family.IMAGE)
    with pytest.raises(ValueError, match="begins with its family's, 'toy2_'. Received: 'other'"):
        keras_tnt.register_family(
            "toy2", toy_family.ToyNet, {"other": Variant({})}, toy_family.IMAGE
        )
    with pytest.raises(ValueError, match="There is a family 'tnt' already"):
        keras_tnt.register_family("tnt", toy_family.ToyNet, {}, toy_family.IMAGE)
    with pytest.raises(ValueError, match="no module 'no_such_plugin' to import"):
        registry.load_plugins("no_such_plugin")


# === User-defined families ===


@pytest.fixture(scope="module")
def toy():
    return keras_tnt.create_model("toynet_tiny", class_names=["cat", "dog", "owl"])


def test_functions_of_a_family_are_listed_built_and_saved(toy, tmp_path):
    assert keras_tnt.list_models("toynet*") == ["toynet_tiny", "toynet_xl2"]
    assert keras_tnt.ToyNetXL2(classes=2).input_shape == (None, 48, 48, 3)
    toy.save(tmp_path / "toy.keras")
    again = keras.models.load_model(tmp_path / "toy.keras")
    images = 100 * normal((2, 32, 32, 3))
    assert_equal(compute(again, images), compute(toy, images))
    assert keras_tnt.class_names(again) == ["cat", "dog", "owl"]
    other = keras_tnt.ToyNetTiny(classes=3, input_shape=(48, 32, 3), weights=tmp_path / "toy.keras")
    assert other.get_layer("position").table.shape == (24, 16)


def test_checkpoints_of_a_family_use_its_tensor_names(toy, tmp_path):
    keras_tnt.save_checkpoint(toy, tmp_path / "toy.safetensors")
    tensors = load_file(tmp_path / "toy.safetensors")
    assert tensors["stem.conv.weight"].shape == (16, 3, 8, 8)
    assert tensors["layer.0.k.weight"].shape == (16, 16)
    assert set(tensors) == {name for entry in entries(toy) for name in entry.names}
    other = keras_tnt.ToyNetTiny(classes=3)
    keras_tnt.load_checkpoint(other, tmp_path / "toy.safetensors")
    for ours, theirs in zip(other.get_weights(), toy.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    del tensors["where"]
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="missing: where"):
        keras_tnt.load_checkpoint(other, tmp_path / "less.safetensors")


def test_images_of_a_family_use_its_transform(toy):
    found = keras_tnt.anatomy(toy)
    assert (found.family, found.grid, found.patch_size) == ("toynet", (4, 4), 8)
    assert (found.image.crop, found.image.covered_size()) == (0.8, (40, 40))
    assert keras_tnt.anatomy(keras_tnt.ToyNetXL2(classes=2)).image.crop == 1.0
    assert [block.name for block in found.blocks] == ["block_0"]
    pixels = np.random.default_rng(0).uniform(0, 255, (40, 40, 3)).round().astype("uint8")
    np.testing.assert_array_equal(keras_tnt.load_image(pixels, toy), pixels[4:36, 4:36])
    normalised = (pixels / 255 - toy_family.IMAGE.mean) / toy_family.IMAGE.std
    outside = keras_tnt.ToyNetTiny(classes=3, include_preprocessing=False)
    outside.set_weights(toy.get_weights())
    expected = compute(toy, pixels[None, 4:36, 4:36].astype("float32"))
    assert_close(compute(outside, normalised[None, 4:36, 4:36].astype("float32")), expected, 1e-5)


def test_family_supports_inspection_and_compilation(toy):
    images = 100 * normal((2, 32, 32, 3))
    maps = keras_tnt.inspection.attention_maps(toy, images)
    assert {name: x.shape for name, x in maps.items()} == {"block_0/outer": (2, 2, 16, 16)}
    features = keras_tnt.inspection.feature_maps(toy, blocks=(1,))
    assert features.output_shape == (None, 4, 4, 16)
    assert_close(keras_tnt.compile_inference(toy)(images), compute(toy, images), 1e-5)


def test_stages_without_sizes_are_inferred_from_their_tokens():
    model = toy_stages.StageNet(input_shape=(32, 48, 3), classes=3, distilled=True)
    found = keras_tnt.anatomy(model)
    assert (found.grid, found.patch_size, found.class_tokens) == ((8, 12), 4, 2)
    assert [(b.stage, b.grid, b.prefix_tokens) for b in found.blocks] == [
        (0, (8, 12), 0),
        (1, (4, 6), 2),
    ]
    images = 100 * normal((2, 32, 48, 3))
    features = keras_tnt.inspection.feature_maps(model)
    assert features.output_shape == [(None, 8, 12, 8), (None, 4, 6, 16)]
    expected = compute(keras.Model(model.inputs[0], model.get_layer("high").output), images)[:, 2:]
    assert_close(compute(features, images)[1], np.reshape(expected, (2, 4, 6, 16)), 1e-6)
    rollout = keras_tnt.inspection.attention_rollout(model, images)
    assert rollout.shape == (2, 2 + 4 * 6, 2 + 8 * 12)
    assert_close(rollout.sum(axis=-1), np.ones((2, 26)), 1e-5)
    assert keras_tnt.inspection.relevance(model, images).shape == (2, 8, 12)


@pytest.mark.slow
@pytest.mark.one_backend
def test_family_is_exported(toy, tmp_path):
    path = keras_tnt.export.saved_model(toy, tmp_path / "toy", signatures=["serving_bytes"])
    card = json.loads((Path(path) / "assets.extra" / "model.json").read_text())
    assert card["labels"] == ["cat", "dog", "owl"] and card["resized_to_cover"] == [40, 40]
    keras_tnt.export.onnx(toy, tmp_path / "toy.onnx")


def run(script, *arguments):
    """Runs a script of the repository and returns what it prints."""
    result = subprocess.run(
        [sys.executable, ROOT / script, "--plugins=tests.helpers.toy_family", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.one_backend
def test_family_is_trained_evaluated_and_exported_by_the_commands(tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    short = ("--epochs=1", "--steps_per_epoch=2", "--batch_size=8", "--notensorboard")
    run("training/train.py", "--model=toynet_tiny", "--dataset=digits", workdir, *short)
    told = run("training/evaluate.py", f"--run={tmp_path / 'run'}", "--json")
    assert json.loads(told)["images"] == 360
    told = run(
        "savedmodels/export.py", f"--run={tmp_path / 'run'}", "--no_saved_model",
        f"--onnx={tmp_path / 'toy.onnx'}",
    )  # fmt: skip
    assert "ONNX, verified" in told
