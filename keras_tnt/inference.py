"""A model's forward pass, compiled whole by the backend's compiler."""

import os

import keras
import numpy as np
from keras import ops

from keras_tnt.layers.base import during, program_device


def compile_inference(model, max_batch=None):
    """Compile a model's forward pass: XLA on TensorFlow and JAX, export and Inductor on torch.

    XLA compiles a program for each batch size. Sizes are rounded up to powers of two, so that
    batches of any size need few; each is compiled when first needed, which takes from seconds to a
    minute. Inductor's program is for every size; it holds the weights packed, as a second copy. The
    function predicts with the model's weights as they are at each call (on torch, other weights are
    another minute's compilation), and never trains.

    On a CPU transformers among words, 16 or a multiple of it a patch, are C++ that the machine's
    compiler makes for its processor (the variable CXX names another); where there is none, a
    warning says so, and XLA takes its place.

    Args:
        model: a Keras model of one input.
        max_batch: the largest batch to run at once, a power of two; larger ones are cut up. None:
            256, but one or two images a core where the CPU computes: its caches hold no more.

    Returns:
        A function from a batch of images, `(batch, *model.input_shape[1:])`, array or tensor of the
        backend, to what `model` predicts for it: arrays for an array, tensors for a tensor.

    Raises:
        ValueError: for a model of several inputs; from the function, for images that do not fit.

    Example:

    >>> predict = keras_tnt.compile_inference(model)
    >>> probabilities = predict(images)
    """
    if len(model.inputs) != 1:
        raise ValueError(
            f"`compile_inference` takes a model of one input. '{model.name}' has "
            f"{len(model.inputs)}."
        )
    device = "cpu" if "cpu" in str(ops.zeros(()).device).lower() else "accelerator"
    if max_batch is None:
        max_batch = max(4, 1 << os.cpu_count().bit_length()) if device == "cpu" else 256
    if max_batch < 1 or max_batch & (max_batch - 1):
        raise ValueError(f"`max_batch` must be a power of two. Received: {max_batch}")
    program_of = {"tensorflow": tensorflow_program, "jax": jax_program, "torch": torch_program}
    program = program_of[keras.backend.backend()](model)
    image_shape, dtype = tuple(model.input_shape[1:]), model.inputs[0].dtype

    def predict(images):
        if tuple(images.shape[1:]) != image_shape or not images.shape[0]:
            raise ValueError(
                f"Images must have the shape (batch, {', '.join(map(str, image_shape))}). "
                f"Received: {tuple(images.shape)}"
            )
        tensor = ops.convert_to_tensor(images, dtype=dtype)
        pieces = ops.array_split(tensor, -(-images.shape[0] // max_batch))
        with during(program_device, device):
            results = [program(piece) for piece in pieces]
        outputs = keras.tree.map_structure(lambda *parts: ops.concatenate(parts), *results)
        if isinstance(images, np.ndarray):
            outputs = keras.tree.map_structure(ops.convert_to_numpy, outputs)
        return outputs

    return predict


def in_powers_of_two(program):
    """Fill batches up to powers of two, and cut off what was filled."""

    def run(images):
        count = images.shape[0]
        size = 1 << (count - 1).bit_length()
        if size > count:
            images = ops.pad(images, [[0, size - count]] + [[0, 0]] * (len(images.shape) - 1))
        return keras.tree.map_structure(lambda y: y[:count], program(images))

    return run


def tensorflow_program(model):
    import tensorflow as tf

    @tf.function(jit_compile=True)
    def forward(images):
        return model(images, training=False)

    return in_powers_of_two(forward)


def jax_program(model):
    import jax

    @jax.jit
    def forward(trainable, non_trainable, images):
        return model.stateless_call(trainable, non_trainable, images, training=False)[0]

    def run(images):
        trainable = [v.value for v in model.trainable_variables]
        non_trainable = [v.value for v in model.non_trainable_variables]
        return forward(trainable, non_trainable, images)

    return in_powers_of_two(run)


def torch_program(model):
    """Frozen, Inductor packs weights for oneDNN and lets it do what follows a matrix product."""
    import torch
    from torch._inductor import config
    from torch.fx.experimental import _config as symbols

    # Inductor fails to pack int8, and chooses oneDNN for products of an unknown size: so even a
    # batch of one stays unknown.
    freezing = all(keras.backend.is_float_dtype(w.dtype) for w in model.weights)
    settings = config.patch(freezing=freezing), symbols.patch(backed_size_oblivious=True)
    compiled, of_weights = None, None

    def export():
        # Dynamo breaks a Keras model's graph at each attribute hook; what is exported is plain.
        two_images = ops.zeros((2, *model.input_shape[1:]), model.inputs[0].dtype)
        exported = torch.export.export(
            model,
            (two_images,),
            dynamic_shapes=(({0: torch.export.Dim.DYNAMIC},),),
            strict=False,
        )
        compiled = torch.compile(exported.module())
        torch._dynamo.maybe_mark_dynamic(two_images, 0)
        compiled(two_images)  # so that the size is unknown to the program whatever comes first
        return compiled

    def run(images):
        nonlocal compiled, of_weights
        weights = [(id(v.value), v.value._version) for v in model.variables]
        with torch.no_grad(), settings[0], settings[1]:
            if weights != of_weights:
                compiled, of_weights = export(), weights
            return compiled(images)

    return run
