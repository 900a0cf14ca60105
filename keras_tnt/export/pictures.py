"""Encoded images to class names with an exported ONNX file, without Keras, for servers."""

import json
import os

import numpy as np

from keras_tnt.export.onnx_runtime import onnx_session
from keras_tnt.images.decoding import evaluation_pixels, open_picture

TOP = 5  # number of classes in an answer
BATCH = 8  # images per call of the session


class PictureModel:
    """Model for encoded images, from a version that `keras_tnt.export.triton` wrote.

    Args:
        folder: folder of the version, with `model.onnx` and `model.json`.
    """

    def __init__(self, folder: str | os.PathLike):
        """Reads the metadata, and opens the file in ONNX Runtime."""
        with open(os.path.join(folder, "model.json"), encoding="utf-8") as file:
            self.card = json.load(file)
        self.session = onnx_session(os.path.join(folder, "model.onnx"))

    def read(self, pictures: list[bytes]) -> np.ndarray:
        """Decodes images and converts them to the model's input.

        Raises:
            ValueError: if there are no images, or one cannot be read; the message has its index.
            MemoryError: if there is not enough memory to read an image.
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
        """Returns the outputs for a batch of any size.

        Args:
            images: as returned by `read`.

        Returns:
            `probabilities`, `(batch, classes)`, and `classes` (bytes) and `scores` of the best
            five, `(batch, 5)`; for a model without a classifier, `features`.
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
    """Normalizes pixels in [0, 255], for a model that does not normalize by itself."""
    shape = (-1, 1, 1) if card["data_format"] == "channels_first" else (-1,)
    mean, std = (np.reshape(value, shape) for value in normalization_of(card))
    return ((images / 255 - mean) / std).astype("float32")


def normalization_of(card):
    """Returns mean and std as arrays, with one value per channel of the model, or averaged."""
    mean_and_std = (np.asarray(card[name], dtype="float32") for name in ("mean", "std"))
    return [x if card["channels"] == len(x) else x.mean(keepdims=True) for x in mean_and_std]
