"""`weights="imagenet"`, with a fake hub that has full-size checkpoints under timm's names."""

from pathlib import Path

import keras
import numpy as np
import pytest
from safetensors import safe_open

import keras_tnt
from keras_tnt.models import registry
from keras_tnt.models.pretrained import fetch, find_source
from keras_tnt.weights import hub as downloads
from tests.helpers import golden
from tests.helpers.checks import BACKEND

ROWS = {row.name: row for row in registry.checkpoints()}
PUBLISHED = golden.checkpoints()
# Weights by name, and the variant's arguments that select them.
CASES = {
    "tnt_s_patch16_224.in1k": {},
    "tnt_s_legacy_patch16_224.in1k": {"legacy": True},
    "tnt_b_patch16_224.in1k": {},
    "deit_small_distilled_patch16_224.fb_in1k": {"distilled": True},
    "deit_base_patch16_384.fb_in1k": {"input_shape": (384, 384, 3)},
    "cait_xxs24_224.fb_dist_in1k": {},
}
if BACKEND != "tensorflow":  # the loader is the same on every backend
    for name in ("tnt_s_legacy_patch16_224", "tnt_b_patch16_224"):
        del CASES[f"{name}.in1k"]
    del CASES["deit_base_patch16_384.fb_in1k"]


def images(model):
    """Returns a noise image of the model's size."""
    return np.random.default_rng(0).uniform(0, 255, (1, *model.input_shape[1:])).astype("float32")


def logits(model):
    if keras.backend.backend() == "jax":  # JAX would compile each operation separately
        return model.predict(images(model), verbose=0)
    return keras.ops.convert_to_numpy(model(images(model)))


def randomize(model):
    """Assigns random values to every variable, so that none that is not loaded is missed."""
    rng = np.random.default_rng(1)
    for variable in model.variables:
        if variable.dtype == "float32":
            noise = rng.standard_normal(variable.shape, dtype="float32")
            variable.assign(keras.ops.convert_to_numpy(variable) + 0.02 * noise)


def publish(hub, row, model, path):
    """Adds a model to the hub under a row's name, after checking its tensors.

    The tensor names and shapes must be those of the public file.
    """
    keras_tnt.save_checkpoint(model, path)
    with safe_open(path, framework="np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    assert shapes == PUBLISHED[row.name]["tensors"]
    hub.add(row.repository, row.file, path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_imagenet_weights_give_the_logits_of_the_published_model(name, hub, tmp_path):
    row = ROWS[name]
    build = getattr(keras_tnt, row.model)
    arguments = {"classifier_activation": None, **CASES[name]}
    reference = build(weights=None, **arguments)
    randomize(reference)
    publish(hub, row, reference, tmp_path / "model.safetensors")

    model = build(**arguments)
    assert hub.downloads() == 1
    for actual, expected in zip(model.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_array_equal(actual, expected)
    if row.parameters < 50e6:  # equal weights suffice for larger models
        golden.assert_close(logits(model), logits(reference), 1e-6)

    hub.requests.clear()
    assert Path(fetch(find_source(name))).stat().st_size > 4e6
    assert hub.requests == []


@pytest.mark.one_backend
@pytest.mark.slow
def test_rebuilt_model_uses_the_cached_weights(hub, tmp_path):
    row = ROWS["deit_tiny_patch16_224.fb_in1k"]
    reference = keras_tnt.DeiTTiny(weights=None, classifier_activation=None)
    publish(hub, row, reference, tmp_path / "model.safetensors")
    for requests in (2, 2):
        model = keras_tnt.DeiTTiny(weights="imagenet", classifier_activation=None)
        assert len(hub.requests) == requests
        golden.assert_close(logits(model), logits(reference), 1e-6)


# === Selection of a row, without a download ===


@pytest.fixture
def asked_for(monkeypatch):
    """Makes downloads fail, and returns the list of repositories that they requested."""
    asked = []

    def fetch(repository, *_, **__):
        asked.append(repository.removeprefix("timm/"))
        raise ConnectionError("this test downloads nothing")

    monkeypatch.setattr(downloads, "fetch", fetch)
    return asked


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("model", "arguments", "expected"),
    [
        ("TNTSmall", {}, "tnt_s_patch16_224.in1k"),
        ("TNTSmall", {"legacy": True}, "tnt_s_legacy_patch16_224.in1k"),
        ("TNTSmall", {"input_shape": (384, 384, 3)}, "tnt_s_patch16_224.in1k"),
        ("TNTSmall", {"stochastic_depth": 0.1, "dropout": 0.1}, "tnt_s_patch16_224.in1k"),
        ("TNTSmall", {"outer_dim": 384}, "tnt_s_patch16_224.in1k"),
        ("TNTBase", {"include_top": False, "classes": 3}, "tnt_b_patch16_224.in1k"),
        ("DeiTTiny", {}, "deit_tiny_patch16_224.fb_in1k"),
        ("DeiTTiny", {"distilled": True}, "deit_tiny_distilled_patch16_224.fb_in1k"),
        ("DeiTBase", {}, "deit_base_patch16_224.fb_in1k"),
        ("DeiTBase", {"input_shape": (384, 384, 3)}, "deit_base_patch16_384.fb_in1k"),
        ("DeiTBase", {"input_shape": (448, 448, 3)}, "deit_base_patch16_384.fb_in1k"),
        ("DeiTBase", {"input_shape": (96, 96, 3)}, "deit_base_patch16_224.fb_in1k"),
        (
            "DeiTBase",
            {"input_shape": (384, 384, 3), "distilled": True},
            "deit_base_distilled_patch16_384.fb_in1k",
        ),
        ("CaiTXXS24", {}, "cait_xxs24_224.fb_dist_in1k"),
        ("CaiTXS24", {}, "cait_xs24_384.fb_dist_in1k"),
        ("CaiTXS24", {"input_shape": (224, 224, 3)}, "cait_xs24_384.fb_dist_in1k"),
        ("CaiTM48", {}, "cait_m48_448.fb_dist_in1k"),
    ],
)
@pytest.mark.one_backend
def test_imagenet_selects_the_matching_row(model, arguments, expected, asked_for):
    with pytest.raises(ConnectionError):
        getattr(keras_tnt, model)(**arguments)
    assert asked_for == [expected]


@pytest.mark.one_backend
def test_image_size_is_read_in_channels_first_format(asked_for):
    keras.config.set_image_data_format("channels_first")
    with pytest.raises(ConnectionError):
        keras_tnt.DeiTBase(input_shape=(3, 384, 384))
    with pytest.raises(ConnectionError):
        keras_tnt.DeiTBase(input_tensor=keras.Input((3, 384, 384)))
    assert asked_for == ["deit_base_patch16_384.fb_in1k"] * 2


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "name", ["TNTTiny", *(f"PyramidTNT{size}" for size in ("Tiny", "Small", "Medium", "Base"))]
)
def test_variant_without_public_weights_raises(name, asked_for):
    with pytest.raises(ValueError, match=rf"no public weights of {name}\. .*weights='<path>'"):
        getattr(keras_tnt, name)(weights="imagenet")
    assert asked_for == []


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 6}, r"no public weights of TNTSmall\(depth=6\), only of TNTSmall, TNTSmall\(le"),
        ({"distilled": True}, r"no public weights of TNTSmall\(distilled=True\)"),
        ({"classes": 10}, "1000 classes, the model 10.* classes=1000, or include_top=False"),
        ({"weights": "tnt_b_patch16_224.in1k"}, "belong to keras_tnt.TNTBase, not to TNTSmall"),
        (
            {"weights": "tnt_s_legacy_patch16_224.in1k", "legacy": False},
            r"belong to TNTSmall\(legacy=True\), not to TNTSmall\(legacy=False\): leave out legacy",
        ),
        ({"weights": "tnt_s_patch16_224.in1k", "depth": 6}, "leave out depth"),
        ({"weights": "no/such/file"}, "'no/such/file', which is no file"),
        ({"weights": __file__}, "A file of weights ends in .weights.h5"),
        ({"weights": "hf://flowers"}, "'hf://owner/repository'.* Received: 'hf://flowers'"),
        ({"input_shape": (60, 60, 3)}, "multiples of 16"),
        ({"pooling": "mean"}, "`pooling` must be one of"),
    ],
)
def test_invalid_arguments_raise_before_a_download(arguments, message, asked_for):
    with pytest.raises(ValueError, match=message):
        keras_tnt.TNTSmall(**arguments)
    assert asked_for == []


@pytest.mark.one_backend
def test_unknown_argument_raises_before_a_download(asked_for):
    with pytest.raises(TypeError, match=r"TNTSmall\(\) .*unexpected keyword argument 'deepth'"):
        keras_tnt.TNTSmall(deepth=6)
    assert asked_for == []


@pytest.mark.one_backend
def test_builder_does_not_accept_imagenet():
    with pytest.raises(ValueError, match="belongs to the variants, such as keras_tnt.TNTSmall"):
        keras_tnt.TNT(weights="imagenet")
