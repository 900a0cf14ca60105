"""How each runtime calls what is in C++, and what of them promises nothing.

Interfaces that a runtime may change in any release are used here alone. A release that is not in
`SEEN`, or one that fails, means another, slower way and a warning, never an error.
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

from keras_tnt import native
from keras_tnt.native import cache, processor

# The releases with which the tests of this package passed.
SEEN = {
    "jax": ("0.10",),  # custom calls of typed buffers, from headers in the package
    "onnxruntime": ("1.31",),  # the table of its C functions
    "openvino": ("2026.4",),  # headers and libraries in the package
    "tensorflow": ("2.21",),  # XLA's headers in the package, and the operation XlaCallModule
    "torch": ("2.13",),  # Inductor's and Dynamo's settings
}

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
    """What is there in C++ as an operation of a backend of Keras.

    Returns:
        A function (x, weights, epsilon, keep=None) to what x becomes, which has a gradient; None,
        with a warning, where it cannot be had. x are words `(batch, patches, words, dim)`, tokens
        `(batch, tokens, dim)` or the words of each patch side by side, `(batch, patches, inputs)`,
        in float32; the weights `native.Weights` or, of the last, `native.PatchWeights`. `keep`, for
        the first two, `(2, batch, patches)` or `(2, batch)`, is what the branches of attention and
        MLP are multiplied by, and has no gradient.
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


def runs_here(backend: str, x, training: bool) -> bool:
    """Whether what a backend is about to compute, or to compile, is for a CPU of this process.

    A program that may leave the process, to a file or another machine, must not call what is in
    C++: it would run nowhere else.

    Args:
        backend: of Keras.
        x: the tensor, which may be one of a program that is being made.
        training: whether it is for training.

    Returns:
        False also where it cannot be told, and where the backend takes no operator of ours.
    """
    ask = {"jax": _jax_runs_here, "tensorflow": _tensorflow_runs_here, "torch": _torch_runs_here}
    try:
        return backend in ask and ask[backend](x, training)
    except Exception as error:  # of whatever kind a changed interface raises
        native.warn_slower(f"{backend} does not say for whom a program is made: {error}")
        return False


def _jax_runs_here(x, training):
    import jax

    # What is compiled for other devices or exported, the operator itself sees to.
    return jax.default_backend() == "cpu"


_stays_here = contextvars.ContextVar("stays_here", default=False)


@contextlib.contextmanager
def local_program() -> Iterator[None]:
    """Within the context, what TensorFlow traces is a program that nobody saves.

    TensorFlow does not say whether a `tf.function` will be saved, with `training=True` or without,
    compiled by XLA or not. So C++ is part of those that are known to stay in this process: those of
    Keras's `fit`, `evaluate` and `predict`, and what is traced within this context.
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


# The functions that `fit`, `evaluate` and `predict` run, which Keras leaves out of what it saves.
KERAS_FUNCTIONS = {
    "one_step_on_data",
    "one_step_on_data_distributed",
    "multi_step_on_data",
    "multi_step_on_iterator",
}
BRANCHES = {"CondBranchFuncGraph", "WhileBodyFuncGraph", "WhileCondFuncGraph"}


def _is_of_keras(graph):
    """Whether a graph, but for its branches and loops, is one of Keras's trainer."""
    while type(graph).__name__ in BRANCHES:
        graph = graph.outer_graph
    if graph.name not in KERAS_FUNCTIONS:
        return False
    # A replica of a mirrored step is traced in a thread, which has no frame of Keras's.
    if type(threading.current_thread()).__name__ == "_MirroredReplicaThread":
        return True
    import keras

    trainer = keras.Model.make_train_function.__module__  # where Keras defines them
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
    """Returns a number from torch's random state, which `torch.utils.checkpoint` restores.

    Returns:
        `None` within a transformation of `torch.func`, where numbers have no value.
    """
    import torch

    if torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    return int(torch.randint(2**62, (), device="cpu"))


def is_in_torch_backward() -> bool:
    """Returns whether torch is in a backward pass, in which forward passes are recomputations."""
    import torch

    # Private, as is all of it: torch.utils.checkpoint itself asks in this way.
    find = getattr(torch._C, "_current_graph_task_id", None)
    return find is not None and find() != -1


def torch_rank() -> int:
    """Returns the rank of this process in `torch.distributed`; 0 where there is none."""
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return 0
    return distributed.get_rank()


# === Operators ===


def jax_operator(sizes):
    from keras_tnt.native import jax_operator

    return jax_operator.make(sizes)


def tensorflow_operator(sizes):
    from keras_tnt.native import tensorflow_operator

    return tensorflow_operator.make(sizes)


def torch_operator(sizes):
    from keras_tnt.native import torch_operator

    return torch_operator.make(sizes)


def inductor_program(
    model, network: Callable, image_shape: tuple, precision: str, export: Callable
) -> Callable:
    """What Inductor makes of a network for batches of any size, or made in another process.

    Args:
        model: a Keras model.
        network: computes what the model does, in this precision.
        image_shape: of the images, without the batch.
        precision: in which the network multiplies.
        export: gives a function of `torch.compile`, not called before, and a batch of two images.
    """
    if not is_seen("torch"):
        return export()[0]
    if os.environ.get("CXX"):
        native.defined(*native.compiler())  # Inductor would wait for one that does not answer
    from keras_tnt.native import torch_program

    return torch_program.make(model, network, image_shape, precision, export)


def jax_program(function: Callable, *args) -> Callable:
    """What `jax.jit` made, compiled for these arguments, or found as another process compiled it.

    Programs for one CPU are kept in the folder of caches, by what they compute, release of JAX,
    settings of XLA and instructions of the processor.

    Args:
        function: of `jax.jit`.
        *args: what it is to be called with, or what is like it.
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
    path = os.path.join(native.cache_folder(), f"jax-{name}.bin")
    with contextlib.suppress(Exception):  # there is none, it is damaged, or not taken any more
        data = cache.read(path)
        if data is not None:
            return serialize_executable.deserialize_and_load(*pickle.loads(data))
    compiled = lowered.compile()
    with contextlib.suppress(Exception):  # no place for it, or a program that cannot be kept
        cache.write(path, pickle.dumps(serialize_executable.serialize(compiled)))
    return compiled


def register_in_onnxruntime(options, sizes: native.InnerSizes, domain: str) -> bool:
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


def extend_openvino(core, sizes: native.Sizes, domain: str) -> bool:
    """Add the C++ as an operation of a domain, which `export.onnx_runtime.KINDS` names.

    Args:
        core: an `openvino.Core`.
        sizes: of an inner transformer, or `half` of another part.
        domain: of the operation.

    Returns:
        Whether it could be done; if not, with a warning.
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
            library = native.library(f"openvino_{sizes.part}.cpp", inner, *settings)
            if library is not None:
                name = domain.encode()  # which has to live while it is added
                ctypes.c_char_p.in_dll(library, "domain").value = name
                core.add_extension(library._name)
        except Exception as error:  # of whatever kind a changed interface raises
            native.warn_slower(f"OpenVINO refused it: {error}")
            return False
        return library is not None
