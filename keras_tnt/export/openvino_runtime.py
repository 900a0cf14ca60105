"""Exported files in OpenVINO, with C++ operations for transformer blocks."""

import functools
import os
import threading
from collections.abc import Callable

import numpy as np

from keras_tnt.export.onnx_runtime import read_model, secret, use_native
from keras_tnt.export.requirements import require
from keras_tnt.kernels import processor, runtimes

HINTS = {"float32": "f32", "bfloat16": "bf16"}


def core():
    """Returns this process's `openvino.Core`."""
    return core_of(os.getpid())


@functools.cache
def core_of(process):
    """Returns the `openvino.Core` of a process, which lives until the process ends.

    Each `Core` installs an alternate signal stack for its thread, and restores the previous stack
    when it is destroyed. If two are destroyed in the order in which they were created, the restored
    stack does not exist any more, and the next signal, Ctrl-C or SIGTERM, is a segmentation fault.
    """
    import openvino

    return openvino.Core()


def openvino_session(path: str | os.PathLike, precision: str | None = None) -> Callable:
    """Opens a file of `keras_tnt.export.onnx` or `.openvino` in OpenVINO on the CPU.

    The inner transformers (over words) of an ONNX file in float32 are replaced by a C++ operation
    of this package. With `precision="bfloat16"`, on a CPU with AVX512-BF16 and without AMX, so are
    the outer transformers and the projection from words to patches; on other CPUs the operation
    computes in float32. The machine's C++ compiler builds the operations for its CPU; the first
    process that needs them waits some seconds. If they cannot be built, a warning is issued and the
    file runs unchanged, as other files do.

    Args:
        path: path of the file, ending in `.onnx` or `.xml`.
        precision: `"float32"`, or `"bfloat16"`, for the operations that OpenVINO considers faster
            in it; in the C++ operations, norms, softmax and residuals stay in float32. On a CPU
            without bfloat16 instructions, a warning is issued and float32 is used. If `None`,
            float32.

    Returns:
        A thread-safe function from a batch of images, `(batch, height, width, channels)` or as the
        model takes them, to a dict of arrays by output name. It raises a ValueError for images of
        another shape, and a RuntimeError in a process that was forked after the file was opened.

    Raises:
        FileNotFoundError: if the file does not exist.
        ImportError: if `openvino` is not installed.
        ValueError: if the precision or the type of file is not supported, or an ONNX file is
            refused, as by `onnx_session`.

    Example:
        >>> predict = keras_tnt.export.openvino_session("tnt_small.onnx", precision="bfloat16")
        >>> predict(images)["probabilities"]
    """
    require("openvino", package="openvino")
    import openvino

    if precision not in (None, *HINTS):
        raise ValueError(
            f"`precision` must be None or one of {', '.join(HINTS)}. Received: {precision!r}"
        )
    path = os.path.abspath(os.path.expanduser(os.fspath(path)))
    kind = os.path.splitext(path)[1]
    if kind not in (".onnx", ".xml"):
        raise ValueError(f"`path` must end in .onnx or .xml. Received: '{path}'")
    for needed in (path, *([path[:-4] + ".bin"] if kind == ".xml" else [])):
        if not os.path.isfile(needed):
            raise FileNotFoundError(
                f"There is no file '{needed}'; `keras_tnt.export.onnx` and `.openvino` write them."
            )
    if precision == "bfloat16" and not processor.takes_bfloat16():
        precision = "float32"
    settings = {"INFERENCE_PRECISION_HINT": HINTS[precision or "float32"]}
    compiled = core().compile_model(read(path, precision == "bfloat16"), "CPU", settings)
    names = [output.get_any_name() for output in compiled.outputs]
    wanted = compiled.inputs[0].get_partial_shape()
    opened_in, lock, idle = os.getpid(), threading.Lock(), []

    def predict(images):
        runtimes.refuse_fork(opened_in)
        images = np.ascontiguousarray(images, "float32")
        if not wanted.compatible(openvino.PartialShape(images.shape)) or not len(images):
            raise ValueError(
                f"Images must have the shape {wanted}, where ? may be any. Received: {images.shape}"
            )
        with lock:
            request = idle.pop() if idle else compiled.create_infer_request()
        try:
            results = request.infer([images], share_inputs=True)
            return dict(zip(names, results.to_tuple(), strict=True))
        finally:
            with lock:
                idle.append(request)

    return predict


def read(path, half):
    """Reads a file as an OpenVINO model, with C++ operations if it is a supported ONNX file."""
    if path.endswith(".onnx"):
        require("onnx")
        proto, complete = read_model(path)
        operations = use_native(proto, secret(os.getpid()), half) if complete else {}
        if operations and all(
            runtimes.extend_openvino(core(), sizes, domain) for domain, sizes in operations.items()
        ):
            return core().read_model(proto.SerializeToString())
    return core().read_model(path)
