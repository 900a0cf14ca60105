"""What PyramidTNT (arXiv 2201.00978) has beyond TNT: a convolutional stem, stages of ever fewer
patches, outer attention to pooled patches with relative positions.

Maps are channels last inside, whatever the images are: the CPU has no other convolution on
TensorFlow.
"""

import keras
import numpy as np
from keras import ops

from keras_tnt.layers.attention import Attention, split_heads
from keras_tnt.layers.base import (
    CompositeLayer,
    LayerNormalization,
    RandomNormal,
    projection,
    take_first_spec,
)
from keras_tnt.layers.blocks import TNTBlock, TransformerBlock
from keras_tnt.layers.grid import (
    ceil_divide,
    checked,
    cut,
    image_size,
    in_a_row,
    patches_of,
    product,
    resample,
    told_grid,
    whole_patches,
)
from keras_tnt.layers.sharding import reshape
from keras_tnt.native import runtimes


def halve(size):
    """The size of a map after a 3x3 convolution of stride 2, zero-padded by 1 on each side."""
    return ceil_divide(size, 2)


def enough_to_pool(x, grid, size):
    """A tensor, once a grid is known to have a square of so many patches; see `checked`."""
    message = (
        f"A stage pools {size}x{size} patches, and has {{}}x{{}}. Give larger images, or build the "
        "model with smaller `reductions`."
    )
    return checked(x, grid, lambda side: side >= size, lambda sides: (message, sides))


def convolution(dim, stride, *, dtype, name):
    """Returns a 3x3 convolution of a map that `pad_edges` has padded.

    Its kernel starts from N(0, sqrt(2 / fan_out)), its bias from zeros, as in the published code.
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
    """Zeros around (batch, rows, columns, dim); Keras's "same" pads stride 2 on one side only."""
    return ops.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]])


@keras.saving.register_keras_serializable(package="keras_tnt")
class BatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` whose statistics a recomputation on torch does not move."""

    def call(self, inputs, training=None, mask=None):
        if training and keras.backend.backend() == "torch" and runtimes.is_in_torch_backward():
            state = [(variable, variable.value) for variable in self.variables]
            with keras.StatelessScope(state_mapping=state):
                return super().call(inputs, training=training, mask=mask)
        return super().call(inputs, training=training, mask=mask)


@keras.saving.register_keras_serializable(package="keras_tnt")
class ConvolutionNormReLU(CompositeLayer):
    """3x3 convolution, BatchNorm, ReLU: `(batch, rows, columns, channels)` to as many of `dim`.

    Args:
        dim: channels of the result.
        stride: of the convolution: 1, or 2 for half the rows and columns, rounded up.
    """

    def __init__(self, dim: int, stride: int = 1, **kwargs):
        super().__init__(**kwargs)
        self.dim = dim
        self.stride = stride

    def build(self, input_shape):
        policy = self.dtype_policy
        self.convolution = convolution(self.dim, self.stride, dtype=policy, name="convolution")
        self.convolution.build((None, None, None, input_shape[-1]))
        self.norm = BatchNormalization(momentum=0.9, epsilon=1e-5, dtype=policy, name="norm")
        self.norm.build(self.compute_output_shape(input_shape))

    def call(self, x, training=False):
        return ops.relu(self.norm(self.convolution(pad_edges(x)), training=training))

    def compute_output_shape(self, input_shape):
        batch, *size, _ = input_shape
        if self.stride == 2:
            size = [halve(side) for side in size]
        return (batch, *size, self.dim)

    def get_config(self):
        return {**super().get_config(), "dim": self.dim, "stride": self.stride}


@keras.saving.register_keras_serializable(package="keras_tnt")
class PyramidStem(CompositeLayer):
    """Patches of 8x8 pixels and the 4x4 words in each, by convolutions of the whole image.

    Args:
        outer_dim, inner_dim: dimensions of a patch and of a word.
        data_format: `"channels_last"` or `"channels_first"`; None: Keras's setting.

    Call arguments:
        images: `(batch, height, width, channels)`, or channels first; multiples of 8.

    Returns:
        `(patches, words)`: `(batch, height/8 * width/8, outer_dim)` and
        `(batch, height/8 * width/8, 16, inner_dim)`, row by row.
    """

    part = "stem"

    patch_size = 8

    def __init__(self, outer_dim: int, inner_dim: int, data_format: str | None = None, **kwargs):
        super().__init__(**kwargs)
        self.outer_dim = outer_dim
        self.inner_dim = inner_dim
        self.data_format = data_format or keras.config.image_data_format()

    def build(self, input_shape):
        height, width, channels = image_size(input_shape, self.data_format)
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
        step = ConvolutionNormReLU(dim, stride, dtype=self.dtype_policy, name=name)
        step.build(shape)
        return step

    def call(self, images, training=False):
        images = whole_patches(images, self.patch_size, self.data_format)
        x = self.common(images, training=training)  # (b, H/2, W/2, 2*inner_dim)
        words = cut(self.words(x, training=training), 4)  # (b, r, q, 16*inner_dim)
        patches = self.patches2(self.patches1(x, training=training), training=training)
        patches = self.patches3(patches, training=training)  # (b, r, q, outer_dim)
        return in_a_row(patches, self.outer_dim), in_a_row(words, 16, self.inner_dim)

    def compute_output_shape(self, input_shape):
        batch_and_patches = patches_of(input_shape, self.patch_size, self.data_format)
        return (*batch_and_patches, self.outer_dim), (*batch_and_patches, 16, self.inner_dim)

    def get_config(self):
        return {
            **super().get_config(),
            "outer_dim": self.outer_dim,
            "inner_dim": self.inner_dim,
            "data_format": self.data_format,
        }


class Merge(CompositeLayer):
    """What the two mergings share: LayerNorm, then a 3x3 convolution of stride 2."""

    part = "merge"

    def __init__(
        self, dim: int, grid: tuple[int, int] | None = None, epsilon: float = 1e-5, **kwargs
    ):
        super().__init__(**kwargs)
        self.dim = dim
        self.grid = grid and tuple(grid)
        self.epsilon = epsilon

    def build(self, input_shape):
        policy = self.dtype_policy
        self.norm = LayerNormalization(epsilon=self.epsilon, dtype=policy, name="norm")
        self.norm.build(input_shape)
        self.convolution = convolution(self.dim, 2, dtype=policy, name="convolution")
        self.convolution.build((None, None, None, input_shape[-1]))

    def merged_shape(self, input_shape, grid_shape):
        sides = self.grid if grid_shape is None else grid_shape[1:]
        return (input_shape[0], product(*map(halve, sides)), *input_shape[2:-1], self.dim)

    def get_config(self):
        return {
            **super().get_config(),
            "dim": self.dim,
            "grid": self.grid,
            "epsilon": self.epsilon,
        }


@keras.saving.register_keras_serializable(package="keras_tnt")
class MergePatches(Merge):
    """Patches of the next stage: a 3x3 convolution of stride 2 over the patches.

    Args:
        dim: dimension of a patch of the next stage.
        grid: (rows, columns) of the patches, of which odd ones are rounded up; None: each call
            tells it.
        epsilon: of the norm.

    Call arguments:
        patches: `(batch, rows * columns, dim of this stage)`.
        grid: `(batch, rows, columns)`, whose shape tells the grid; None: the layer's own.

    Returns:
        `(batch, rows/2 * columns/2, dim)`.
    """

    def call(self, patches, grid=None):
        shape = (-1, *told_grid(grid, self.grid), patches.shape[-1])
        x = reshape(self.norm(patches), shape)  # (b, r, q, c)
        return in_a_row(self.convolution(pad_edges(x)), self.dim)  # (b, r/2*q/2, dim)

    def compute_output_shape(self, patches_shape, grid_shape=None):
        return self.merged_shape(patches_shape, grid_shape)


@keras.saving.register_keras_serializable(package="keras_tnt")
class MergeWords(Merge):
    """Words of the next stage: the words of 2x2 patches joined, a 3x3 convolution of stride 2.

    Args:
        dim: dimension of a word of the next stage.
        grid: (rows, columns) of the patches, to odd ones of which a row or column of zero words is
            added; None: each call tells it.
        epsilon: of the norm.

    Call arguments:
        words: `(batch, rows * columns, words, dim of this stage)`.
        grid: `(batch, rows, columns)`, whose shape tells the grid; None: the layer's own.

    Returns:
        `(batch, rows/2 * columns/2, words, dim)`.
    """

    def call(self, words, grid=None):
        _, _, count, dim = words.shape
        side = round(count**0.5)
        sides = told_grid(grid, self.grid)
        rows, columns = map(halve, sides)
        x = reshape(self.norm(words), (-1, *sides, count * dim))  # (b, r, q, w*c)
        missing = [[0, 2 * half - n] for half, n in zip((rows, columns), sides, strict=True)]
        x = ops.pad(x, [[0, 0], *missing, [0, 0]])
        x = reshape(x, (-1, 2, columns, 2, side, side * dim))  # (b*r/2, 2, q/2, 2, s, s*c)
        x = ops.transpose(x, (0, 2, 1, 4, 3, 5))  # (b*r/2, q/2, 2, s, 2, s*c)
        x = reshape(x, (-1, 2 * side, 2 * side, dim))  # (b*r/2*q/2, 2*s, 2*s, c)
        x = self.convolution(pad_edges(x))  # (b*r/2*q/2, s, s, dim)
        return reshape(x, (-1, rows * columns, count, self.dim))  # (b, r/2*q/2, w, dim)

    def compute_output_shape(self, words_shape, grid_shape=None):
        return self.merged_shape(words_shape, grid_shape)


@keras.saving.register_keras_serializable(package="keras_tnt")
class RelativePosition(keras.layers.Layer):
    """A learned score for each head, patch and pooled patch, shared by the blocks of a stage.

    Weights saved on another grid are resampled as they load.

    Args:
        num_heads: number of heads.
        grid: (rows, columns) of the table's patches.
        reduction: side of the squares of patches that are pooled for keys and values.

    Call arguments:
        patches: `(batch, rows * columns, dim)`, of which nothing is read.
        grid: `(batch, rows, columns)`, whose shape tells the grid of `patches`, for which the table
            is resampled as weights are that load; None: the table's.

    Returns:
        `(1, num_heads, rows * columns, rows/reduction * columns/reduction)`.
    """

    part = "position"

    def __init__(self, num_heads: int, grid: tuple[int, int], reduction: int = 1, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.grid = tuple(grid)
        self.reduction = reduction

    def table_shape(self, grid):
        sides = self.table_sides(grid)
        return (self.num_heads, product(*sides[:2]), product(*sides[2:]))

    def table_sides(self, grid):
        """(rows, columns, pooled rows, pooled columns) of a grid."""
        return (*grid, *(None if side is None else side // self.reduction for side in grid))

    def build(self, input_shape):
        self.table = self.add_weight(
            name="table",
            shape=self.table_shape(self.grid),
            initializer=RandomNormal(stddev=1.0),  # `torch.randn` in the published code
            autocast=False,
        )

    def call(self, patches, grid=None):
        table = ops.convert_to_tensor(self.table)
        if grid is not None and tuple(grid.shape[1:]) != self.grid:
            new_grid = told_grid(grid, None)
            table = enough_to_pool(table, new_grid, self.reduction)
            sides = self.table_sides(new_grid)
            table = resample(table, self.table_sides(self.grid), sides)
            shape = (self.num_heads, sides[0] * sides[1], sides[2] * sides[3])
            table = ops.reshape(table, shape)  # (h, r*q, r/s*q/s)
        return ops.expand_dims(ops.cast(table, self.compute_dtype), 0)

    def compute_output_shape(self, patches_shape, grid_shape=None):
        return (1, *self.table_shape(self.grid if grid_shape is None else grid_shape[1:]))

    def can_resample(self, shape):
        """Whether a table of this shape, (1, heads, patches, pooled), is of a square grid."""
        one, heads, patches, pooled = shape
        side = round(patches**0.5)
        return (
            one == 1
            and heads == self.num_heads
            and side**2 == patches
            and (side // self.reduction) ** 2 == pooled > 0
        )

    def resample(self, table):
        """Fit the table (1, heads, patches, pooled) of another, square grid to this layer's."""
        side = round(table.shape[-2] ** 0.5)
        return self.resampled(table[0], (side, side))

    def resampled(self, table, grid):
        """Bicubic, antialiased, over the patches as over the pooled patches."""
        if grid == self.grid:
            return table
        sides, new_sides = self.table_sides(grid), self.table_sides(self.grid)
        x = resample(np.reshape(table, (-1, *sides)).astype("float64"), sides, new_sides)
        return np.reshape(x, self.table_shape(self.grid)).astype(table.dtype)

    def save_own_variables(self, store):
        super().save_own_variables(store)
        store["grid"] = np.array(self.grid)

    def load_own_variables(self, store):
        grid = tuple(int(side) for side in store["grid"])
        self.table.assign(self.resampled(np.array(store["0"]), grid))

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "grid": self.grid,
            "reduction": self.reduction,
        }


@keras.saving.register_keras_serializable(package="keras_tnt")
class ReducedAttention(Attention):
    """Attention of all patches to patches pooled by squares (PyramidTNT, section 3.2).

    Args:
        num_heads: number of heads; divides the input's last dimension.
        grid: (rows, columns) of the patches; None: each call tells it.
        reduction: side of the squares whose mean is a key and a value; 1: no pooling. Patches
            beyond the last whole square are nobody's key.
        qkv_bias: whether query, key and value have a bias.
        attention_dropout: dropout rate on the attention, in [0, 1).
        dropout: dropout rate after the output projection, in [0, 1).
        epsilon: of the norm of the pooled patches.

    Call arguments:
        x: `(batch, rows * columns, dim)`.
        bias: if given, added to the scores, `(1, num_heads, patches, pooled patches)`.
        grid: `(batch, rows, columns)`, whose shape tells the grid; None: the layer's own.
        first_tokens: if given, only the first so many patches are computed; the result is exact.

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
        super().__init__(num_heads, qkv_bias, attention_dropout, dropout, **kwargs)
        self.grid = grid and tuple(grid)
        self.reduction = reduction
        self.epsilon = epsilon

    def build(self, input_shape):
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
        """The mean of each square: (batch, rows/reduction * columns/reduction, dim)."""
        size, dim = self.reduction, x.shape[-1]
        grid = told_grid(grid, self.grid)
        x = enough_to_pool(x, grid, size)
        rows, columns = (side // size for side in grid)
        x = reshape(x, (-1, *grid, dim))[:, : rows * size, : columns * size]
        x = reshape(x, (-1, rows, size, columns, size, dim))  # (b, r/s, s, q/s, s, c)
        return reshape(ops.mean(x, axis=(2, 4)), (-1, rows * columns, dim))  # (b, r/s*q/s, c)

    def call(self, x, bias=None, grid=None, first_tokens=None, training=False):
        pooled = x
        if self.reduction > 1:
            pooled = self.norm(self.reduce(self.pool(x, grid)))
        query = split_heads(self.query(x), self.num_heads)
        key, value = (
            split_heads(part, self.num_heads) for part in ops.split(self.kv(pooled), 2, axis=-1)
        )
        return self.attend(
            query, key, value, bias=bias, first_tokens=first_tokens, training=training
        )

    def compute_output_shape(self, input_shape):
        return input_shape

    def compute_output_spec(self, x, bias=None, grid=None, first_tokens=None, training=False):
        return take_first_spec(x, first_tokens, self.compute_dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "grid": self.grid,
            "reduction": self.reduction,
            "epsilon": self.epsilon,
        }


@keras.saving.register_keras_serializable(package="keras_tnt")
class ReducedBlock(TransformerBlock):
    """A transformer block with `ReducedAttention`: PyramidTNT's outer transformer.

    Args:
        num_heads: number of heads; divides the input's last dimension.
        grid: (rows, columns) of the patches; None: each call tells it.
        reduction: side of the squares of patches whose mean is a key and a value; 1: no pooling.
        mlp_ratio: hidden dimension of the MLP over the input's.
        qkv_bias: whether query, key and value have a bias.
        dropout: dropout rate behind each projection, in [0, 1).
        attention_dropout: dropout rate on the attention, in [0, 1).
        stochastic_depth: rate at which samples skip a branch, in [0, 1).
        layer_scale: initial value of the LayerScale on each branch; None: no LayerScale.
        squeeze_excite: whether the MLP's output passes through `SqueezeExcite`.
        epsilon: of the norms.

    Call arguments:
        x: `(batch, rows * columns, dim)`.
        bias: if given, added to the scores, `(1, num_heads, patches, pooled patches)`.
        grid: `(batch, rows, columns)`, whose shape tells the grid; None: the layer's own.
        first_tokens: if given, only the first so many patches are computed; the result is exact.

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
        self.grid = grid and tuple(grid)
        self.reduction = reduction

    def make_attention(self):
        return ReducedAttention(
            grid=self.grid,
            reduction=self.reduction,
            epsilon=self.epsilon,
            **self.attention_arguments(),
        )

    def get_config(self):
        config = {**super().get_config(), "grid": self.grid, "reduction": self.reduction}
        del config["sample_axes"], config["norm_axis"]
        return config


@keras.saving.register_keras_serializable(package="keras_tnt")
class PyramidTNTBlock(TNTBlock):
    """`TNTBlock` with `ReducedBlock` outside, and inside norms over all words of a patch.

    Args:
        outer_heads, inner_heads: heads of the two transformers; divide their dimensions.
        grid: (rows, columns) of the patches; None: each call tells it.
        reduction: side of the squares of patches whose mean is a key and a value of the outer
            attention; 1: no pooling.
        mlp_ratio: hidden dimension of the MLPs over their inputs'.
        qkv_bias: whether query, key and value have a bias.
        dropout: dropout rate behind each projection, in [0, 1).
        attention_dropout: dropout rate on the attention, in [0, 1).
        stochastic_depth: rate at which a branch is skipped, in [0, 1): by a sample in the outer
            transformer, by a patch in the inner one.
        layer_scale: initial value of the LayerScale on each branch; None: no LayerScale.
        epsilon: of the norms.

    Call arguments:
        tokens: `(batch, rows * columns, outer_dim)`.
        words: `(batch, rows * columns, words, inner_dim)`.
        bias: if given, added to the scores of the outer attention.
        grid: `(batch, rows, columns)`, whose shape tells the grid; None: the layer's own.
        first_tokens: if given, only the first so many patches are computed; the result is exact.

    Returns:
        `(tokens, words)` of the same shapes, but for `first_tokens`.
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
        self.grid = grid and tuple(grid)
        self.reduction = reduction

    def make_inner(self):
        return TransformerBlock(
            self.inner_heads,
            sample_axes=2,
            norm_axis=(-2, -1),
            name="inner",
            **self.transformer_arguments(),
        )

    def make_outer(self):
        return ReducedBlock(
            self.outer_heads,
            self.grid,
            self.reduction,
            name="outer",
            **self.transformer_arguments(),
        )

    def get_config(self):
        config = {**super().get_config(), "grid": self.grid, "reduction": self.reduction}
        del config["squeeze_excite"], config["legacy"], config["prefix_tokens"]
        return config
