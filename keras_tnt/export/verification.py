"""Verification of exported files against the model that they were exported from."""

import dataclasses
import io

import keras
import numpy as np

from keras_tnt.export.pictures import normalised
from keras_tnt.preprocessing import load_images

BATCHES = (1, 5)
TOLERANCE = 1e-4  # relative error, as defined by `verify`, for equal inputs
PICTURE_TOLERANCE = 2e-3  # absolute error of probabilities, for equal encoded images


@dataclasses.dataclass(frozen=True)
class Example:
    """A batch and the model's outputs for it.

    Attributes:
        images: array of images as the model takes them.
        outputs: arrays by output name.
        pictures: encoded images, if `images` are their evaluation crops.
    """

    images: np.ndarray
    outputs: dict
    pictures: tuple = ()


def examples(network, card):
    """Returns the random batches on which an export is verified, with outputs by Keras.

    Args:
        network: a `serving_network`.
        card: metadata as returned by `describe`.

    Returns:
        A list of `Example`, one for each size of `BATCHES`.

    Raises:
        ValueError: if the model's outputs are not finite.
    """
    random = np.random.default_rng(0)
    found = []
    for batch, size in zip(BATCHES, sizes(card), strict=False):
        channels_first = card["data_format"] == "channels_first"
        image = (card["channels"], *size) if channels_first else (*size, card["channels"])
        shape = (batch, *image)
        pixels = card["input"] != "normalised"
        images = random.uniform(0, 255, shape) if pixels else random.normal(size=shape)
        found.append(example(network, images.astype("float32")))
    return found


def sizes(card):
    """Returns the image size of each batch; they differ for a model of any image size."""
    height, width = card["image_size"]
    step = card.get("multiple_of")
    if step is None:
        return [(height, width)] * len(BATCHES)
    # The second is smaller and not square, but large enough for stages that pool.
    return [(height, width), (height - height // (4 * step) * step, width + step)]


def picture_examples(model, network, card):
    """Returns batches of encoded images, read by `load_images`, with outputs by Keras."""
    found = []
    for batch in BATCHES:
        pictures = tuple(draw_picture(seed) for seed in range(batch))
        images = load_images(list(pictures), model)
        if card["input"] == "normalised":
            images = normalised(images, card)
        found.append(example(network, images.astype("float32"), pictures))
    return found


def example(network, images, pictures=()):
    """Returns the `Example` of a batch; raises a ValueError if outputs are not finite."""
    if keras.backend.backend() == "tensorflow":
        # `predict` would compile a function, which is slower and warns after a few models.
        outputs = network(images, training=False)
    else:
        outputs = network.predict_on_batch(images)
    outputs = {name: np.asarray(value, dtype="float32") for name, value in outputs.items()}
    unusable = [name for name, value in outputs.items() if not np.isfinite(value).all()]
    if unusable:
        raise ValueError(
            f"Model '{network.name}' gives NaN or infinite {' and '.join(unusable)} for images in "
            "its range. Its weights are broken."
        )
    return Example(images, outputs, pictures)


def draw_picture(seed):
    """Returns an encoded image of waves and noise; its size and format depend on the seed."""
    from PIL import Image

    random = np.random.default_rng(seed)
    height, width = random.integers(40, 500, 2)
    y, x = (axis[..., None] for axis in np.mgrid[:height, :width])
    periods, phases = random.uniform(5, 80, (2, 3)), random.uniform(0, 6, (2, 3))
    waves = np.sin(x / periods[0] + phases[0]) + np.cos(y / periods[1] + phases[1])
    pixels = 127 + 60 * waves + random.normal(0, 8, (height, width, 3))
    encoded = io.BytesIO()
    image = Image.fromarray(pixels.clip(0, 255).astype("uint8"))
    image.save(encoded, ("JPEG", "PNG", "WEBP")[seed % 3])
    return encoded.getvalue()


def verify(outputs, example, what, tolerance=TOLERANCE, absolute=False):
    """Compares the outputs of a file with the model's.

    Args:
        outputs: arrays by output name, all or some of those in `example`.
        example: an `Example`.
        what: name of the file, for the error message.
        tolerance: largest error that passes. Defaults to `TOLERANCE`.
        absolute: whether errors are absolute. If not, they are relative: the largest absolute
            difference, divided by max(peak-to-peak, max abs) of the model's output. Defaults to
            False.

    Returns:
        The largest error.

    Raises:
        RuntimeError: if an output has another shape, or a larger error.
    """
    worst = 0.0
    for name, value in outputs.items():
        expected = example.outputs[name]
        if value.shape != expected.shape:
            raise RuntimeError(
                f"{what} gives {name} of shape {value.shape}, the model {expected.shape}."
            )
        unit = 1.0 if absolute else spread(expected)
        difference = float(np.abs(value - expected).max()) / unit
        if not difference <= tolerance:
            raise RuntimeError(
                f"{what} differs from the model at batch {len(expected)}: {name} by "
                f"{difference:.1e}{'' if absolute else ' of its spread'}, where {tolerance:.0e} is "
                "allowed. Nothing was kept."
            )
        worst = max(worst, difference)
    return worst


def verify_names(classes, scores, example, labels, what):
    """Raises a RuntimeError if names or scores of the best classes differ from the example's."""
    labels = np.array(labels)
    for names, found, probabilities in zip(
        classes, scores, example.outputs["probabilities"], strict=True
    ):
        best = np.sort(probabilities)[::-1][: len(names)]
        for name, score, expected in zip(names, found, best, strict=True):
            of_name = probabilities[labels == name.decode()]
            if not (np.abs(of_name - score) <= PICTURE_TOLERANCE).any() or (
                abs(score - expected) > PICTURE_TOLERANCE
            ):
                raise RuntimeError(
                    f"{what} gives class '{name.decode()}' the score {score:.4f}; the model gives "
                    f"it {of_name}. Nothing was kept."
                )


def spread(values):
    """Returns max(peak-to-peak, max abs) of an array, but at least the smallest normal float32."""
    return float(max(np.ptp(values), np.abs(values).max(), np.finfo("float32").tiny))
