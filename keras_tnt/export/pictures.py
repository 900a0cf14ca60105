"""Encoded images to named classes by an exported ONNX file, without Keras: what servers run."""

import json
import os

import numpy as np

from keras_tnt.export.onnx_runtime import onnx_session
from keras_tnt.images import evaluation_pixels, open_picture

TOP = 5  # classes that are named
BATCH = 8  # images that are computed at a time


class PictureModel:
    """A version that `keras_tnt.export.triton` wrote for pictures.

    Args:
        folder: of the version, with `model.onnx` and `model.json`.
    """

    def __init__(self, folder: str | os.PathLike):
        with open(os.path.join(folder, "model.json"), encoding="utf-8") as file:
            self.card = json.load(file)
        self.session = onnx_session(os.path.join(folder, "model.onnx"))

    def read(self, pictures: list[bytes]) -> np.ndarray:
        """Encoded images as the model takes them.

        Raises:
            ValueError: if one is no image that is read; the message tells its place, from 0.
            MemoryError: if there is none to read it.
        """
        if not pictures:
            raise ValueError("No images were given.")
        card = self.card
        wanted = (
            card["image_size"], card["resized_to_cover"], card["channels"], card["data_format"]
        )  # fmt: skip
        images = [
            evaluation_pixels(open_picture(picture, f"Image {place} of the batch"), *wanted)
            for place, picture in enumerate(pictures)
        ]
        images = np.stack(images)
        return normalised(images, card) if card["input"] == "normalised" else images

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """What a batch of any size gives.

        Args:
            images: as `read` returns them.

        Returns:
            `probabilities`, and `classes` (bytes) and `scores` of the best five, `(batch, ...)`
            each; of a model without a classifier `features`.
        """
        (name,) = self.card["outputs"]
        parts = np.split(images, range(BATCH, len(images), BATCH))
        (values,) = zip(
            *(self.session.run([name], {"images": part}) for part in parts), strict=True
        )
        values = np.concatenate(values)
        if not self.card["labels"]:
            return {name: values}
        labels = np.array([label.encode() for label in self.card["labels"]], object)
        best = np.argsort(-values, axis=-1, kind="stable")[:, :TOP]
        scores = np.take_along_axis(values, best, axis=-1)
        return {"classes": labels[best], "scores": scores, name: values}


def normalised(images, card):
    """Pixels in [0, 255] as a model takes them that does not normalise by itself."""
    shape = (-1, 1, 1) if card["data_format"] == "channels_first" else (-1,)
    mean, std = (np.reshape(value, shape) for value in normalisation_of(card))
    return ((images / 255 - mean) / std).astype("float32")


def normalisation_of(card):
    """A card's mean and std as arrays, a value a channel of the model."""
    mean_and_std = (np.asarray(card[name], dtype="float32") for name in ("mean", "std"))
    return [x if card["channels"] == len(x) else x.mean(keepdims=True) for x in mean_and_std]
