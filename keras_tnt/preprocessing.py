"""Evaluation preprocessing of images, and decoding of predictions."""

import os

import keras
import numpy as np
from keras import ops

from keras_tnt.images.class_names import imagenet_classes
from keras_tnt.images.decoding import as_uint8, evaluation_pixels, open_picture
from keras_tnt.layers.grid import ceil_divide
from keras_tnt.layers.inputs_outputs import along_channels
from keras_tnt.models.anatomy import anatomy, class_names

# === Images ===


def load_image(image, model: keras.Model) -> np.ndarray:
    """Loads an image and takes the crop that the model is evaluated on.

    The image is rotated according to EXIF, converted to the model's channels (dropping
    transparency), resized with bicubic interpolation so that its shorter side is the model's side
    divided by the family's crop fraction (0.9 for TNT, PyramidTNT and DeiT, 1 for CaiT and for DeiT
    from 384 pixels on; `keras_tnt.anatomy(model).image.crop`), rounded down, and cropped in the
    center. For a model of images of any size, the size is
    `keras_tnt.anatomy(model).image.native_size`.

    Args:
        image: path or bytes of a JPEG, PNG, WebP, GIF or BMP file within the limits of
            `keras_tnt.images.decoding` (268 MB, 65,535 pixels per side, 67,108,864 in total); a
            `PIL.Image`, which covers all other formats of Pillow; or an array `(height,
            width)` or `(height, width, 1, 3 or 4)` of values in [0, 255]. Arrays of uint16 and
            floats in [0, 1] are rejected.
        model: the model that the image is for; determines size, channels and data format.

    Returns:
        float32 array `(height, width, channels)` in [0, 255], or channels first if the model is.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if Pillow is not installed.
        ValueError: if it is not a supported image; the message names the file.
        MemoryError: if there is not enough memory.

    Example:
        >>> image = keras_tnt.load_image("cat.jpg", model)
        >>> keras_tnt.decode_predictions(model.predict(image[None]))
    """
    return evaluation_pixels(open_picture(image), *wanted_pixels(model))


def load_images(images, model: keras.Model) -> np.ndarray:
    """Loads a batch of images, each as by `load_image`.

    Args:
        images: list of inputs of `load_image`, or an array `(batch, height, width, channels)`.
        model: the model that the images are for.

    Returns:
        float32 array `(batch, height, width, channels)` in [0, 255], or channels first if the model
        is.

    Raises:
        As `load_image`; for bytes, the message names the index in the batch, from 0.
    """
    if isinstance(images, str | bytes | os.PathLike):
        raise ValueError("`images` must be a list. For one image there is load_image.")
    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = as_uint8(images)  # The batch is checked as a whole: single images may be dark.
    pictures = (
        open_picture(image, f"Image {place} of the batch") for place, image in enumerate(images)
    )
    wanted = wanted_pixels(model)
    return np.stack([evaluation_pixels(picture, *wanted) for picture in pictures])


def wanted_pixels(model):
    """Returns the arguments of `evaluation_pixels` for a model."""
    wanted = anatomy(model).image
    return wanted.native_size, wanted.covered_size(), wanted.channels, wanted.data_format


def pad_to_fit(images, model: keras.Model):
    """Pads images at the bottom and right to a size that the model accepts.

    The padding has the mean color, which the model normalizes to zero. Pixels keep their
    coordinates, as detection and segmentation need: a box in the image is the same box in the
    result.

    Args:
        images: one image, `(height, width, channels)` or channels first according to the model, or
            a batch of them; an array, or a tensor of the backend.
        model: a model of this package. Height and width are padded to the next multiples of its
            patch size, or to the model's image size if that is fixed.

    Returns:
        Array or tensor of the same dtype and rank; the mean color is rounded for integer dtypes.
        Images of a valid size are returned unchanged.

    Raises:
        ValueError: for inputs that are not images with the model's channels, and for images larger
            than the model's fixed size.

    Example:
        >>> model = keras_tnt.TNTSmall(weights=None, input_shape=(None, None, 3))
        >>> keras_tnt.pad_to_fit(np.zeros((300, 400, 3)), model).shape
        (304, 400, 3)
    """
    found = anatomy(model)
    image, shape = found.image, tuple(images.shape)
    axes = (-2, -1) if image.data_format == "channels_first" else (-3, -2)
    channels_axis = -3 if image.data_format == "channels_first" else -1
    if len(shape) not in (3, 4) or shape[channels_axis] != image.channels:
        raise ValueError(
            f"Model '{model.name}' takes images of shape {image.shape}, or a batch of them. "
            f"Received: {shape}"
        )
    color = 255 * np.array(image.mean) if image.normalizes else np.zeros(3)
    if image.channels != len(color):
        color = color.mean(keepdims=True)
    if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(images.dtype)):
        color = color.round()
    color = along_channels(color, image.data_format)
    for axis, wanted in zip(axes, (image.height, image.width), strict=True):
        sizes = [*(ops.shape(images) if None in shape else images.shape)]
        missing = fitting_side(found, sizes[axis], wanted) - sizes[axis]
        if isinstance(missing, int) and missing <= 0:
            if missing < 0:
                raise ValueError(
                    f"Model '{model.name}' takes images of shape {image.shape}. Received larger "
                    f"ones, of {shape}: `load_image` resizes and crops."
                )
            continue
        sizes[axis] = missing
        images = append(images, color, sizes, axis)
    return images


def append(images, color, shape, axis):
    """Returns images with a block of `color`, of shape `shape`, appended along an axis."""
    if isinstance(images, np.ndarray):
        added = np.broadcast_to(color.astype(images.dtype), shape)
        return np.concatenate([images, added], axis=axis)
    added = ops.broadcast_to(ops.cast(color, images.dtype), shape)
    return ops.concatenate([images, added], axis=axis)


def fitting_side(found, side, wanted):
    """Returns the next valid side of an image, or `wanted` if the model's image size is fixed."""
    if wanted is not None:
        return wanted
    # Each stage needs at least as many patches per side as the squares that it pools.
    least = max(1, *((block.reduction - 1) * 2**block.stage + 1 for block in found.blocks))
    multiple = found.image.multiple_of or 1
    count = ceil_divide(side, multiple)
    return multiple * (max(count, least) if isinstance(side, int) else ops.maximum(count, least))


# === Predictions ===


def decode_predictions(
    predictions, top: int = 5, model: keras.Model | None = None
) -> list[list[tuple[str, str, float]]]:
    """Returns the names of the classes that a model predicts; works offline.

    Args:
        predictions: array or tensor `(batch, classes)`, as returned by `model.predict`.
        top: number of classes per image, most likely first; all classes if the model has fewer.
            Defaults to 5.
        model: the model that predicted, for its class names. Defaults to ImageNet's 1,000 classes.

    Returns:
        For each image, a list of `(WordNet id, name, score)`. For classes other than ImageNet's,
        the name replaces the id.

    Raises:
        ValueError: for predictions of another shape, and a model without names.

    Example:
        >>> keras_tnt.decode_predictions(model.predict(images), top=1)
        [[('n02123045', 'tabby', 0.83)]]
    """
    predictions = keras.ops.convert_to_numpy(predictions)
    labels = imagenet_classes()
    if model is not None:
        names = class_names(model)
        if names is None:
            raise ValueError(
                f"Model '{model.name}' has no names of its classes. Give it some: "
                "keras_tnt.set_class_names(model, names) keeps its weights."
            )
        if names != [name for _, name in labels]:
            labels = [(name, name) for name in names]
    if predictions.ndim != 2 or predictions.shape[1] != len(labels):
        raise ValueError(
            f"`predictions` must have shape (batch, {len(labels)}). Received: shape "
            f"{predictions.shape}. For classes other than ImageNet's say model=, the model that "
            "predicted them."
        )
    if top < 1 or (model is None and top > len(labels)):
        raise ValueError(f"`top` must lie in 1 to {len(labels)}. Received: {top}")
    return [
        [(*labels[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[:top]]
        for scores in predictions
    ]
