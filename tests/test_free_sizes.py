"""Models of images of any size: what a model built for each size with the same weights computes."""

import functools

import keras
import numpy as np
import pytest

import keras_tnt
from keras_tnt.layers import PositionEmbedding, RelativePosition
from keras_tnt.layers.grid import resampling_matrix
from tests.checks import BACKEND, assert_equal, compute, gradients, normal
from tests.golden import assert_close
from tests.test_families import tiny as tiny_family
from tests.test_tnt import tiny as tiny_tnt

ANY = (None, None)
# Height and width that the position tables are made for, and what differs from them.
NATIVE, SIZES = (32, 48), ((32, 48), (48, 32), (64, 80))
# Inner transformers of 16 words are what there is C++ for.
WORDS = {"patch_size": 16, "inner_stride": 4}
BUILD = {
    "tnt": functools.partial(tiny_tnt, **WORDS, distilled=True, layer_scale=0.5),
    "tnt_legacy": functools.partial(
        tiny_tnt, **WORDS, legacy=True, squeeze_excite=True, inner_blocks=(0,)
    ),
    "tnt_class_attention": functools.partial(
        tiny_tnt, **WORDS, class_attention_depth=1, layer_scale=0.5
    ),
    "deit": functools.partial(tiny_family, "deit_distilled"),
    "cait": functools.partial(tiny_family, "cait"),
    "pyramid_tnt": functools.partial(tiny_family, "pyramid_tnt"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function from a name to (model of any size, function from a size to the model of it)."""
    folder = tmp_path_factory.mktemp("weights")

    @functools.cache
    def make(name):
        path = folder / f"{name}.weights.h5"
        donor = BUILD[name](size=NATIVE)
        donor.set_weights([filled(v) for v in donor.weights])
        donor.save_weights(path)

        @functools.cache
        def of_size(size):
            return donor if size == NATIVE else BUILD[name](size=size, weights=path)

        free = BUILD[name](size=ANY, weights=path)
        free.weights_file = path
        return free, of_size

    return make


def filled(variable):
    """Values that let every weight be felt."""
    scale = {"table": 1.0, "gamma": 0.1, "moving_variance": 0.1}.get(variable.name, 0.2)
    offset = 1 if variable.name in ("gamma", "moving_variance") else 0
    return offset + scale * normal(variable.shape)


def pixels(size, batch=2, channels=3):
    random = np.random.default_rng(sum(size))
    return random.uniform(0, 255, (batch, *size, channels)).astype("float32")


# === The same numbers ===


@pytest.mark.parametrize("name", BUILD)
def test_any_size_gives_what_a_model_of_that_size_gives(name, models):
    free, of_size = models(name)
    assert free.input_shape == (None, None, None, 3)
    for size in SIZES:
        images = pixels(size)
        expected = compute(of_size(size), images)
        assert np.ptp(expected) > 0.01
        assert_close(compute(free, images), expected, 1e-5)


@pytest.mark.parametrize("name", BUILD)
def test_gradients_are_those_of_a_model_of_that_size(name, models):
    """Those of a table are the other model's, brought back along the resampling."""
    free, of_size = models(name)
    size = SIZES[-1]
    images, fixed = pixels(size), of_size(size)
    found, expected = (gradients(model, model, [images]) for model in (free, fixed))
    layers = {v.path: layer for layer in fixed.layers for v in layer.trainable_variables}
    largest = max(np.ptp(gradient) for gradient in expected)
    tables = {v.path: layer for layer in free.layers for v in layer.trainable_variables}
    for variable, ours, theirs in zip(free.trainable_variables, found, expected, strict=True):
        path = variable.path
        if isinstance(tables[path], (PositionEmbedding, RelativePosition)):
            theirs = brought_back(theirs, layers[path], tables[path])
        # Of what the loss does not depend on, as on a shift of all scores, rounding is left.
        error = np.abs(ours - theirs).max() / max(np.ptp(theirs), 1e-3 * largest)
        assert error < 2e-5, f"{path}: {error:.1e}"


def brought_back(gradient, layer, table):
    """The gradient of a table from that of the table resampled of it."""
    if isinstance(layer, RelativePosition):
        new, old = (layer.table_sides(x.grid) for x in (layer, table))
        matrices = [resampling_matrix(*sides) for sides in zip(old, new, strict=True)]
        gradient = np.reshape(gradient, (-1, *new))
        gradient = np.einsum("nijkl,ia,jb,kc,ld->nabcd", gradient, *matrices)
        return gradient.reshape(table.table.shape)
    rows, columns = (
        resampling_matrix(*sides) for sides in zip(table.grid, layer.grid, strict=True)
    )
    prefix, dim = layer.prefix_tokens, gradient.shape[-1]
    places = np.reshape(gradient[prefix:], (*layer.grid, dim))
    places = np.einsum("ijd,ia,jb->abd", places, rows, columns).reshape(-1, dim)
    return np.concatenate([gradient[:prefix], places])


def test_on_its_own_grid_a_table_is_used_as_it_is():
    for layer in (PositionEmbedding((3, 2), 1), RelativePosition(2, (4, 6), 2)):
        layer.build((None, None, 8))
        tokens = np.zeros((2, 7, 8), "float32")
        grid = np.zeros((2, *layer.grid), "float32")
        assert_equal(layer(tokens, grid)[0], layer.table)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the other backends know every size")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", BUILD)
def test_a_graph_need_not_know_the_size(name, compiled, models):
    import tensorflow as tf

    if compiled and name not in ("tnt", "pyramid_tnt"):
        pytest.skip("the same operations")
    free, of_size = models(name)
    images = tf.TensorSpec((None, None, None, 3))
    run = tf.function(
        lambda x: free(x, training=False), input_signature=[images], jit_compile=compiled
    )
    for size in SIZES:
        assert_close(run(pixels(size)), compute(of_size(size), pixels(size)), 1e-5)
    if not compiled:
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"nearest size that fits is"):
            run(pixels((33, 47)))


@pytest.mark.parametrize("name", ["tnt", "pyramid_tnt"])
def test_channels_first_models_take_any_size(name, models):
    free, _ = models(name)
    images = pixels(SIZES[1])
    expected = compute(free, images)
    keras.config.set_image_data_format("channels_first")
    turned = BUILD[name](size=ANY, weights=free.weights_file)
    assert turned.input_shape == (None, 3, None, None)
    assert_close(compute(turned, np.transpose(images, (0, 3, 1, 2))), expected, 1e-5)


# === What does not fit ===


@pytest.mark.parametrize("name", ["tnt", "tnt_legacy", "deit", "pyramid_tnt"])
def test_a_size_that_the_patches_do_not_divide_is_an_error_that_names_the_nearest(name, models):
    free, _ = models(name)
    side = keras_tnt.anatomy(free).patch_size
    wrong = pixels((3 * side + 1, 2 * side))
    for call in (free, free.predict_on_batch, keras_tnt.compile_inference(free)):
        with pytest.raises(ValueError, match=f"multiples of {side}.*fits is {3 * side}x{2 * side}"):
            call(wrong)


def test_fit_names_the_nearest_size_too(models):
    free, _ = models("deit")
    free.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="nearest size that fits is 48x32"):
        free.fit(pixels((47, 33)), np.zeros(2), verbose=0)


def test_an_image_with_fewer_patches_than_are_pooled_is_refused(models):
    free, _ = models("pyramid_tnt")
    with pytest.raises(ValueError, match=r"pools 2x2 patches, and has 1x4.*larger images"):
        free(pixels((8, 32)))


@pytest.mark.one_backend
def test_shapes_that_no_model_takes_are_refused_when_it_is_built():
    for shape, said in (
        ((None, None, None), r"\(height, width, channels\), of which height and width may be None"),
        ((None, 0, 3), "three sizes"),
        ((None, 40, 3), r"multiples of 16.*fits is anyx48"),
    ):
        with pytest.raises(ValueError, match=said):
            keras_tnt.DeiT(input_shape=shape)
