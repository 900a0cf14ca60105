"""Faithfulness metrics on a model that is small enough to remove every patch."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_tnt
from keras_tnt import inspection
from keras_tnt.inspection.faithfulness import saco
from keras_tnt.inspection.subject import Subject

GRAY = (10.0, 20.0, 30.0)


@pytest.fixture(scope="module")
def model():
    model = keras_tnt.DeiT(
        input_shape=(16, 24, 3), patch_size=8, classes=4, depth=1, embed_dim=12, num_heads=3
    )
    draw = np.random.default_rng(1)
    for weight in model.trainable_variables:
        if len(weight.shape) > 1:  # also tokens and positions: Keras's initial values are random
            scale = 0.5 if weight.name == "kernel" else 0.02
            weight.assign(scale * draw.normal(size=weight.shape))
    return model


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(0, 255, (3, 16, 24, 3))


def probabilities(model, images, target):
    return ops.convert_to_numpy(model(np.stack(images), training=False))[:, target]


def without(image, *patches):
    """Returns the image with the given ones of its six patches in gray."""
    image = image.copy()
    for row, column in (divmod(patch, 3) for patch in patches):
        image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = GRAY
    return image


@pytest.mark.one_backend
def test_patches_are_deleted_and_inserted_by_relevance(model, images):
    order = [4, 0, 2, 5, 1, 3]
    maps = np.empty(6)
    maps[order] = [6, 5, 4, 3, 2, 1]
    found = inspection.faithfulness(model, images[:1], maps.reshape(1, 2, 3), 2, baseline=GRAY)
    deleted = [without(images[0], *order[:n]) for n in range(7)]
    inserted = [without(images[0], *order[n:]) for n in range(7)]
    deleted, inserted = (probabilities(model, x, 2) for x in (deleted, inserted))
    np.testing.assert_allclose(found["fractions"], np.arange(7) / 6)
    np.testing.assert_allclose(found["deletion"], deleted, atol=1e-5)
    np.testing.assert_allclose(found["insertion"], inserted, atol=1e-5)
    area = (sum(deleted) - (deleted[0] + deleted[-1]) / 2) / 6
    np.testing.assert_allclose(found["deletion_area"], area, atol=1e-5)


def test_occlusion_maps_are_faithful(model, images):
    lacking = [[x, *(without(x, patch) for patch in range(6))] for x in images]
    found = [probabilities(model, cases, 1) for cases in lacking]
    maps = np.reshape([p[0] - p[1:] for p in found], (3, 2, 3))
    found = inspection.faithfulness(model, images, maps, 1, baseline=GRAY)
    contrary = inspection.faithfulness(model, images, -maps, 1, baseline=GRAY)
    assert found["images"] == 3
    assert found["saco"] == pytest.approx(1) and contrary["saco"] == pytest.approx(-1)
    assert -1 < found["random"]["saco"] < 1
    assert found["deletion_area"] < found["random"]["deletion_area"] < contrary["deletion_area"]
    assert found["random"]["deletion_area"] == contrary["random"]["deletion_area"]


@pytest.mark.one_backend
def test_targets_default_to_the_predicted_classes(model, images):
    maps = np.random.default_rng(2).random((3, 4, 6))
    predicted = Subject(model, images).predict(images).argmax(axis=-1)
    by_default = inspection.faithfulness(model, images, maps)
    told = inspection.faithfulness(model, images, maps, predicted)
    np.testing.assert_array_equal(by_default["deletion"], told["deletion"])
    assert len(by_default["fractions"]) == 21


@pytest.mark.one_backend
def test_saco_weighs_pairs_by_their_difference_in_relevance():
    # Of the pairs 3-1, 3-0 and 1-0 the first is misordered: (3 + 1 - 2) / (2 + 3 + 1).
    assert saco(np.array([3.0, 1, 0]), np.array([0.2, 0.3, 0.1])) == pytest.approx(2 / 6)
    assert saco(np.ones(3), np.arange(3)) == 0


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(
    ("activation", "classes"),
    [("softmax", 3), ("sigmoid", 3), ("sigmoid", 1), (None, 3), (None, 1), ("hard_sigmoid", 2)],
)
def test_curves_measure_the_outputs_of_the_model(activation, classes, distilled):
    model = keras_tnt.DeiT(
        input_shape=(16, 24, 3), patch_size=8, classes=classes, depth=1, embed_dim=12, num_heads=3,
        classifier_activation=activation, distilled=distilled,
    )  # fmt: skip
    draw = np.random.default_rng(7)
    for weight in model.trainable_variables:
        weight.assign(0.4 * draw.normal(size=weight.shape))
    images = draw.uniform(0, 255, (2, 16, 24, 3))
    maps = draw.random((2, 2, 3))
    target = classes - 1
    found = inspection.faithfulness(model, images, maps, target, baseline=GRAY)
    whole = probabilities(model, images, target)
    empty = probabilities(model, [np.broadcast_to(GRAY, (16, 24, 3))], target)[0]
    assert found["measure"] == (activation or "linear")
    for curve in (found["deletion"], found["insertion"][::-1], found["random"]["deletion"]):
        assert curve[0] == pytest.approx(whole.mean(), abs=1e-5)
        assert curve[-1] == pytest.approx(empty, abs=1e-5)
    assert np.ptp(found["deletion"]) > 1e-4


@pytest.mark.parametrize(
    ("head", "measure"),
    [
        ([keras.layers.Dense(1, activation="sigmoid")], "sigmoid"),
        ([keras.layers.Dense(4, activation="softmax", use_bias=False)], "softmax"),
        ([keras.layers.Dense(3), keras.layers.Activation("sigmoid")], "sigmoid"),
        ([keras.layers.Dense(3), keras.layers.Softmax()], "softmax"),
        ([keras.layers.Dense(3)], "linear"),
    ],
)
def test_custom_head_is_measured_by_its_activation(head, measure):
    inside = keras_tnt.DeiT(
        input_shape=(16, 24, 3), patch_size=8, depth=1, embed_dim=12, num_heads=3,
        include_top=False, pooling="token",
    )  # fmt: skip
    head = [type(layer).from_config(layer.get_config()) for layer in head]
    model = keras.Sequential([keras.Input((16, 24, 3)), inside, *head])
    images = np.random.default_rng(3).uniform(0, 255, (2, 16, 24, 3))
    maps = inspection.relevance(model, images, 0)  # uses the gradient of the logit
    assert maps.max() > 0
    found = inspection.faithfulness(model, images, maps, 0, baseline=GRAY)
    assert found["measure"] == measure
    expected = probabilities(model, images, 0)
    assert found["deletion"][0] == pytest.approx(expected.mean(), abs=1e-5)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (np.zeros((2, 2, 3)), "for 3 images of 16x24 pixels.*Received: \\(2, 2, 3\\)"),
        (np.zeros((3, 5, 3)), "that divide them"),
        (np.full((3, 2, 3), np.nan), "not finite"),
    ],
)
def test_invalid_maps_raise(model, images, maps, message):
    with pytest.raises(ValueError, match=message):
        inspection.faithfulness(model, images, maps)
