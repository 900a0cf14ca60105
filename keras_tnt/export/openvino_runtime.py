"""An exported file in OpenVINO, its transformers in C++."""

import functools
import os
import threading
from collections.abc import Callable

import numpy as np

from keras_tnt.export.onnx_runtime import read_model, secret, use_native
from keras_tnt.export.requirements import require
from keras_tnt.native import processor, runtimes

HINTS = {"float32": "f32", "bfloat16": "bf16"}


def core():
    """This process's `openvino.Core`."""
    return core_of(os.getpid())


@functools.cache
def core_of(process):
    """The `openvino.Core` of a process, which is kept until it ends.

    Each one that is made gives its thread a stack to handle signals on, and each that goes restores
    the stack before it. If two go in the order in which they came, that one is gone too, and the
    next signal, Ctrl-C or SIGTERM, is a segmentation fault.
    """
    import openvino

    return openvino.Core()


def openvino_session(path: str | os.PathLike, precision: str | None = None) -> Callable:
    """Open a file of `keras_tnt.export.onnx` or `.openvino` in OpenVINO on the CPU.

    Of an ONNX file in float32 the transformers among words become an operation of ours, in bfloat16
    on a processor with AVX512-BF16 and without AMX those among patches too, and from words to
    patches; on another processor ours stays in float32. The machine's C++ compiler makes them for
    its processor, some seconds of work for the first process that needs them. Where they cannot be
    had, a warning says so, and the file runs as it is. So do other files.

    Args:
        path: of the file, ending in `.onnx` or `.xml`.
        precision: `"float32"`; `"bfloat16"`: the arithmetic that OpenVINO takes to gain from it; in
            our operations norms, softmax and residuals stay in float32; on a processor without, a
            warning, and float32. None: float32.

    Returns:
        A function from a batch of images, `(batch, height, width, channels)` or as the model takes
        them, to a dict of arrays by output name. Threads may share it. It raises a ValueError for
        images that do not fit, and a RuntimeError in a process forked after the file was opened.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if `openvino` is not installed.
        ValueError: for another precision, another kind of file, or an ONNX file that brings
            operators of this package along.

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
    """A file as a model of OpenVINO, with our operation where that is possible."""
    if path.endswith(".onnx"):
        require("onnx")
        proto, complete = read_model(path)
        operations = use_native(proto, secret(os.getpid()), half) if complete else {}
        if operations and all(
            runtimes.extend_openvino(core(), sizes, domain) for domain, sizes in operations.items()
        ):
            return core().read_model(proto.SerializeToString())
    return core().read_model(path)
