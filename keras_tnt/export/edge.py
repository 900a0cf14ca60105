"""Export to LiteRT and OpenVINO with Keras's own exporters."""

import json
import os
import zipfile

import keras

from keras_tnt.export import files
from keras_tnt.export.card import describe
from keras_tnt.export.handover import in_tensorflow
from keras_tnt.export.network import serving_network, takes_any_size
from keras_tnt.export.openvino_runtime import core
from keras_tnt.export.requirements import require
from keras_tnt.export.verification import examples, verify
from keras_tnt.files import check_space


def litert(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    labels: list[str] | None = None,
    weights: str | None = None,
) -> str:
    """Exports a model to LiteRT (TensorFlow Lite), and verifies the file against the model.

    The signature maps `images`, of any batch size, to those of `probabilities`, `logits` and
    `features` that the model has. A zip archive with LiteRT's associated files is appended to the
    model: `labels.txt`, one class name per line, and `model.json`, the metadata.

    Args:
        model: a functional model of this package, or one built around it.
        path: path of the file, ending in `.tflite`. An existing file is replaced.
        labels: class names. Defaults to the model's own names, or numbers if it has none.
        weights: description of the weights' origin, for the metadata. Defaults to None.

    Returns:
        The file's absolute path.

    Raises:
        ImportError: if `ai-edge-litert` is not installed.
        ValueError: if the model or the path is not supported.
        RuntimeError: if the file's outputs differ from the model's. No file is left behind.

    Example:
        >>> path = keras_tnt.export.litert(model, "tnt.tflite")
        >>> runner = Interpreter(path).get_signature_runner()  # of ai_edge_litert.interpreter
        >>> runner(images=images)["probabilities"]
        >>> zipfile.ZipFile(path).read("labels.txt").decode().splitlines()
    """
    require("tensorflow")
    require("ai_edge_litert", package="ai-edge-litert")
    return export("write_litert", model, path, ".tflite", labels, weights)


def openvino(model: keras.Model, path: str | os.PathLike) -> str:
    """Exports a model to OpenVINO, a `.xml` and a `.bin` file, and verifies them.

    Args:
        model: a functional model of this package, or one built around it.
        path: path of the file, ending in `.xml`. An existing file is replaced.

    Returns:
        The `.xml` file's absolute path.

    Raises:
        ImportError: if `openvino` is not installed.
        ValueError: if the model or the path is not supported.
        RuntimeError: if the file's outputs differ from the model's. No file is left behind.

    Example:
        >>> path = keras_tnt.export.openvino(model, "tnt.xml")
        >>> openvino.Core().compile_model(path)(images)["probabilities"]
    """
    require("tensorflow")
    require("openvino", package="openvino")
    return export("write_openvino", model, path, ".xml")


def export(write, model, path, extension, labels=None, weights=None):
    """Checks the arguments and calls the function named `write`, with Keras on TensorFlow."""
    path = os.path.abspath(os.path.expanduser(os.fspath(path)))
    if not path.endswith(extension):
        raise ValueError(f"`path` must end in {extension}. Received: '{path}'")
    files.check_directory(os.path.dirname(path))
    network = serving_network(model)
    if takes_any_size(network):
        raise ValueError(
            f"Model '{model.name}' takes images of any size, and such a file is for one: build the "
            "model with `input_shape`, and give it the weights. `onnx` and `saved_model` write "
            "files for any."
        )
    # Keras converts both formats from a temporary SavedModel.
    check_space(os.path.dirname(path), 2 * files.size_of(network), "The export")
    card = describe(model, network, labels, weights)
    references = {"images": examples(network, card)}
    arguments = {"path": path, "card": card}
    if keras.backend.backend() == "tensorflow":
        return globals()[write](network, references, **arguments)
    function, folder = f"{__name__}:{write}", os.path.dirname(path)
    return in_tensorflow(function, network, references, arguments, folder)


def with_named_input(network):
    """Returns the network with an input named `images`, as the file's signature has it."""
    images = keras.Input(network.inputs[0].shape[1:], name="images")
    return keras.Model(images, network(images), name=network.name)


def write_litert(network, references, path, card):
    """Writes and verifies a LiteRT file, and returns its path. Needs Keras on TensorFlow."""
    from ai_edge_litert.interpreter import Interpreter

    with files.new_file(path) as temporary:
        with_named_input(network).export(temporary, format="litert", verbose=False)
        run = Interpreter(temporary).get_signature_runner()
        for example in references["images"]:
            verify(run(images=example.images), example, "The LiteRT file")
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.writestr("model.json", json.dumps(card, indent=1))
            if card["labels"]:
                archive.writestr("labels.txt", "".join(f"{label}\n" for label in card["labels"]))
    return path


def write_openvino(network, references, path, card):
    """Writes and verifies OpenVINO files, and returns the path. Needs Keras on TensorFlow."""
    with files.new_file(path, ".bin") as temporary:
        with_named_input(network).export(temporary, format="openvino", verbose=False)
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = core().compile_model(temporary, "CPU", exact)
        for example in references["images"]:
            results = compiled(example.images)
            outputs = {name: results[name] for name in network.output}
            verify(outputs, example, "The OpenVINO file")
    return path
