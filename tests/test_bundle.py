"""Bundles (`save_pretrained`): read back by us and by timm, and pushed to a hub."""

import importlib.machinery
import importlib.util
import json
import sys
import types

import keras
import numpy as np
import pytest

import keras_tnt
from keras_tnt.models.bundle import build_config
from tests.helpers.checks import compute, normal

NAMES = ["cat", "dog", "bird"]
TINY = {
    "input_shape": (32, 32, 3),
    "patch_size": 8,
    "inner_stride": 4,
    "depth": 1,
    "outer_dim": 16,
    "inner_dim": 4,
    "outer_heads": 2,
    "inner_heads": 2,
    "inner_blocks": (0,),
}


def images(model, scale=255):
    return scale * np.abs(normal((2, *model.input_shape[1:])))


def test_any_architecture_round_trips(tmp_path):
    model = keras_tnt.TNT(**TINY, class_names=NAMES, distilled=True, classifier_activation=None)
    layer = keras_tnt.anatomy(model).input_normalization
    layer.mean, layer.crop, layer.interpolation = (0.1, 0.2, 0.3), 0.8, "bilinear"
    folder = keras_tnt.save_pretrained(model, tmp_path / "bundle")
    found = keras_tnt.load_pretrained(folder)
    assert keras_tnt.class_names(found) == NAMES
    assert keras_tnt.anatomy(found).image == keras_tnt.anatomy(model).image
    np.testing.assert_allclose(
        compute(found, images(model)), compute(model, images(model)), atol=1e-5
    )


@pytest.mark.one_backend
def test_weights_argument_reads_classes_names_and_size_of_a_bundle(tmp_path):
    model = keras_tnt.DeiTTiny(weights=None, input_shape=(64, 64, 3), class_names=NAMES)
    folder = keras_tnt.save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "deit_tiny_patch16_224"
    assert config["model_args"] == {"img_size": [64, 64]}
    assert config["label_names"] == NAMES
    found = keras_tnt.DeiTTiny(weights=folder)
    assert found.input_shape == (None, 64, 64, 3)
    assert keras_tnt.class_names(found) == NAMES
    np.testing.assert_allclose(
        compute(found, images(model)), compute(model, images(model)), atol=1e-5
    )
    body = keras_tnt.DeiTTiny(weights=folder, include_top=False, pooling="token")
    assert body.output_shape == (None, 192)
    with pytest.raises(ValueError, match="3 classes"):
        keras_tnt.DeiTTiny(weights=folder, classes=5)
    with pytest.raises(ValueError, match="belong to keras_tnt.DeiTTiny"):
        keras_tnt.DeiTSmall(weights=folder)


@pytest.mark.slow
@pytest.mark.one_backend
def test_bundle_has_the_architecture_of_the_model():
    size = {"weights": None, "input_shape": (32, 32, 3), "classes": 3}
    for build, arguments, architecture in (
        ("DeiTTiny", {"distilled": True}, "deit_tiny_distilled_patch16_224"),
        ("TNTTiny", {}, "tnt_tiny"),
        ("TNTTiny", {"depth": 1}, "tnt"),
        ("DeiTTiny", {"num_heads": 1}, "deit"),
        ("PyramidTNTTiny", {}, "pyramid_tnt_tiny"),
    ):
        model = keras_tnt.create_model(build, **size, **arguments)
        assert build_config(model)["architecture"] == architecture
    copy = keras.models.clone_model(model)
    assert build_config(copy)["architecture"] == architecture


@pytest.mark.one_backend
def test_wrapped_classifier_is_saved_if_equivalent_to_a_head(tmp_path):
    def around(pooling):
        body = keras_tnt.TNT(**TINY, include_top=False, pooling=pooling)
        return keras.Sequential([body, keras.layers.Dense(3, "softmax", name="head")])

    model = around("token")
    found = keras_tnt.load_pretrained(keras_tnt.save_pretrained(model, tmp_path))
    np.testing.assert_allclose(
        compute(found, images(model)), compute(model, images(model)), atol=1e-5
    )
    with pytest.raises(ValueError, match="reads pooling='avg'"):
        keras_tnt.save_pretrained(around("avg"), tmp_path)
    body = keras_tnt.TNT(**TINY, include_top=False, pooling="avg")
    found = keras_tnt.load_pretrained(keras_tnt.save_pretrained(body, tmp_path))
    np.testing.assert_allclose(compute(found, images(body)), compute(body, images(body)), atol=1e-5)


@pytest.mark.one_backend
def test_folder_without_a_bundle_raises(tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        keras_tnt.DeiTTiny(weights=str(tmp_path))
    (tmp_path / "config.json").write_text('{"architecture": "resnet50"}')
    with pytest.raises(ValueError, match="holds no model"):
        keras_tnt.DeiTTiny(weights=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="'resnet50'"):
        keras_tnt.DeiTTiny(weights=str(tmp_path))
    with pytest.raises(ValueError, match="holds no model of keras_tnt.save_pretrained"):
        keras_tnt.load_pretrained(tmp_path)


# === timm ===


class Anything(type):
    """A metaclass whose classes have every attribute."""

    def __getattr__(cls, name):
        return name


def anything(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything(name, (), {})


class NoTorchvision:
    """An import finder that fakes torchvision, which timm imports and these models do not use."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = anything
        return module

    def exec_module(self, module):
        pass


@pytest.fixture(scope="module")
def timm():
    """Yields timm, which may be installed without a torchvision that matches torch."""
    pytest.importorskip("torch")
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    stands_in = importlib.util.find_spec("torchvision") is None
    if stands_in:
        sys.meta_path.append(finder := NoTorchvision())
    import timm

    yield timm
    if stands_in:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("tnt_small", {}),
        ("tnt_small", {"legacy": True}),
        ("deit_small", {"distilled": True}),
        ("cait_xxs24", {}),
    ],
)
def test_timm_loads_the_bundle(name, arguments, timm, tmp_path):
    import torch

    settings = {"input_shape": (64, 64, 3), "class_names": NAMES, "classifier_activation": None}
    model = keras_tnt.create_model(name, weights=None, **settings, **arguments)
    model.set_weights([w + 0.02 * normal(w.shape, i) for i, w in enumerate(model.get_weights())])
    folder = keras_tnt.save_pretrained(model, tmp_path)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_data_config({}, model=theirs)
    image = keras_tnt.anatomy(model).image
    assert tuple(config["input_size"]) == (3, 64, 64)
    assert (tuple(config["mean"]), tuple(config["std"])) == (image.mean, image.std)
    assert (config["crop_pct"], config["interpolation"]) == (image.crop, image.interpolation)
    assert list(theirs.pretrained_cfg["label_names"]) == NAMES

    pixels = 255 * np.random.default_rng(0).uniform(size=(2, *model.input_shape[1:]))
    pixels = pixels.astype("float32")
    normalised = (pixels / 255 - image.mean) / image.std
    with torch.no_grad():
        expected = theirs(torch.from_numpy(normalised.transpose(0, 3, 1, 2).astype("float32")))
    found = compute(model, pixels)
    assert np.abs(found - expected.numpy()).max() < 1e-4 * np.ptp(expected.numpy())


# === The hub ===


@pytest.mark.one_backend
def test_pushed_model_loads_from_the_hub(hub, tmp_path):  # noqa: F811
    model = keras_tnt.DeiTTiny(weights=None, input_shape=(32, 32, 3), class_names=NAMES)
    hub.folder = tmp_path
    source = keras_tnt.push_to_hub(model, "someone/flowers", token="hf_secret")
    assert source == "hf://someone/flowers"
    [created] = hub.created
    assert (created["organization"], created["name"]) == ("someone", "flowers")
    assert hub.tokens == {"Bearer hf_secret"}
    found = keras_tnt.DeiTTiny(weights=source)
    assert keras_tnt.class_names(found) == NAMES
    np.testing.assert_allclose(
        compute(found, images(model)), compute(model, images(model)), atol=1e-5
    )
    hub.status = 403
    with pytest.raises(OSError, match="'someone/flowers' cannot be written at http://127"):
        keras_tnt.push_to_hub(model, "someone/flowers", token="hf_secret")
    with pytest.raises(ValueError, match="owner/name"):
        keras_tnt.push_to_hub(model, "flowers")
