"""Fine-tuned checkpoints from any hub repository: classes, size and normalization are applied."""

import json

import keras
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import load_file

import keras_tnt
from keras_tnt.models.pretrained import find_source
from tests.helpers import golden

FLOWERS = "hf://someone/flowers"
CONFIG = {
    "architecture": "deit_tiny_distilled_patch16_224",
    "num_classes": 7,
    "model_args": {"img_size": 64},
    "pretrained_cfg": {
        "input_size": [3, 64, 64],
        "num_classes": 7,
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.25, 0.3],
    },
}
DEIT = {"embed_dim": 192, "num_heads": 3, "distilled": True, "input_shape": (64, 64, 3)}


@pytest.fixture(scope="module")
def reference():
    """Returns the model that was trained."""
    return keras_tnt.DeiT(**DEIT, classes=7, include_preprocessing=False)


@pytest.fixture(scope="module")
def checkpoint(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("flowers") / "model.safetensors"
    keras_tnt.save_checkpoint(reference, path)
    return path


@pytest.fixture
def publish(hub, checkpoint, tmp_path):
    """Returns a function that adds the checkpoint and a config.json to the hub."""

    def put(config, **more):
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config | more))
            hub.add("someone/flowers", "config.json", tmp_path / "config.json")
        hub.add("someone/flowers", "model.safetensors", checkpoint)
        return hub

    return put


def images():
    return np.random.default_rng(0).uniform(0, 255, (2, 64, 64, 3)).astype("float32")


def test_model_uses_classes_size_and_normalization_of_the_repository(publish, reference):
    publish(CONFIG)
    model = keras_tnt.DeiTTiny(weights=FLOWERS)
    assert model.input_shape == (None, 64, 64, 3)
    assert model.output_shape == (None, 7)
    normalised = (images() / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]
    expected = reference.predict(normalised, verbose=0)
    golden.assert_close(model.predict(images(), verbose=0), expected)


def test_normalization_is_saved_with_the_model(publish, tmp_path):
    publish(CONFIG)
    model = keras_tnt.DeiTTiny(weights=FLOWERS)
    model.save(tmp_path / "flowers.keras")
    again = keras.saving.load_model(tmp_path / "flowers.keras")
    golden.assert_close(
        again.predict(images(), verbose=0), model.predict(images(), verbose=0), 1e-6
    )


@pytest.mark.one_backend
def test_headless_model_uses_the_repository(publish):
    publish(CONFIG)
    backbone = keras_tnt.DeiTTiny(weights=FLOWERS, include_top=False, input_shape=(32, 96, 3))
    assert backbone.output_shape == (None, 2, 6, 192)


@pytest.mark.one_backend
def test_other_number_of_classes_raises_before_the_download(publish):
    hub = publish(CONFIG)
    with pytest.raises(ValueError, match="have 7 classes, the model 5. Say classes=7, or include"):
        keras_tnt.DeiTTiny(weights=FLOWERS, classes=5)
    assert hub.downloads() == 0


@pytest.mark.one_backend
def test_other_variant_raises_before_the_download(publish):
    hub = publish(CONFIG)
    with pytest.raises(ValueError, match="belong to keras_tnt.DeiTTiny, not to TNTSmall"):
        keras_tnt.TNTSmall(weights=FLOWERS)
    assert hub.downloads() == 0


@pytest.mark.one_backend
def test_architecture_of_another_package_raises(publish):
    hub = publish(CONFIG, architecture="resnet50")
    with pytest.raises(ValueError, match="holds a 'resnet50'. keras_tnt reads .*tnt_s_patch16_224"):
        keras_tnt.DeiTTiny(weights=FLOWERS)
    assert hub.downloads() == 0


@pytest.mark.one_backend
def test_repository_without_a_classifier_raises(publish):
    publish(CONFIG, num_classes=0)
    with pytest.raises(ValueError, match="no classifier, the model 1000. Say include_top=False"):
        keras_tnt.DeiTTiny(weights=FLOWERS)


@pytest.mark.one_backend
def test_repository_without_config_is_matched_by_its_tensors(publish, reference):
    publish(None)
    with pytest.raises(ValueError, match="7 classes, the model 1000: .*classes=7"):
        keras_tnt.DeiTTiny(weights=FLOWERS, distilled=True, input_shape=(64, 64, 3))
    model = keras_tnt.DeiT(**DEIT, classes=7, include_preprocessing=False, weights=FLOWERS)
    for actual, expected in zip(model.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.one_backend
def test_torch_file_is_the_fallback(hub, checkpoint, reference, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.tensor(value) for name, value in load_file(checkpoint).items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    hub.add("someone/flowers", "pytorch_model.bin", tmp_path / "pytorch_model.bin")
    model = keras_tnt.DeiT(**DEIT, classes=7, include_preprocessing=False, weights=FLOWERS)
    for actual, expected in zip(model.get_weights(), reference.get_weights(), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.one_backend
def test_repository_without_weights_raises(hub, tmp_path):
    (tmp_path / "README.md").write_text("soon")
    hub.add("someone/flowers", "README.md", tmp_path / "README.md")
    with pytest.raises(
        ValueError, match="holds no weights .* model.safetensors, pytorch_model.bin"
    ):
        keras_tnt.DeiT(**DEIT, weights=FLOWERS)


@pytest.mark.one_backend
def test_cached_repository_is_loaded_offline(publish, monkeypatch):
    hub = publish(CONFIG)
    first = keras_tnt.DeiTTiny(weights=FLOWERS)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    second = keras_tnt.DeiTTiny(weights=FLOWERS)
    assert hub.requests == []
    for actual, expected in zip(second.get_weights(), first.get_weights(), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.one_backend
def test_revision_is_requested(publish):
    publish(CONFIG)
    assert find_source(f"{FLOWERS}@main").classes == 7
    with pytest.raises(ValueError, match="no revision 'v2'"):
        find_source(f"{FLOWERS}@v2")


@pytest.mark.one_backend
def test_weights_name_sets_size_and_arguments():
    source = find_source("deit_base_distilled_patch16_384.fb_in1k")
    assert source.model == "DeiTBase"
    assert source.arguments == {"distilled": True}
    assert source.size == (384, 384)
    assert source.classes == 1000
