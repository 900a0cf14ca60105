"""A model's forward pass, compiled whole by the backend's compiler."""

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from keras_tnt.anatomy import anatomy, is_ours, sides_of
from keras_tnt.layers.base import default_device, inference_on
from keras_tnt.layers.half import check_in_float32, in_bfloat16, kernels_to_change
from keras_tnt.native import processor, runtimes

PRECISIONS = ("float32", "bfloat16")

# One program at a time is compiled: compilers keep state that belongs to the whole process.
_compiling = threading.RLock()


def compile_inference(
    model: keras.Model,
    max_batch: int | None = None,
    max_sizes: int = 8,
    *,
    precision: str | None = None,
) -> Callable:
    """Compile a model's forward pass: XLA on TensorFlow and JAX, export and Inductor on torch.

    XLA compiles a program for each batch size. Batches are rounded up to powers of two, so that
    batches of any size need few; each is compiled when first needed, which takes from seconds to a
    minute. Inductor's program is for every size; it holds the weights packed, as a second copy. The
    function predicts with the model's weights as they are at each call (on torch, other weights are
    another minute's compilation), and never trains. Threads may share it.

    Programs of JAX and torch for a CPU are kept in the user's folder of caches, XDG_CACHE_HOME,
    where the next process finds them compiled; torch's, of which the newest stay (eight, of 4 GiB
    in all), hold the weights.

    On a CPU transformers among words, 16 or a multiple of it a patch, are C++ that the machine's
    compiler makes for its processor (the variable CXX names another) and that is kept in the user's
    folder of caches. What cannot be compiled is computed in a slower way, and a warning says so.

    Args:
        model: a Keras model of one input.
        max_batch: the largest batch to run at once, a power of two; larger ones are cut up. None:
            256, but one or two images a core where the CPU computes: its caches hold no more.
        max_sizes: of a model of images of any size, how many sizes have programs at once: each is
            compiled by itself, and the one used longest ago makes room for another.
        precision: None or `"float32"`: as the model computes. `"bfloat16"`, of a model in float32:
            attention and MLP over patches multiply in bfloat16; norms, softmax, residuals and heads
            stay in float32. So do words, but on a CPU with AVX512-BF16 and without AMX, where C++
            computes them and, of plain self-attention, patches. On a CPU without instructions for
            bfloat16, a warning, and as the model computes.

    Returns:
        A function from a batch of images, `(batch, *model.input_shape[1:])`, array or tensor of the
        backend, to what `model` predicts for it: arrays for an array, tensors for a tensor.

    Raises:
        ValueError: for a model of several inputs, or that `precision` is not for; from the
            function, for images that do not fit.
        RuntimeError: in a process forked from one that imported this package: spawn it instead.

    Example:

    >>> predict = keras_tnt.compile_inference(model)
    >>> probabilities = predict(images)
    """
    runtimes.refuse_fork()
    if len(model.inputs) != 1:
        raise ValueError(
            f"`compile_inference` takes a model of one input. '{model.name}' has "
            f"{len(model.inputs)}."
        )
    if precision not in (None, *PRECISIONS):
        raise ValueError(
            f"`precision` must be None or one of {', '.join(PRECISIONS)}. Received: {precision!r}"
        )
    if precision == "bfloat16":
        check_in_float32(model)
    device = default_device()
    if max_batch is None:
        max_batch = max(4, 1 << os.cpu_count().bit_length()) if device == "cpu" else 256
    if max_batch < 1 or max_batch & (max_batch - 1):
        raise ValueError(f"`max_batch` must be a power of two. Received: {max_batch}")
    if not isinstance(max_sizes, int) or max_sizes < 1:
        raise ValueError(f"`max_sizes` must be a positive integer. Received: {max_sizes!r}")
    half = precision == "bfloat16" and (device != "cpu" or processor.takes_bfloat16())
    image_shape, dtype = tuple(model.input_shape[1:]), model.inputs[0].dtype
    image = anatomy(model).image if is_ours(model) else None
    programs = functools.lru_cache(max_sizes)(
        lambda shape: with_second_choice(model, device, shape, half)
    )
    finding = threading.Lock()

    def predict(images):
        runtimes.refuse_fork()
        shape = tuple(images.shape[1:])
        if len(shape) != len(image_shape) or not images.shape[0] or not fits(shape, image_shape):
            raise ValueError(
                f"Images must have the shape (batch, {', '.join(map(str, image_shape))}). "
                f"Received: {tuple(images.shape)}"
            )
        if image is not None and None in image_shape:
            image.check_size(*sides_of((None, *shape), image.data_format))
        with finding:
            program = programs(shape)
        tensor = ops.convert_to_tensor(images, dtype=dtype)
        pieces = ops.array_split(tensor, -(-images.shape[0] // max_batch))
        results = [program(piece) for piece in pieces]
        outputs = keras.tree.map_structure(lambda *parts: ops.concatenate(parts), *results)
        if isinstance(images, np.ndarray):
            outputs = keras.tree.map_structure(ops.convert_to_numpy, outputs)
        return outputs

    return predict


def fits(shape, wanted):
    """Whether a shape is the one wanted, of which sizes may be None: any."""
    return all(b in (None, a) for a, b in zip(shape, wanted, strict=True))


def with_second_choice(model, device, image_shape, half=False):
    """A model's program of the best make, or of the next best from where that fails.

    Args:
        model: a Keras model of one input.
        device: "cpu" or "accelerator".
        image_shape: shape of an image, known whole.
        half: whether to multiply in bfloat16.
    """
    backend = keras.backend.backend()
    first, second = {
        "tensorflow": (tensorflow_program, tensorflow_program),
        "jax": (jax_program, jax_program),
        "torch": (torch_program, torch_plain_program),
    }[backend]
    program, failed = first(model, image_shape, half), False

    def run(images):
        nonlocal program, failed
        if failed:
            return program(images)
        try:
            with inference_on(device):
                return program(images)
        except Exception as error:  # of whatever kind a compiler raises
            with _compiling:
                plain = program if failed else second(model, image_shape, half)
                result = plain(images)  # raises what is not the compiler's fault
                if not failed:
                    warnings.warn(
                        f"`compile_inference` computes '{model.name}' in a slower way, for "
                        f"{backend} could not compile the faster one: {error}",
                        stacklevel=3,
                    )
                program, failed = plain, True
            return result

    return run


def in_powers_of_two(program):
    """Fill batches up to powers of two, and cut off what was filled; each size is compiled once."""
    compiled = set()

    def run(images):
        count = images.shape[0]
        size = 1 << (count - 1).bit_length()
        if size > count:
            images = ops.pad(images, [[0, size - count]] + [[0, 0]] * (len(images.shape) - 1))
        with contextlib.nullcontext() if size in compiled else _compiling:
            outputs = program(images)
        compiled.add(size)
        return keras.tree.map_structure(lambda y: y[:count], outputs)

    return run


def tensorflow_program(model, image_shape, half=False):
    import tensorflow as tf

    network = in_bfloat16(model) if half else model

    @tf.function(jit_compile=True)
    def forward(images):
        values = [variable.value for variable in model.variables]
        return call_with(values, network, images)

    return in_powers_of_two(forward)


def jax_program(model, image_shape, half=False):
    import jax

    network = in_bfloat16(model) if half else model
    kernels = {id(variable) for variable in kernels_to_change(model)} if half else set()
    converted = {}  # by the variable: its value, and that in bfloat16

    @jax.jit
    def forward(values, images):
        return call_with(values, network, images)

    def value_of(variable):
        value = variable.value
        if id(variable) not in kernels:
            return value
        if converted.get(id(variable), (None,))[0] is not value:
            converted[id(variable)] = value, value.astype("bfloat16")
        return converted[id(variable)][1]

    programs = {}

    def run(images):
        values = [value_of(variable) for variable in model.variables]
        signature = images.shape, *((value.shape, value.dtype) for value in values)
        if signature not in programs:
            programs[signature] = runtimes.jax_program(forward, values, images)
        return programs[signature](values, images)

    return in_powers_of_two(run)


def call_with(values, network, images):
    """What a network predicts with these values of its variables."""
    with keras.StatelessScope(state_mapping=list(zip(network.variables, values, strict=True))):
        return network(images, training=False)


def torch_program(model, image_shape, half=False):
    """Frozen, Inductor packs weights for oneDNN and lets it do what follows a matrix product."""
    import torch

    precision = "bfloat16" if half else model.compute_dtype
    program, of_weights, lock = None, None, threading.Lock()

    def export(network):
        # Dynamo breaks a Keras model's graph at each attribute hook; what is exported is plain.
        two_images = ops.zeros((2, *image_shape), model.inputs[0].dtype)
        exported = torch.export.export(
            network,
            (two_images,),
            dynamic_shapes=(({0: torch.export.Dim.DYNAMIC},),),
            strict=False,
        )
        return torch.compile(exported.module()), two_images

    def run(images):
        nonlocal program, of_weights
        with torch.no_grad(), lock:
            weights = [(id(v.value), v.value._version) for v in model.variables]
            if weights != of_weights:
                with _compiling:
                    network = in_bfloat16(model) if half else model
                    program = runtimes.inductor_program(
                        model, network, image_shape, precision, functools.partial(export, network)
                    )
                    of_weights = weights
            return program(images)

    return run


def torch_plain_program(model, image_shape, half=False):
    import torch

    @torch.no_grad()
    def run(images):
        return model(images, training=False)

    return run
