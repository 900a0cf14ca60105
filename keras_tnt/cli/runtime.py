"""Opens models of any format for prediction, each by the fastest available runtime."""

import dataclasses
import hashlib
import os
from collections.abc import Callable

import numpy as np

from keras_tnt import files
from keras_tnt.cli.cards import onnx_card, saved_model_card, saved_model_folder
from keras_tnt.images.class_names import imagenet_classes
from keras_tnt.text import printable

# Below this number of images, compiling the model takes longer than it saves.
WORTH_COMPILING = 64
# A directory with more entries is not a model.
MOST_FILES = 10_000


@dataclasses.dataclass(frozen=True)
class Transform:
    """Preprocessing of an image.

    Attributes:
        size: (height, width) of the input in pixels.
        covered: (height, width) that the resized image covers before the center crop.
        channels: number of channels.
        channels_first: whether the channels come first.
        mean, std: statistics that normalize pixels in [0, 1]. If `None`, pixels stay in [0, 255].
    """

    size: tuple[int, int]
    covered: tuple[int, int]
    channels: int
    channels_first: bool
    mean: np.ndarray | None
    std: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Model that is ready for prediction.

    Attributes:
        transform: preprocessing of the images.
        predict: function from a batch of images to scores or features, (batch, width).
        width: number of scores or features of an image.
        labels: names of the classes. If `None`, they have none.
    """

    transform: Transform
    predict: Callable
    width: int
    labels: list[str] | None = None

    def about(self, number):
        """Returns the index of a class and, if known, its name and WordNet id, as a dict."""
        if self.labels is None:
            return {"class": number}
        found = {"class": number, "name": self.labels[number]}
        wordnet, name = imagenet_classes()[number] if self.width == 1000 else (None, None)
        return found | ({"id": wordnet} if name == found["name"] else {})


def open_runtime(name, weights, features, count):
    """Opens a model for prediction.

    Args:
        name: variant, or path of a `.keras` file, a run's directory, a directory of
            `save_pretrained`, an `.onnx` file or a SavedModel.
        weights: weights of a variant.
        features: whether to return features instead of scores.
        count: number of images to predict.

    Returns:
        A `Runtime`.

    Raises:
        ValueError, OSError: if there is no such model, or it does not support the request.
    """
    name = files.expand(name)
    if name.endswith(".onnx"):
        return open_onnx(name, features)
    if folder := saved_model_folder(name):
        return open_saved_model(folder, features)
    return open_keras(load_model(name, weights), features, count)


def default_batch_size(name):
    """Returns a batch size that a model computes fast: 32 on CPUs, else 256."""
    import keras

    if name.endswith(".onnx") or "cpu" in str(keras.ops.zeros(()).device).lower():
        return 32
    return 256


def load_model(name, weights=None):
    """Returns the Keras model of a variant, a `.keras` file, or a directory with one."""
    import keras_tnt
    from keras_tnt.weights import load_keras_model

    name = files.expand(name)
    if os.path.isdir(name):
        final = os.path.join(name, "final.keras")
        if os.path.isfile(os.path.join(name, "model.safetensors")):
            return keras_tnt.load_pretrained(name)
        if not os.path.isfile(final):
            raise ValueError(
                f"Folder '{name}' holds no model: no final.keras of a run, no model.safetensors of "
                "save_pretrained, and no SavedModel."
            )
        name = final
    if name.endswith(".keras"):
        if not os.path.exists(name):
            raise FileNotFoundError(f"There is no file '{name}'.")
        return load_keras_model(name)
    if os.path.exists(name):
        raise ValueError(
            f"'{name}' is no model: a .keras or .onnx file, a run's directory and a SavedModel are."
        )
    return keras_tnt.create_model(name, weights=parse_weights(weights))


def parse_weights(value):
    """Returns the `weights` argument of the flag --weights: `None` for none, None and ""."""
    return None if value in ("none", "None", "") else value


def open_keras(model, features, count):
    """Returns the `Runtime` of a Keras model."""
    import keras

    import keras_tnt
    from keras_tnt.export.network import serving_network

    image = keras_tnt.anatomy(model).image
    transform = Transform(
        image.native_size,
        image.covered_size(),
        image.channels,
        image.data_format == "channels_first",
        *normalization(not image.normalizes, image.mean, image.std, image.channels),
    )
    if features:
        model = keras.Model(model.inputs[0], serving_network(model).output["features"])
    if len(model.output_shape) != 2:
        raise ValueError(f"'{model.name}' gives no {'vector' if features else 'scores'}.")
    if count < WORTH_COMPILING:
        predict = without_compiler(model)
    else:
        predict = keras_tnt.compile_inference(model)
    labels = None if features else keras_tnt.class_names(model)
    return Runtime(transform, predict, model.output_shape[-1], labels)


def without_compiler(model):
    """Returns a function from a batch to a model's outputs with the lowest latency for few images.

    TensorFlow runs eagerly, because `predict_on_batch` would first compile the model with XLA,
    which takes longer than the prediction. JAX compiles one program instead of one for each
    operation.
    """
    import keras

    if keras.backend.backend() == "tensorflow":
        in_list = isinstance(model.input_shape, list)  # built by keras.Model([inputs], outputs)
        return lambda images: model([images] if in_list else images, training=False)
    return model.predict_on_batch


def open_onnx(path, features):
    """Returns the `Runtime` of an ONNX file."""
    from keras_tnt.export import onnx_session

    card, _ = onnx_card(path)
    try:
        session = onnx_session(path)
    except Exception as error:  # ONNX Runtime raises many types
        raise ValueError(f"'{path}' cannot be opened in ONNX Runtime: {error}") from error
    outputs = {output.name: output.shape for output in session.get_outputs()}
    inputs = {given.name: given.shape for given in session.get_inputs()}
    wanted = "features" if features else "probabilities"
    if wanted not in outputs:
        raise ValueError(f"'{path}' gives {' and '.join(sorted(outputs))}, not {wanted}.")
    if set(inputs) != {"images"}:
        raise ValueError(f"'{path}' takes {' and '.join(sorted(inputs)) or 'nothing'}, not images.")
    check_graph(path, card, inputs["images"], outputs[wanted], wanted)

    def predict(images):
        try:
            return session.run([wanted], {"images": images})[0]
        except Exception as error:  # ONNX Runtime raises many types
            raise ValueError(f"'{path}' cannot compute: {error}") from error

    width = outputs[wanted][-1]
    return Runtime(transform_of(card), predict, width, None if features else labels_of(card, width))


def check_graph(path, card, images, result, wanted):
    """Raises a `ValueError` if the shapes of a graph contradict its card.

    Args:
        path: Path of the file, for messages.
        card: The card.
        images: Shape of the input; sizes that are not integers are dynamic.
        result: Shape of the output, likewise.
        wanted: Name of the output.
    """
    channels = (card["channels"],)
    first = card["data_format"] == "channels_first"
    sides = tuple(card["image_size"])
    expected = channels + sides if first else sides + channels
    if not images or len(images) != 4:
        raise ValueError(
            f"'{path}' cannot be used: its input 'images' has the shape "
            f"{printable(list(images or ()))}, where 4 axes are needed. Export the model again."
        )
    if any(isinstance(n, int) and n != m for n, m in zip(images[1:], expected, strict=True)):
        raise ValueError(
            f"'{path}' contradicts itself: its input 'images' has the shape "
            f"{printable(list(images))}, and its card describes images of {list(expected)}."
        )
    if len(result or ()) != 2 or not isinstance(result[-1], int) or result[-1] < 1:
        raise ValueError(
            f"'{path}' cannot be used: its output '{wanted}' has the shape "
            f"{printable(list(result or ()))}, where (batch, a number of values) is needed. Export "
            "the model again."
        )


def open_saved_model(folder, features):
    """Returns the `Runtime` of a SavedModel."""
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            "A SavedModel needs TensorFlow: pip install 'keras-tnt[tensorflow]'."
        ) from error

    card = saved_model_card(folder)
    try:
        loaded = tf.saved_model.load(folder)  # `predict` must hold a reference to it
    except Exception as error:  # TensorFlow and protobuf raise many types
        raise ValueError(f"'{folder}' cannot be opened in TensorFlow: {error}") from error
    signature, wanted = "serving_default", "probabilities"
    if features:
        signature = wanted = "features"
    function = loaded.signatures.get(signature)
    outputs = function.structured_outputs if function else {}
    if wanted not in outputs:
        raise ValueError(
            f"'{folder}' gives {' and '.join(sorted(outputs)) or 'nothing'}, not {wanted}."
        )

    inputs = function.structured_input_signature[1]
    if set(inputs) != {"images"}:
        raise ValueError(f"'{folder}' takes {' and '.join(sorted(inputs))}, not images.")
    shapes = [as_shape(tensor) for tensor in (inputs["images"], outputs[wanted])]
    check_graph(folder, card, *shapes, wanted)

    def predict(images):
        try:
            return loaded.signatures[signature](images=tf.constant(images))[wanted].numpy()
        except tf.errors.OpError as error:
            raise ValueError(f"'{folder}' cannot compute: {error.message}") from error

    width = shapes[1][-1]
    return Runtime(transform_of(card), predict, width, None if features else labels_of(card, width))


def as_shape(tensor):
    """Returns the shape of a TensorFlow tensor or spec; () if its rank is unknown."""
    return () if tensor.shape.rank is None else tuple(tensor.shape.as_list())


def transform_of(card):
    """Returns the `Transform` that an export's card describes."""
    return Transform(
        tuple(card["image_size"]),
        tuple(card["resized_to_cover"]),
        card["channels"],
        card["data_format"] == "channels_first",
        *normalization(card["input"] == "normalised", card["mean"], card["std"], card["channels"]),
    )


def normalization(wanted, mean, std, channels):
    """Returns (mean, std) of a `Transform`, averaged unless there is one per channel."""
    if not wanted:
        return None, None
    values = (np.array(value, "float32") for value in (mean, std))
    return tuple(x if len(x) == channels else x.mean(keepdims=True) for x in values)


def labels_of(card, width):
    """Returns the class names in an export's card; `None` if they are only indices.

    Args:
        card: the card.
        width: the number of classes.

    Raises:
        ValueError: if the numbers of names and classes differ.
    """
    labels = card["labels"]
    if labels is None or labels == [str(i) for i in range(len(labels))]:
        return None
    if len(labels) != width:
        raise ValueError(f"The model names {len(labels)} classes and gives scores of {width}.")
    return labels


def identity(path):
    """Returns a hash that identifies the content of a model; `None` if the path does not exist.

    It covers names and sizes of the files, and the first and last MiB of each.

    Args:
        path: path of a file or directory.

    Raises:
        ValueError: If it is neither a regular file nor a directory, or has too many files.
    """
    path = files.expand(path)
    if not os.path.exists(path):
        return None
    total = hashlib.sha256()
    for name in sorted(regular_files(path)) if os.path.isdir(path) else [path]:
        with files.open_regular(name) as file:
            size = os.fstat(file.fileno()).st_size
            total.update(f"{os.path.relpath(name, path)} {size}".encode("utf-8", "surrogateescape"))
            total.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            total.update(file.read(1 << 20))
    return total.hexdigest()


def regular_files(folder):
    """Yields the regular files below a directory, without linked directories, FIFOs and devices.

    Args:
        folder: path of the directory.

    Raises:
        ValueError: If there are more than `MOST_FILES` entries.
    """
    folders, count = [folder], 0
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                count += 1
                if count > MOST_FILES:
                    raise ValueError(
                        f"'{folder}' is no model: it holds more than {MOST_FILES:,} files."
                    )
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_file():
                    yield entry.path
