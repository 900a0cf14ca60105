"""Images, the grid of their patches, and tables that are resampled to another grid.

A model of images of any size is made of the layers that a model of one size is made of. Those that
must know the grid of the patches are called with it besides: a tensor `(batch, rows, columns)` of
which they read the shape alone, as it is the shape that every backend knows soonest.
"""

import functools
import math

import keras
import numpy as np
from keras import ops

from keras_tnt.layers.sharding import reshape


def shape_of(x):
    """The shape of a tensor; where a graph has sizes yet to come, beside the batch, tensors."""
    return ops.shape(x) if None in x.shape[1:] else x.shape


def product(*sizes):
    """The product of sizes of which any may be None, not known."""
    return None if None in sizes else math.prod(sizes)


def ceil_divide(size, divisor):
    """How many of `divisor` it takes to cover a size, which may be None or symbolic."""
    # Of positive numbers alone: tf2onnx writes a division of integers that rounds towards zero.
    return None if size is None else (size + divisor - 1) // divisor


def checked(x, sides, fits, told):
    """A tensor, once sides are known to fit.

    Args:
        x: the tensor.
        sides: integers, or sizes that a graph has to come. Those are checked as it runs, by an
            assertion, on TensorFlow (not within XLA), and not at all elsewhere.
        fits: function from a side, a number or tensor, to whether it fits.
        told: function from the sides to (message with "{}" in it, what stands there).

    Raises:
        ValueError: if a side does not fit.
    """
    if all(isinstance(side, int) for side in sides):
        if not all(fits(side) for side in sides):
            message, values = told(sides)
            raise ValueError(message.format(*values))
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        message, values = told(sides)
        message = tf.strings.format(message, [tf.convert_to_tensor(value) for value in values])
        all_fit = tf.reduce_all([fits(side) for side in sides])
        with tf.control_dependencies([tf.debugging.Assert(all_fit, [message])]):
            x = tf.identity(x)
    return x


# === Images ===


def channels_last(images, data_format):
    """(batch, height, width, channels) of images laid out as `data_format` says."""
    if data_format == "channels_first":
        return ops.transpose(images, (0, 2, 3, 1))  # (b, H, W, c)
    return images


def image_size(input_shape, data_format):
    """(height, width, channels) of a batch of images of `input_shape`."""
    if data_format == "channels_first":
        return (*input_shape[2:], input_shape[1])
    return tuple(input_shape[1:])


def patches_of(input_shape, patch_size, data_format):
    """(batch, patches) of images of `input_shape`."""
    height, width, _ = image_size(input_shape, data_format)
    return input_shape[0], product(*(ceil_divide(x, patch_size) for x in (height, width)))


def whole_patches(images, patch_size, data_format):
    """Images of whole patches, channels last.

    Args:
        images: (batch, height, width, channels), or channels first as `data_format` says.
        patch_size: side of a patch in pixels.

    Raises:
        ValueError: if it does not divide height and width.
    """
    images = channels_last(images, data_format)
    return checked(
        images,
        shape_of(images)[1:3],
        lambda side: side % patch_size == 0,
        lambda sides: misfit(sides, patch_size),
    )


def misfit(size, patch_size):
    """What is said of images that are not made of whole patches: `told` of `checked`."""
    nearest = [nearest_multiple(side, patch_size) for side in size]
    return (
        f"Height and width of images must be multiples of {patch_size}. Received: {{}}x{{}}. The "
        "nearest size that fits is {}x{}; keras_tnt.pad_to_fit(images, model) pads to the next."
    ), (*size, *nearest)


def nearest_multiple(side, divisor):
    """The positive multiple of `divisor` that is nearest to a side."""
    count = (2 * side + divisor) // (2 * divisor)
    return divisor * (max(count, 1) if isinstance(side, int) else ops.maximum(count, 1))


def cut(images, size):
    """Cut images into squares of `size` pixels, flattened row by row, channels last.

    Args:
        images: (batch, height, width, channels).

    Returns:
        (batch, height / size, width / size, size * size * channels).
    """
    _, height, width, channels = shape_of(images)
    rows, columns = height // size, width // size
    x = reshape(images, (-1, rows, size, columns, size * channels))  # (b, r, s, q, s*c)
    x = ops.transpose(x, (0, 1, 3, 2, 4))  # (b, r, q, s, s*c)
    return reshape(x, (-1, rows, columns, size * size * channels))  # (b, r, q, s*s*c)


def in_a_row(x, *rest):
    """(batch, rows, columns, ...) to (batch, rows * columns, *rest)."""
    _, rows, columns, *_ = shape_of(x)
    return reshape(x, (-1, rows * columns, *rest))  # (b, r*q, ...)


# === The grid of patches ===


def told_grid(grid, own):
    """(rows, columns): the shape of the tensor that a layer is called with, or else its own.

    Raises:
        ValueError: if there is neither.
    """
    if grid is not None:
        return tuple(shape_of(grid)[1:])
    if own is None:
        raise ValueError("A layer that was made without `grid` must be called with `grid`.")
    return own


@keras.saving.register_keras_serializable(package="keras_tnt")
class PatchGrid(keras.layers.Layer):
    """A pixel of each patch: its shape is the grid that layers are called with.

    Args:
        patch_size: side of a patch in pixels; a part of a patch at the end counts as one.
        data_format: `"channels_last"` or `"channels_first"`; None: Keras's setting.

    Call arguments:
        images: `(batch, height, width, channels)`, or channels first.

    Returns:
        `(batch, rows, columns)`.
    """

    def __init__(self, patch_size: int, data_format: str | None = None, **kwargs):
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.data_format = data_format or keras.config.image_data_format()

    def call(self, images):
        size = self.patch_size
        if self.data_format == "channels_first":
            return images[:, 0, ::size, ::size]
        return images[:, ::size, ::size, 0]

    def compute_output_shape(self, input_shape):
        sides = image_size(input_shape, self.data_format)[:2]
        return (input_shape[0], *(ceil_divide(side, self.patch_size) for side in sides))

    def get_config(self):
        return {
            **super().get_config(),
            "patch_size": self.patch_size,
            "data_format": self.data_format,
        }


@keras.saving.register_keras_serializable(package="keras_tnt")
class PatchMap(keras.layers.Layer):
    """Patches in a row as the map that they are.

    Call arguments:
        patches: `(batch, rows * columns, dim)`.
        grid: `(batch, rows, columns)`, of which the shape is read.

    Returns:
        `(batch, rows, columns, dim)`.
    """

    def call(self, patches, grid):
        rows, columns = told_grid(grid, None)
        return reshape(patches, (-1, rows, columns, patches.shape[-1]))  # (b, r, q, c)

    def compute_output_shape(self, patches_shape, grid_shape):
        return (patches_shape[0], *grid_shape[1:], patches_shape[-1])

    def get_config(self):
        """Returns the configuration; Keras itself makes none where `dtype` is a policy object."""
        return super().get_config()


# === Tables on another grid ===


def resample(table, sides, new_sides, dim=1):
    """Resample axes of an array or tensor: bicubic, antialiased.

    Args:
        table: `(..., *sides, dim)`, in any shape that holds it in this order.
        sides: sizes of the axes.
        new_sides: sizes wanted; of tensors also those that a graph does not know before it runs.
        dim: size of what follows the axes.

    Returns:
        `(..., *new_sides, dim)`, in a shape that holds it in this order.
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
    """Weights (new_size, size) of bicubic resampling with antialias, Keys' cubic with a = -0.5.

    A float64 array; a float32 tensor where a graph has one of the sizes yet to come. Where the
    sizes are equal, the weights are exactly one and zero.
    """
    if isinstance(size, int) and isinstance(new_size, int):
        return weights_of_integers(size, new_size)
    return cubic_weights(ops, size, new_size, "float32")


@functools.lru_cache(maxsize=256)
def weights_of_integers(size, new_size):
    return cubic_weights(np, size, new_size, "float64")


def cubic_weights(xp, size, new_size, dtype):
    """What `resampling_matrix` gives, by NumPy or by Keras's operations."""
    old_places, places = (xp.arange(side, dtype=dtype) for side in (size, new_size))
    step = (old_places[-1:] + 1) / (places[-1:] + 1)
    centers = (places + 0.5) * step - 0.5
    x = xp.abs(centers[:, None] - old_places[None, :]) / xp.maximum(step, 1.0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = xp.where(x < 1, near, xp.where(x < 2, far, 0.0))
    return weights / xp.sum(weights, axis=1, keepdims=True)
