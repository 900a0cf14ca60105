"""An ONNX file that ONNX Runtime runs anywhere."""

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
WRITTEN = range(13, 19)  # the opsets that tf2onnx writes, as far as these models are concerned
WITH_ATTENTION = 23  # has attention as an operator; what was written is brought there
# Largest difference that passes, as a share of the outputs' spread.
TOLERANCES = {"float32": TOLERANCE, "float16": 2e-2, "int8": 0.3}
# What float16 is not exact enough for: softmax, and the statistics of norms.
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
    """Write a model as ONNX, and check the file with ONNX Runtime against the model.

    Its input is `images`, as the model takes them, with a dynamic batch, and with dynamic height
    and width where the model takes any; sizes that its patches do not divide are an error of the
    runtime's. Its metadata are labels,
    mean and standard deviation, image size, source of the weights, and `agreement`: what was
    measured between file and model.

    Args:
        model: a functional model of this package, or one built around it.
        path: of the file, ending in `.onnx`; one that exists is replaced.
        opset: version of the operators, 13 to 18 or 23; None: 18. 23 has attention as one operator
            and is the fastest in ONNX Runtime, which reads it from its version 1.23 on.
            Of images of any size attention stays as 18 writes it.
        signature: `"images"` gives `probabilities` and `logits`, `"features"` the vector that the
            classifier reads.
        precision: `"float32"`; `"float16"`: weights and arithmetic, but for softmax and the
            statistics of norms; `"int8"`: the dense layers, a scale for each column of their
            weights, those among words excepted where `calibration` is given.
        calibration: of int8, images as the model takes them, `(batch, height, width, channels)` or
            channels first, some dozens of the kind that the file is for: the ranges of the dense
            layers' inputs are those that these images have, and the file's agreement with the model
            is measured on them. None: ranges are found at each call, which is slower.
        labels: names of the classes; None: the model's own, else numbers.
        weights: where the weights come from, for the metadata.

    Returns:
        The file's absolute path.

    Raises:
        ValueError: for a model or an argument that cannot be exported.
        OSError: if the disk has no room for it, or runs full; nothing is kept.
        RuntimeError: if what was written does not compute what the model does; nothing is kept.

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
    """Write, verify, and move into place. Needs Keras on TensorFlow."""
    import onnx as onnx_format

    proto = convert(network, names, opset)
    fuse(proto)
    # The tools that quantize write two files more than the one that stays.
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
    """The network as an ONNX graph from `images` to the outputs of these names."""
    import tensorflow as tf
    import tf2onnx
    from onnx import version_converter

    function, _ = tensorflow_function(network)
    spec = tf.TensorSpec((None, *network.inputs[0].shape[1:]), tf.float32, name="images")

    @tf.function(input_signature=[spec], autograph=False)
    def serve(images):
        return named(function(images), names)

    # It logs a warning for every lookup table that the process holds, of whatever model.
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
    """Within this, an optimization of tf2onnx that fails is an error.

    Else tf2onnx copies the whole graph, weights and all, before each of its optimizations, to go
    back to.
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
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    converted = convert_float_to_float16(
        proto, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *IN_FLOAT32]
    )
    model = OnnxModel(converted)
    model.topological_sort()  # the casts of inputs were added last
    return model.model


def to_int8(proto, path, references):
    """Quantize by the ranges of calibration images, where there are any."""
    if "calibration" in references:
        images = np.concatenate([batch.images for batch in references["calibration"]])
        return with_ranges_of(images, proto, path)
    return with_ranges_at_run_time(proto, path)


def compare(path, batches, names, precision):
    """Verify a file; returns the measured agreement with the model, which the metadata tell."""
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
    """The outputs of an ONNX signature."""
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
    """Give a graph's inputs and outputs these names, and their first axis the name "batch"."""
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
