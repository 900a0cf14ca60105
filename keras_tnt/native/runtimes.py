"""How each runtime calls the inner transformer in C++, and what of them promises nothing.

Interfaces that a runtime may change in any release are used here alone. A release that is not in
`SEEN`, or one that fails, means another, slower way and a warning, never an error.
"""

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np

from keras_tnt import native

# The releases with which the tests of this package passed.
SEEN = {
    "jax": ("0.10",),  # custom calls of typed buffers, from headers in the package
    "onnxruntime": ("1.31",),  # the table of its C functions
    "tensorflow": ("2.21",),  # XLA's headers in the package, and the operation XlaCallModule
    "torch": ("2.13",),  # Inductor's and Dynamo's settings
}

# The backends of Keras whose operator has a gradient.
LEARNS = ("torch",)

_imported_in = os.getpid()
_lock = threading.RLock()


def refuse_fork(started_in: int = _imported_in) -> None:
    """Refuse to compute in a forked process, where the runtimes' threads are missing.

    Args:
        started_in: number of the process that started the threads.

    Raises:
        RuntimeError: instead of waiting for those threads for ever.
    """
    if os.getpid() != started_in:
        raise RuntimeError(
            "This process was forked, and the threads that compute were left behind. Start "
            'processes with `multiprocessing.get_context("spawn")`, or import keras_tnt in them '
            "and not before."
        )


def is_seen(package: str) -> bool:
    """Whether an imported package is of a release in `SEEN`; warns where it is not."""
    version = sys.modules[package].__version__
    if ".".join(version.split(".")[:2]) in SEEN[package]:
        return True
    native.warn_slower(
        f"{package} {version} is not among the releases whose interfaces are known here "
        f"({', '.join(SEEN[package])})."
    )
    return False


def operator(backend: str, sizes: native.Sizes) -> Callable | None:
    """The inner transformer in C++ as an operation of a backend of Keras.

    Returns:
        A function (words, weights, epsilon, keep=None) to words, for words `(batch, patches, words,
        dim)` in float32 and `native.Weights`; None, with a warning, where it cannot be had. Where
        `LEARNS` names the backend, it has a gradient, and `keep`, `(2, batch, patches)`, is what
        the branches of attention and MLP are multiplied by.
    """
    with _lock:
        return _operator(backend, sizes)


@functools.cache
def _operator(backend, sizes):
    make = {"jax": jax_operator, "tensorflow": tensorflow_operator, "torch": torch_operator}
    if not is_seen(backend):
        return None
    try:
        return make[backend](sizes)
    except Exception as error:  # of whatever kind a changed interface raises
        native.warn_slower(f"{backend} refused it: {error}")
        return None


def jax_operator(sizes):
    import jax

    library = native.library("xla.cpp", sizes, "-isystem", jax.ffi.include_dir())
    if library is None:
        return None
    name = sizes.name()
    target = jax.ffi.pycapsule(library.inner_transformer)
    jax.ffi.register_ffi_target(name, target, platform="cpu")

    def call(words, weights, epsilon):
        result = jax.ShapeDtypeStruct(words.shape, words.dtype)
        return jax.ffi.ffi_call(name, result)(words, *weights, epsilon=np.float32(epsilon))

    return call


def tensorflow_operator(sizes):
    import tensorflow as tf
    from tensorflow.compiler.tf2xla.python import xla

    name = sizes.name()
    settings = "-isystem", tf.sysconfig.get_include(), f'-DNAME="{name}"'
    if native.library("xla.cpp", sizes, *settings, *tf.sysconfig.get_link_flags()) is None:
        return None

    def call(words, weights, epsilon):
        operands = [words, *weights]
        types = [f"tensor<{'x'.join(map(str, x.shape))}xf32>" for x in operands]
        values = [f"%operand{i}" for i in range(len(operands))]
        parameters = ", ".join(map(": ".join, zip(values, types, strict=True)))
        module = f"""
            func.func public @main({parameters}) -> {types[0]} {{
              %words = stablehlo.custom_call @{name}({", ".join(values)}) {{
                api_version = 4 : i32, backend_config = {{epsilon = {epsilon:.9e} : f32}}
              }} : ({", ".join(types)}) -> {types[0]}
              return %words : {types[0]}
            }}"""
        (result,) = xla.call_module(
            operands,
            version=9,
            module=module,
            Tout=[words.dtype],
            Sout=[words.shape],
            platforms=["CPU"],
        )
        return result

    return call


def torch_operator(sizes):
    if torch_library(sizes) is None:
        return None

    def call(words, weights, epsilon, keep=None):
        settings = sizes.heads, epsilon, sizes.across_words
        return torch_operation()(words, list(weights), keep, *settings)

    return call


@functools.cache
def torch_operation():
    """The operation that torch's programs name; sizes are read off its tensors."""
    import torch

    def arguments(words, weights, keep, heads, across_words):
        """What the C++ takes: the library, tensors side by side, and their pointers."""
        weights = native.Weights(*(weight.contiguous() for weight in weights))
        words = words.contiguous()
        keep = None if keep is None else keep.contiguous()
        sizes = native.Sizes(*words.shape[2:], heads, len(weights.fc1_bias), across_words)
        pointers = (ctypes.c_void_p * len(weights))(*(weight.data_ptr() for weight in weights))
        return torch_library(sizes), words, weights, keep, pointers

    @torch.library.custom_op(
        "keras_tnt::inner_transformer", mutates_args=(), tags=torch.Tag.flexible_layout
    )
    def run(
        words: torch.Tensor,
        weights: list[torch.Tensor],
        keep: torch.Tensor | None,
        heads: int,
        epsilon: float,
        across_words: bool,
    ) -> torch.Tensor:
        library, words, weights, keep, pointers = arguments(
            words, weights, keep, heads, across_words
        )
        result = torch.empty_like(words)
        library.inner_transformer(
            *(
                words.data_ptr(),
                result.data_ptr(),
                pointers,
                keep if keep is None else keep.data_ptr(),
            ),
            *(epsilon, words.shape[0] * words.shape[1], torch.get_num_threads()),
        )
        return result

    @torch.library.custom_op("keras_tnt::inner_transformer_gradient", mutates_args=())
    def run_gradient(
        words: torch.Tensor,
        weights: list[torch.Tensor],
        keep: torch.Tensor,
        gradient: torch.Tensor,
        heads: int,
        epsilon: float,
        across_words: bool,
    ) -> list[torch.Tensor]:
        library, words, weights, keep, pointers = arguments(
            words, weights, keep, heads, across_words
        )
        gradient, result = gradient.contiguous(), torch.empty_like(words)
        threads, counts = torch.get_num_threads(), [weight.numel() for weight in weights]
        sums = torch.zeros(threads, sum(counts))
        library.inner_transformer_gradient(
            *(words.data_ptr(), gradient.data_ptr(), result.data_ptr(), pointers, keep.data_ptr()),
            *(sums.data_ptr(), epsilon, words.shape[0] * words.shape[1], threads),
        )
        found = zip(sums[0].split(counts), weights, strict=True)
        return [result, *(flat.reshape(weight.shape).clone() for flat, weight in found)]

    @run.register_fake
    def _(words, weights, keep, heads, epsilon, across_words):
        return torch.empty_like(words, memory_format=torch.contiguous_format)

    @run_gradient.register_fake
    def _(words, weights, keep, gradient, heads, epsilon, across_words):
        return [
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (words, *weights)
        ]

    def remember(ctx, inputs, output):
        words, weights, keep, *ctx.settings = inputs
        if keep is None:
            keep = words.new_ones((2, *words.shape[:2]))
        ctx.save_for_backward(words, keep, *weights)

    def backward(ctx, gradient):
        words, keep, *weights = ctx.saved_tensors
        of_words, *of_weights = run_gradient(words, weights, keep, gradient, *ctx.settings)
        return of_words, of_weights, None, None, None, None

    run.register_autograd(backward, setup_context=remember)
    return run


@functools.cache
def torch_library(sizes):
    library = native.library("torch.cpp", sizes, "-fopenmp")
    if library is not None:
        pointer, numbers = ctypes.c_void_p, (ctypes.c_float, ctypes.c_int64, ctypes.c_int)
        library.inner_transformer.argtypes = [*[pointer] * 4, *numbers]
        library.inner_transformer_gradient.argtypes = [*[pointer] * 6, *numbers]
        for function in (library.inner_transformer, library.inner_transformer_gradient):
            function.restype = None
    return library


@contextlib.contextmanager
def inductor_settings(freezing: bool) -> Iterator[Callable]:
    """Within the context, Inductor compiles for a batch of unknown size, with packed weights.

    Args:
        freezing: whether to pack the weights, as constants of the program.

    Yields:
        A function that tells Dynamo that a tensor's first dimension may be any.
    """
    if not is_seen("torch"):
        yield lambda tensor: None
        return
    import torch
    from torch._inductor import config
    from torch.fx.experimental import _config as symbols

    with config.patch(freezing=freezing), symbols.patch(backed_size_oblivious=True):
        yield lambda tensor: torch._dynamo.maybe_mark_dynamic(tensor, 0)


def register_in_onnxruntime(options, sizes: native.Sizes, domain: str) -> bool:
    """Register the C++ as the operator `InnerTransformer` of a domain.

    Args:
        options: an `onnxruntime.SessionOptions`.
        sizes: of the inner transformer.
        domain: of the operator, new to these options.

    Returns:
        Whether it could be done; if not, with a warning.
    """
    with _lock:
        library = native.library("onnxruntime.cpp", sizes) if is_seen("onnxruntime") else None
        if library is None:
            return False
        name = domain.encode()  # which has to live while it is registered
        try:
            ctypes.c_char_p.in_dll(library, "domain").value = name
            options.register_custom_ops_library(library._name)
        except Exception as error:  # of whatever kind a changed interface raises
            native.warn_slower(f"ONNX Runtime refused it: {error}")
            return False
        return True
