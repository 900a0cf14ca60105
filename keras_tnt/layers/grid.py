"""Image layout, patch grids, and bicubic resampling of tables to another grid.

Models with a fixed image size and models of any size use the same layers. In the latter, layers
that need the patch grid are also called with a tensor `(batch, rows, columns)`, of which they read
only the shape, because static shapes propagate earlier than values on every backend.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_tnt.layers.base import ConfiguredLayer
from keras_tnt.layers.sharding import reshape


def shape_of(x):
    """Returns the static shape of a tensor, or the dynamic shape if it is unknown.

    An unknown batch size alone does not require the dynamic shape.
    """
    return ops.shape(x) if None in x.shape[1:] else x.shape


def product(*sizes: Any) -> Any:
    """Returns the product of sizes, or `None` if one of them is `None` (unknown)."""
    return None if None in sizes else math.prod(sizes)


def ceil_divide(size: Any, divisor: int) -> Any:
    """Returns `ceil(size / divisor)` for a size that is an integer, symbolic or `None`."""
    # The operands are positive, because tf2onnx exports integer division as rounding to zero.
    return None if size is None else (size + divisor - 1) // divisor


def assert_sides(x, sides, is_valid: Callable, describe_error: Callable):
    """Returns `x` after asserting that all `sides` satisfy `is_valid`.

    Args:
        x: the tensor.
        sides: integers, or sizes that are unknown before a graph runs. The latter are checked by an
            assertion at run time on TensorFlow (except within XLA), and not checked on other
            backends.
        is_valid: predicate of a side, which is an integer or a tensor.
        describe_error: function from the sides to `(message, values)`, a format string with "{}"
            and the values to insert.

    Raises:
        ValueError: if a static side does not fit.
    """
    if all(isinstance(side, int) for side in sides):
        if not all(is_valid(side) for side in sides):
            message, values = describe_error(sides)
            raise ValueError(message.format(*values))
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        message, values = describe_error(sides)
        message = tf.strings.format(message, [tf.convert_to_tensor(value) for value in values])
        all_valid = tf.reduce_all([is_valid(side) for side in sides])
        with tf.control_dependencies([tf.debugging.Assert(all_valid, [message])]):
            x = tf.identity(x)
    return x


# === Images ===


def image_dimensions(input_shape, data_format: str) -> tuple:
    """Returns (height, width, channels) of a batch of images of `input_shape`."""
    if data_format == "channels_first":
        return (*input_shape[2:], input_shape[1])
    return tuple(input_shape[1:])


def count_patches(input_shape, patch_size: int, data_format: str) -> tuple:
    """Returns (batch, patches) for a batch of images of `input_shape`."""
    height, width, _ = image_dimensions(input_shape, data_format)
    return input_shape[0], product(*(ceil_divide(x, patch_size) for x in (height, width)))


def to_whole_patches(images, patch_size: int, data_format: str):
    """Returns images channels last, after asserting that they consist of whole patches.

    Args:
        images: `(batch, height, width, channels)`, or channels first, according to `data_format`.
        patch_size: side of a patch in pixels.
        data_format: `"channels_last"` or `"channels_first"`.

    Raises:
        ValueError: if `patch_size` does not divide height and width.
    """
    if data_format == "channels_first":
        images = ops.transpose(images, (0, 2, 3, 1))  # (b, H, W, c)
    return assert_sides(
        images,
        shape_of(images)[1:3],
        lambda side: side % patch_size == 0,
        lambda sides: size_error(sides, patch_size),
    )


def size_error(size, patch_size: int) -> tuple[str, tuple]:
    """Returns message and values of the error for partial patches, for `assert_sides`."""
    nearest = [nearest_multiple(side, patch_size) for side in size]
    return (
        f"Height and width of images must be multiples of {patch_size}. Received: {{}}x{{}}. The "
        "nearest size that fits is {}x{}; keras_tnt.pad_to_fit(images, model) pads to the next."
    ), (*size, *nearest)


def nearest_multiple(side: Any, divisor: int) -> Any:
    """Returns the positive multiple of `divisor` that is nearest to `side`."""
    count = (2 * side + divisor) // (2 * divisor)
    return divisor * (max(count, 1) if isinstance(side, int) else ops.maximum(count, 1))


def patchify(images, size: int):
    """Patchifies images: splits them into squares, flattened in row-major order, channels last.

    Args:
        images: `(batch, height, width, channels)`.
        size: side of a square in pixels.

    Returns:
        `(batch, height / size, width / size, size * size * channels)`.
    """
    _, height, width, channels = shape_of(images)
    rows, columns = height // size, width // size
    x = reshape(images, (-1, rows, size, columns, size * channels))  # (b, r, s, q, s*c)
    x = ops.transpose(x, (0, 1, 3, 2, 4))  # (b, r, q, s, s*c)
    return reshape(x, (-1, rows, columns, size * size * channels))  # (b, r, q, s*s*c)


def flatten_grid(x, *rest):
    """Flattens the grid: `(batch, rows, columns, ...)` to `(batch, rows * columns, *rest)`."""
    _, rows, columns, *_ = shape_of(x)
    return reshape(x, (-1, rows * columns, *rest))  # (b, r*q, ...)


# === The grid of patches ===


def as_grid(grid) -> tuple[int, int] | None:
    """Returns (rows, columns) as a tuple, or `None` for `None`; JSON has lists instead."""
    return None if grid is None else (grid[0], grid[1])


def resolve_grid(grid, own: tuple[int, int] | None) -> tuple[Any, Any]:
    """Returns (rows, columns) of the `grid` tensor of a call, or else the layer's own grid.

    Args:
        grid: tensor `(batch, rows, columns)`, or `None`.
        own: (rows, columns) of the layer, or `None`.

    Raises:
        ValueError: if both are `None`.
    """
    if grid is not None:
        rows, columns = shape_of(grid)[1:]
        return rows, columns
    if own is None:
        raise ValueError("A layer that was built without `grid` must be called with `grid`.")
    return own


@keras.saving.register_keras_serializable(package="keras_tnt")
class PatchGrid(ConfiguredLayer):
    """Subsamples one pixel per patch; only the (rows, columns) shape of the output is used.

    Args:
        patch_size: side of a patch in pixels; a partial patch at the end counts as one.
        data_format: `"channels_last"` or `"channels_first"`. Defaults to Keras's image data format.

    Call arguments:
        images: `(batch, height, width, channels)`, or channels first.

    Returns:
        `(batch, rows, columns)`.
    """

    def __init__(self, patch_size: int, data_format: str | None = None, **kwargs):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.data_format = data_format or keras.config.image_data_format()

    def call(self, images):
        """Maps images to `(batch, rows, columns)`."""
        size = self.patch_size
        if self.data_format == "channels_first":
            return images[:, 0, ::size, ::size]
        return images[:, ::size, ::size, 0]

    def compute_output_shape(self, input_shape):
        """Returns `(batch, rows, columns)`."""
        sides = image_dimensions(input_shape, self.data_format)[:2]
        return (input_shape[0], *(ceil_divide(side, self.patch_size) for side in sides))


@keras.saving.register_keras_serializable(package="keras_tnt")
class PatchMap(ConfiguredLayer):
    """Reshapes a sequence of patches to a feature map.

    Call arguments:
        patches: `(batch, rows * columns, dim)`.
        grid: `(batch, rows, columns)`, of which the shape is read.

    Returns:
        `(batch, rows, columns, dim)`.
    """

    def call(self, patches, grid):
        """Maps `(batch, rows * columns, dim)` to `(batch, rows, columns, dim)`."""
        rows, columns = resolve_grid(grid, None)
        return reshape(patches, (-1, rows, columns, patches.shape[-1]))  # (b, r, q, c)

    def compute_output_shape(self, patches_shape, grid_shape):
        """Returns `(batch, rows, columns, dim)`."""
        return (patches_shape[0], *grid_shape[1:], patches_shape[-1])


# === Resampling of tables ===


def resample(table, sides, new_sides, dim=1):
    """Resamples axes of an array or tensor: bicubic, antialiased.

    Args:
        table: `(..., *sides, dim)`, or any shape with the same elements in the same order.
        sides: sizes of the axes.
        new_sides: sizes of the resampled axes; those of tensors may be unknown before a graph runs.
        dim: number of values after the axes. Defaults to 1.

    Returns:
        The values of `(..., *new_sides, dim)` in this order, not necessarily in this shape.
    """
    xp = np if isinstance(table, np.ndarray) else ops
    following = math.prod(sides) * dim
    for side, new_side in zip(sides, new_sides, strict=True):
        following //= side
        if isinstance(new_side, int) and side == new_side:
            continue
        matrix = resampling_matrix(side, new_side)
        if xp is ops:
            matrix = ops.cast(matrix, table.dtype)
        table = xp.matmul(matrix, xp.reshape(table, (-1, side, following)))  # (..., new, rest)
    return table


def resampling_matrix(size, new_size):
    """Returns the weights of antialiased bicubic resampling (Keys' cubic, a = -0.5).

    Args:
        size: number of samples.
        new_size: number of samples of the result.

    Returns:
        `(new_size, size)`: a float64 array, or a float32 tensor if a size is unknown before a graph
        runs. For equal sizes it is exactly the identity.
    """
    if isinstance(size, int) and isinstance(new_size, int):
        return static_cubic_weights(size, new_size)
    return cubic_weights(ops, size, new_size, "float32")


@functools.lru_cache(maxsize=256)
def static_cubic_weights(size, new_size):
    """Returns the cached float64 weights for two static sizes."""
    return cubic_weights(np, size, new_size, "float64")


def cubic_weights(xp, size, new_size, dtype):
    """Computes `resampling_matrix` with NumPy or Keras operations.

    Args:
        xp: `numpy` or `keras.ops`.
        size: number of samples.
        new_size: number of samples of the result.
        dtype: dtype of the weights.
    """
    old_places, places = (xp.arange(side, dtype=dtype) for side in (size, new_size))
    step = (old_places[-1:] + 1) / (places[-1:] + 1)
    centers = (places + 0.5) * step - 0.5
    x = xp.abs(centers[:, None] - old_places[None, :]) / xp.maximum(step, 1.0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = xp.where(x < 1, near, xp.where(x < 2, far, 0.0))
    return weights / xp.sum(weights, axis=1, keepdims=True)
