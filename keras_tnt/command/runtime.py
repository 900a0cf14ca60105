"""A model of any form, opened for prediction by the fastest path that there is for it."""

import dataclasses
import hashlib
import os
from collections.abc import Callable

import numpy as np

from keras_tnt import files
from keras_tnt.command.cards import onnx_card, saved_model_card, saved_model_folder
from keras_tnt.imagenet import imagenet_classes
from keras_tnt.text import printable

# Fewer images than these are predicted sooner without compiling the model for speed.
WORTH_COMPILING = 64
# More files than these in a folder are no model.
MOST_FILES = 10_000


@dataclasses.dataclass(frozen=True)
class Transform:
    """What is made of an image before a model sees it.

    Attributes:
        size: (height, width) in pixels.
        covered: (height, width) that the image is resized to cover before the centre crop.
        channels: number of channels.
        channels_first: whether they stand first.
        mean, std: by which pixels in [0, 1] are normalised; None: pixels stay in [0, 255].
    """

    size: tuple[int, int]
    covered: tuple[int, int]
    channels: int
    channels_first: bool
    mean: np.ndarray | None
    std: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Runtime:
    """A model that is ready.

    Attributes:
        transform: of the images.
        predict: function from a batch to scores, or features, of each image.
        width: how many scores or features that are.
        labels: names of the classes; None: they have none.
    """

    transform: Transform
    predict: Callable
    width: int
    labels: list[str] | None = None

    def about(self, number):
        """The number of a class and, where they are known, its name and WordNet id."""
        if self.labels is None:
            return {"class": number}
        found = {"class": number, "name": self.labels[number]}
        wordnet, name = imagenet_classes()[number] if self.width == 1000 else (None, None)
        return found | ({"id": wordnet} if name == found["name"] else {})


def open_runtime(name, weights, features, count):
    """Open a model.

    Args:
        name: variant, or path of a `.keras` file, a run's directory, a folder of
            `save_pretrained`, an `.onnx` file or a SavedModel.
        weights: of a variant.
        features: whether it is to give features in the place of scores.
        count: of the images that it is opened for.

    Returns:
        A `Runtime`.

    Raises:
        ValueError, OSError: if there is no such model, or it cannot do that.
    """
    name = files.expand(name)
    if name.endswith(".onnx"):
        return open_onnx(name, features)
    if folder := saved_model_folder(name):
        return open_saved_model(folder, features)
    return open_keras(load_model(name, weights), features, count)


def default_batch_size(name):
    """How many images at once a model computes fast."""
    import keras

    if name.endswith(".onnx") or "cpu" in str(keras.ops.zeros(()).device).lower():
        return 32
    return 256


def load_model(name, weights=None):
    """The Keras model of a variant, a `.keras` file, or a directory that holds one."""
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
    if weights in ("none", "None", ""):  # as --weights=none has it
        weights = None
    return keras_tnt.create_model(name, weights=weights)


def open_keras(model, features, count):
    import keras

    import keras_tnt
    from keras_tnt.export.network import serving_network

    image = keras_tnt.anatomy(model).image
    transform = Transform(
        image.native_size,
        image.covered_size(),
        image.channels,
        image.data_format == "channels_first",
        *normalisation(not image.normalises, image.mean, image.std, image.channels),
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
    """Returns a function from a batch to a model's outputs that answers soonest for few images.

    TensorFlow runs operation by operation: `predict_on_batch` would compile the model with XLA
    first, which takes longer than the prediction. JAX compiles one program rather than one for each
    operation.
    """
    import keras

    if keras.backend.backend() == "tensorflow":
        in_list = isinstance(model.input_shape, list)  # built by keras.Model([inputs], outputs)
        return lambda images: model([images] if in_list else images, training=False)
    return model.predict_on_batch


def open_onnx(path, features):
    from keras_tnt.export import onnx_session

    card, _ = onnx_card(path)
    try:
        session = onnx_session(path)
    except Exception as error:  # of ONNX Runtime's, which has many
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
        except Exception as error:  # of ONNX Runtime's, which has many
            raise ValueError(f"'{path}' cannot compute: {error}") from error

    width = outputs[wanted][-1]
    return Runtime(transform_of(card), predict, width, None if features else labels_of(card, width))


def check_graph(path, card, images, result, wanted):
    """Raises a `ValueError` if a graph takes other images than its card describes.

    Args:
        path: Path of the file, for messages.
        card: The card.
        images: Shape of the input; what is not an integer in it is free.
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
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            "A SavedModel needs TensorFlow: pip install 'keras-tnt[tensorflow]'."
        ) from error

    card = saved_model_card(folder)
    try:
        loaded = tf.saved_model.load(folder)  # which the function needs to be kept alive
    except Exception as error:  # of TensorFlow's and protobuf's, which have many
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
    """The sizes of a TensorFlow tensor or its specification; none where they are unknown."""
    return () if tensor.shape.rank is None else tuple(tensor.shape.as_list())


def transform_of(card):
    """The `Transform` that an export's card tells."""
    return Transform(
        tuple(card["image_size"]),
        tuple(card["resized_to_cover"]),
        card["channels"],
        card["data_format"] == "channels_first",
        *normalisation(card["input"] == "normalised", card["mean"], card["std"], card["channels"]),
    )


def normalisation(wanted, mean, std, channels):
    """(mean, std) of a `Transform`; averages where there is not one of them a channel."""
    if not wanted:
        return None, None
    values = (np.array(value, "float32") for value in (mean, std))
    return tuple(x if len(x) == channels else x.mean(keepdims=True) for x in values)


def labels_of(card, width):
    """The names in an export's card, where they say more than numbers do.

    Raises:
        ValueError: if they are not as many as the classes.
    """
    labels = card["labels"]
    if labels is None or labels == [str(i) for i in range(len(labels))]:
        return None
    if len(labels) != width:
        raise ValueError(f"The model names {len(labels)} classes and gives scores of {width}.")
    return labels


def identity(path):
    """What tells one model from another of the same path: a hash of its files' ends; or None.

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
    """Yields the regular files below a folder; linked folders, FIFOs and devices are left out.

    Raises:
        ValueError: If there are more than a model has.
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
