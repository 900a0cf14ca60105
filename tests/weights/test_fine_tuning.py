"""Fine-tuning a checkpoint on handwritten digits, as in the README."""

import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits

import keras_tnt
from keras_tnt.layers import TNTBlock
from tests.helpers import golden


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Returns the path of a TNT-S checkpoint of two blocks for 1000 classes at 224x224."""
    keras.utils.set_random_seed(1)
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    keras_tnt.save_checkpoint(keras_tnt.TNTSmall(depth=2, weights=None), path)
    return str(path)


@pytest.fixture(scope="module")
def digits():
    """Returns (images of 64x64 pixels in [0, 255], labels)."""
    data = load_digits()
    images = np.kron(data.images[:256] * (255 / 16), np.ones((8, 8)))
    return np.repeat(images[..., None], 3, axis=-1).astype("float32"), data.target[:256]


def classifier(backbone):
    return keras.Sequential([backbone, keras.layers.Dense(10, name="head")])


def train(model, digits, rate, epochs):
    """Returns the loss of each epoch."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(rate), loss, metrics=["accuracy"])
    return model.fit(*digits, batch_size=32, epochs=epochs, verbose=0).history["loss"]


def predict(model, digits):
    return model.predict(digits[0][:64], verbose=0)


def through_a_checkpoint(model, path):
    """Returns a TNT-S with its own head, loaded from a checkpoint of `model`."""
    keras_tnt.save_checkpoint(model, path)
    return keras_tnt.TNTSmall(
        input_shape=(64, 64, 3), weights=path, classes=10, classifier_activation=None, depth=2
    )


@pytest.mark.slow
def test_train_the_head_then_all_layers(checkpoint, digits, tmp_path):
    backbone = keras_tnt.TNTSmall(
        include_top=False, pooling="token", input_shape=(64, 64, 3), weights=checkpoint, depth=2
    )
    pretrained = backbone.get_weights()
    model = classifier(backbone)

    backbone.trainable = False
    losses = train(model, digits, 1e-2, epochs=3)
    assert losses[-1] < losses[0]
    for before, after in zip(pretrained, backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)

    backbone.trainable = True
    losses += train(model, digits, 3e-5, epochs=4)
    assert losses[-1] < losses[2]
    accuracy = model.evaluate(*digits, verbose=0, return_dict=True)["accuracy"]
    assert accuracy > 0.3

    model.save(tmp_path / "digits.keras")
    again = keras.saving.load_model(tmp_path / "digits.keras")
    golden.assert_close(predict(again, digits), predict(model, digits), 1e-5)
    again = through_a_checkpoint(model, tmp_path / "digits.safetensors")
    golden.assert_close(predict(again, digits), predict(model, digits), 1e-5)


@pytest.mark.one_backend
@pytest.mark.slow
def test_lora_trains_few_weights_and_round_trips(checkpoint, digits, tmp_path):
    backbone = keras_tnt.TNTSmall(
        include_top=False, pooling="token", input_shape=(64, 64, 3), weights=checkpoint, depth=2
    )
    backbone.trainable = False
    model = classifier(backbone)
    kernels = {}
    for block in backbone.layers:
        if isinstance(block, TNTBlock):
            qkv = block.outer.attention.qkv
            qkv.trainable = block.trainable = backbone.trainable = True
            qkv.enable_lora(rank=4)
            kernels[block.name] = keras.ops.convert_to_numpy(qkv.kernel)
    assert len(kernels) == 2
    losses = train(model, digits, 3e-3, epochs=3)
    assert losses[-1] < losses[0]
    for block in backbone.layers:
        if block.name in kernels:
            adapted = keras.ops.convert_to_numpy(block.outer.attention.qkv.kernel)
            assert np.abs(adapted - kernels[block.name]).max() > 0

    model.save(tmp_path / "digits.keras")
    again = keras.saving.load_model(tmp_path / "digits.keras", compile=False)
    golden.assert_close(predict(again, digits), predict(model, digits), 1e-5)
    again = through_a_checkpoint(model, tmp_path / "digits.safetensors")
    golden.assert_close(predict(again, digits), predict(model, digits), 1e-4)
