"""Exported files are run again and compared with the model that they were made from."""

import dataclasses
import io

import keras
import numpy as np

from keras_tnt.export.pictures import normalised
from keras_tnt.preprocessing import load_images

BATCHES = (1, 5)
TOLERANCE = 1e-4  # of the outputs' spread, for the same numbers in
PICTURE_TOLERANCE = 2e-3  # of probabilities, for the same encoded images in


@dataclasses.dataclass(frozen=True)
class Example:
    """A batch and what the model says to it.

    Attributes:
        images: array of images as the model takes them.
        outputs: arrays by output name.
        pictures: encoded images, where `images` are their evaluation crops.
    """

    images: np.ndarray
    outputs: dict
    pictures: tuple = ()


def examples(network, card):
    """The batches of images that an export is checked on, computed by Keras.

    Args:
        network: a `serving_network`.
        card: what `describe` said of it.

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
    """The sizes of images that the batches have, of a model of any size each another."""
    height, width = card["image_size"]
    step = card.get("multiple_of")
    if step is None:
        return [(height, width)] * len(BATCHES)
    # A smaller size, not square; a stage that pools has to have what it pools.
    return [(height, width), (height - height // (4 * step) * step, width + step)]


def picture_examples(model, network, card):
    """The batches of encoded images that an export is checked on, loaded by `load_image`."""
    found = []
    for batch in BATCHES:
        pictures = tuple(draw_picture(seed) for seed in range(batch))
        images = load_images(list(pictures), model)
        if card["input"] == "normalised":
            images = normalised(images, card)
        found.append(example(network, images.astype("float32"), pictures))
    return found


def example(network, images, pictures=()):
    if keras.backend.backend() == "tensorflow":
        # Not compiled: that would take longer, and warn of it after a few models.
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
    """An encoded image of waves and noise, of another size and format for each seed."""
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
    """Compare what a file computes with what the model did.

    Args:
        outputs: arrays by output name, some of those that `example` has.
        example: an `Example`.
        what: the file, for the message.
        tolerance: largest difference that passes.
        absolute: whether `tolerance` is a difference, not a share of the output's spread.

    Returns:
        The largest difference found.

    Raises:
        RuntimeError: if an output is of another shape, or off.
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
    """Check the best classes' names and scores against an example's probabilities."""
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
    return float(max(np.ptp(values), np.abs(values).max(), np.finfo("float32").tiny))
