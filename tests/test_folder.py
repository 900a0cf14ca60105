"""`ImageFolder`: images in one subfolder per class."""

import keras
import numpy as np
import pytest
from PIL import Image

import keras_tnt
from tests.helpers.checks import run_python


def tiny(**arguments):
    return keras_tnt.DeiT(
        **{
            "input_shape": (16, 16, 3),
            "patch_size": 8,
            "embed_dim": 8,
            "depth": 1,
            "num_heads": 1,
            **arguments,
        }
    )


@pytest.fixture
def folder(tmp_path):
    """Writes five images of class a, three of class b, and files that are not images."""
    rng = np.random.default_rng(0)
    for name, count in (("b", 3), ("a", 5)):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for i in range(count):
            place = tmp_path / name / ("deeper" if i == 0 else "")
            pixels = rng.integers(0, 256, (20, 24, 3), dtype="uint8")
            Image.fromarray(pixels).save(place / f"{i}.{'PNG' if i % 2 else 'png'}")
        (tmp_path / name / "._x.png").write_text("no image")
        (tmp_path / name / "notes.txt").write_text("no image")
    for name in (".hidden", "__MACOSX", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "__MACOSX" / "x.png").write_text("no image")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    return tmp_path


def test_each_image_is_loaded_once_as_by_load_image(folder):
    model = tiny(classes=2)
    data = keras_tnt.ImageFolder(folder, model, batch_size=3)
    assert data.class_names == ["a", "b"] and len(data) == 3
    batches = [data[i] for i in range(len(data))]
    assert [len(labels) for _, labels in batches] == [3, 3, 2]
    images = np.concatenate([images for images, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    assert sorted(labels.tolist()) == [0] * 5 + [1] * 3
    for image, label, number in zip(images, labels, data.order, strict=True):
        path = data.paths[number]
        assert f"/{data.class_names[label]}/" in path
        np.testing.assert_array_equal(image, keras_tnt.load_image(path, model))


def test_fit_accepts_it_and_the_seed_sets_the_order(folder):
    model = tiny(classes=2)
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=True)
    data, other, third = (
        keras_tnt.ImageFolder(folder, model, batch_size=4, seed=seed) for seed in (1, 1, 2)
    )
    first = data.order.tolist()
    assert first == other.order.tolist() != third.order.tolist()
    for each in (data, other):
        model.fit(each, epochs=1, verbose=0)
    assert data.order.tolist() == other.order.tolist() != first
    still = keras_tnt.ImageFolder(folder, model, shuffle=False)
    assert still.order.tolist() == list(range(8))
    assert model.predict(still, verbose=0).shape == (8, 2)


@pytest.mark.one_backend
def test_subsets_are_stratified_and_disjoint(folder):
    parts = [
        keras_tnt.ImageFolder(folder, tiny(), validation_share=0.4, subset=subset)
        for subset in ("training", "validation")
    ]
    assert [np.bincount(part.labels).tolist() for part in parts] == [[3, 2], [2, 1]]
    assert not set(parts[0].paths) & set(parts[1].paths)
    assert len(set(parts[0].paths) | set(parts[1].paths)) == 8


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"subset": "test"}, "Received: 'test'"),
        ({"validation_share": 0.2}, "goes with `subset`"),
        ({"subset": "training"}, "goes with `subset`"),
        ({"directory": "no/such"}, "must be a folder"),
        ({"directory": ""}, "must be a folder"),
    ],
)
def test_invalid_arguments_raise(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_tnt.ImageFolder(**{"directory": folder, "model": tiny(), **arguments})
    with pytest.raises(ValueError, match="a folder of images for each class"):
        keras_tnt.ImageFolder(folder / "empty", tiny())


# Trains on a folder while TensorFlow cannot be imported.
WITHOUT_TENSORFLOW = """
import sys
sys.modules["tensorflow"] = None
import keras_tnt
model = keras_tnt.DeiT(input_shape=(16, 16, 3), patch_size=8, embed_dim=8, depth=1, num_heads=1)
images = keras_tnt.ImageFolder(sys.argv[1], model, batch_size=4)
mine = keras_tnt.reset_classifier(model, class_names=images.class_names)
mine.compile(keras_tnt.finetuning.layerwise("adamw", mine), "sparse_categorical_crossentropy")
mine.fit(images, epochs=1, verbose=0)
keras_tnt.save_pretrained(mine, sys.argv[2])
print(keras_tnt.class_names(keras_tnt.load_pretrained(sys.argv[2])))
"""


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="needs another backend")
def test_fine_tuning_does_not_require_tensorflow(folder, tmp_path):
    printed = run_python(WITHOUT_TENSORFLOW, str(folder), str(tmp_path / "bundle"))
    assert "['a', 'b']" in str(printed)
