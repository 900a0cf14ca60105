"""Reference values from the public PyTorch implementations: the files in tests/golden.

Each model's file contains random weights under the tensor names of its public checkpoint, a batch
of normalized images, and the outputs of the reference.
"""

import gzip
import json
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

DIRECTORY = Path(__file__).parents[1] / "golden"


class Golden(NamedTuple):
    """One golden file: the reference's arguments, weights, images, and outputs by name."""

    config: dict
    weights: dict
    images: np.ndarray  # (batch, height, width, channels), or as set in Keras
    outputs: dict

    def save_checkpoint(self, path):
        """Writes the weights as a safetensors checkpoint and returns its path."""
        save_file(self.weights, path)
        return str(path)


def load(name):
    """Returns the `Golden` of `tests/golden/{name}.safetensors`."""
    arrays, metadata = read(name)
    images = arrays["input_nchw"]
    if keras.config.image_data_format() == "channels_last":
        images = np.ascontiguousarray(np.transpose(images, (0, 2, 3, 1)))
    return Golden(
        json.loads(metadata["config"]),
        {key.removeprefix("weights/"): arrays[key] for key in arrays if key.startswith("weights/")},
        images,
        {key.removeprefix("output/"): arrays[key] for key in arrays if key.startswith("output/")},
    )


def read(name):
    """Returns all arrays of a file by name, and its metadata."""
    with safe_open(DIRECTORY / f"{name}.safetensors", framework="np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def checkpoints():
    """Returns a dict of all public checkpoints by name: location, tensor names and shapes."""
    return json.loads(gzip.decompress((DIRECTORY / "checkpoints.json.gz").read_bytes()))


def assert_close(actual, expected, tolerance=1e-4):
    """Asserts that errors are at most `tolerance` times the expected peak-to-peak range."""
    actual, expected = (keras.ops.convert_to_numpy(x).astype("float64") for x in (actual, expected))
    assert actual.shape == expected.shape
    assert np.all(np.isfinite(actual)), "not finite"
    error = np.abs(actual - expected).max() / (np.ptp(expected) or 1.0)
    assert error <= tolerance, f"largest error is {error:.1e} of the spread"
