"""Compiled inference: a model's whole forward pass, compiled by the backend's compiler."""

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from keras_tnt.kernels import processor, runtimes
from keras_tnt.layers.base import default_device, inference_device_scope
from keras_tnt.layers.half import check_in_float32, in_bfloat16, kernels_to_change
from keras_tnt.models.anatomy import anatomy, is_ours, sides_of

PRECISIONS = ("float32", "bfloat16")

# Programs are compiled one at a time, because compilers have process-wide state.
_compiling = threading.RLock()


def compile_inference(
    model: keras.Model,
    max_batch: int | None = None,
    max_sizes: int = 8,
    *,
    precision: str | None = None,
) -> Callable:
    """Compiles a model's forward pass: XLA on TensorFlow and JAX, export and Inductor on torch.

    XLA compiles one program per batch size. Batches are padded to powers of two, so that few
    programs serve all batch sizes; each is compiled on first use, which takes from seconds to a
    minute. Inductor's program serves every size and contains a packed copy of the weights. Each
    call uses the model's current weights (on torch, changing the weights triggers recompilation,
    about one minute) in inference mode. The function is thread-safe.

    Compiled JAX and torch CPU programs are cached in the user's cache directory (XDG_CACHE_HOME),
    where the next process finds them. Those of torch contain the weights; the newest are retained
    (at most eight, of 4 GiB in total).

    On CPUs, word transformers with a multiple of 16 words per patch run in C++. The kernel is
    compiled for the processor by the machine's compiler (the variable CXX selects another) and
    cached in the user's cache directory. If compilation fails, slower operations are used, with a
    warning.

    Args:
        model: a Keras model with one input.
        max_batch: maximum batch size of a program, a power of two; larger batches are split.
            Defaults to 256, and on CPUs to one or two images per core (at least 4), as caches hold
            no more.
        max_sizes: for a model of images of any size, maximum number of image sizes with programs at
            a time, with LRU eviction. Defaults to 8.
        precision: `None` or `"float32"` for the model's precision. `"bfloat16"`, for a float32
            model, computes the matrix products of attention and MLP over patches in bfloat16;
            norms, softmax, residuals and heads stay in float32. Words do too, except on CPUs with
            AVX512-BF16 and without AMX, where C++ computes words in bfloat16, and patches of blocks
            with plain self-attention. On CPUs without bfloat16 instructions, the model's precision
            is used, with a warning.

    Returns:
        A function from a batch of images, `(batch, *model.input_shape[1:])`, array or tensor of the
        backend, to the model's predictions: arrays for an array, tensors for a tensor.

    Raises:
        ValueError: for a model with several inputs, or one that does not support `precision`; when
            the function is called, for images of another shape.
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
    """Returns whether a shape matches the wanted one, in which `None` matches any size."""
    return all(b in (None, a) for a, b in zip(shape, wanted, strict=True))


def with_second_choice(model, device, image_shape, half=False):
    """Compiles with the preferred compiler and falls back to the next one on failure.

    Args:
        model: a Keras model with one input.
        device: "cpu" or "accelerator".
        image_shape: static shape of an image.
        half: whether matrix products are in bfloat16. Defaults to `False`.

    Returns:
        A function from a batch of images to predictions.
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
            with inference_device_scope(device):
                return program(images)
        except Exception as error:  # Compilers raise exceptions of any type.
            with _compiling:
                plain = program if failed else second(model, image_shape, half)
                result = plain(images)  # An error here is not the compiler's.
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
    """Wraps a program to pad batches to powers of two and slice the outputs.

    The first call of each size holds the compilation lock.
    """
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
    """Returns the forward pass compiled by XLA with `tf.function`, for batches of powers of two."""
    import tensorflow as tf

    network = in_bfloat16(model) if half else model

    @tf.function(jit_compile=True)
    def forward(images):
        values = [variable.value for variable in model.variables]
        return call_with(values, network, images)

    return in_powers_of_two(forward)


def jax_program(model, image_shape, half=False):
    """Returns the forward pass compiled by `jax.jit`, for batches of powers of two."""
    import jax

    network = in_bfloat16(model) if half else model
    kernels = {id(variable) for variable in kernels_to_change(model)} if half else set()
    converted = {}  # By the variable's id: its value, and the value in bfloat16.

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
    """Returns a network's predictions with the given values of its variables."""
    with keras.StatelessScope(state_mapping=list(zip(network.variables, values, strict=True))):
        return network(images, training=False)


def torch_program(model, image_shape, half=False):
    """Returns the exported forward pass, compiled by Inductor with frozen weights.

    Inductor prepacks frozen weights for oneDNN and fuses post-ops into matrix products.
    """
    import torch

    precision = "bfloat16" if half else model.compute_dtype
    program, of_weights, lock = None, None, threading.Lock()

    def export(network):
        # Dynamo has a graph break at each attribute hook of a Keras model; exports have no hooks.
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
    """Returns the eager forward pass on torch, the fallback of `torch_program`."""
    import torch

    @torch.no_grad()
    def run(images):
        return model(images, training=False)

    return run
