"""Builds, loads and saves the trainer's models."""

import dataclasses
import difflib
import inspect
import json
import os
import typing
import zipfile

import keras
import numpy as np
import tensorflow as tf

import keras_tnt
from keras_tnt import finetuning
from keras_tnt.files import replacing, write_atomically
from keras_tnt.images.class_names import imagenet_classes
from keras_tnt.layers.base import rematerialized
from keras_tnt.layers.inputs_outputs import scale_and_offset
from keras_tnt.models import pretrained, registry
from keras_tnt.teacher import Teacher
from keras_tnt.text import as_flags
from keras_tnt.weights import load_keras_file, load_keras_model
from training import configuration
from training.checkpoint import load_best

IMAGENET_CLASSES = 1000
KERAS_FILES = (".keras", ".weights.h5")

TNT_DIGITS = {
    "input_shape": (32, 32, 3),
    "patch_size": 8,
    "inner_stride": 2,
    "depth": 3,
    "outer_dim": 64,
    "inner_dim": 8,
    "outer_heads": 4,
    "inner_heads": 2,
}


def tnt_digits(classes=10, name="tnt_digits", **architecture):
    """Builds a TNT for 32x32 images: 16 patches of 16 words.

    Args:
        classes: Number of classes. Defaults to 10.
        name: Name of the model. Defaults to "tnt_digits".
        **architecture: Arguments of `keras_tnt.TNT` that override `TNT_DIGITS`.
    """
    return keras_tnt.TNT(classes=classes, name=name, **(TNT_DIGITS | architecture))


def find_builder(name, flag="--model"):
    """Returns the function that builds the model of a name.

    Args:
        name: "tnt_digits", a family or a variant of keras_tnt.
        flag: Flag that is named in the error. Defaults to "--model".

    Raises:
        ValueError: If there is no such model; the message suggests the nearest names.
    """
    if name == "tnt_digits":
        return tnt_digits
    try:
        return registry.find_model(name)
    except ValueError as error:
        raise ValueError(f"{flag}: {as_flags(str(error))}") from error


def build(config, classes, label_names=None, fresh_heads=True):
    """Builds the model of a configuration, on pixels in [0, 255], in its precision.

    Args:
        config: A `training.configuration.Config`.
        classes: Number of classes.
        label_names: Class names of the data set, which are stored in the model if there are
            `classes` of them. Defaults to `None`. ImageNet's names are built in.
        fresh_heads: Whether to initialize the heads randomly if `--weights` has another number of
            classes; if `False`, such weights raise an error. Defaults to `True`.

    Returns:
        A `keras.Model`.

    Raises:
        ValueError: If arguments or weights do not fit the model.
    """
    builder = find_builder(config.model)
    arguments = custom_arguments(config, builder)
    wordnet = [identifier for identifier, _ in imagenet_classes()]
    if label_names and len(label_names) == classes and list(label_names) != wordnet:
        arguments["class_names"] = list(label_names)
    if config.image_size:
        arguments["input_shape"] = (config.image_size, config.image_size, 3)
    for name in ("stochastic_depth", "dropout", "distilled"):
        if getattr(config, name):
            arguments[name] = getattr(config, name)
    if config.precision != "float32":
        arguments["dtype"] = f"mixed_{config.precision}"
    weights = None if config.weights == "none" else file_of_run(config.weights) or None
    if weights == "imagenet" and not has_public_weights(builder):
        raise ValueError(
            f"--weights=imagenet: there are no public weights of {config.model}. Type --weights= "
            "to begin at random, --weights=FILE for yours, or another --model of `keras-tnt list`"
        )
    theirs = classes_of(weights)
    builder = with_errors_as_flags(builder, config)
    if not fresh_heads or theirs in (None, classes):
        model = builder(classes=classes, weights=weights, **arguments)
    else:
        model = builder(classes=classes, weights=None, **arguments)
        arguments.pop("class_names", None)
        top = {"classes": theirs} if theirs else {"include_top": False}
        fresh = take_all_but_heads(model, builder(weights=weights, **top, **arguments))
        print(
            f"--weights={config.weights} has {theirs or 'no'} classes, the data {classes}: "
            f"{', '.join(fresh)} start afresh",
            flush=True,
        )
    if config.remat:
        found = keras_tnt.anatomy(model)
        for layer in (*(block.layer for block in found.blocks), *found.class_blocks):
            rematerialize(layer)
    return model


def custom_arguments(config, builder):
    """Returns the arguments in `--model_args`, lists converted to tuples.

    Args:
        config: A `training.configuration.Config`.
        builder: Function that builds the model.

    Raises:
        ValueError: If the builder has no such argument, in which case the message suggests the
            nearest ones, or if a number is expected and a boolean given.
    """
    arguments = configuration.model_arguments(config)
    parameters = inspect.signature(builder).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        parameters = {**parameters, **inspect.signature(keras_tnt.TNT).parameters}
    own = set(parameters) - set(configuration.SET_BY_FLAGS) - {"architecture", "arguments"}
    known = sorted(own)
    for name, value in arguments.items():
        if name not in known:
            near = difflib.get_close_matches(name, known)
            raise ValueError(
                f"--model_args: {config.model} has no argument {name!r}. "
                + (f"Did you mean {' or '.join(near)}? " if near else "")
                + f"There are: {', '.join(known)}"
            )
        if holds_boolean(value) and takes_numbers(parameters[name]):
            raise ValueError(
                f"--model_args: {config.model} takes numbers as {name!r}, not true or false. "
                f"Received: {json.dumps(value)}"
            )
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in arguments.items()
    }


def holds_boolean(value):
    """Returns whether a JSON value is, or is a list that contains, `true` or `false`."""
    return any(map(holds_boolean, value)) if isinstance(value, list) else isinstance(value, bool)


def takes_numbers(parameter):
    """Returns whether a parameter is one or more numbers, and not also a boolean.

    Args:
        parameter: An `inspect.Parameter`, of which the annotation and the default are considered.
    """

    def kinds(hint):
        inner = typing.get_args(hint)
        return set().union(*map(kinds, inner)) if inner else {hint}

    default = parameter.default
    values = default if isinstance(default, tuple | list) else [default]
    found = kinds(parameter.annotation) | set(map(type, values))
    return bool(found & {int, float}) and bool not in found


def with_errors_as_flags(builder, config):
    """Wraps a builder so that its errors name `--model`, `--model_args` and other flags."""
    given = f"--model={config.model}"
    if config.model_args:
        given += f" --model_args={config.model_args}"

    def build_model(**arguments):
        try:
            return builder(**arguments)
        except ConnectionError as error:
            raise ConnectionError(as_flags(str(error))) from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{given}: {as_flags(str(error))}") from error

    return build_model


def has_public_weights(builder):
    """Returns whether a builder's `weights` default to "imagenet"."""
    weights = inspect.signature(builder).parameters.get("weights")
    return weights is not None and weights.default == "imagenet"


def freeze(config, model):
    """Freezes the layers selected by `--freeze`.

    Raises:
        ValueError: If the model has no such part.
    """
    if not config.freeze:
        return
    up_to = int(config.freeze) if config.freeze.isdecimal() else config.freeze
    try:
        finetuning.freeze(model, up_to)
    except ValueError as error:
        raise ValueError(f"--freeze={config.freeze}: {error}") from error


def load(config, classes, run, weights, checkpoint):
    """Loads the model to evaluate.

    Args:
        config: A `training.configuration.Config`.
        classes: Number of classes.
        run: Directory of a run, used if `weights` is empty.
        weights: A `.keras` file, which is loaded as a model, or weights for the configured model.
        checkpoint: Which of the run's weights to load: "final", "final_ema", "best" or "averaged".

    Raises:
        ValueError: If a file does not exist, or its weights do not fit the model.
    """
    if weights and weights.endswith(".keras"):
        if not os.path.isfile(weights):
            raise ValueError(f"--weights: there is no file {weights!r}")
        return load_keras_model(weights)
    config = dataclasses.replace(config, weights=weights or "")
    model = build(config, classes, fresh_heads=False)
    if weights:
        return model
    if checkpoint != "best":
        path = os.path.join(run, f"{checkpoint}.weights.h5")
        if not os.path.isfile(path):
            way = f"python training/average.py --run={run} writes it"
            way = way if checkpoint == "averaged" else "has the run ended?"
            raise ValueError(f"{run} holds no {checkpoint}.weights.h5: {way}")
        load_keras_file(model, path)
        return model
    load_best(model, run)
    return model


def take_all_but_heads(model, donor):
    """Copies all weights but the heads' from a model with other classes.

    Args:
        model: `keras.Model` to fill.
        donor: `keras.Model` to copy from.

    Returns:
        Sorted paths of the head variables, which are unchanged.
    """
    values = {v.path: v for v in donor.weights}
    heads = {v.path for head in keras_tnt.anatomy(model).heads for v in head.weights}
    for variable in model.weights:
        if variable.path not in heads:
            variable.assign(values[variable.path].numpy())
    return sorted(heads)


def file_of_run(weights):
    """Returns the path of `final.keras` if `--weights` names a run's directory, else `weights`.

    Raises:
        ValueError: If the directory has no `final.keras`.
    """
    if not os.path.isdir(weights):
        return weights
    path = os.path.join(weights, "final.keras")
    if not os.path.isfile(path):
        raise ValueError(f"--weights={weights} holds no final.keras: has the run ended?")
    return path


def classes_of(weights):
    """Returns the number of classes of weights, or `None` if unknown or without weights.

    Args:
        weights: "imagenet", a file, a hub repository, or `None`.
    """
    if weights is None or weights == "imagenet":
        return weights and IMAGENET_CLASSES
    try:
        return pretrained.count_weight_classes(pretrained.find_source(weights))
    except ValueError as error:
        raise ValueError(f"--weights: {as_flags(str(error))}") from error


def build_teacher(config, student):
    """Builds the teacher: a function from the student's images to logits.

    Args:
        config: A `training.configuration.Config`.
        student: The `keras.Model` to train.

    Returns:
        A `keras_tnt.teacher.Teacher`, or `None` without distillation.
    """
    if config.distill == "none":
        return None
    if config.teacher.endswith(".keras"):
        if not os.path.isfile(config.teacher):
            raise ValueError(f"--teacher: there is no file {config.teacher!r}")
        model = load_keras_model(config.teacher)
    else:
        model = find_builder(config.teacher, "--teacher")(weights="imagenet")
    name = config.teacher_preprocessing
    return Teacher(model, student, {"auto": None, "none": "same"}.get(name, name))


def rematerialize(layer):
    """Makes a block recompute its activations in the backward pass of a training step."""
    call = layer.call
    recomputed = rematerialized(layer, call)

    def call_or_recompute(*inputs, training=False, **fixed):
        chosen = recomputed if training else call
        return chosen(*inputs, training=training, **fixed)

    layer.call = call_or_recompute


def logits_model(model):
    """Returns a model with the same layers that outputs the logits of each head.

    The class head is the first, the distillation head, if any, the second.
    """
    heads = keras_tnt.anatomy(model).heads
    return keras.Model(model.inputs, [head.output for head in heads])


def normalization(model):
    """Yields (scale, offset) of a model's input normalization, float32 (3,) each."""
    image = keras_tnt.anatomy(model).image
    values = scale_and_offset(image.mean, image.std, 3)
    return (np.broadcast_to(value.astype("float32"), 3) for value in values)


def pixels(model, normalised):
    """Inverts a model's input normalization.

    Args:
        model: The `keras.Model`.
        normalised: Normalized values (..., 3).

    Returns:
        Pixels (..., 3) that the model normalizes to these values.
    """
    scale, offset = normalization(model)
    return (normalised - offset) / scale


def mean_color(model):
    """Returns the color that a model's input normalization maps to zero.

    Returns:
        Three integers in [0, 255].
    """
    scale, offset = normalization(model)
    # Rounded up slightly: 127.5, which is 127.4999 in float32, becomes 128.
    return tuple(int(round(value + 1e-3)) for value in (-offset / scale).tolist())


def crop_share(config, model):
    """Returns the share of the resized image's side that the evaluation crop covers."""
    return config.crop or keras_tnt.anatomy(model).image.crop


def image_size(model):
    """Returns the model's input (height, width)."""
    image = keras_tnt.anatomy(model).image
    return image.height, image.width


def state(model):
    """Returns all variables of a model, by names that are stable across processes.

    These are weights and moving statistics ("model/<path>") and seeds ("seed/<index>").
    """
    named = {f"model/{v.path}": v.value for v in model.weights}
    weights = {id(v) for v in model.weights}
    seeds = [v for v in model.variables if id(v) not in weights]
    return named | {f"seed/{i}": v.value for i, v in enumerate(seeds)}


def save_final(model, config, classes, label_names, workdir, name="final"):
    """Writes `<name>.keras` and `<name>.weights.h5`, in float32 for every training precision.

    Args:
        model: The trained `keras.Model`.
        config: A `training.configuration.Config`.
        classes: Number of classes.
        label_names: Class names, or `None`.
        workdir: Directory to write to.
        name: Stem of the file names. Defaults to "final".

    Returns:
        Dict from file name to path.
    """
    plain = build_plain(config, classes, label_names)
    values = {v.path: v.numpy() for v in model.weights}
    for variable in plain.weights:
        variable.assign(values[variable.path])
    return write_model(plain, workdir, name)


def build_plain(config, classes, label_names):
    """Builds the model of a configuration in float32, with random weights.

    Args:
        config: A `training.configuration.Config`.
        classes: Number of classes.
        label_names: Class names, or `None`.
    """
    unadorned = dataclasses.replace(config, precision="float32", weights="", remat=False)
    return build(unadorned, classes, label_names)


def write_model(plain, workdir, name):
    """Writes `<name>.keras` and `<name>.weights.h5` atomically.

    Args:
        plain: `keras.Model` in float32.
        workdir: Directory to write to.
        name: Stem of the file names.

    Returns:
        Dict from file name to path.
    """
    files = {suffix: os.path.join(workdir, name + suffix) for suffix in KERAS_FILES}
    with replacing(files[".keras"]) as temporary:
        plain.save(temporary)
        # The weight file is extracted from the .keras file, where Keras wrote it in memory: HDF5
        # aborts the process if it writes to a full disk.
        with zipfile.ZipFile(temporary) as archive:
            weights = archive.read("model.weights.h5")
    write_atomically(files[".weights.h5"], weights)
    return {os.path.basename(path): path for path in files.values()}


# Dense bfloat16 or tensor-core float16 peak throughput by the vendors' data sheets, in TFLOP/s.
PEAKS = {"V100": 125, "T4": 65, "A100": 312, "L4": 121, "H100": 989, "H200": 989, "B200": 2250}


def peak_tflops(config):
    """Returns the peak throughput of a device in TFLOP/s.

    It is `--peak_tflops`, that of a known GPU outside of float32, or 0 if unknown.
    """
    if config.peak_tflops:
        return config.peak_tflops
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus or config.precision == "float32":
        return 0.0
    name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "")
    return float(next((peak for key, peak in PEAKS.items() if key in name), 0))


def forward_flops(model):
    """Returns the floating-point operations of a forward pass on one image.

    Matrix products and convolutions are counted, a multiply-add as two operations.
    """
    signature = tf.TensorSpec((1, *model.input_shape[1:]), tf.float32)
    function = tf.function(lambda x: model(x, training=False), autograph=False)
    graph = function.get_concrete_function(signature).graph
    total = 0
    for operation in graph.get_operations():
        if operation.type in ("MatMul", "BatchMatMulV2"):
            transposed = operation.get_attr(
                "transpose_a" if operation.type == "MatMul" else "adj_x"
            )
            inner = operation.inputs[0].shape[-2 if transposed else -1]
            total += 2 * inner * operation.outputs[0].shape.num_elements()
        elif operation.type == "Conv2D":
            kernel = operation.inputs[1].shape
            each = kernel.num_elements() // kernel[-1]
            total += 2 * each * operation.outputs[0].shape.num_elements()
    return total
