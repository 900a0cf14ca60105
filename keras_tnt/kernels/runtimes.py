"""Bindings of the C++ kernels, and of cached programs, to each runtime.

This module and those that it imports on demand (`jax_operator`, `tensorflow_operator`,
`torch_operator`, `torch_program`) use interfaces that a runtime may change in any release. If a
release is not among the tested versions in `SEEN`, or an interface fails, the result is a slower
fallback and a warning, never an error.
"""

import contextlib
import contextvars
import ctypes
import functools
import hashlib
import os
import pickle
import platform
import sys
import threading
from collections.abc import Callable, Iterator

from keras_tnt import kernels
from keras_tnt.kernels import cache, processor

# Tested versions of the runtimes. Comments name the interfaces that may change.
SEEN = {
    "jax": ("0.10",),  # XLA's FFI headers in the package
    "onnxruntime": ("1.31",),  # the function table of its C API
    "openvino": ("2026.4",),  # headers and libraries in the package
    "tensorflow": ("2.21",),  # XLA's headers in the package, and the operation XlaCallModule
    "torch": ("2.13",),  # settings of Inductor and Dynamo
}

_imported_in = os.getpid()
_lock = threading.RLock()


def refuse_fork(started_in: int = _imported_in) -> None:
    """Raises an error in a forked process, where the runtimes' worker threads are missing.

    Args:
        started_in: id of the process that started the threads. Defaults to the process that
            imported this module.

    Raises:
        RuntimeError: in another process, which would otherwise wait for those threads forever.
    """
    if os.getpid() != started_in:
        raise RuntimeError(
            "This process was forked, and the threads that compute were left behind. Start "
            'processes with `multiprocessing.get_context("spawn")`, or import keras_tnt in them '
            "and not before."
        )


def is_seen(package: str) -> bool:
    """Returns whether an imported package has a tested version, and warns if it has not."""
    version = sys.modules[package].__version__
    if ".".join(version.split(".")[:2]) in SEEN[package]:
        return True
    kernels.warn_slower(
        f"{package} {version} is not among the releases whose interfaces are known here "
        f"({', '.join(SEEN[package])})."
    )
    return False


def operator(backend: str, sizes: kernels.Sizes) -> Callable | None:
    """Returns a C++ kernel as a differentiable operation of a Keras backend.

    Args:
        backend: "jax", "tensorflow" or "torch".
        sizes: the kernel and its sizes.

    Returns:
        A function `(x, weights, epsilon, keep=None)`, or `None`, with a warning, if the kernel is
        not available. All tensors are float32:

        - For `kernels.InnerSizes`, x are words `(batch, patches, words, dim)` and weights are
          `kernels.Weights`; the result has the shape of x.
        - For `kernels.OuterSizes`, x are tokens `(batch, tokens, dim)` and weights are
          `kernels.Weights`; the result has the shape of x.
        - For `kernels.PatchSizes`, x are the concatenated words of each patch,
          `(batch, patches, inputs)`, and weights are `kernels.PatchWeights`; the result is
          `(batch, patches, dim)`.

        `keep`, for the first two, are the drop-path multipliers of the attention and MLP branches,
        `(2, batch, patches)` or `(2, batch)`; they have no gradient.
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
    except Exception as error:  # A changed interface may raise anything.
        kernels.warn_slower(f"{backend} refused it: {error}")
        return None


def runs_here(backend: str, x, training: bool) -> bool:
    """Returns whether a computation, eager or being traced, is for a CPU of this process.

    A program that may leave the process, to a file or another machine, must not contain the C++
    kernels: it would run nowhere else.

    Args:
        backend: name of the Keras backend.
        x: an input tensor, which may be symbolic.
        training: whether the computation is for training.

    Returns:
        `False` also if it cannot be determined, or the backend has no C++ kernels.
    """
    ask = {"jax": _jax_runs_here, "tensorflow": _tensorflow_runs_here, "torch": _torch_runs_here}
    try:
        return backend in ask and ask[backend](x, training)
    except Exception as error:  # A changed interface may raise anything.
        kernels.warn_slower(f"{backend} does not say for whom a program is made: {error}")
        return False


def _jax_runs_here(x, training):
    import jax

    # When lowered for another device, or exported, the operator falls back by itself.
    return jax.default_backend() == "cpu"


_stays_here = contextvars.ContextVar("stays_here", default=False)


@contextlib.contextmanager
def local_program() -> Iterator[None]:
    """Returns a context in which TensorFlow traces programs that are never saved.

    TensorFlow does not know during tracing whether a `tf.function` will be saved. So only functions
    that are known to stay in this process contain C++ kernels: those of Keras's `fit`, `evaluate`
    and `predict`, and those traced in this context.
    """
    token = _stays_here.set(True)
    try:
        yield
    finally:
        _stays_here.reset(token)


def _tensorflow_runs_here(x, training):
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    if any(device.device_type != "CPU" for device in tf.config.list_logical_devices()):
        return False
    if tf.executing_eagerly():
        return True
    graph = tf.compat.v1.get_default_graph()
    if not (_stays_here.get() or _is_of_keras(graph)):
        return False
    return training or control_flow_util.GraphOrParentsInXlaContext(graph)


# The functions that `fit`, `evaluate` and `predict` trace, which Keras never saves.
KERAS_FUNCTIONS = {
    "one_step_on_data",
    "one_step_on_data_distributed",
    "multi_step_on_data",
    "multi_step_on_iterator",
}
BRANCHES = {"CondBranchFuncGraph", "WhileBodyFuncGraph", "WhileCondFuncGraph"}


def _is_of_keras(graph):
    """Returns whether a graph, or the one around its branches and loops, is of Keras's trainer."""
    while type(graph).__name__ in BRANCHES:
        graph = graph.outer_graph
    if graph.name not in KERAS_FUNCTIONS:
        return False
    # MirroredStrategy traces each replica in a thread, whose stack has no frame of Keras.
    if type(threading.current_thread()).__name__ == "_MirroredReplicaThread":
        return True
    import keras

    trainer = keras.Model.make_train_function.__module__  # the module of KERAS_FUNCTIONS
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != trainer:
        frame = frame.f_back
    return frame is not None


def _torch_runs_here(x, training):
    import torch
    from torch.autograd import forward_ad
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return (
        x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()
        and (torch.compiler.is_compiling() or get_proxy_mode() is None)
        and forward_ad._current_level < 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


# === Random numbers ===


def torch_random_number() -> int | None:
    """Returns a random number of torch's generator, whose state `torch.utils.checkpoint` restores.

    Returns:
        `None` inside a transform of `torch.func`, where tensors have no concrete value.
    """
    import torch

    if torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    return int(torch.randint(2**62, (), device="cpu"))


def is_in_torch_backward() -> bool:
    """Returns whether torch runs a backward pass; forward passes in it are recomputations."""
    import torch

    # torch has no public interface for this; torch.utils.checkpoint uses the same private one.
    find = getattr(torch._C, "_current_graph_task_id", None)
    return find is not None and find() != -1


def torch_rank() -> int:
    """Returns the rank of this process in `torch.distributed`, or 0 if it is not initialized."""
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return 0
    return distributed.get_rank()


# === Operators ===


def jax_operator(sizes):
    """Imports `kernels.jax_operator` and returns its operation, or `None`; see `operator`."""
    from keras_tnt.kernels import jax_operator

    return jax_operator.make(sizes)


def tensorflow_operator(sizes):
    """Imports `tensorflow_operator` and returns its operation, or `None`; see `operator`."""
    from keras_tnt.kernels import tensorflow_operator

    return tensorflow_operator.make(sizes)


def torch_operator(sizes):
    """Imports `kernels.torch_operator` and returns its operation, or `None`; see `operator`."""
    from keras_tnt.kernels import torch_operator

    return torch_operator.make(sizes)


def inductor_program(
    model, network: Callable, image_shape: tuple, precision: str, export: Callable
) -> Callable:
    """Compiles a network with Inductor for any batch size, or loads the cached program.

    Args:
        model: a Keras model, whose weights and config identify the cached program.
        network: function that computes the model in this precision.
        image_shape: shape of an image, without the batch axis.
        precision: dtype of the matrix products, such as "float32" or "bfloat16".
        export: function that returns a new function of `torch.compile` and a batch of two images.

    Returns:
        A function from a batch of images to the model's outputs.
    """
    if not is_seen("torch"):
        return export()[0]
    if os.environ.get("CXX"):
        kernels.defined(*kernels.compiler())  # This has a timeout; Inductor's own check has none.
    from keras_tnt.kernels import torch_program

    return torch_program.make(model, network, image_shape, precision, export)


def jax_program(function: Callable, *args) -> Callable:
    """Compiles a jitted function for these arguments, or loads the cached program.

    Programs for a single CPU device are cached on disk by their StableHLO, JAX version, XLA flags
    and CPU features.

    Args:
        function: a function of `jax.jit`.
        *args: arguments, or their shapes and dtypes (`jax.ShapeDtypeStruct`).

    Returns:
        The compiled program, or `function` itself on other devices or an untested version of JAX.
    """
    import jax
    from jax.experimental import serialize_executable

    devices = jax.devices()
    if [device.platform for device in devices] != ["cpu"] or not is_seen("jax"):
        return function
    lowered = function.lower(*args)
    instructions = sorted(processor.features())
    if not instructions:
        return lowered.compile()
    settings = [jax.__version__, os.environ.get("XLA_FLAGS", ""), platform.machine(), *instructions]
    name = hashlib.sha256("\0".join([lowered.as_text(), *settings]).encode()).hexdigest()[:32]
    path = os.path.join(kernels.cache_folder(), f"jax-{name}.bin")
    with contextlib.suppress(Exception):  # The entry is missing, damaged, or incompatible.
        data = cache.read(path)
        if data is not None:
            return serialize_executable.deserialize_and_load(*pickle.loads(data))
    compiled = lowered.compile()
    with contextlib.suppress(Exception):  # The cache or the program does not support it.
        cache.write(path, pickle.dumps(serialize_executable.serialize(compiled)))
    return compiled


def register_in_onnxruntime(options, sizes: kernels.InnerSizes, domain: str) -> bool:
    """Registers the inner kernel as the ONNX Runtime custom operator `InnerTransformer`.

    Args:
        options: an `onnxruntime.SessionOptions`.
        sizes: sizes of the inner transformer.
        domain: ONNX domain of the operator, new to these options.

    Returns:
        Whether the operator was registered. If not, a warning says why.
    """
    with _lock:
        library = kernels.library("onnxruntime.cpp", sizes) if is_seen("onnxruntime") else None
        if library is None:
            return False
        name = domain.encode()  # must stay alive during the registration
        try:
            ctypes.c_char_p.in_dll(library, "domain").value = name
            options.register_custom_ops_library(library._name)
        except Exception as error:  # A changed interface may raise anything.
            kernels.warn_slower(f"ONNX Runtime refused it: {error}")
            return False
        return True


def extend_openvino(core, sizes: kernels.Sizes, domain: str) -> bool:
    """Registers a kernel as an OpenVINO operation, with the name in `export.onnx_runtime.KINDS`.

    Args:
        core: an `openvino.Core`.
        sizes: `InnerSizes`, or `OuterSizes` or `PatchSizes` with `half`.
        domain: ONNX domain of the operation.

    Returns:
        Whether the operation was registered. If not, a warning says why.
    """
    with _lock:
        if not is_seen("openvino"):
            return False
        try:
            folder = os.path.dirname(sys.modules["openvino"].__file__)
            libraries = os.path.join(folder, "libs")
            needed = ("libopenvino.so", "libopenvino_onnx_frontend.so", "libtbb.so")
            named = [name for name in sorted(os.listdir(libraries)) if name.startswith(needed)]
            settings = ["-isystem", os.path.join(folder, "include"), f'-DDOMAIN="{sizes.name()}"']
            settings += [f"-L{libraries}", f"-Wl,-rpath,{libraries}"]
            settings += [f"-l:{name}" for name in named]
            inner = sizes if sizes.part == "inner" else None
            library = kernels.library(f"openvino_{sizes.part}.cpp", inner, *settings)
            if library is not None:
                name = domain.encode()  # must stay alive during the registration
                ctypes.c_char_p.in_dll(library, "domain").value = name
                core.add_extension(library._name)
        except Exception as error:  # A changed interface may raise anything.
            kernels.warn_slower(f"OpenVINO refused it: {error}")
            return False
        return library is not None
