"""Embedding layers: stems, class token, and positions with their resampling."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_tnt.layers import (
    ClassToken,
    LegacyWordEmbedding,
    LegacyWordsToPatches,
    PatchEmbedding,
    PositionEmbedding,
    WordEmbedding,
    WordsToPatches,
)
from keras_tnt.layers.base import intercept_attention
from keras_tnt.layers.embedding import resample_positions
from tests.helpers import golden
from tests.helpers.checks import assert_close, assert_equal, check_layer, compute, normal

STEMS = [WordEmbedding, LegacyWordEmbedding]
# (patch size, inner stride, (height, width), channels): the papers' and other valid ones.
SIZES = [
    (16, 4, (32, 48), 3),
    (16, 8, (32, 16), 3),
    (16, 16, (16, 32), 3),
    (12, 3, (12, 24), 1),
    (8, 2, (24, 8), 4),
    (4, 1, (8, 12), 3),
    (14, 7, (28, 28), 2),
]


def convolution(layer, images):
    """Returns the stem's 7x7 convolution, zero-padded by 3, computed by Keras."""
    images = np.pad(images, [[0, 0], [3, 3], [3, 3], [0, 0]])
    result = ops.conv(images, layer.kernel, layer.stride, "valid", data_format="channels_last")
    return ops.convert_to_numpy(result + layer.bias)


def unfold(x, side):
    """Splits (batch, height, width, dim) into (batch, squares, side * side, dim), row-major."""
    batch, height, width, dim = x.shape
    x = x.reshape((batch, height // side, side, width // side, side, dim))
    return x.transpose((0, 1, 3, 2, 4, 5)).reshape((batch, -1, side * side, dim))


def given(stem, patch_size, stride, size, channels):
    """Returns a stem with random weights, and images for it."""
    layer = stem(6, patch_size, stride)
    images = normal((2, *size, channels))
    layer.build(images.shape)
    layer.set_weights([normal(w.shape) for w in layer.get_weights()])
    return layer, images


@pytest.mark.parametrize(("patch_size", "stride", "size", "channels"), SIZES)
def test_word_embedding_is_a_padded_convolution_per_patch(patch_size, stride, size, channels):
    layer, images = given(WordEmbedding, patch_size, stride, size, channels)
    patches = unfold(images, patch_size).reshape((-1, patch_size, patch_size, channels))
    expected = convolution(layer, patches)
    words = (patch_size // stride) ** 2
    assert_close(compute(layer, images), expected.reshape((2, -1, words, 6)), 1e-5)


@pytest.mark.parametrize(("patch_size", "stride", "size", "channels"), SIZES)
def test_legacy_word_embedding_is_a_padded_convolution_of_the_image(
    patch_size, stride, size, channels
):
    layer, images = given(LegacyWordEmbedding, patch_size, stride, size, channels)
    expected = unfold(convolution(layer, images), patch_size // stride)
    assert_close(compute(layer, images), expected, 1e-5)


@pytest.mark.parametrize("stem", STEMS)
def test_stems_are_valid_keras_layers(stem):
    check_layer(stem, (2, 16, 24, 3), dim=5, patch_size=8, stride=4)


@pytest.mark.parametrize("stem", STEMS)
def test_stride_must_divide_the_patch_size(stem):
    with pytest.raises(ValueError, match="must divide.*inner_stride=3, patch_size=16"):
        stem(8, patch_size=16, stride=3)


def test_patch_embedding_is_a_valid_keras_layer():
    check_layer(PatchEmbedding, (2, 16, 24, 3), dim=5, patch_size=8)


def test_patch_embedding_is_a_strided_convolution():
    layer = PatchEmbedding(8, 5)
    images = normal((2, 16, 24, 3))
    layer.build(images.shape)
    kernel = ops.reshape(layer.projection.kernel, (8, 8, 3, 5))
    expected = ops.conv(images, kernel, 8, "valid", data_format="channels_last")
    expected = ops.convert_to_numpy(expected + layer.projection.bias).reshape((2, 6, 5))
    assert_close(compute(layer, images), expected, 1e-5)


@pytest.mark.parametrize("layer_class", [*STEMS, PatchEmbedding])
def test_channels_first_images_have_the_same_embedding(layer_class):
    images = normal((2, 16, 24, 3))
    last = layer_class(dim=5, patch_size=8)
    expected = last(images)
    first = check_layer(
        layer_class, (2, 3, 16, 24), dim=5, patch_size=8, data_format="channels_first"
    )
    first.set_weights(last.get_weights())
    assert_equal(first(images.transpose((0, 3, 1, 2))), expected)
    keras.config.set_image_data_format("channels_first")
    assert layer_class(dim=5, patch_size=8).data_format == "channels_first"


@pytest.mark.parametrize(
    ("layer_class", "config"),
    [
        (WordsToPatches, {}),
        (WordsToPatches, {"use_bias": False, "epsilon": 1e-6}),
        (LegacyWordsToPatches, {}),
    ],
)
def test_words_to_patches_is_a_valid_keras_layer(layer_class, config):
    check_layer(layer_class, (2, 3, 4, 6), dim=10, **config)


def test_words_of_a_patch_are_concatenated_channel_minor():
    layer = LegacyWordsToPatches(dim=24)
    words = normal((2, 3, 4, 6))
    layer.build(words.shape)
    layer.projection.set_weights([np.eye(24), np.zeros(24)])
    normed = ops.convert_to_numpy(layer.norm_words(words))
    assert_equal(layer(words), normed.reshape((2, 3, 24)))


@pytest.mark.parametrize("layer_class", [WordsToPatches, LegacyWordsToPatches])
def test_word_with_zero_weight_is_excluded_from_its_patch(layer_class):
    layer, words = layer_class(dim=10), normal((2, 3, 4, 6))
    plain = ops.convert_to_numpy(layer(words))
    seen = []

    def leave_out_the_second(_, weights):
        seen.append(ops.convert_to_numpy(weights))
        return ops.multiply(weights, np.array([1, 0, 1, 1], "float32"))

    with intercept_attention(leave_out_the_second):
        without = ops.convert_to_numpy(layer(words))
    kernel = ops.convert_to_numpy(layer.projection.kernel).copy()
    kernel[6:12] = 0
    layer.projection.kernel.assign(kernel)
    assert_equal(without, layer(words))
    assert np.all(seen[0] == 1) and seen[0].shape == (2, 3, 4)
    assert np.any(plain != without)


def test_class_token_is_a_valid_keras_layer():
    layer = check_layer(ClassToken, (2, 5, 8))
    x = normal((2, 5, 8))
    output = ops.convert_to_numpy(layer(x))
    assert np.array_equal(output[:, 1:], x)
    assert np.array_equal(output[:, 0], np.repeat(ops.convert_to_numpy(layer.token)[0], 2, axis=0))


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        ((2, 6, 8), {"grid": (2, 3)}),
        ((2, 8, 8), {"grid": (2, 3), "prefix_tokens": 2}),
        ((2, 3, 4, 8), {"grid": (2, 2)}),
    ],
)
def test_position_embedding_is_a_valid_keras_layer(shape, config):
    check_layer(PositionEmbedding, shape, **config)


@pytest.mark.parametrize(
    ("source", "target", "grid", "new_grid", "prefix_tokens"),
    [
        ("pos_4x4_prefix1", "to_6x6", (4, 4), (6, 6), 1),
        ("pos_4x4_prefix1", "to_5x7", (4, 4), (5, 7), 1),
        ("pos_8x8_prefix2", "to_12x12", (8, 8), (12, 12), 2),
        ("pos_8x8_prefix2", "to_3x3", (8, 8), (3, 3), 2),
    ],
)
def test_positions_are_resampled_as_in_the_reference(source, target, grid, new_grid, prefix_tokens):
    arrays, _ = golden.read("position_resample")
    resampled = resample_positions(arrays[source][0], grid, new_grid, prefix_tokens)
    assert_close(resampled, arrays[target][0], 1e-4)
    assert np.array_equal(resampled[:prefix_tokens], arrays[source][0, :prefix_tokens])


def test_resampling_preserves_constants_and_an_equal_grid():
    table = normal((12, 8))
    assert resample_positions(table, (3, 4), (3, 4)) is table
    constant = np.full((12, 8), 0.25, "float32")
    np.testing.assert_allclose(resample_positions(constant, (3, 4), (7, 2)), 0.25, rtol=1e-6)


def test_position_table_that_does_not_match_its_grid_raises():
    with pytest.raises(ValueError, match="12 positions does not fit a grid of 3x3 with 2 prefix"):
        resample_positions(normal((12, 8)), (3, 3), (4, 4), 2)


def test_only_a_single_table_of_a_square_grid_can_be_resampled():
    layer = PositionEmbedding((2, 3), prefix_tokens=1)
    layer.build((None, 7, 8))
    assert layer.can_resample((10, 8)) and layer.can_resample((1, 10, 8))
    for shape in [(2, 10, 8), (2, 1, 10, 8), (1, 10, 7), (1, 9, 8), (1, 1, 8)]:
        assert not layer.can_resample(shape), shape


@pytest.mark.parametrize(("new_grid", "new_tokens"), [((4, 2), 9), ((3, 5), 16)])
def test_position_embedding_resamples_weights_of_another_grid(new_grid, new_tokens, tmp_path):
    def model(grid, tokens):
        inputs = keras.Input((tokens, 8))
        outputs = PositionEmbedding(grid, prefix_tokens=1, name="position")(inputs)
        return keras.Model(inputs, outputs)

    saved, loaded = model((2, 3), 7), model(new_grid, new_tokens)
    saved.save_weights(tmp_path / "p.weights.h5")
    loaded.load_weights(tmp_path / "p.weights.h5")
    table = saved.get_layer("position").get_weights()[0]
    expected = resample_positions(table, (2, 3), new_grid, 1)
    assert_close(loaded.get_layer("position").table, expected, 1e-6)
