"""Relevance methods, compared with a NumPy reference and with results derived by hand."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_tnt
from keras_tnt import inspection
from keras_tnt.inspection import flow
from keras_tnt.inspection.links import observe
from keras_tnt.inspection.subject import Subject
from keras_tnt.layers.base import intercept_attention
from tests.helpers.relevance_models import PYRAMID, TNT, VIT, images_for
from tests.helpers.relevance_reference import Reference, relevance, word_relevance

MODELS = {
    "deit": (keras_tnt.DeiT, {**VIT, "distilled": True}),
    "cait": (keras_tnt.CaiT, {**VIT, "layer_scale": 0.5}),
    "tnt": (keras_tnt.TNT, {**TNT, "distilled": True}),
    "tnt_class_attention": (keras_tnt.TNT, {**TNT, "class_attention_depth": 2}),
    "pyramid_tnt": (keras_tnt.PyramidTNT, PYRAMID),
}
WITH_WORDS = ["tnt", "tnt_class_attention", "pyramid_tnt"]
METHODS = ["gradient_attention", "rollout", "grad_cam", "integrated_gradients", "random"]


@pytest.fixture(scope="module")
def models():
    """Returns models with weights large enough for uneven attention, equal on every backend."""
    built = {}
    for name, (builder, arguments) in MODELS.items():
        built[name] = model = builder(**arguments)
        draw = np.random.default_rng(1)
        for weight in model.weights:
            center = 1.0 if weight.name in ("gamma", "moving_variance") else 0.0
            values = center + 0.3 * draw.normal(size=weight.shape)
            weight.assign(np.abs(values) if weight.name == "moving_variance" else values)
    return built


def reference_of(model, image):
    of_tnt = model.name == "tnt"
    return Reference(
        model,
        image,
        patch_size=8,
        heads=3,
        inner_heads=2,
        epsilon=1e-5 if of_tnt else 1e-6,
        blocks=2,
    )


def assert_close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# === The equations ===


@pytest.mark.parametrize(
    "name",
    ["deit", "cait", "tnt", pytest.param("tnt_class_attention", marks=pytest.mark.one_backend)],
)
def test_relevance_matches_the_reference_equations(models, name):
    """Patches follow the paper's equations, words those of docs/relevance.md."""
    model = models[name]
    image = images_for(model)[1]
    reference = reference_of(model, image)
    logits = Subject(model, image[None]).predict(image[None])[0]
    np.testing.assert_allclose(logits, reference.logits(), atol=1e-5)
    links = reference.links(target=2)
    maps = inspection.relevance(model, image[None], targets=2)
    assert maps.dtype == "float32" and maps.shape[1] == 2
    assert_close(maps[0].ravel(), relevance(reference, links))
    if name in WITH_WORDS:
        maps = inspection.relevance(model, image[None], targets=2, level="words")
        assert maps.shape == (1, 4, 4)
        assert_close(flow.to_words(maps, (2, 2))[0], word_relevance(reference, links))


@pytest.mark.slow
@pytest.mark.one_backend
@pytest.mark.parametrize("name", WITH_WORDS)
def test_word_relevance_sums_to_patch_relevance(models, name):
    model = models[name]
    images = images_for(model)
    for method in ("gradient_attention", "rollout", "integrated_gradients"):
        patches = inspection.relevance(model, images, [1, 3], method)
        words = inspection.relevance(model, images, [1, 3], method, level="words")
        rows, columns = patches.shape[1:]
        side = words.shape[1] // rows
        blocks = words.reshape(2, rows, side, columns, side)
        assert_close(blocks.sum(axis=(2, 4)), patches)
        assert np.any(blocks.std(axis=(2, 4)) > 0.01 * blocks.mean()), "words make no difference"


@pytest.mark.slow
def test_pyramid_relevance_passes_through_pooling_and_merging(models):
    """The expected matrix of all patches is carried forward through each pooling and merge."""
    model = models["pyramid_tnt"]
    images = images_for(model, 1)
    subject = Subject(model, images)
    _, weights = observe(subject.logits, images)
    gates = subject.gate_gradient(weights, ops.convert_to_tensor(images), subject.chosen([2]))
    relevance, grid = np.eye(20), (5, 4)
    for stage, (blocks, reduction) in enumerate([(2, 2), (1, 2), (1, 1)]):
        if stage:
            relevance, grid = mean_of_squares(relevance, grid, 2, ragged=True)
        for i in range(blocks):
            outer = "" if (stage, i) == (0, 1) else "outer/"
            gate = gates[f"stage_{stage}_block_{i}/{outer}attention"]
            pooled, _ = mean_of_squares(relevance, grid, reduction, ragged=False)
            relevance = relevance + np.maximum(gate, 0).mean(axis=1)[0] @ pooled
    maps = inspection.relevance(model, images, 2)
    assert_close(maps[0].ravel(), relevance.mean(axis=0))


def mean_of_squares(rows, grid, size, ragged):
    """Returns the mean of each window's rows. At a ragged edge, windows are smaller."""
    corners = [
        [(y, x) for x in range(0, grid[1] if ragged else grid[1] // size * size, size)]
        for y in range(0, grid[0] if ragged else grid[0] // size * size, size)
    ]
    rows = rows.reshape(*grid, -1)
    means = [rows[y : y + size, x : x + size].mean(axis=(0, 1)) for r in corners for y, x in r]
    return np.array(means), (len(corners), len(corners[0]))


@pytest.mark.one_backend
def test_gate_gradients_match_finite_differences(models):
    """Covers a pyramid's inner attention and words, which the reference lacks."""
    model = models["pyramid_tnt"]
    images = images_for(model, 1)
    subject = Subject(model, images)
    _, weights = observe(subject.logits, images)
    gates = subject.gate_gradient(weights, ops.convert_to_tensor(images), subject.chosen([2]))
    for path in ("stage_1_block_0/inner/attention", "stage_1_block_0/words_to_patches"):
        place = np.unravel_index(np.abs(gates[path]).argmax(), gates[path].shape)
        ends = []
        for step in (0.01, -0.01):
            change = np.ones(gates[path].shape, "float32")
            change[place] += step

            def look(layer, x, change=change, path=path):
                return ops.multiply(x, change) if layer.path == path else x

            with intercept_attention(look):
                ends.append(subject.predict(images)[0, 2])
        assert_close(gates[path][place], (ends[0] - ends[1]) / 0.02, 0.02)


# === The other methods ===


@pytest.mark.one_backend
@pytest.mark.parametrize("name", MODELS)
def test_rollout_method_equals_attention_rollout(models, name):
    model = models[name]
    images = images_for(model)
    rollout = inspection.attention_rollout(model, images)
    tokens = keras_tnt.anatomy(model).class_tokens
    rows = rollout[:, :tokens, tokens:].mean(axis=1) if tokens else rollout.mean(axis=1)
    maps = inspection.relevance(model, images, 1, method="rollout")
    assert_close(maps.reshape(2, -1), rows)


def test_integrated_gradients_sum_to_the_difference_of_logits(models):
    model, gray = models["deit"], (120.0, 110.0, 100.0)
    images = images_for(model)
    maps = inspection.relevance(model, images, [0, 3], "integrated_gradients", baseline=gray)
    subject = Subject(model, images)
    without = np.broadcast_to(gray, images.shape)
    added = (subject.predict(images) - subject.predict(without))[[0, 1], [0, 3]]
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), added, rtol=0.1)


@pytest.mark.parametrize("name", ["deit", "cait"])
def test_grad_cam_weights_channels_by_their_mean_gradient(models, name):
    model = models[name]
    image = images_for(model)[1]
    reference = reference_of(model, image)
    path = "tokens of class_block_1" if name == "cait" else "tokens of block_1"
    gradient = reference.gradient(path, 2)[-6:]  # of the patch tokens
    expected = np.maximum(reference.read[path][-6:] @ gradient.mean(axis=0), 0)
    assert_close(inspection.relevance(model, image[None], 2, "grad_cam")[0].ravel(), expected)


@pytest.mark.one_backend
def test_random_maps_depend_on_the_seed(models):
    images = images_for(models["tnt"], 9)
    first, again, other = (
        inspection.relevance(models["tnt"], images, 0, "random", "words", seed=seed)
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.any(first == other)
    assert len(np.unique(first)) == first.size
    assert first.min() >= 0


# === Images, targets, models ===


@pytest.mark.one_backend
def test_targets_default_to_the_predicted_classes(models):
    model = models["tnt"]
    images = images_for(model, 3)
    predicted = model(images, training=False)
    predicted = ops.convert_to_numpy(predicted).argmax(axis=-1).tolist()
    by_default = inspection.relevance(model, images)
    np.testing.assert_array_equal(by_default, inspection.relevance(model, images, predicted))
    others = inspection.relevance(model, images, [(c + 1) % 4 for c in predicted])
    assert np.all(np.any(by_default != others, axis=(1, 2)))


@pytest.mark.one_backend
def test_targets_can_be_class_names():
    model = keras_tnt.DeiT(**VIT, class_names=["cat", "dog", "owl", "fox"])
    images = images_for(model)
    by_name = inspection.relevance(model, images, ["fox", "dog"])
    np.testing.assert_array_equal(by_name, inspection.relevance(model, images, [3, 1]))
    with pytest.raises(ValueError, match="no class 'foxx'. The nearest are fox"):
        inspection.relevance(model, images, "foxx")


@pytest.mark.one_backend
def test_relevance_is_computed_per_image(models):
    model = models["tnt"]
    images = images_for(model, 10)
    together = inspection.relevance(model, images, level="words")
    assert_close(together[9:], inspection.relevance(model, images[9:], level="words"))


@pytest.mark.one_backend
def test_channels_first_images_have_the_same_relevance(models):
    model = models["tnt"]
    images = images_for(model)
    keras.config.set_image_data_format("channels_first")
    first = keras_tnt.TNT(**{**TNT, "distilled": True, "input_shape": (3, 16, 16)})
    first.set_weights(model.get_weights())
    moved = np.moveaxis(images, -1, 1)
    for method in METHODS:
        expected = inspection.relevance(model, images, 1, method, "words")
        assert_close(inspection.relevance(first, moved, 1, method, "words"), expected, 1e-4)


@pytest.mark.one_backend
def test_wrapped_model_with_custom_head_is_explained():
    inside = keras_tnt.DeiT(**VIT, include_top=False, pooling="token")
    head = keras.layers.Dense(5, name="mine")
    model = keras.Sequential([keras.Input((16, 24, 3)), inside, head])
    images = images_for(model)
    maps = inspection.relevance(model, images, 4)
    assert maps.shape == (2, 2, 3) and maps.max() > 0
    with pytest.raises(ValueError, match="Use another method"):
        inspection.relevance(model, images, 4, "grad_cam")


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": 4}, "no class 4: they are 0 to 3"),
        ({"targets": [0, 1, 2]}, "one class for each of 2 images. Received: 3"),
        ({"targets": "cat"}, "no class 'cat'. Or give 0 to 3"),
        ({"method": "lime"}, "must be one of gradient_attention, rollout"),
        ({"level": "pixels"}, "must be one of patches, words"),
        ({"level": "words"}, "has patches alone"),
    ],
)
def test_invalid_arguments_raise_one_line_errors(models, arguments, message):
    model = models["deit"]
    with pytest.raises(ValueError, match=message) as caught:
        inspection.relevance(model, images_for(model), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.one_backend
def test_unsupported_models_and_images_raise(models):
    images = images_for(models["deit"])
    with pytest.raises(ValueError, match="takes a batch of images"):
        inspection.relevance(models["deit"], images[:, :, :16])
    with pytest.raises(ValueError, match="has no head"):
        inspection.relevance(keras_tnt.DeiT(**VIT, include_top=False), images)
    wrapped = keras.Sequential([keras.Input((16, 24, 3)), models["deit"]])
    with pytest.raises(ValueError, match=f"Pass its layer '{models['deit'].name}'"):
        inspection.relevance(wrapped, images)
    with pytest.raises(ValueError, match="not built from one of keras_tnt's"):
        inspection.relevance(keras.Sequential([keras.layers.Flatten()]), images)
