"""Keras weight files are loaded completely, or not at all with the reason."""

import zipfile

import keras
import numpy as np
import pytest

import keras_tnt
from keras_tnt.weights import load_keras_file, load_keras_model

DEIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "input_shape": (32, 32, 3), "classes": 8}
ENDINGS = (".keras", ".weights.h5")


def values(model):
    return [keras.ops.convert_to_numpy(v).copy() for v in model.variables]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def trained():
    """Returns a model with an optimizer state that is saved with it."""
    model = keras_tnt.DeiT(**DEIT, dropout=0.1)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("keras")
    trained.save(folder / "model.keras")
    trained.save_weights(folder / "model.weights.h5")
    return {ending: str(folder / f"model{ending}") for ending in ENDINGS}


@pytest.mark.parametrize("ending", ENDINGS)
def test_keras_file_fills_every_variable(ending, files, trained):
    model = keras_tnt.DeiT(**DEIT, dropout=0.1, weights=files[ending])
    assert same(model.get_weights(), trained.get_weights())


def test_headless_model_ignores_the_heads(files, trained):
    model = keras_tnt.DeiT(**DEIT, include_top=False, weights=files[".keras"])
    assert same(model.get_weights(), trained.get_weights()[: len(model.weights)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 6}, "The file has 8 classes, the model 6."),
        ({"depth": 3}, "missing: block_2"),
        ({"depth": 1}, "unused: transformer_block_1"),
        ({"distilled": True}, "missing: head_distillation"),
        ({"embed_dim": 32}, "shape: class_token has (1, 1, 16) in the file, (1, 1, 32) in the"),
    ],
)
@pytest.mark.one_backend
def test_mismatch_raises_with_the_difference_and_changes_nothing(arguments, message, files):
    model = keras_tnt.DeiT(**DEIT | arguments)
    before = values(model)
    for path in files.values():
        with pytest.raises(ValueError, match="does not fit model 'deit'. Nothing was") as caught:
            load_keras_file(model, path)
        assert message in str(caught.value)
        assert path in str(caught.value)
    assert same(values(model), before)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.one_backend
def test_truncated_keras_file_raises(ending, files, trained, tmp_path):
    path = tmp_path / f"cut{ending}"
    with open(files[ending], "rb") as file:
        whole = file.read()
    for size in (0, 500, 3000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{path}' cannot be read.*truncated or damaged"):
            load_keras_file(trained, str(path))


def test_load_keras_model_reads_or_raises(files, trained, tmp_path):
    assert same(load_keras_model(files[".keras"]).get_weights(), trained.get_weights())
    with open(files[".keras"], "rb") as file:
        whole = file.read()
    path = tmp_path / "model.keras"
    path.write_bytes(whole[:3000])
    with pytest.raises(ValueError, match=f"{path}' cannot be read.*truncated or damaged"):
        load_keras_model(str(path))
    with zipfile.ZipFile(files[".keras"]) as old, zipfile.ZipFile(path, "w") as new:
        new.writestr("model.weights.h5", old.read("model.weights.h5"))
        new.writestr("config.json", "[" * 100_000)
    with pytest.raises(ValueError, match=f"{path}' holds no model that Keras can build"):
        load_keras_model(str(path))


@pytest.mark.one_backend
def test_missing_file_raises(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.keras"):
        load_keras_file(trained, str(tmp_path / "none.keras"))
