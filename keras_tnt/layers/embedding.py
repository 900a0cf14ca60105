"""Stems that embed images as patches and words, word-to-patch projections, and position tables."""

import math

import keras
import numpy as np
from keras import ops

from keras_tnt.layers import fused
from keras_tnt.layers.base import (
    CompositeLayer,
    ConfiguredLayer,
    LayerNormalization,
    TruncatedNormal,
    attention_interceptor,
    projection,
    torch_uniform,
)
from keras_tnt.layers.grid import (
    count_patches,
    flatten_grid,
    image_dimensions,
    patchify,
    resample,
    resolve_grid,
    shape_of,
    to_whole_patches,
)
from keras_tnt.layers.sharding import reshape, shard_like


@keras.saving.register_keras_serializable(package="keras_tnt")
class PatchEmbedding(CompositeLayer):
    """Patch embedding: projects each square patch to a token (ViT, arXiv 2010.11929, equation 1).

    Args:
        patch_size: side of a patch in pixels; divides height and width.
        dim: dimension of a token.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to Keras's image data format.

    Returns:
        `(batch, height/patch_size * width/patch_size, dim)`, in row-major order.
    """

    role = "stem"

    def __init__(self, patch_size: int, dim: int, data_format: str | None = None, **kwargs):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.dim = dim
        self.data_format = data_format or keras.config.image_data_format()

    def build(self, input_shape):
        """Builds the projection from the pixels of a patch to a token."""
        values = self.patch_size**2 * image_dimensions(input_shape, self.data_format)[-1]
        self.projection = projection(
            self.dim, fan_in=values, dtype=self.dtype_policy, name="projection"
        )
        self.projection.build((None, None, values))

    def call(self, images):
        """Maps images to `(batch, patches, dim)`."""
        images = to_whole_patches(images, self.patch_size, self.data_format)
        return flatten_grid(self.projection(patchify(images, self.patch_size)), self.dim)

    def compute_output_shape(self, input_shape):
        """Returns `(batch, patches, dim)`."""
        return (*count_patches(input_shape, self.patch_size, self.data_format), self.dim)


@keras.saving.register_keras_serializable(package="keras_tnt")
class WordEmbedding(ConfiguredLayer):
    """TNT's stem: a 7x7 convolution inside each patch that embeds its words (TNT, section 2.2).

    The image is split into patches first, so that the convolution, which has stride `stride` and
    zero padding of 3, reads no pixel of another patch. Each word is therefore a linear function of
    its patch's pixels, and the layer computes all words with one matrix product.

    Args:
        dim: dimension of a word.
        patch_size: side of a patch in pixels; divides height and width. Defaults to 16.
        stride: side of a word in pixels; divides `patch_size`. Defaults to 4.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to Keras's image data format.

    Returns:
        `(batch, patches, words, dim)`, both patches and words in row-major order.
    """

    role = "stem"

    kernel_size = 7

    def __init__(
        self,
        dim: int,
        patch_size: int = 16,
        stride: int = 4,
        data_format: str | None = None,
        **kwargs,
    ):
        """Initializes the layer; raises a `ValueError` if `stride` does not divide `patch_size`."""
        super().__init__(**kwargs)
        if patch_size % stride:
            raise ValueError(
                "`inner_stride` must divide `patch_size`. "
                f"Received: inner_stride={stride}, patch_size={patch_size}"
            )
        self.dim = dim
        self.patch_size = patch_size
        self.stride = stride
        self.data_format = data_format or keras.config.image_data_format()
        self.side = patch_size // stride  # Side of a patch in words.

    def build(self, input_shape):
        """Creates the `(7, 7, channels, dim)` kernel and the bias."""
        channels = image_dimensions(input_shape, self.data_format)[-1]
        fan_in = self.kernel_size**2 * channels
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.kernel_size, self.kernel_size, channels, self.dim),
            initializer=torch_uniform(fan_in),
        )
        self.bias = self.add_weight(
            name="bias", shape=(self.dim,), initializer=torch_uniform(fan_in)
        )

    def call(self, images):
        """Maps images to `(batch, patches, words, dim)`."""
        images = to_whole_patches(images, self.patch_size, self.data_format)
        patches = patchify(images, self.patch_size)  # (b, r, q, p*p*c)
        words = ops.matmul(patches, self.patch_kernel())  # (b, r, q, words*dim)
        return self.by_patch(words) + self.bias

    def patch_kernel(self):
        """Returns the convolution as a matrix, `(pixels of a patch, words * dim)`."""
        size, pad = self.patch_size, self.kernel_size // 2
        starts = [size + pad - i * self.stride for i in range(self.side)]
        x = ops.pad(self.kernel, [[size, size], [size, size], [0, 0], [0, 0]])
        x = ops.stack([x[start : start + size] for start in starts])
        x = ops.stack([x[:, :, start : start + size] for start in starts], axis=1)
        x = ops.transpose(x, (2, 3, 4, 0, 1, 5))  # (p, p, c, side, side, dim)
        return ops.reshape(x, (size * size * x.shape[2], self.side**2 * self.dim))

    def by_patch(self, words):
        """Reshapes `(batch, rows, columns, words * dim)` to `(batch, patches, words, dim)`."""
        return flatten_grid(words, self.side**2, self.dim)

    def compute_output_shape(self, input_shape):
        """Returns `(batch, patches, words, dim)`."""
        batch_and_patches = count_patches(input_shape, self.patch_size, self.data_format)
        return (*batch_and_patches, self.side**2, self.dim)


@keras.saving.register_keras_serializable(package="keras_tnt")
class LegacyWordEmbedding(WordEmbedding):
    """Stem of timm's first TNT port: the convolution reads across patches.

    The image is convolved as a whole and split into patches afterwards.

    Args:
        dim: dimension of a word.
        patch_size: side of a patch in pixels; divides height and width. Defaults to 16.
        stride: side of a word in pixels; divides `patch_size`. Defaults to 4.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to Keras's image data format.

    Returns:
        `(batch, patches, words, dim)`, both patches and words in row-major order.
    """

    def call(self, images):
        """Maps images to `(batch, patches, words, dim)`."""
        pad = [self.kernel_size // 2] * 2
        images = to_whole_patches(images, self.patch_size, self.data_format)
        images = ops.pad(images, [[0, 0], pad, pad, [0, 0]])
        words = ops.conv(images, self.kernel, self.stride, "valid", data_format="channels_last")
        return self.by_patch(patchify(words + self.bias, self.side))


@keras.saving.register_keras_serializable(package="keras_tnt")
class WordsToPatches(CompositeLayer):
    """Word-to-patch projection of the concatenated, normalized words (TNT, equations 5 and 6).

    Args:
        dim: dimension of a patch.
        use_bias: whether the projection has a bias, as in the stem and not in the blocks. Defaults
            to `True`.
        epsilon: epsilon of the layer norms. Defaults to 1e-5.

    Call arguments:
        words: `(batch, patches, words, inner_dim)`.

    Returns:
        `(batch, patches, dim)`.
    """

    # Whether `call` uses the C++ kernels if `keras_tnt.layers.fused` supports the call. If `False`,
    # the layer is computed with Keras operations.
    native_kernels = True

    def __init__(self, dim: int, use_bias: bool = True, epsilon: float = 1e-5, **kwargs):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(**kwargs)
        self.dim = dim
        self.use_bias = use_bias
        self.epsilon = epsilon

    def norm(self, name, shape):
        """Returns a built layer norm over the last axis of `shape`."""
        norm = LayerNormalization(epsilon=self.epsilon, dtype=self.dtype_policy, name=name)
        norm.build(shape)
        return norm

    def build_projection(self, words_shape):
        """Builds the projection from `words * inner_dim` to `dim` values."""
        *lead, words, inner_dim = words_shape
        self.projection = projection(
            self.dim, self.use_bias, dtype=self.dtype_policy, name="projection"
        )
        self.projection.build((*lead, words * inner_dim))

    def build(self, words_shape):
        """Builds a norm of the concatenated words, the projection, and a norm of the patches."""
        *lead, words, inner_dim = words_shape
        self.norm_words = self.norm("norm_words", (*lead, words * inner_dim))
        self.build_projection(words_shape)
        self.norm_patches = self.norm("norm_patches", (*lead, self.dim))

    def flatten(self, words):
        """Concatenates the words of each patch: `(batch, patches, words * inner_dim)`."""
        _, patches, count, inner_dim = shape_of(words)
        return reshape(words, (-1, patches, count * inner_dim))  # (b, n, words*inner_dim)

    def apply_gate(self, x, words):
        """Multiplies each word of `x` by its observer gate; returns `x` without an observer.

        Args:
            x: `(batch, patches, words * inner_dim)`.
            words: `(batch, patches, words, inner_dim)`, used for its shape and dtype alone.
        """
        look = attention_interceptor()
        if look is None:
            return x
        weights = look(self, ops.ones_like(words[..., 0]))  # (b, n, words)
        return x * ops.repeat(weights, words.shape[-1], axis=-1)

    def call(self, words, training=False):
        """Maps words to `(batch, patches, dim)`."""
        x = self.flatten(words)
        if self.native_kernels and (y := fused.projected(self, x, training)) is not None:
            return y
        return self.norm_patches(self.projection(self.apply_gate(self.norm_words(x), words)))

    def compute_output_shape(self, words_shape):
        """Returns `(batch, patches, dim)`."""
        return (*words_shape[:-2], self.dim)


@keras.saving.register_keras_serializable(package="keras_tnt")
class LegacyWordsToPatches(WordsToPatches):
    """Word-to-patch projection of timm's first TNT port, with a norm of each single word.

    No norm follows the projection.

    Args:
        dim: dimension of a patch.
        use_bias: whether the projection has a bias. Defaults to `True`.
        epsilon: epsilon of the layer norm. Defaults to 1e-5.

    Call arguments:
        words: `(batch, patches, words, inner_dim)`.

    Returns:
        `(batch, patches, dim)`.
    """

    def build(self, words_shape):
        """Builds a norm of the single words and the projection."""
        self.norm_words = self.norm("norm_words", words_shape)
        self.build_projection(words_shape)

    def call(self, words, training=False):
        """Maps words to `(batch, patches, dim)`."""
        return self.projection(self.apply_gate(self.flatten(self.norm_words(words)), words))


@keras.saving.register_keras_serializable(package="keras_tnt")
class ClassToken(ConfiguredLayer):
    """Prepends a learned token: `(batch, tokens, dim)` to `(batch, 1 + tokens, dim)`."""

    role = "token"

    def build(self, input_shape):
        """Creates the `(1, 1, dim)` token."""
        self.token = self.add_weight(
            name="token",
            shape=(1, 1, input_shape[-1]),
            initializer=TruncatedNormal(stddev=0.02),
        )

    def call(self, x):
        """Maps `(batch, tokens, dim)` to `(batch, 1 + tokens, dim)`."""
        token = ops.broadcast_to(
            ops.convert_to_tensor(self.token, dtype=x.dtype), (ops.shape(x)[0], 1, x.shape[-1])
        )
        return ops.concatenate([shard_like(token, x), x], axis=1)

    def compute_output_shape(self, input_shape):
        """Returns `(batch, 1 + tokens, dim)`."""
        batch, tokens, dim = input_shape
        return (batch, None if tokens is None else tokens + 1, dim)


@keras.saving.register_keras_serializable(package="keras_tnt")
class PositionEmbedding(ConfiguredLayer):
    """Learned position embedding of a token grid and of the prefix tokens before it.

    Position tables saved for another grid are resampled when they are loaded.

    Args:
        grid: (rows, columns) of the table.
        prefix_tokens: number of tokens before those of the grid. Defaults to 0.

    Call arguments:
        x: `(batch, ..., prefix_tokens + rows * columns, dim)`.
        grid: `(batch, rows, columns)`, whose shape is the grid of `x`; the table is resampled to it
            as at loading. Defaults to the table's grid.
    """

    role = "position"

    def __init__(self, grid: tuple[int, int], prefix_tokens: int = 0, **kwargs):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(**kwargs)
        self.grid = (grid[0], grid[1])
        self.prefix_tokens = prefix_tokens

    def build(self, input_shape):
        """Creates the `(prefix_tokens + rows * columns, dim)` table."""
        self.table = self.add_weight(
            name="table",
            shape=(self.prefix_tokens + self.grid[0] * self.grid[1], input_shape[-1]),
            initializer=TruncatedNormal(stddev=0.02),
            autocast=False,
        )

    def call(self, x, grid=None):
        """Adds the table to `(batch, ..., prefix_tokens + rows * columns, dim)`."""
        return x + ops.cast(self.table_on(grid), self.compute_dtype)

    def table_on(self, grid):
        """Returns the position table, resampled to the grid given by the shape of `grid`.

        Args:
            grid: `(batch, rows, columns)`. If `None`, the table is not resampled.

        Returns:
            `(prefix_tokens + rows * columns, dim)`.
        """
        table = ops.convert_to_tensor(self.table)
        if grid is None or tuple(grid.shape[1:]) == self.grid:
            return table
        prefix, dim = self.prefix_tokens, table.shape[-1]
        positions = resample(table[prefix:], self.grid, resolve_grid(grid, None), dim)
        return ops.concatenate([table[:prefix], ops.reshape(positions, (-1, dim))])

    def can_resample(self, shape):
        """Returns whether `resample` accepts a table of this shape."""
        dim = self.table.shape[-1]
        if len(shape) == 4:
            return shape[2:] == (dim, 1) and min(shape) > 0 and self.prefix_tokens == 0
        tokens = shape[-2] - self.prefix_tokens
        is_square = tokens > 0 and round(tokens**0.5) ** 2 == tokens
        return math.prod(shape[:-2]) == 1 and shape[-1] == dim and is_square

    def resample(self, table):
        """Resamples a table of another grid to this layer's grid.

        Args:
            table: array `(..., prefix + tokens, dim)` of a square grid, or `(rows, columns, dim,
                1)`.

        Returns:
            Array of the shape of this layer's table.
        """
        dim = self.table.shape[-1]
        if table.ndim == 4:
            grid = table.shape[:2]
        else:
            grid = (round((table.shape[-2] - self.prefix_tokens) ** 0.5),) * 2
        table = np.reshape(table, (-1, dim))
        return resample_positions(table, grid, self.grid, self.prefix_tokens)

    def save_own_variables(self, store):
        """Saves the table and its grid, from which `load_own_variables` resamples."""
        super().save_own_variables(store)
        store["grid"] = np.array(self.grid)

    def load_own_variables(self, store):
        """Loads a table, resampled from the grid it was saved with."""
        table, grid = np.array(store["0"]), tuple(int(side) for side in store["grid"])
        self.table.assign(resample_positions(table, grid, self.grid, self.prefix_tokens))

    def compute_output_shape(self, input_shape):
        """Returns `input_shape`."""
        return input_shape


def resample_positions(
    table: np.ndarray, grid: tuple, new_grid: tuple, prefix_tokens: int = 0
) -> np.ndarray:
    """Resamples a position table to another grid: bicubic, antialiased, prefix unchanged.

    Args:
        table: array `(prefix_tokens + rows * columns, dim)`.
        grid: (rows, columns) of `table`.
        new_grid: (rows, columns) of the result.
        prefix_tokens: number of leading rows of `table` outside the grid. Defaults to 0.

    Returns:
        Array `(prefix_tokens + new rows * new columns, dim)` of `table`'s dtype.

    Raises:
        ValueError: if `table` does not have `prefix_tokens + rows * columns` rows.
    """
    if len(table) != prefix_tokens + grid[0] * grid[1]:
        raise ValueError(
            f"A table of {len(table)} positions does not fit a grid of {grid[0]}x{grid[1]} with "
            f"{prefix_tokens} prefix tokens."
        )
    if tuple(grid) == tuple(new_grid):
        return table
    dim = table.shape[-1]
    positions = resample(table[prefix_tokens:].astype("float64"), grid, new_grid, dim)
    positions = np.reshape(positions, (-1, dim)).astype(table.dtype)
    return np.concatenate([table[:prefix_tokens], positions])
