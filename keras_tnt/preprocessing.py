"""Images as the public weights were evaluated on them, and names for what the models predict."""

import os

import keras
import numpy as np

from keras_tnt.anatomy import anatomy, class_names
from keras_tnt.imagenet import imagenet_classes
from keras_tnt.images import evaluation_pixels, open_picture

# === Images ===


def load_image(image, model: keras.Model) -> np.ndarray:
    """Read an image and take the crop that the model is evaluated on.

    The image is turned upright where EXIF says so, converted to the model's channels (transparency
    is dropped), resized bicubic so that its shorter side is the model's side divided by the
    family's crop share (0.9 for TNT, PyramidTNT and DeiT, 1 for CaiT and for DeiT from 384 pixels
    on; `keras_tnt.anatomy(model).image.crop`), rounded down, and cropped in the center.

    Args:
        image: path or bytes of a JPEG, PNG, WebP, GIF or BMP file within the limits that
            `keras_tnt.images` names (268 MB, 65,535 pixels a side, 67,108,864 in all); a
            `PIL.Image`, in which way every other format that Pillow reads can be given; or an array
            `(height, width)` or `(height, width, 1, 3 or 4)` of values in [0, 255].
        model: the model that is to see the image; tells size, channels and their place.

    Returns:
        float32 array `(height, width, channels)` in [0, 255], or channels first if the model wants
        that.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if Pillow is not installed.
        ValueError: if it is no image that is read; the message names the file.
        MemoryError: if there is none to read it.

    Example:

    >>> image = keras_tnt.load_image("cat.jpg", model)
    >>> keras_tnt.decode_predictions(model.predict(image[None]))
    """
    return evaluation_pixels(open_picture(image), *wanted_pixels(model))


def load_images(images, model: keras.Model) -> np.ndarray:
    """A batch of images, each as `load_image` gives it.

    Args:
        images: list of what `load_image` takes, or an array `(batch, height, width, channels)`.
        model: the model that is to see them.

    Returns:
        float32 array `(batch, height, width, channels)` in [0, 255].

    Raises:
        As `load_image`; of bytes the message tells the place in the batch, from 0.
    """
    if isinstance(images, str | bytes | os.PathLike):
        raise ValueError("`images` must be a list. For one image there is load_image.")
    pictures = (
        open_picture(image, f"Image {place} of the batch") for place, image in enumerate(images)
    )
    wanted = wanted_pixels(model)
    return np.stack([evaluation_pixels(picture, *wanted) for picture in pictures])


def wanted_pixels(model):
    """What `evaluation_pixels` is told of a model."""
    wanted = sized_image(model)
    size = (wanted.height, wanted.width)
    return size, wanted.covered_size(), wanted.channels, wanted.data_format


def sized_image(model):
    """The `anatomy.Image` of a model that takes images of one size.

    Raises:
        ValueError: if it takes any size.
    """
    image = anatomy(model).image
    if None in (image.height, image.width):
        raise ValueError(
            f"`model` must take images of one size. Received: a model of input shape {image.shape}"
        )
    return image


# === Predictions ===


def decode_predictions(
    predictions, top: int = 5, model: keras.Model | None = None
) -> list[list[tuple[str, str, float]]]:
    """Name the classes that a model predicts; works offline.

    Args:
        predictions: array or tensor `(batch, classes)`, as `model.predict` gives it.
        top: how many classes to name, likeliest first; all, where there are fewer.
        model: the model that predicted, whose class names are given; None: ImageNet's 1,000.

    Returns:
        For each image a list of `(WordNet id, name, score)`; of classes other than ImageNet's the
        name stands in the id's place too.

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
                f"Model '{model.name}' has no names of its classes. Build it with class_names=, or "
                "give it some by keras_tnt.reset_classifier."
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
