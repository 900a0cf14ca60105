"""The models that the trainer can build, by name, and their logits."""

import dataclasses
import inspect
import os
import zipfile

import keras
import numpy as np
import tensorflow as tf

import keras_tnt
from keras_tnt.files import replacing, write_atomically
from keras_tnt.teacher import Teacher
from training.checkpoint import read

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
    """A TNT sized for 32x32 images: 16 patches of 16 words."""
    return keras_tnt.TNT(classes=classes, name=name, **(TNT_DIGITS | architecture))


def builders():
    """Every model function of keras_tnt by the name that it gives its models, and tnt_digits."""
    found = {"tnt_digits": tnt_digits}
    for function in vars(keras_tnt).values():
        if inspect.isfunction(function):
            parameters = inspect.signature(function).parameters
            if {"include_top", "classifier_activation", "name"} <= set(parameters):
                found[parameters["name"].default] = function
    return found


def check_name(name, flag="--model"):
    """Raise a ValueError that lists the models if there is none of this name."""
    if name not in builders():
        raise ValueError(f"{flag}: there is no {name!r}. There are: {', '.join(builders())}")


def build(config, classes):
    """The model of a configuration, on pixels in [0, 255], in its precision.

    Args:
        config: a `training.configuration.Config`.
        classes: number of classes.

    Returns:
        A `keras.Model`.
    """
    arguments = {}
    if config.image_size:
        arguments["input_shape"] = (config.image_size, config.image_size, 3)
    for name in ("stochastic_depth", "dropout", "distilled"):
        if getattr(config, name):
            arguments[name] = getattr(config, name)
    builder, weights = builders()[config.model], config.weights or None
    policy = config.precision if config.precision == "float32" else f"mixed_{config.precision}"
    keras.config.set_dtype_policy(policy)
    try:
        if weights is None or classes == IMAGENET_CLASSES or weights.endswith(KERAS_FILES):
            model = builder(classes=classes, weights=weights, **arguments)
        else:
            model = builder(classes=classes, weights=None, **arguments)
            take_all_but_heads(model, builder(weights=weights, **arguments))
    finally:
        keras.config.set_dtype_policy("float32")
    if config.remat:
        for layer in model.layers:
            if "block" in layer.name:
                rematerialise(layer)
    return model


def load(config, classes, run, weights, checkpoint):
    """The model to evaluate: of a `.keras` file, of a run, or built and filled with weights."""
    if weights and weights.endswith(".keras"):
        if not os.path.isfile(weights):
            raise ValueError(f"--weights: there is no file {weights!r}")
        return keras.models.load_model(weights, compile=False)
    model = build(dataclasses.replace(config, weights=weights or ""), classes)
    if weights:
        return model
    if checkpoint != "best":
        path = os.path.join(run, f"{checkpoint}.weights.h5")
        if not os.path.isfile(path):
            raise ValueError(f"{run} holds no {checkpoint}.weights.h5: has the run ended?")
        model.load_weights(path)
        return model
    tensors, _ = read(os.path.join(run, "checkpoints", "best.safetensors"))
    for variable in model.weights:
        variable.assign(tensors[f"model/{variable.path}"])
    return model


def take_all_but_heads(model, donor):
    """Copy the weights of a model of other classes."""
    values = {v.path: v for v in donor.weights}
    for variable in model.weights:
        if not variable.path.startswith(("head/", "head_distillation/")):
            variable.assign(values[variable.path].numpy())


def build_teacher(config, student):
    """The teacher as a function from the student's images to logits; None without one."""
    if config.distill == "none":
        return None
    if config.teacher.endswith(".keras"):
        if not os.path.isfile(config.teacher):
            raise ValueError(f"--teacher: there is no file {config.teacher!r}")
        model = keras.models.load_model(config.teacher, compile=False)
    else:
        check_name(config.teacher, "--teacher")
        model = builders()[config.teacher](weights="imagenet")
    return Teacher(model, student, None, None)


def rematerialise(layer):
    """Let a block's activations be computed again in the backward pass instead of kept.

    The block is handed its variables' values, its seeds among them, so that the second computation
    drops what the first one dropped.
    """
    call = layer.call

    def rematerialised(*inputs, training=False, **fixed):
        if not training:
            return call(*inputs, training=training, **fixed)
        variables, structure = layer.variables, []

        @tf.recompute_grad
        def pure(*tensors):
            values = zip(variables, tensors[len(inputs) :], strict=True)
            with keras.StatelessScope(state_mapping=values):
                outputs = call(*tensors[: len(inputs)], training=True, **fixed)
            structure[:] = [outputs]
            return keras.tree.flatten(outputs)

        outputs = pure(*inputs, *(tf.convert_to_tensor(v.value) for v in variables))
        weights = {id(v) for v in layer.weights}
        for seed in (v for v in variables if id(v) not in weights):
            seed.assign(seed + tf.constant([0, 1], seed.dtype))
        return keras.tree.pack_sequence_as(structure[0], outputs)

    layer.call = rematerialised


def logits_model(model):
    """The same layers up to the heads: logits of the class head, and of the distillation head."""
    names = {layer.name for layer in model.layers}
    heads = [name for name in ("head", "head_distillation") if name in names]
    return keras.Model(model.inputs, [model.get_layer(name).output for name in heads])


def normalisation(model):
    """(scale, offset) that a model puts its pixels through, three values each."""
    layer = model.get_layer("rescaling")
    return (np.broadcast_to(np.array(x, "float32"), 3) for x in (layer.scale, layer.offset))


def pixels(model, normalised):
    """What a model's normalisation makes `normalised` of."""
    scale, offset = normalisation(model)
    return (normalised - offset) / scale


def mean_colour(model):
    """The colour that a model's normalisation takes to zero, in whole numbers."""
    scale, offset = normalisation(model)
    # A hair up: 127.5, which is 127.4999 in float32, goes to 128.
    return tuple(int(round(value + 1e-3)) for value in (-offset / scale).tolist())


def image_size(model):
    """(height, width) that a model takes."""
    shape = model.input_shape
    first = keras.config.image_data_format() == "channels_first"
    return tuple(shape[2:] if first else shape[1:3])


def state(model):
    """Every variable of a model by a name that holds in any process: weights, statistics, seeds."""
    named = {f"model/{v.path}": v.value for v in model.weights}
    weights = {id(v) for v in model.weights}
    seeds = [v for v in model.variables if id(v) not in weights]
    return named | {f"seed/{i}": v.value for i, v in enumerate(seeds)}


def save_final(model, config, classes, workdir, name="final"):
    """Write `<name>.keras` and `<name>.weights.h5`, float32 whatever the training's precision.

    Returns:
        Dict from file name to path.
    """
    plain = build(
        dataclasses.replace(config, precision="float32", weights="", remat=False), classes
    )
    values = {v.path: v.numpy() for v in model.weights}
    for variable in plain.weights:
        variable.assign(values[variable.path])
    files = {suffix: os.path.join(workdir, name + suffix) for suffix in KERAS_FILES}
    with replacing(files[".keras"]) as temporary:
        plain.save(temporary)
        # A .keras file holds the file of weights, written in memory. HDF5 itself, writing to a disk
        # that is full, ends the process.
        with zipfile.ZipFile(temporary) as archive:
            weights = archive.read("model.weights.h5")
    write_atomically(files[".weights.h5"], weights)
    return {os.path.basename(path): path for path in files.values()}


# Dense bfloat16 or tensor-core float16 peaks by the makers' data sheets, TFLOP/s.
PEAKS = {"V100": 125, "T4": 65, "A100": 312, "L4": 121, "H100": 989, "H200": 989, "B200": 2250}


def peak_tflops(config):
    """A device's peak: what was given, what is known of this GPU, or 0."""
    if config.peak_tflops:
        return config.peak_tflops
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus or config.precision == "float32":
        return 0.0
    name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "")
    return float(next((peak for key, peak in PEAKS.items() if key in name), 0))


def forward_flops(model):
    """Floating-point operations of a forward pass on one image: its matrix products."""
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
