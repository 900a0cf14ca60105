"""PyramidTNT's stem, stages and outer attention, where golden logits do not cover them."""

import numpy as np
import pytest
from keras import ops

from keras_tnt.layers import (
    MergePatches,
    MergeWords,
    PyramidStem,
    PyramidTNTBlock,
    ReducedAttention,
    ReducedBlock,
    RelativePosition,
)
from keras_tnt.layers.pyramid import ConvolutionNormReLU
from tests.helpers.checks import (
    assert_close,
    assert_equal,
    check_layer,
    check_layer_config,
    check_layer_policy,
    compute,
    normal,
)

RANDOM = {"dropout": 0.1, "attention_dropout": 0.1, "stochastic_depth": 0.1}
# No norm precedes these layers, so that large inputs give large outputs.
ALONE = {"half_scale": 3.0}


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_norm_relu_is_a_valid_keras_layer(stride):
    check_layer(ConvolutionNormReLU, (2, 5, 6, 3), dim=4, stride=stride, **ALONE)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_is_padded_symmetrically(stride):
    layer = ConvolutionNormReLU(4, stride)
    x = normal((2, 6, 8, 3))
    layer.build(x.shape)
    kernel = normal((3, 3, 3, 4))
    layer.convolution.kernel.assign(kernel)
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    expected = sum(
        padded[:, i : i + 6 : stride, j : j + 8 : stride] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    )
    assert_close(compute(layer, x), np.maximum(expected, 0) / np.sqrt(1 + 1e-5), 1e-5)


def test_batch_statistics_have_momentum_0_9():
    layer = ConvolutionNormReLU(4)
    x = normal((2, 6, 8, 3))
    layer(x, training=True)
    rows = ops.convert_to_numpy(layer.convolution(np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])))
    rows = rows.reshape(-1, 4)
    assert_close(layer.norm.moving_mean, 0.1 * rows.mean(axis=0), 1e-5)
    moved = ops.convert_to_numpy(layer.norm.moving_variance)
    np.testing.assert_allclose(moved, 0.9 + 0.1 * rows.var(axis=0), rtol=0.02)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_stem_is_a_valid_keras_layer(data_format):
    shape = (2, 16, 24, 3) if data_format == "channels_last" else (2, 3, 16, 24)
    check_layer(PyramidStem, shape, outer_dim=8, inner_dim=2, data_format=data_format, **ALONE)


def test_words_of_a_patch_are_its_region_of_the_word_map():
    layer = PyramidStem(outer_dim=8, inner_dim=2)
    images = normal((1, 16, 24, 3))
    _, words = compute(layer, images)
    map_of_words = compute(layer.words, compute(layer.common, images))
    assert_equal(words[0, 4], map_of_words[0, 4:8, 4:8].reshape(16, 2))


@pytest.mark.parametrize("grid", [(4, 2), (3, 5)])
def test_merge_layers_are_valid_keras_layers(grid):
    count = grid[0] * grid[1]
    layer = check_layer(MergePatches, (2, count, 6), dim=8, grid=grid)
    merged = ((grid[0] + 1) // 2) * ((grid[1] + 1) // 2)
    assert layer.compute_output_shape((None, count, 6)) == (None, merged, 8)
    layer = check_layer(MergeWords, (2, count, 4, 6), dim=8, grid=grid)
    assert layer.compute_output_shape((None, count, 4, 6)) == (None, merged, 4, 8)


def test_words_of_four_patches_are_merged_in_image_order():
    """A kernel that is nonzero only in its center selects the first word of each 2x2."""
    layer = MergeWords(6, grid=(2, 4))
    image = normal((4, 8, 6))  # 2x4 patches of 2x2 words
    words = image.reshape(2, 2, 4, 2, 6).transpose(0, 2, 1, 3, 4).reshape(1, 8, 4, 6)
    layer.build(words.shape)
    kernel = np.zeros((3, 3, 6, 6), "float32")
    kernel[1, 1] = np.eye(6)
    layer.convolution.kernel.assign(kernel)
    normalised = ops.convert_to_numpy(layer.norm(image))[::2, ::2]  # 2x4 words, two patches
    expected = normalised.reshape(2, 2, 2, 6).transpose(1, 0, 2, 3).reshape(1, 2, 4, 6)
    assert_close(compute(layer, words), expected, 1e-5)


def test_odd_grid_is_padded_with_zero_words():
    odd, even = MergeWords(6, grid=(1, 3)), MergeWords(6, grid=(2, 4))
    words = normal((2, 3, 4, 6))
    padded = np.zeros((2, 2, 4, 4, 6), "float32")
    padded[:, 0, :3] = words
    odd.build(words.shape)
    even.build((2, 8, 4, 6))
    even.set_weights(odd.get_weights())
    even.norm.beta.assign(np.zeros(6))
    assert_close(compute(odd, words), compute(even, padded.reshape(2, 8, 4, 6)), 1e-5)


def test_relative_position_does_not_depend_on_the_patches():
    config = {"num_heads": 3, "grid": (4, 5), "reduction": 2}
    layer, patches = RelativePosition(**config), normal((2, 20, 8))
    assert_equal(layer(patches), layer(2 * patches))
    assert_equal(layer(patches)[0], layer.table)
    assert layer.compute_output_shape(patches.shape) == layer(patches).shape == (1, 3, 20, 4)
    check_layer_config(layer, config, [patches])
    for policy in ("mixed_float16", "mixed_bfloat16"):
        check_layer_policy(layer, policy, [patches], {})


def test_relative_positions_of_a_smooth_function_are_resampled_exactly():
    """Scores that are linear in both positions remain so in the interior of the grid."""

    def table(layer):
        axes = [(np.arange(n) + 0.5) / n for n in (8, 8, 4, 4)]
        if layer.grid == (16, 12):
            axes = [(np.arange(n) + 0.5) / n for n in (16, 12, 8, 6)]
        i, j, k, m = np.meshgrid(*axes, indexing="ij")
        return np.stack([i - k, 2 * j + m])

    square, other = (RelativePosition(2, grid, reduction=2) for grid in ((8, 8), (16, 12)))
    for layer in (square, other):
        layer.build((None, layer.grid[0] * layer.grid[1], 8))
    found = other.resample(table(square).reshape(1, 2, 64, 16)).reshape(2, 16, 12, 8, 6)
    inside = np.s_[:, 4:12, 3:9, 3:5, 2:4]
    np.testing.assert_allclose(found[inside], table(other)[inside], atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 2, 20, 4), (1, 3, 16, 4), (1, 2, 16, 16)])
def test_incompatible_relative_position_table_is_not_resampled(shape):
    layer = RelativePosition(2, (8, 8), reduction=2)
    assert layer.can_resample((1, 2, 16, 4))
    assert not layer.can_resample(shape)


@pytest.mark.parametrize(("grid", "reduction"), [((4, 6), 2), ((5, 3), 2), ((3, 2), 1)])
def test_reduced_attention_is_a_valid_keras_layer(grid, reduction):
    shape = (2, grid[0] * grid[1], 12)
    config = {"num_heads": 3, "qkv_bias": True, "epsilon": 1e-6, "dropout": 0.1}
    check_layer(ReducedAttention, shape, grid=grid, reduction=reduction, **config, **ALONE)


def test_incomplete_pooling_windows_are_excluded_from_the_keys():
    layer = ReducedAttention(num_heads=2, grid=(5, 3), reduction=2)
    x = normal((1, 5, 3, 8))
    changed = x.copy()
    changed[:, 4:], changed[:, :, 2:] = 7.0, 7.0
    whole = np.s_[:, :4, :2]
    first, second = (
        compute(layer, y.reshape(1, 15, 8)).reshape(1, 5, 3, 8)[whole] for y in (x, changed)
    )
    assert_equal(first, second)


def test_keys_are_the_means_of_pooling_windows():
    layer = ReducedAttention(num_heads=2, grid=(4, 6), reduction=2)
    x = normal((2, 4, 6, 8))
    expected = x.reshape(2, 2, 2, 3, 2, 8).mean(axis=(2, 4)).reshape(2, 6, 8)
    assert_close(layer.pool(x.reshape(2, 24, 8)), expected, 1e-6)


def test_bias_is_added_to_the_scores():
    layer = ReducedAttention(num_heads=2, grid=(2, 2), reduction=1)
    x = normal((1, 4, 8))
    layer.build(x.shape)
    only_third = np.full((1, 2, 4, 4), -1e9, "float32")
    only_third[..., 2] = 0.0
    attended = layer(x, bias=only_third)
    value = ops.split(layer.kv(x), 2, axis=-1)[1][:, 2:3]
    assert_close(attended, ops.convert_to_numpy(ops.repeat(layer.projection(value), 4, 1)), 1e-5)


@pytest.mark.parametrize("config", [{"layer_scale": 0.1, "qkv_bias": True}, {"epsilon": 1e-6}])
def test_pyramid_blocks_are_valid_keras_layers(config):
    size = {"grid": (2, 4), "reduction": 2}
    check_layer(ReducedBlock, (2, 8, 12), num_heads=2, **size, **config, **RANDOM)
    check_layer(
        PyramidTNTBlock, (2, 8, 12), (2, 8, 4, 6), outer_heads=2, inner_heads=3, **size, **config
    )


def test_inner_norms_normalize_all_words_of_a_patch():
    block = PyramidTNTBlock(2, 2, grid=(2, 2))
    words = normal((1, 4, 4, 6)) * np.array([1.0, 5.0, 9.0, 13.0], "float32")[:, None]
    block(normal((1, 4, 12)), words)
    normed = ops.convert_to_numpy(block.inner.norm_attention(words))
    np.testing.assert_allclose(normed.mean(axis=(2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(normed.std(axis=(2, 3)), 1, atol=1e-3)
    assert np.std(normed[0, 0, 0]) < np.std(normed[0, 0, 3])
