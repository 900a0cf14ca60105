"""Export to a SavedModel for TF Serving."""

import json
import os

import keras
import numpy as np

from keras_tnt.export import files
from keras_tnt.export.card import describe
from keras_tnt.export.graph import serving_module
from keras_tnt.export.handover import in_tensorflow
from keras_tnt.export.network import serving_network, takes_any_size
from keras_tnt.export.requirements import require
from keras_tnt.export.verification import (
    PICTURE_TOLERANCE,
    examples,
    picture_examples,
    verify,
    verify_names,
)
from keras_tnt.export.warmup import image_example, warmup_requests, write_warmup
from keras_tnt.files import check_space, scratch

SIGNATURES = ("serving_default", "serving_bytes", "classify", "features")
FROM_PICTURES = ("serving_bytes", "classify")
CLASSIFY = "tensorflow/serving/classify"  # method name that TF Serving's Classify calls require
CARD = os.path.join("assets.extra", "model.json")


def saved_model(
    model: keras.Model,
    directory: str | os.PathLike,
    version: int | None = None,
    labels: list[str] | None = None,
    *,
    signatures: list[str] | None = None,
    weights: str | None = None,
) -> str:
    """Exports a SavedModel for TF Serving to `directory/<version>`, and verifies it.

    The signatures, all with a dynamic batch axis:

    - `serving_default`: `images`, as the model takes them, to `probabilities` and `logits`.
    - `serving_bytes`: `image_bytes`, encoded images of any size, in the formats that
      `keras_tnt.load_image` reads, through the evaluation transform to `classes` and `scores` of
      the best five, and `probabilities`.
    - `classify`: for TF Serving's Classify calls; `inputs`, serialized tf.Examples whose feature
      "image/encoded" is an encoded image, to `classes` and `scores`.
    - `features`: `images` to `features`, the vector that the classifier reads; for two heads, the
      mean of their vectors.

    For a model of any image size, `images` may have any size that is divisible into patches; for
    others the error contains the nearest size. Encoded images are resized to its native size.

    Models with other than 1 or 3 channels have no signatures for encoded images. Those without a
    classifier return `features` from every signature. The export is in float32 for models of any
    precision.

    Args:
        model: a functional model of this package, or one built around it.
        directory: the model's directory, which the server polls for versions.
        version: version number, a positive integer that does not exist yet. Defaults to the next
            free number.
        labels: class names. Defaults to the model's own names, or numbers if it has none.
        signatures: names of the signatures to write. Defaults to all that the model supports.
        weights: description of the weights' origin, for the metadata. Defaults to None.

    Returns:
        The path of the version, `directory/<version>`. Its folder `assets.extra` contains warm-up
        requests for TF Serving, and `model.json`, the metadata.

    Raises:
        ValueError: if the model or an argument is not supported.
        FileExistsError: if the version exists.
        NotADirectoryError: if `directory` is a file.
        OSError: if the disk is full. No file is left behind.
        RuntimeError: if the outputs differ from the model's. No file is left behind.

    Example:
        >>> path = keras_tnt.export.saved_model(model, "savedmodels/tnt_small")
        >>> tf.saved_model.load(path).signatures["serving_default"](images=images)["probabilities"]
    """
    require("tensorflow", "tensorflow_serving", "PIL")
    directory = os.path.abspath(os.path.expanduser(os.fspath(directory)))
    files.check_directory(directory, version)
    network = serving_network(model)
    card = describe(model, network, labels, weights)
    signatures = check_signatures(signatures, network, card)
    check_space(directory, files.size_of(network), "The export")

    references = {"images": examples(network, card)}
    if set(FROM_PICTURES) & set(signatures):
        references["pictures"] = picture_examples(model, network, card)
    arguments = {
        "card": card,
        "directory": directory,
        "version": version,
        "signatures": signatures,
    }
    # A graph with dynamic image sizes needs Keras on TensorFlow.
    backends = ("tensorflow",) if takes_any_size(network) else ("tensorflow", "jax")
    if keras.backend.backend() in backends:
        return write_saved_model(network, references, **arguments)
    function = f"{__name__}:write_saved_model"
    return in_tensorflow(function, network, references, arguments, directory)


def check_signatures(signatures, network, card):
    """Returns the signatures to write, in a fixed order.

    Raises:
        ValueError: if a name is unknown, or the model does not support the signature.
    """
    possible = ["serving_default"]
    if card["channels"] in (1, 3):
        possible.append("serving_bytes")
        if card["labels"]:
            possible.append("classify")
    if "features" in network.output:
        possible.append("features")
    if signatures is None:
        return possible
    if isinstance(signatures, str):
        signatures = [signatures]
    unknown = [name for name in signatures if name not in SIGNATURES]
    if unknown:
        raise ValueError(
            f"`signatures` are names out of {', '.join(SIGNATURES)}. Received: {unknown[0]!r}"
        )
    unfit = [name for name in signatures if name not in possible]
    if unfit:
        raise ValueError(
            f"Model '{network.name}', which takes {card['channels']} channels and gives "
            f"{' and '.join(network.output)}, can have the signatures {', '.join(possible)}. "
            f"Received: {unfit[0]!r}"
        )
    # Servers require serving_default.
    return [name for name in possible if name in signatures or name == "serving_default"]


def write_saved_model(network, references, card, directory, version, signatures):
    """Writes and verifies a SavedModel. Needs Keras on TensorFlow or JAX."""
    import tensorflow as tf

    with scratch(directory) as temporary:
        labels_file = None
        if card["labels"]:
            labels_file = os.path.join(temporary, "labels.txt")
            with open(labels_file, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(f"{label}\n" for label in card["labels"])
        module, functions = serving_module(network, card, labels_file, signatures)
        warmup = warmup_requests(os.path.basename(directory), requests(references, signatures))
        needed = files.size_of(network) + sum(map(len, warmup)) + size_of_graphs(functions)
        check_space(directory, needed, "The SavedModel")
        with files.new_version(directory, version) as place:
            with files.temporary_files_in(temporary):
                tf.saved_model.save(module, place.aside, functions)
            if "classify" in signatures:
                set_method(place.aside, "classify", CLASSIFY)
            write_warmup(place.aside, warmup)
            verify_saved_model(place.aside, references, signatures, card["labels"])
            with open(os.path.join(place.aside, CARD), "w", encoding="utf-8") as file:
                json.dump(card, file, indent=1)
    return place.path


def size_of_graphs(functions):
    """Returns the bytes of functions in a SavedModel, which stores each of them twice."""
    graphs = [f.graph.as_graph_def() for f in functions.values()]
    nodes = sum(node.ByteSize() for graph in graphs for node in graph.node)
    library = {f.signature.name: f.ByteSize() for graph in graphs for f in graph.library.function}
    return 2 * (nodes + sum(library.values()))


def set_method(folder, signature, method):
    """Sets the TF Serving method of a signature; Keras and TensorFlow always write Predict."""
    from tensorflow.core.protobuf import saved_model_pb2

    path = os.path.join(folder, "saved_model.pb")
    saved = saved_model_pb2.SavedModel()
    with open(path, "rb") as file:
        saved.ParseFromString(file.read())
    saved.meta_graphs[0].signature_def[signature].method_name = method
    with open(path, "wb") as file:
        file.write(saved.SerializeToString(deterministic=True))
    # It contains the checksum of the unmodified file.
    os.remove(os.path.join(folder, "fingerprint.pb"))


def signature_input(signature, example):
    """Returns a signature's input for an `Example`: a name and an array."""
    if signature == "classify":
        return "inputs", np.array([image_example(p) for p in example.pictures], dtype=object)
    if signature in FROM_PICTURES:
        return "image_bytes", np.array(example.pictures, dtype=object)
    return "images", example.images


def requests(references, signatures):
    """Yields (signature, input name, input, example) for each signature and batch size."""
    for signature in signatures:
        kind = "pictures" if signature in FROM_PICTURES else "images"
        for example in references[kind]:
            yield signature, *signature_input(signature, example), example


def verify_saved_model(folder, references, signatures, labels):
    """Raises a RuntimeError if a signature's outputs differ from the model's."""
    import tensorflow as tf

    functions = tf.saved_model.load(folder).signatures
    for signature, name, value, example in requests(references, signatures):
        what = f"Signature {signature} of the SavedModel"
        outputs = functions[signature](**{name: tf.constant(value)})
        outputs = {key: output.numpy() for key, output in outputs.items()}
        if signature not in FROM_PICTURES:
            verify(outputs, example, what)
        elif labels is None:
            verify(outputs, example, what, 10 * PICTURE_TOLERANCE)
        else:
            verify_names(outputs.pop("classes"), outputs.pop("scores"), example, labels, what)
            verify(outputs, example, what, PICTURE_TOLERANCE, absolute=True)
