"""Export to ONNX, in float32, float16 or int8."""

import contextlib
import json
import os

import keras
import numpy as np

from keras_tnt.export import files
from keras_tnt.export.card import describe
from keras_tnt.export.graph import named, tensorflow_function
from keras_tnt.export.handover import in_tensorflow
from keras_tnt.export.network import serving_network
from keras_tnt.export.onnx_fusion import fuse
from keras_tnt.export.onnx_int8 import check_calibration, with_ranges_at_run_time, with_ranges_of
from keras_tnt.export.requirements import require
from keras_tnt.export.verification import TOLERANCE, example, examples, verify
from keras_tnt.files import check_space

SIGNATURES = {"images": ("probabilities", "logits"), "features": ("features",)}
WRITTEN = range(13, 19)  # the opsets that tf2onnx writes for these models
WITH_ATTENTION = 23  # has an attention operator; graphs are converted to it
# Largest relative error that passes, as defined by `verify`.
TOLERANCES = {"float32": TOLERANCE, "float16": 2e-2, "int8": 0.3}
# Operators for which float16 is not accurate enough: softmax, and the statistics of norms.
IN_FLOAT32 = (
    "Softmax", "LayerNormalization", "ReduceMean", "ReduceSum", "Pow", "Sqrt", "Reciprocal",
)  # fmt: skip


def onnx(
    model: keras.Model,
    path: str | os.PathLike,
    opset: int | None = None,
    signature: str = "images",
    *,
    precision: str = "float32",
    calibration=None,
    labels: list[str] | None = None,
    weights: str | None = None,
) -> str:
    """Exports a model to ONNX, and verifies the file against the model with ONNX Runtime.

    The input is `images`, as the model takes them, with a dynamic batch axis, and with dynamic
    height and width if the model takes images of any size; the runtime raises an error for sizes
    that are not divisible into patches. The metadata contains labels, mean and standard deviation,
    image size, origin of the weights, and `agreement`, the measured agreement of file and model.

    Args:
        model: a functional model of this package, or one built around it.
        path: path of the file, ending in `.onnx`. An existing file is replaced.
        opset: opset version, 13 to 18 or 23. Opset 23 has an attention operator, is the fastest in
            ONNX Runtime, and requires its version 1.23 or later. For images of any size, attention
            is written as in opset 18. Defaults to 18.
        signature: `"images"`, with the outputs `probabilities` and `logits`, or `"features"`, with
            the vector that the classifier reads. Defaults to `"images"`.
        precision: `"float32"`; `"float16"`, for weights and arithmetic except softmax and the
            statistics of norms; or `"int8"`, for dense layers, with per-column weight scales: all
            of them, or those over patches if `calibration` is given. Defaults to `"float32"`.
        calibration: for int8, some dozens of typical images as the model takes them,
            `(batch, height, width, channels)` or channels first. They determine the ranges of
            activations (static quantization), and the agreement is measured on them. If `None`,
            ranges are computed at each call (dynamic quantization), which is slower.
        labels: class names. Defaults to the model's own names, or numbers if it has none.
        weights: description of the weights' origin, for the metadata. Defaults to None.

    Returns:
        The file's absolute path.

    Raises:
        ValueError: if the model or an argument is not supported.
        OSError: if the disk is full. No file is left behind.
        RuntimeError: if the outputs differ from the model's. No file is left behind.

    Example:
        >>> path = keras_tnt.export.onnx(model, "tnt_small.onnx")
        >>> onnxruntime.InferenceSession(path).run(["probabilities"], {"images": images})
    """
    require("tensorflow", "tf2onnx", "onnx", "onnxruntime")
    path = os.path.abspath(os.path.expanduser(os.fspath(path)))
    if not path.endswith(".onnx"):
        raise ValueError(f"`path` must end in .onnx. Received: '{path}'")
    if precision not in TOLERANCES:
        raise ValueError(
            f"`precision` must be one of {', '.join(TOLERANCES)}. Received: {precision!r}"
        )
    if opset is not None and opset not in (*WRITTEN, WITH_ATTENTION):
        raise ValueError(
            f"`opset` must lie in {WRITTEN[0]} to {WRITTEN[-1]} or be {WITH_ATTENTION}. "
            f"Received: {opset!r}"
        )
    files.check_directory(os.path.dirname(path))
    network = serving_network(model)
    calibration = check_calibration(calibration, precision, network)
    names = names_of(signature, network)
    card = describe(model, network, labels, weights)
    check_space(os.path.dirname(path), files.size_of(network), "The export")
    if calibration is None:
        references = {"images": examples(network, card)}
    else:
        pieces = [calibration[i : i + 8] for i in range(0, len(calibration), 8)]
        references = {"calibration": [example(network, piece) for piece in pieces]}
    arguments = {
        "card": card,
        "path": path,
        "opset": opset or WRITTEN[-1],
        "names": names,
        "precision": precision,
    }
    if keras.backend.backend() == "tensorflow":
        return write_onnx(network, references, **arguments)
    function = f"{__name__}:write_onnx"
    return in_tensorflow(function, network, references, arguments, os.path.dirname(path))


def write_onnx(network, references, card, path, opset, names, precision):
    """Writes and verifies an ONNX file, and moves it into place. Needs Keras on TensorFlow."""
    import onnx as onnx_format

    proto = convert(network, names, opset)
    fuse(proto)
    # Quantization writes two temporary files in addition.
    copies = 3 if precision == "int8" else 1
    check_space(os.path.dirname(path), copies * proto.ByteSize(), "The ONNX file")
    with files.new_file(path) as temporary:
        if precision == "float16":
            proto = to_float16(proto)
        elif precision == "int8":
            proto = to_int8(proto, temporary, references)
        onnx_format.save(proto, temporary)
        onnx_format.checker.check_model(temporary, full_check=True)
        (batches,) = references.values()
        agreement = compare(temporary, batches, names, precision)
        for key, value in {**card, "precision": precision, "agreement": agreement}.items():
            text = value if isinstance(value, str) else json.dumps(value)
            proto.metadata_props.add(key=key, value=text)
        onnx_format.save(proto, temporary)
    return path


def convert(network, names, opset):
    """Converts the network to an ONNX graph from `images` to the outputs `names`."""
    import tensorflow as tf
    import tf2onnx
    from onnx import version_converter

    function, _ = tensorflow_function(network)
    spec = tf.TensorSpec((None, *network.inputs[0].shape[1:]), tf.float32, name="images")

    @tf.function(input_signature=[spec], autograph=False)
    def serve(images):
        return named(function(images), names)

    # tf2onnx logs a warning for every lookup table in the process, of any model.
    logger, level = tf.get_logger(), tf.get_logger().level
    logger.setLevel("ERROR")
    try:
        with graphs_not_copied():
            proto, _ = tf2onnx.convert.from_function(
                serve, input_signature=[spec], opset=min(opset, WRITTEN[-1])
            )
    finally:
        logger.setLevel(level)
    if opset > WRITTEN[-1]:
        proto = version_converter.convert_version(proto, opset)
    name_ends(proto.graph, ["images"], sorted(names))
    return proto


@contextlib.contextmanager
def graphs_not_copied():
    """Makes a failing optimization of tf2onnx an error within the block.

    Otherwise tf2onnx copies the whole graph, weights included, before each optimization, to restore
    it after a failure.
    """
    name = "TF2ONNX_CATCH_ERRORS"
    before = os.environ.get(name)
    os.environ[name] = "FALSE"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def to_float16(proto):
    """Converts a model to float16, with inputs and outputs in float32."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    converted = convert_float_to_float16(
        proto, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *IN_FLOAT32]
    )
    model = OnnxModel(converted)
    model.topological_sort()  # the conversion appends the casts of inputs
    return model.model


def to_int8(proto, path, references):
    """Quantizes statically if there are calibration images, otherwise dynamically."""
    if "calibration" in references:
        images = np.concatenate([batch.images for batch in references["calibration"]])
        return with_ranges_of(images, proto, path)
    return with_ranges_at_run_time(proto, path)


def compare(path, batches, names, precision):
    """Verifies a file, and returns its measured agreement with the model, for the metadata."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    worst, same, apart = 0.0, [], []
    for batch in batches:
        outputs = dict(zip(names, session.run(names, {"images": batch.images}), strict=True))
        worst = max(worst, verify(outputs, batch, "The ONNX file", TOLERANCES[precision]))
        if "logits" in outputs:
            best, expected = (x["logits"].argmax(-1) for x in (outputs, batch.outputs))
            same.extend((best == expected).tolist())
        if "probabilities" in outputs:
            difference = outputs["probabilities"] - batch.outputs["probabilities"]
            apart.append(float(abs(difference).max()))
    agreement = {"largest_difference_of_spread": worst}
    if same:
        agreement |= {"images": len(same), "same_top1": sum(same) / len(same)}
    if apart:
        agreement["largest_difference_of_probabilities"] = max(apart)
    return agreement


def names_of(signature, network):
    """Returns the output names of an ONNX signature."""
    if signature not in SIGNATURES:
        raise ValueError(
            f"`signature` must be one of {', '.join(SIGNATURES)}; encoded images are for "
            f"`saved_model` alone. Received: {signature!r}"
        )
    names = [name for name in SIGNATURES[signature] if name in network.output]
    if not names and signature == "features":
        raise ValueError(f"No one vector reaches the classifier of model '{network.name}'.")
    return names or ["features"]


def name_ends(graph, inputs, outputs):
    """Renames a graph's inputs and outputs, and names the dynamic axes of images."""
    names = {
        end.name: name
        for ends, wanted in ((graph.input, inputs), (graph.output, outputs))
        for end, name in zip(ends, wanted, strict=True)
    }
    for node in graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(tensor, tensor) for tensor in tensors]
    for end in (*graph.input, *graph.output):
        end.name = names[end.name]
        end.type.tensor_type.shape.dim[0].dim_param = "batch"
    free = [d for d in graph.input[0].type.tensor_type.shape.dim[1:] if not d.HasField("dim_value")]
    for dim, name in zip(free, ("height", "width"), strict=False):
        dim.dim_param = name
