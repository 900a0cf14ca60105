"""Images as the public weights were evaluated on them, and names for what the models predict."""

import functools
import os
from pathlib import Path

import numpy as np

from keras_tnt.images import convert, evaluation_crop, open_picture
from keras_tnt.weights.names import FAMILIES, family

# The share of the resized image's side that the crop keeps, by family (timm's configurations).
CROPS = {"tnt": 0.9, "pyramid_tnt": 0.9, "deit": 0.9, "cait": 1.0}
# From this side on DeiT was evaluated without cropping.
WHOLE = {"deit": 384}
CLASSES = Path(__file__).parent / "imagenet_classes.txt"


# === Images ===


def load_image(image, model):
    """Read an image and take the crop that the model is evaluated on.

    The image is turned upright where EXIF says so, converted to the model's channels (transparency
    is dropped), resized bicubic so that its shorter side is the model's side divided by the
    family's crop share (0.9 for TNT, PyramidTNT and DeiT, 1 for CaiT and for DeiT from 384 pixels
    on), rounded down, and cropped in the center.

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
    return evaluation_pixels(open_picture(image), model)


def evaluation_pixels(picture, model):
    """The evaluation crop of a `PIL.Image` as the array that `load_image` returns."""
    height, width, channels, channels_first = input_layout(model)
    crop = evaluation_crop(convert(picture, channels), (height, width), resized_sides(model))
    pixels = np.reshape(np.asarray(crop, "float32"), (height, width, channels))
    return np.moveaxis(pixels, -1, 0) if channels_first else pixels


def load_images(images, model):
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
    return np.stack([evaluation_pixels(picture, model) for picture in pictures])


def input_layout(model):
    """(height, width, channels, whether channels stand first) of the images a model takes."""
    stems = [layer for layer in model._flatten_layers() if type(layer).__name__ in FAMILIES]
    channels_first = any(getattr(s, "data_format", None) == "channels_first" for s in stems)
    shape = model.input_shape[1:]
    if len(shape) != 3 or None in shape:
        raise ValueError(
            f"`model` must take images of one size. Received: a model of input shape {shape}"
        )
    if channels_first:
        return *shape[1:], shape[0], True
    return *shape, False


def resized_sides(model):
    """(height, width) that images are resized to cover before the crop."""
    kind = family(model)
    height, width = input_layout(model)[:2]
    share = 1.0 if min(height, width) >= WHOLE.get(kind, np.inf) else CROPS[kind]
    return tuple(int(side / share) for side in (height, width))


# === Predictions ===


@functools.cache
def imagenet_classes():
    """The 1,000 classes of ImageNet in the order of the models: (WordNet id, name) each."""
    lines = CLASSES.read_text(encoding="utf-8").splitlines()
    return tuple(tuple(line.split(" ", 1)) for line in lines)


def decode_predictions(predictions, top=5):
    """Name the classes that ImageNet models predict; works offline.

    Args:
        predictions: array or tensor `(batch, 1000)`, as `model.predict` gives it.
        top: how many classes to name, likeliest first.

    Returns:
        For each image a list of `(WordNet id, name, score)`.

    Raises:
        ValueError: for predictions of another shape.

    Example:

    >>> keras_tnt.decode_predictions(model.predict(images), top=1)
    [[('n02123045', 'tabby', 0.83)]]
    """
    import keras

    predictions = keras.ops.convert_to_numpy(predictions)
    names = imagenet_classes()
    if predictions.ndim != 2 or predictions.shape[1] != len(names):
        raise ValueError(
            f"`predictions` must have shape (batch, {len(names)}). Received: shape "
            f"{predictions.shape}. Classes other than ImageNet's have names of your own."
        )
    if not 1 <= top <= len(names):
        raise ValueError(f"`top` must lie in 1 to {len(names)}. Received: {top}")
    return [
        [(*names[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[:top]]
        for scores in predictions
    ]
