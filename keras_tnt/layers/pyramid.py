"""Layers of PyramidTNT (arXiv 2201.00978): convolutional stem, patch merging, reduced attention.

Feature maps are channels last inside the layers for either image data format, because TensorFlow
has no channels-first convolution on CPUs.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_tnt.kernels import runtimes
from keras_tnt.layers.attention import Attention, split_heads
from keras_tnt.layers.base import (
    CompositeLayer,
    ConfiguredLayer,
    LayerNormalization,
    RandomNormal,
    projection,
)
from keras_tnt.layers.blocks import TNTBlock, TransformerBlock
from keras_tnt.layers.grid import (
    as_grid,
    assert_sides,
    ceil_divide,
    count_patches,
    flatten_grid,
    image_dimensions,
    patchify,
    product,
    resample,
    resolve_grid,
    to_whole_patches,
)
from keras_tnt.layers.sharding import reshape


def halve_side(size: Any) -> Any:
    """Returns the size of a feature map after a 3x3 convolution of stride 2, zero-padded by 1."""
    return ceil_divide(size, 2)


def assert_poolable(x, grid: tuple, size: int):
    """Returns `x` after asserting that the grid has at least `size` x `size` patches."""
    message = (
        f"A stage needs at least {size}x{size} patches for pooling, got {{}}x{{}}. "
        "Use larger images, or build the model with smaller `reductions`."
    )
    return assert_sides(x, grid, lambda side: side >= size, lambda sides: (message, sides))


def convolution(dim: int, stride: int, *, dtype, name: str) -> keras.layers.Conv2D:
    """Returns a 3x3 convolution for feature maps padded by `pad_edges`.

    As in the published code, the kernel is initialized from N(0, sqrt(2 / fan_out)) and the bias
    with zeros.
    """
    return keras.layers.Conv2D(
        dim,
        3,
        stride,
        data_format="channels_last",
        kernel_initializer=RandomNormal(stddev=(2 / (3 * 3 * dim)) ** 0.5),
        dtype=dtype,
        name=name,
    )


def pad_edges(x):
    """Zero-pads a feature map by 1 on each side; Keras's "same" pads stride 2 on one side only."""
    return ops.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])


@keras.saving.register_keras_serializable(package="keras_tnt")
class BatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` that freezes its statistics in recomputations on torch."""

    def call(self, inputs, training=None, mask=None):
        """Normalizes `inputs`; in torch's backward pass the moving statistics stay unchanged."""
        if training and keras.backend.backend() == "torch" and runtimes.is_in_torch_backward():
            state = [(variable, variable.value) for variable in self.variables]
            with keras.StatelessScope(state_mapping=state):
                return super().call(inputs, training=training, mask=mask)
        return super().call(inputs, training=training, mask=mask)


@keras.saving.register_keras_serializable(package="keras_tnt")
class ConvolutionNormReLU(CompositeLayer):
    """3x3 convolution, BatchNorm and ReLU, on channels-last feature maps.

    Args:
        dim: number of output channels.
        stride: stride of the convolution, 1 or 2; 2 halves rows and columns, rounded up. Defaults
            to 1.
    """

    def __init__(self, dim: int, stride: int = 1, **kwargs):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(**kwargs)
        self.dim = dim
        self.stride = stride

    def build(self, input_shape):
        """Builds the convolution and its BatchNorm."""
        policy = self.dtype_policy
        self.convolution = convolution(self.dim, self.stride, dtype=policy, name="convolution")
        self.convolution.build((None, None, None, input_shape[-1]))
        self.norm = BatchNormalization(momentum=0.9, epsilon=1e-5, dtype=policy, name="norm")
        self.norm.build(self.compute_output_shape(input_shape))

    def call(self, x, training=False):
        """Maps a feature map to `(batch, rows/stride, columns/stride, dim)`, rounded up."""
        return ops.relu(self.norm(self.convolution(pad_edges(x)), training=training))

    def compute_output_shape(self, input_shape):
        """Returns `(batch, rows/stride, columns/stride, dim)`, rounded up."""
        batch, *size, _ = input_shape
        if self.stride == 2:
            size = [halve_side(side) for side in size]
        return (batch, *size, self.dim)


@keras.saving.register_keras_serializable(package="keras_tnt")
class PyramidStem(CompositeLayer):
    """Convolutional stem: embeds patches of 8x8 pixels and the 4x4 words of each.

    Args:
        outer_dim: dimension of a patch.
        inner_dim: dimension of a word.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to Keras's image data format.

    Call arguments:
        images: `(batch, height, width, channels)`, or channels first; sides are multiples of 8.

    Returns:
        `(patches, words)`: `(batch, height/8 * width/8, outer_dim)` and
        `(batch, height/8 * width/8, 16, inner_dim)`, in row-major order.
    """

    role = "stem"

    patch_size = 8

    def __init__(self, outer_dim: int, inner_dim: int, data_format: str | None = None, **kwargs):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(**kwargs)
        self.outer_dim = outer_dim
        self.inner_dim = inner_dim
        self.data_format = data_format or keras.config.image_data_format()

    def build(self, input_shape):
        """Builds one convolution for both branches, one for the words and three for the patches."""
        height, width, channels = image_dimensions(input_shape, self.data_format)
        shape = (None, height, width, channels)
        self.common = self.step("common", 2 * self.inner_dim, 2, shape)
        shape = self.common.compute_output_shape(shape)
        self.words = self.step("words", self.inner_dim, 1, shape)
        self.patches1 = self.step("patches1", 4 * self.inner_dim, 2, shape)
        shape = self.patches1.compute_output_shape(shape)
        self.patches2 = self.step("patches2", 8 * self.inner_dim, 2, shape)
        shape = self.patches2.compute_output_shape(shape)
        self.patches3 = self.step("patches3", self.outer_dim, 1, shape)

    def step(self, name, dim, stride, shape):
        """Returns a built `ConvolutionNormReLU` for inputs of `shape`."""
        step = ConvolutionNormReLU(dim, stride, dtype=self.dtype_policy, name=name)
        step.build(shape)
        return step

    def call(self, images, training=False):
        """Maps images to patches and words."""
        images = to_whole_patches(images, self.patch_size, self.data_format)
        x = self.common(images, training=training)  # (b, H/2, W/2, 2*inner_dim)
        words = patchify(self.words(x, training=training), 4)  # (b, r, q, 16*inner_dim)
        patches = self.patches2(self.patches1(x, training=training), training=training)
        patches = self.patches3(patches, training=training)  # (b, r, q, outer_dim)
        return flatten_grid(patches, self.outer_dim), flatten_grid(words, 16, self.inner_dim)

    def compute_output_shape(self, input_shape):
        """Returns the shapes of patches and words."""
        batch_and_patches = count_patches(input_shape, self.patch_size, self.data_format)
        return (*batch_and_patches, self.outer_dim), (*batch_and_patches, 16, self.inner_dim)


class Merge(CompositeLayer):
    """Base class of patch and word merging: layer norm, then a 3x3 convolution of stride 2."""

    role = "merge"

    def __init__(
        self, dim: int, grid: tuple[int, int] | None = None, epsilon: float = 1e-5, **kwargs
    ):
        """Initializes the arguments that both merging layers share; they document them."""
        super().__init__(**kwargs)
        self.dim = dim
        self.grid = as_grid(grid)
        self.epsilon = epsilon

    def build(self, input_shape):
        """Builds the layer norm and the convolution."""
        policy = self.dtype_policy
        self.norm = LayerNormalization(epsilon=self.epsilon, dtype=policy, name="norm")
        self.norm.build(input_shape)
        self.convolution = convolution(self.dim, 2, dtype=policy, name="convolution")
        self.convolution.build((None, None, None, input_shape[-1]))

    def merged_shape(self, input_shape, grid_shape):
        """Returns the output shape, with the sides of the grid halved and rounded up."""
        sides = self.grid if grid_shape is None else grid_shape[1:]
        assert sides is not None, "the layer has no grid"
        return (input_shape[0], product(*map(halve_side, sides)), *input_shape[2:-1], self.dim)


@keras.saving.register_keras_serializable(package="keras_tnt")
class MergePatches(Merge):
    """Patch merging between stages: a 3x3 convolution of stride 2 over the patches.

    Args:
        dim: dimension of a patch in the next stage.
        grid: (rows, columns) of the patches; odd numbers are rounded up. If `None`, each call
            passes the grid.
        epsilon: epsilon of the layer norm. Defaults to 1e-5.

    Call arguments:
        patches: `(batch, rows * columns, dim of this stage)`.
        grid: `(batch, rows, columns)`, whose shape is the grid. Defaults to the layer's grid.

    Returns:
        `(batch, rows/2 * columns/2, dim)`.
    """

    def call(self, patches, grid=None):
        """Maps `(batch, rows * columns, channels)` to `(batch, rows/2 * columns/2, dim)`."""
        shape = (-1, *resolve_grid(grid, self.grid), patches.shape[-1])
        x = reshape(self.norm(patches), shape)  # (b, r, q, c)
        return flatten_grid(self.convolution(pad_edges(x)), self.dim)  # (b, r/2*q/2, dim)

    def compute_output_shape(self, patches_shape, grid_shape=None):
        """Returns `(batch, rows/2 * columns/2, dim)`."""
        return self.merged_shape(patches_shape, grid_shape)


@keras.saving.register_keras_serializable(package="keras_tnt")
class MergeWords(Merge):
    """Word merging between stages: a 3x3 convolution of stride 2 over the words of 2x2 patches.

    Args:
        dim: dimension of a word in the next stage.
        grid: (rows, columns) of the patches; odd numbers are padded with a row or column of zero
            words. If `None`, each call passes the grid.
        epsilon: epsilon of the layer norm. Defaults to 1e-5.

    Call arguments:
        words: `(batch, rows * columns, words, dim of this stage)`.
        grid: `(batch, rows, columns)`, whose shape is the grid. Defaults to the layer's grid.

    Returns:
        `(batch, rows/2 * columns/2, words, dim)`.
    """

    def call(self, words, grid=None):
        """Maps words to `(batch, rows/2 * columns/2, words, dim)`."""
        _, _, count, dim = words.shape
        side = round(count**0.5)
        sides = resolve_grid(grid, self.grid)
        rows, columns = map(halve_side, sides)
        x = reshape(self.norm(words), (-1, *sides, count * dim))  # (b, r, q, w*c)
        missing = [[0, 2 * half - n] for half, n in zip((rows, columns), sides, strict=True)]
        x = ops.pad(x, [[0, 0], *missing, [0, 0]])
        x = reshape(x, (-1, 2, columns, 2, side, side * dim))  # (b*r/2, 2, q/2, 2, s, s*c)
        x = ops.transpose(x, (0, 2, 1, 4, 3, 5))  # (b*r/2, q/2, 2, s, 2, s*c)
        x = reshape(x, (-1, 2 * side, 2 * side, dim))  # (b*r/2*q/2, 2*s, 2*s, c)
        x = self.convolution(pad_edges(x))  # (b*r/2*q/2, s, s, dim)
        return reshape(x, (-1, rows * columns, count, self.dim))  # (b, r/2*q/2, w, dim)

    def compute_output_shape(self, words_shape, grid_shape=None):
        """Returns `(batch, rows/2 * columns/2, words, dim)`."""
        return self.merged_shape(words_shape, grid_shape)


@keras.saving.register_keras_serializable(package="keras_tnt")
class RelativePosition(ConfiguredLayer):
    """Learned relative position bias per head, patch and pooled patch, shared by a stage's blocks.

    Tables saved for another grid are resampled when they are loaded.

    Args:
        num_heads: number of heads.
        grid: (rows, columns) of the table's patches.
        reduction: side of the squares of patches that are pooled for keys and values. Defaults to
            1.

    Call arguments:
        patches: unused; `(batch, rows * columns, dim)`.
        grid: `(batch, rows, columns)`, whose shape is the grid of `patches`; the table is resampled
            to it as at loading. Defaults to the table's grid.

    Returns:
        `(1, num_heads, rows * columns, rows/reduction * columns/reduction)`.
    """

    role = "position"

    def __init__(self, num_heads: int, grid: tuple[int, int], reduction: int = 1, **kwargs):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.grid = (grid[0], grid[1])
        self.reduction = reduction

    def table_shape(self, grid) -> tuple:
        """Returns `(num_heads, patches, pooled patches)` of a grid."""
        sides = self.table_sides(grid)
        return (self.num_heads, product(*sides[:2]), product(*sides[2:]))

    def table_sides(self, grid) -> tuple:
        """Returns (rows, columns, pooled rows, pooled columns) of a grid."""
        return (*grid, *(None if side is None else side // self.reduction for side in grid))

    def build(self, input_shape):
        """Creates the `(num_heads, patches, pooled patches)` table."""
        self.table = self.add_weight(
            name="table",
            shape=self.table_shape(self.grid),
            initializer=RandomNormal(stddev=1.0),  # The published code uses `torch.randn`.
            autocast=False,
        )

    def call(self, patches, grid=None):
        """Returns the bias `(1, num_heads, patches, pooled patches)`, resampled to the grid."""
        table = ops.convert_to_tensor(self.table)
        if grid is not None and tuple(grid.shape[1:]) != self.grid:
            new_grid = resolve_grid(grid, None)
            table = assert_poolable(table, new_grid, self.reduction)
            sides = self.table_sides(new_grid)
            table = resample(table, self.table_sides(self.grid), sides)
            shape = (self.num_heads, sides[0] * sides[1], sides[2] * sides[3])
            table = ops.reshape(table, shape)  # (h, r*q, r/s*q/s)
        return ops.expand_dims(ops.cast(table, self.compute_dtype), 0)

    def compute_output_shape(self, patches_shape, grid_shape=None):
        """Returns `(1, num_heads, patches, pooled patches)`."""
        return (1, *self.table_shape(self.grid if grid_shape is None else grid_shape[1:]))

    def can_resample(self, shape):
        """Returns whether a table `(1, heads, patches, pooled)` is one of a square grid."""
        one, heads, patches, pooled = shape
        side = round(patches**0.5)
        return (
            one == 1
            and heads == self.num_heads
            and side**2 == patches
            and (side // self.reduction) ** 2 == pooled > 0
        )

    def resample(self, table):
        """Resamples a table `(1, heads, patches, pooled)` of a square grid to this layer's grid."""
        side = round(table.shape[-2] ** 0.5)
        return self.resampled(table[0], (side, side))

    def resampled(self, table, grid):
        """Resamples a table `(heads, patches, pooled)` of `grid` to this layer's grid."""
        if grid == self.grid:
            return table
        sides, new_sides = self.table_sides(grid), self.table_sides(self.grid)
        x = resample(np.reshape(table, (-1, *sides)).astype("float64"), sides, new_sides)
        return np.reshape(x, self.table_shape(self.grid)).astype(table.dtype)

    def save_own_variables(self, store):
        """Saves the table and its grid, from which `load_own_variables` resamples."""
        super().save_own_variables(store)
        store["grid"] = np.array(self.grid)

    def load_own_variables(self, store):
        """Loads a table, resampled from the grid it was saved with."""
        grid = tuple(int(side) for side in store["grid"])
        self.table.assign(self.resampled(np.array(store["0"]), grid))


@keras.saving.register_keras_serializable(package="keras_tnt")
class ReducedAttention(Attention):
    """Spatial-reduction attention (SRA): keys and values are average-pooled patches.

    See PyramidTNT, section 3.2.

    Args:
        num_heads: number of heads; divides the input's last dimension.
        grid: (rows, columns) of the patches. If `None`, each call passes the grid.
        reduction: side of the squares of patches that are averaged for a key and a value; 1
            disables pooling. Trailing patches that do not fill a square are excluded from the keys.
            Defaults to 1.
        qkv_bias: whether query, key and value have a bias. Defaults to `False`.
        attention_dropout: dropout rate on the attention weights, in [0, 1). Defaults to 0.
        dropout: dropout rate after the output projection, in [0, 1). Defaults to 0.
        epsilon: epsilon of the layer norm of the pooled patches. Defaults to 1e-5.

    Call arguments:
        x: `(batch, rows * columns, dim)`.
        bias: if given, added to the scores, `(1, num_heads, patches, pooled patches)`.
        grid: `(batch, rows, columns)`, whose shape is the grid. Defaults to the layer's grid.
        first_tokens: number N of leading query patches. If given, only the first N output patches
            are computed, with the same values as a slice of the full result.

    Returns:
        `(batch, first_tokens or rows * columns, dim)`.
    """

    def __init__(
        self,
        num_heads: int,
        grid: tuple[int, int] | None = None,
        reduction: int = 1,
        qkv_bias: bool = False,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        epsilon: float = 1e-5,
        **kwargs,
    ):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(num_heads, qkv_bias, attention_dropout, dropout, **kwargs)
        self.grid = as_grid(grid)
        self.reduction = reduction
        self.epsilon = epsilon

    def build(self, input_shape):
        """Builds the projections, and the reduction of the keys if `reduction` is above 1."""
        dim = input_shape[-1]
        policy = self.dtype_policy
        self.query = projection(dim, self.qkv_bias, dtype=policy, name="query")
        self.query.build(input_shape)
        if self.reduction > 1:
            self.reduce = projection(dim, dtype=policy, name="reduce")
            self.reduce.build(input_shape)
            self.norm = LayerNormalization(epsilon=self.epsilon, dtype=policy, name="norm")
            self.norm.build(input_shape)
        self.kv = projection(2 * dim, self.qkv_bias, dtype=policy, name="kv")
        self.kv.build(input_shape)
        self.build_output(dim)

    def pool(self, x, grid=None):
        """Averages each square: `(batch, rows/reduction * columns/reduction, dim)`."""
        size, dim = self.reduction, x.shape[-1]
        grid = resolve_grid(grid, self.grid)
        x = assert_poolable(x, grid, size)
        rows, columns = (side // size for side in grid)
        x = reshape(x, (-1, *grid, dim))[:, : rows * size, : columns * size]
        x = reshape(x, (-1, rows, size, columns, size, dim))  # (b, r/s, s, q/s, s, c)
        return reshape(ops.mean(x, axis=(2, 4)), (-1, rows * columns, dim))  # (b, r/s*q/s, c)

    def project(self, x, grid=None):
        """Returns the query of all patches, and key and value of the pooled patches."""
        pooled = x
        if self.reduction > 1:
            pooled = self.norm(self.reduce(self.pool(x, grid)))
        query = self.query(x)
        key, value = ops.split(self.kv(pooled), 2, axis=-1)
        return tuple(split_heads(part, self.num_heads) for part in (query, key, value))


@keras.saving.register_keras_serializable(package="keras_tnt")
class ReducedBlock(TransformerBlock):
    """Transformer block with `ReducedAttention`: PyramidTNT's outer transformer.

    Args:
        num_heads: number of heads; divides the input's last dimension.
        grid: (rows, columns) of the patches. If `None`, each call passes the grid.
        reduction: side of the squares of patches that are averaged for a key and a value; 1
            disables pooling. Defaults to 1.
        mlp_ratio: hidden dimension of the MLP divided by the input's. Defaults to 4.
        qkv_bias: whether query, key and value have a bias. Defaults to `False`.
        dropout: dropout rate after each projection, in [0, 1). Defaults to 0.
        attention_dropout: dropout rate on the attention weights, in [0, 1). Defaults to 0.
        stochastic_depth: probability of dropping a sample's residual branch, in [0, 1). Defaults to
            0.
        layer_scale: initial value of the LayerScale on each branch. If `None`, there is no
            LayerScale.
        squeeze_excite: whether `SqueezeExcite` follows the MLP. Defaults to `False`.
        epsilon: epsilon of the layer norms. Defaults to 1e-5.

    Call arguments:
        x: `(batch, rows * columns, dim)`.
        bias: if given, added to the scores, `(1, num_heads, patches, pooled patches)`.
        grid: `(batch, rows, columns)`, whose shape is the grid. Defaults to the layer's grid.
        first_tokens: number N of leading query patches. If given, only the first N output patches
            are computed, with the same values as a slice of the full result.

    Returns:
        `(batch, first_tokens or rows * columns, dim)`.
    """

    def __init__(
        self,
        num_heads: int,
        grid: tuple[int, int] | None = None,
        reduction: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        layer_scale: float | None = None,
        squeeze_excite: bool = False,
        epsilon: float = 1e-5,
        **kwargs,
    ):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(
            num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            dropout=dropout,
            attention_dropout=attention_dropout,
            stochastic_depth=stochastic_depth,
            layer_scale=layer_scale,
            squeeze_excite=squeeze_excite,
            epsilon=epsilon,
            **kwargs,
        )
        self.grid = as_grid(grid)
        self.reduction = reduction

    def build_attention(self):
        """Returns a new `ReducedAttention`."""
        return ReducedAttention(
            grid=self.grid,
            reduction=self.reduction,
            epsilon=self.epsilon,
            **self.attention_arguments(),
        )


@keras.saving.register_keras_serializable(package="keras_tnt")
class PyramidTNTBlock(TNTBlock):
    """`TNTBlock` with an outer `ReducedBlock` and inner layer norms over all words of a patch.

    Args:
        outer_heads: number of heads of the outer transformer; divides the dimension of a patch.
        inner_heads: number of heads of the inner transformer; divides the dimension of a word.
        grid: (rows, columns) of the patches. If `None`, each call passes the grid.
        reduction: side of the squares of patches that are averaged for a key and a value of the
            outer attention; 1 disables pooling. Defaults to 1.
        mlp_ratio: hidden dimension of the MLPs divided by their input dimension. Defaults to 4.
        qkv_bias: whether query, key and value have a bias. Defaults to `False`.
        dropout: dropout rate after each projection, in [0, 1). Defaults to 0.
        attention_dropout: dropout rate on the attention weights, in [0, 1). Defaults to 0.
        stochastic_depth: probability of dropping a residual branch, in [0, 1): per sample in the
            outer transformer, per patch in the inner one. Defaults to 0.
        layer_scale: initial value of the LayerScale on each branch. If `None`, there is no
            LayerScale.
        epsilon: epsilon of the layer norms. Defaults to 1e-5.

    Call arguments:
        tokens: `(batch, rows * columns, outer_dim)`.
        words: `(batch, rows * columns, words, inner_dim)`.
        bias: if given, added to the scores of the outer attention.
        grid: `(batch, rows, columns)`, whose shape is the grid. Defaults to the layer's grid.
        first_tokens: number N of leading query patches. If given, only the first N output patches
            are computed, with the same values as a slice of the full result.

    Returns:
        `(tokens, words)`: the input shapes, except that `tokens` has `first_tokens` patches if
        given.
    """

    def __init__(
        self,
        outer_heads: int,
        inner_heads: int,
        grid: tuple[int, int] | None = None,
        reduction: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        layer_scale: float | None = None,
        epsilon: float = 1e-5,
        **kwargs,
    ):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(
            outer_heads,
            inner_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            dropout=dropout,
            attention_dropout=attention_dropout,
            stochastic_depth=stochastic_depth,
            layer_scale=layer_scale,
            prefix_tokens=0,
            epsilon=epsilon,
            **kwargs,
        )
        self.grid = as_grid(grid)
        self.reduction = reduction

    def build_inner(self):
        """Returns a new inner transformer, whose layer norms span all words of a patch."""
        return TransformerBlock(
            self.inner_heads,
            sample_axes=2,
            norm_axis=(-2, -1),
            name="inner",
            **self.transformer_arguments(),
        )

    def build_outer(self):
        """Returns a new outer transformer, a `ReducedBlock`."""
        return ReducedBlock(
            self.outer_heads,
            self.grid,
            self.reduction,
            name="outer",
            **self.transformer_arguments(),
        )
