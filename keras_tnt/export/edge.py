"""LiteRT and OpenVINO files, by Keras's own export."""

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
    """Write a model for LiteRT (TensorFlow Lite), and check the file against the model.

    Its signature takes `images` of any batch to `probabilities`, `logits` and `features`, as far as
    the model has them. Behind the model the file is a zip archive, as LiteRT has associated files:
    `labels.txt`, a class name a line, and `model.json`, which tells of images and weights.

    Args:
        model: a functional model of this package, or one built around it.
        path: of the file, ending in `.tflite`; one that exists is replaced.
        labels: names of the classes; None: the model's own, else numbers.
        weights: where the weights come from, for the metadata.

    Returns:
        The file's absolute path.

    Raises:
        ImportError: if `ai-edge-litert` is not installed.
        ValueError: for a model or a path that cannot be exported.
        RuntimeError: if what was written does not compute what the model does; nothing is kept.

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
    """Write a model for OpenVINO, a `.xml` and a `.bin` file, and check them against the model.

    Args:
        model: a functional model of this package, or one built around it.
        path: of the file, ending in `.xml`; one that exists is replaced.

    Returns:
        The `.xml` file's absolute path.

    Raises:
        ImportError: if `openvino` is not installed.
        ValueError: for a model or a path that cannot be exported.
        RuntimeError: if what was written does not compute what the model does; nothing is kept.

    Example:

    >>> path = keras_tnt.export.openvino(model, "tnt.xml")
    >>> openvino.Core().compile_model(path)(images)["probabilities"]
    """
    require("tensorflow")
    require("openvino", package="openvino")
    return export("write_openvino", model, path, ".xml")


def export(write, model, path, extension, labels=None, weights=None):
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
    # A SavedModel is what both are made from.
    check_space(os.path.dirname(path), 2 * files.size_of(network), "The export")
    card = describe(model, network, labels, weights)
    references = {"images": examples(network, card)}
    arguments = {"path": path, "card": card}
    if keras.backend.backend() == "tensorflow":
        return globals()[write](network, references, **arguments)
    function, folder = f"{__name__}:{write}", os.path.dirname(path)
    return in_tensorflow(function, network, references, arguments, folder)


def with_named_input(network):
    images = keras.Input(network.inputs[0].shape[1:], name="images")
    return keras.Model(images, network(images), name=network.name)


def write_litert(network, references, path, card):
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
    with files.new_file(path, ".bin") as temporary:
        with_named_input(network).export(temporary, format="openvino", verbose=False)
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = core().compile_model(temporary, "CPU", exact)
        for example in references["images"]:
            results = compiled(example.images)
            outputs = {name: results[name] for name in network.output}
            verify(outputs, example, "The OpenVINO file")
    return path
