"""Inputs, normalization, heads and pooling that family builders share."""

import contextlib
import contextvars
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_tnt.layers import (
    ImageNormalization,
    PatchGrid,
    PatchMap,
    Predictions,
    SelectToken,
    SelectTokens,
)
from keras_tnt.layers.base import at_least_float32, context_value, projection
from keras_tnt.layers.grid import ceil_divide, nearest_multiple
from keras_tnt.layers.inputs_outputs import along_channels, scale_and_offset
from keras_tnt.models.anatomy import NORMALIZATION
from keras_tnt.models.registry import ImageTransform
from keras_tnt.weights.names import HEADS

# Size of the position tables: (height, width) in pixels, or (rows, columns) of patches.
_table_size: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar(
    "table_size", default=None
)


_table_grid: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar(
    "table_grid", default=None
)


def image_input(
    input_tensor, input_shape, default_size: int, divisor: int, any_size: bool = False
) -> tuple[Any, tuple[int, int]]:
    """Returns the model's input and its image size, after checking them.

    Args:
        input_tensor: Keras tensor or array to use as the input. If `None`, a new input is created.
        input_shape: (height, width, channels), or channels first if that is Keras's image data
            format. If `None`, the images are square RGB of side `default_size`.
        default_size: side in pixels without `input_shape`.
        divisor: number that height and width must be multiples of.
        any_size: whether the family supports images of any size, for which height, width or both
            are `None`. Defaults to `False`.

    Returns:
        `(tensor, (height, width))`. For images of any size, (height, width) is the size of the
        position tables: that of the weights or of the variant.

    Raises:
        ValueError: for a shape that is not an image's or that `divisor` does not divide.
    """
    channels_first = keras.config.image_data_format() == "channels_first"
    if input_tensor is not None:
        if not keras.utils.is_keras_tensor(input_tensor):
            input_tensor = keras.Input(tensor=input_tensor)
        shape = tuple(input_tensor.shape[1:])
        if input_shape is not None and tuple(input_shape) != shape:
            raise ValueError(
                f"`input_shape` and `input_tensor` differ: {tuple(input_shape)} and {shape}. "
                "Leave `input_shape` out."
            )
    elif input_shape is None:
        size = (default_size, default_size)
        shape = (3, *size) if channels_first else (*size, 3)
    else:
        shape = tuple(input_shape)

    layout = "(channels, height, width)" if channels_first else "(height, width, channels)"
    sides, channels = (shape[1:], shape[:1]) if channels_first else (shape[:2], shape[2:])
    known = [*(side for side in sides if not (any_size and side is None)), *channels]
    if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in known):
        free = ", of which height and width may be None" if any_size else ""
        raise ValueError(f"`input_shape` must be three sizes {layout}{free}. Received: {shape}")
    if any(side is not None and side % divisor for side in sides):
        fitting = "x".join(
            "any" if side is None else str(nearest_multiple(side, divisor)) for side in sides
        )
        raise ValueError(
            f"Height and width must be multiples of {divisor}. Received: input_shape={shape}, read "
            f"as {layout}. The nearest size that fits is {fitting}."
        )
    inputs = keras.Input(shape, name="images") if input_tensor is None else input_tensor
    if None not in sides:
        return inputs, (sides[0], sides[1])
    grid = _table_grid.get()
    if grid is not None:
        return inputs, (divisor * grid[0], divisor * grid[1])
    return inputs, _table_size.get() or (default_size, default_size)


def table_size(size: tuple[int, int]) -> contextlib.AbstractContextManager:
    """Context manager that sets the size of position tables in models of images of any size."""
    return context_value(_table_size, size)


def patch_grid(
    images, size: tuple[int, int], patch_size: int, dtype=None, name="grid"
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Returns the patch grid, and the keyword arguments that pass it to layers.

    Args:
        images: the model's normalized images.
        size: (height, width) from `image_input`.
        patch_size: side of a patch in pixels.
        dtype: dtype or policy of the model. Defaults to Keras's global policy.
        name: name of the `PatchGrid` layer, if there is one. Defaults to "grid".

    Returns:
        `(grid, grid_kwargs)`: (rows, columns) for `size`, and the keyword arguments for layers that
        need the grid: `{"grid": tensor}` for images of any size, otherwise `{}`.
    """
    grid = ceil_divide(size[0], patch_size), ceil_divide(size[1], patch_size)
    if None not in images.shape[1:]:
        return grid, {}
    return grid, {"grid": PatchGrid(patch_size, dtype=dtype, name=name)(images)}


def normalize(images, family: str, transform: ImageTransform, inside: bool, dtype=None):
    """Applies the model's `ImageNormalization`.

    Args:
        images: the model's input.
        family: name of the family.
        transform: the family's `ImageTransform`.
        inside: whether the model takes pixels in [0, 255] and normalizes them.
        dtype: dtype or policy of the model. Defaults to Keras's global policy.
    """
    return ImageNormalization(
        family,
        transform.mean,
        transform.std,
        inside,
        interpolation=transform.interpolation,
        dtype=dtype,
        name=NORMALIZATION,
    )(images)


normalise = normalize  # codespell:ignore normalise: the name that plugins of release 0.1 call


def preprocessor(transform: ImageTransform) -> Callable:
    """Returns a family's `preprocess_input`, for models without built-in normalization."""

    def preprocess_input(x, data_format: str | None = None):
        """Normalizes pixels in [0, 255], for models built with `include_preprocessing=False`.

        Args:
            x: array or tensor of images, `(batch, height, width, channels)` or one image, or
                channels first.
            data_format: `"channels_last"` or `"channels_first"`. Defaults to Keras's image data
                format.

        Returns:
            (x / 255 - mean) / std, array or tensor of the same shape, in floating point.
        """
        data_format = data_format or keras.config.image_data_format()
        if isinstance(x, np.ndarray) and not np.issubdtype(x.dtype, np.floating):
            x = x.astype(keras.config.floatx())
        is_tensor = keras.ops.is_tensor(x)
        if is_tensor and not keras.backend.is_float_dtype(x.dtype):
            x = keras.ops.cast(x, keras.config.floatx())
        channels = x.shape[-3 if data_format == "channels_first" else -1]
        values = scale_and_offset(transform.mean, transform.std, channels)
        scale, offset = (along_channels(value, data_format) for value in values)
        if is_tensor:
            scale, offset = (keras.ops.convert_to_tensor(v, x.dtype) for v in (scale, offset))
            return x * scale + offset
        return x * scale.astype(x.dtype) + offset.astype(x.dtype)

    return preprocess_input


def read_tokens(tokens, count: int, dtype=None) -> list:
    """Returns the first `count` tokens as vectors `(batch, dim)`, the inputs of the heads."""
    names = ("class_vector", "distillation_vector")[:count]
    return [SelectToken(i, dtype=dtype, name=name)(tokens) for i, name in enumerate(names)]


def classify(vectors, classes, classifier_activation, class_names=None, dtype=None):
    """Builds the heads: `head` on the first vector, `head_distillation` on the second, if any.

    With two heads, the prediction is the mean of their logits (as in DeiT's released code),
    followed by the activation, in float32 or float64.

    Args:
        vectors: one or two tensors `(batch, dim)`.
        classes: number of classes.
        classifier_activation: activation of layer `predictions`. If `None`, the outputs are logits.
        class_names: names of the classes, stored in the model. If `None`, the classes are unnamed.
        dtype: dtype or policy of the model. Defaults to Keras's global policy.

    Returns:
        Predictions `(batch, classes)`.
    """
    logits = [
        projection(classes, dtype=dtype, name=name)(vector)
        for name, vector in zip(HEADS, vectors, strict=False)
    ]
    x = logits[0]
    if len(logits) > 1:
        x = keras.layers.Average(dtype=dtype, name="logits")(logits)
    dtype = at_least_float32(x.dtype)
    return Predictions(classifier_activation, class_names, dtype=dtype, name="predictions")(x)


def pool(tokens, grid, prefix_tokens: int, pooling: str | None, dtype=None, grid_kwargs=None):
    """Builds the features of a model without its top.

    Args:
        tokens: the last tokens, `(batch, prefix_tokens + rows * columns, dim)`.
        grid: (rows, columns) from `patch_grid`.
        prefix_tokens: number of tokens before the patches.
        pooling: the builders' argument.
        dtype: dtype or policy of the model. Defaults to Keras's global policy.
        grid_kwargs: keyword arguments from `patch_grid`. Defaults to none.

    Returns:
        A feature map `(batch, rows, columns, dim)`, or a vector `(batch, dim)` if `pooling` is
        given.
    """
    common = {"data_format": "channels_last", "dtype": dtype}
    if pooling == "token":
        tokens = SelectTokens(0, prefix_tokens, dtype=dtype, name="class_tokens")(tokens)
        return keras.layers.GlobalAveragePooling1D(name="token", **common)(tokens)
    if prefix_tokens:
        tokens = SelectTokens(prefix_tokens, dtype=dtype, name="patches")(tokens)
    if pooling is None and grid_kwargs:
        return PatchMap(dtype=dtype, name="feature_map")(tokens, **grid_kwargs)
    if pooling is None:
        shape = (*grid, tokens.shape[-1])
        return keras.layers.Reshape(shape, dtype=dtype, name="feature_map")(tokens)
    layer = {
        "avg": keras.layers.GlobalAveragePooling1D,
        "max": keras.layers.GlobalMaxPooling1D,
    }[pooling]
    return layer(name=f"{pooling}_pool", **common)(tokens)
