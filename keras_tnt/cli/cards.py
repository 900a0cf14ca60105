"""Metadata of exported models (cards), validated as untrusted input."""

import json
import math
import operator
import os

from keras_tnt import files
from keras_tnt.images.decoding import MAX_SIDE
from keras_tnt.weights import hub_config
from keras_tnt.weights.hub_config import as_names, as_number, as_text, as_whole, wrong

CARD = os.path.join("assets.extra", "model.json")
TEXTS = ("name", "input", "data_format", "made_with")
MOST_CHANNELS = 4096
LARGEST_GRAPH = 2**31  # bytes, protobuf's limit of a message


def onnx_card(path):
    """Returns (card, number of parameters) of a file of `keras_tnt.export.onnx`.

    Args:
        path: path of the file.

    Raises:
        OSError, ValueError: if it cannot be read, or is not such a file.
    """
    from keras_tnt.export.requirements import require

    require("onnx", "onnxruntime")
    import onnx

    path = files.expand(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is no file '{path}'.")
    try:
        with files.open_regular(path, LARGEST_GRAPH) as file:
            proto = onnx.load_model_from_string(file.read(LARGEST_GRAPH))
    except (OSError, ValueError):
        raise
    except Exception as error:  # protobuf raises several types
        raise ValueError(f"'{path}' is no ONNX file.") from error
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    if "resized_to_cover" not in metadata:
        raise ValueError(f"'{path}' is no file of keras_tnt.export.onnx: it tells no image size.")
    parameters = sum(math.prod(tensor.dims) for tensor in proto.graph.initializer)
    card = {key: value if key in TEXTS else as_json(value) for key, value in metadata.items()}
    return checked(card, path), parameters


def as_json(text):
    """Returns the value of a JSON text, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def saved_model_folder(path):
    """Returns the directory of our SavedModel at a path, its newest version; or `None`."""
    path = files.expand(path)
    versions = []
    if os.path.isdir(path):
        # No more digits than a version has, because int rejects thousands of them.
        names = (name for name in os.listdir(path) if name.isdecimal() and len(name) < 20)
        versions = sorted(map(int, names), reverse=True)
    for folder in (path, *(os.path.join(path, str(version)) for version in versions)):
        if os.path.lexists(os.path.join(folder, CARD)):
            return folder
    return None


def saved_model_card(folder):
    """Returns the card of a SavedModel that this package exported.

    Args:
        folder: path of the SavedModel.

    Raises:
        OSError, ValueError: if it has none.
    """
    path = os.path.join(folder, CARD)
    try:
        card = hub_config.parse_json(files.read_regular(path, hub_config.LARGEST_FILE))
    except ValueError as error:
        raise ValueError(f"'{path}' is no card of an exported model: {error}") from error
    return checked(card, path)


def checked(card, path):
    """Returns a card after validating the types and bounds of its values.

    Args:
        card: dict of the card's values.
        path: path of the file, for messages.

    Raises:
        ValueError: naming the file and the first invalid value.
    """
    try:
        for name in TEXTS:
            as_text(name, card[name])
        channels = as_whole("channels", card["channels"], 1, MOST_CHANNELS)
        sizes = {name: check_size(name, card[name]) for name in ("image_size", "resized_to_cover")}
        check_numbers("mean", card["mean"], channels, -hub_config.LARGEST_STATISTIC)
        check_numbers("std", card["std"], channels, hub_config.SMALLEST_STD)
        if len(card["mean"]) != len(card["std"]):
            raise ValueError(f"`mean` has {len(card['mean'])} numbers, `std` {len(card['std'])}.")
        if any(map(operator.lt, sizes["resized_to_cover"], sizes["image_size"])):
            raise ValueError(
                f"`resized_to_cover` must not be smaller than `image_size`, {sizes['image_size']}. "
                f"It is {sizes['resized_to_cover']}."
            )
        if math.prod(sizes["image_size"]) > hub_config.LARGEST_SIDE**2:
            raise wrong("image_size", "at most 4096 x 4096 pixels", card["image_size"])
        if card["data_format"] not in ("channels_first", "channels_last"):
            raise wrong("data_format", "channels_first or channels_last", card["data_format"])
        labels = card["labels"] and list(as_names("labels", card["labels"]))
        return {**card, **sizes, "labels": labels, "weights": card["weights"]}
    except KeyError as error:
        reason = f"it has no {error}."
    except ValueError as error:
        reason = error
    raise ValueError(f"'{path}' is no card of an exported model: {reason}")


def check_size(name, value):
    """Returns the [height, width] of images if it is valid; else raises a `ValueError`."""
    if not isinstance(value, list) or len(value) != 2:
        raise wrong(name, "two sides", value)
    return [as_whole(name, side, 1, MAX_SIDE) for side in value]


def check_numbers(name, value, channels, least):
    """Raises a `ValueError` unless a value is a list of 1, 3 or `channels` bounded numbers."""
    if not isinstance(value, list) or len(value) not in (1, 3, channels):
        raise wrong(name, "a list of numbers, one a channel", value)
    for number in value:
        as_number(name, number, least, hub_config.LARGEST_STATISTIC)
