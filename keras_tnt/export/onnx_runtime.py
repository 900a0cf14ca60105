"""Exported ONNX files in ONNX Runtime, with C++ operators for transformer blocks."""

import contextlib
import functools
import itertools
import math
import os
import secrets

import numpy as np

from keras_tnt import kernels
from keras_tnt.export import onnx_blocks
from keras_tnt.export.onnx_blocks import NoMatch, subgraphs_of
from keras_tnt.export.requirements import require
from keras_tnt.kernels import runtimes

DOMAIN = "keras_tnt"

# Attributes that are counts, by which ONNX Runtime divides.
COUNTS = ("num_outputs", "num_heads", "q_num_heads", "kv_num_heads", "group", "blocksize")

# Session options may open several files, whose operators need different names.
_sessions = itertools.count()


@functools.cache
def secret(process: int) -> str:
    """Returns the random prefix of a process's operator domains, which no file can know."""
    return f"{DOMAIN}_{secrets.token_hex(16)}"


def onnx_session(path: str | os.PathLike, options=None):
    """Opens a file of `keras_tnt.export.onnx` in ONNX Runtime on the CPU, with C++ operators.

    Inner transformers (over words) are replaced by an operator of this package, which the machine's
    C++ compiler builds for its CPU; the first process that needs it waits about a second. If it
    cannot be built, a warning is issued and the file runs unchanged. Files in float16, of models
    without words, with external weights, or of other exporters run unchanged too.

    Args:
        path: path of the file.
        options: an `onnxruntime.SessionOptions`. Defaults to those of ONNX Runtime.

    Returns:
        An `onnxruntime.InferenceSession`, which raises a RuntimeError if it is run in a process
        that was forked after the session was opened.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not an ONNX file, contains operators in this package's domains, or
            lacks its external weights.

    Example:
        >>> session = keras_tnt.export.onnx_session("tnt_small.onnx")
        >>> session.run(["probabilities"], {"images": images})
    """
    require("onnx", "onnxruntime")
    import onnxruntime

    path = os.path.abspath(os.path.expanduser(os.fspath(path)))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file '{path}'; `keras_tnt.export.onnx` writes one.")
    options = options or onnxruntime.SessionOptions()
    proto, complete = read_model(path)
    model = path
    prefix = f"{secret(os.getpid())}_{next(_sessions)}"
    operators = use_native(proto, prefix) if complete else {}
    if operators and all(
        runtimes.register_in_onnxruntime(options, sizes, domain)
        for domain, sizes in operators.items()
    ):
        model = proto.SerializeToString()

    class Session(onnxruntime.InferenceSession):
        opened_in = os.getpid()

        def run(self, *args, **kwargs):
            runtimes.refuse_fork(self.opened_in)
            return super().run(*args, **kwargs)

    return Session(model, options, ["CPUExecutionProvider"])


def check_nodes(proto, path):
    """Raises an error for a file with nodes that only sessions may add, or that end the process.

    Raises:
        ValueError: if the graph, a subgraph or a function has a node in this package's domains, or
            an attribute or constant for which ONNX Runtime aborts.
    """
    for node, constants in nodes_and_constants(proto):
        if node.domain.casefold().startswith(DOMAIN):
            raise ValueError(
                f"'{path}' has an operator {node.domain!r}.{node.op_type!r}. Domains that "
                f"begin with '{DOMAIN}' are for operators that are put into a graph when it is "
                "opened; a file must not have any. Received: a file that was made or changed "
                "by other means; export the model anew with `keras_tnt.export.onnx`."
            )
        fatal = fatal_in(node, constants)
        if fatal:
            raise ValueError(
                f"'{path}' has a {node.op_type} with {node.output[:1]} as output, whose {fatal}, "
                "for which ONNX Runtime ends the process. Export the model anew with "
                "`keras_tnt.export.onnx`."
            )


def nodes_and_constants(proto):
    """Yields the nodes of a model's graph, its subgraphs and its functions.

    Yields:
        (node, dict from the name of each constant that the node can see to its tensor or `Constant`
        node).
    """
    scopes = [(graph, {}) for graph in (proto.graph, *proto.functions)]
    while scopes:
        graph, outer = scopes.pop()
        constants = outer | constants_of(graph)
        for node in graph.node:
            yield node, constants
            scopes.extend((inner, constants) for inner in subgraphs_of(node))


def constants_of(graph):
    """Returns a dict from the names that a graph or function defines to constants.

    A name whose value is not constant has the value `None`, as it hides a constant of that name of
    an outer graph.
    """
    constants = {tensor.name: tensor for tensor in getattr(graph, "initializer", ())}
    for node in graph.node:
        constant = node if node.op_type == "Constant" else None
        constants |= dict.fromkeys(node.output, constant)
    # The names of a graph's inputs, which a caller may set even if they have a default value.
    return constants | {getattr(value, "name", value): None for value in graph.input}


def value_of(node, place, constants):
    """Returns the array of a node's constant input; `None` if it has none or cannot be read."""
    from onnx import numpy_helper

    constant = constants.get(node.input[place]) if place < len(node.input) else None
    try:
        if not hasattr(constant, "op_type"):
            return constant if constant is None else numpy_helper.to_array(constant)
        (attribute,) = constant.attribute
        if attribute.ref_attr_name:
            return None
        if attribute.name == "value":
            return numpy_helper.to_array(attribute.t)
        return np.array({"value_int": attribute.i, "value_ints": attribute.ints}[attribute.name])
    except Exception:  # of any type, for damaged tensors
        return None


def fatal_in(node, constants):
    """Returns a description of what ends the process in ONNX Runtime 1.31; "" if nothing does.

    Args:
        node: a node.
        constants: the constants it can see, as `nodes_and_constants` yields them.
    """
    for attribute in node.attribute:
        if attribute.ref_attr_name:  # its value is set by the function's caller
            continue
        if attribute.name in COUNTS and attribute.i < 1:
            return f"attribute {attribute.name}={attribute.i} must be at least 1"
    check = FATAL.get(node.op_type)
    return check(node, lambda place: value_of(node, place, constants)) if check else ""


def fatal_split(node, value):
    """Describes a number of outputs that is wrong: ONNX Runtime fills them unchecked."""
    for attribute in node.attribute:
        if attribute.name == "num_outputs" and not attribute.ref_attr_name:
            if attribute.i != len(node.output):
                return (
                    f"attribute num_outputs={attribute.i} must be its number of outputs, "
                    f"{len(node.output)}"
                )
    return ""


def fatal_sequence(node, value):
    """Describes a size of parts that is 0, or could be: ONNX Runtime divides by it."""
    if not any(node.input[1:2]):
        return ""
    split = value(1)
    if split is None:
        return "input `split` is not a constant and could be 0"
    return f"input split={split} must be at least 1" if split.ndim == 0 and split < 1 else ""


def fatal_division(node, value):
    """Describes a division of the least integer by -1, whose result no integer can hold."""
    dividend, divisor = value(0), value(1)
    if dividend is None or divisor is None or dividend.dtype.kind != "i":
        return ""
    least = np.iinfo(dividend.dtype).min
    if (dividend == least).any() and (divisor == -1).any():
        return f"input {least} must not be divided by -1"
    return ""


def fatal_frames(node, value):
    """Describes frames of length 0: ONNX Runtime divides by it."""
    window, length = value(2), value(3)
    if window is not None and not window.size:
        return "input `window` must not be empty"
    if length is not None and not length.all():
        return "input frame_length=0 must be at least 1"
    return ""


# Functions that describe what ends the process in a node of a kind, from the node and from a
# function that returns its constant input at a place, or `None`.
FATAL = {
    "Split": fatal_split,
    "SplitToSequence": fatal_sequence,
    "Div": fatal_division,
    "Mod": fatal_division,
    "STFT": fatal_frames,
}


def check_external_files(proto, path):
    """Checks that external weights are regular files; a runtime could wait forever for others.

    Returns:
        Whether the model has external weights.

    Raises:
        ValueError: if one of them does not name exactly one file, or the file is missing or not a
            regular one.
    """
    folder, found = os.path.dirname(path), False
    for tensor in tensors_of(proto):
        if tensor.data_location == tensor.EXTERNAL:
            found = True
            places = [entry.value for entry in tensor.external_data if entry.key == "location"]
            if len(places) != 1:
                raise ValueError(
                    f"'{path}' has the weight {tensor.name!r} in another file, which exactly one "
                    f"`location` must name. Received: {places}. Export the model anew with "
                    "`keras_tnt.export.onnx`."
                )
            if not os.path.isfile(os.path.join(folder, places[0])):
                raise ValueError(
                    f"'{path}' has the weight {tensor.name!r} in the file {places[0]!r}, which is "
                    "not there or no file. Put it next to the model."
                )
    return found


def tensors_of(proto):
    """Yields the constants of a model, dense and sparse ones: of graphs, nodes and functions."""
    graphs = [proto.graph, *proto.functions]
    attributes = [a for function in proto.functions for a in function.attribute_proto]
    sparse = []
    while graphs:
        graph = graphs.pop()
        yield from getattr(graph, "initializer", ())
        sparse.extend(getattr(graph, "sparse_initializer", ()))
        for node in graph.node:
            attributes.extend(node.attribute)
            graphs.extend(subgraphs_of(node))
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("sparse_tensor"):
            sparse.append(attribute.sparse_tensor)
        sparse.extend(attribute.sparse_tensors)
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def read_model(path):
    """Reads an ONNX file, without its external weights.

    Returns:
        (model, whether it may be rewritten). It may not if it has external weights, or a constant
        whose values do not have its shape, which the runtime shall judge.

    Raises:
        ValueError: if it is not an ONNX file, or is refused.
    """
    import onnx

    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception as error:  # of any type, by protobuf
        raise ValueError(f"'{path}' is not an ONNX file, or damaged: {error}") from error
    check_nodes(proto, path)
    external = check_external_files(proto, path)
    return proto, not external and all(has_its_shape(tensor) for tensor in tensors_of(proto))


def has_its_shape(tensor):
    """Returns whether a float32 or int64 constant has as many values as its shape says."""
    import onnx

    if tensor.data_type == onnx.TensorProto.FLOAT:
        stored = len(tensor.raw_data) / 4 or len(tensor.float_data)
    elif tensor.data_type == onnx.TensorProto.INT64:
        stored = len(tensor.raw_data) / 8 or len(tensor.int64_data)
    else:
        return True
    return stored == math.prod(tensor.dims)


def use_native(proto, prefix, half=False):
    """Replaces the transformer blocks of a graph by C++ operators.

    Args:
        proto: an ONNX model, changed in place.
        prefix: prefix of the operators' domains, and of the names of their weights.
        half: whether to compute in bfloat16, and to replace outer transformers and the projection
            from words to patches as well. Defaults to False.

    Returns:
        A dict from an operator's domain, which begins with the prefix, to its sizes.
    """
    from onnx import TensorProto, helper, numpy_helper

    found, places, constants, values = {}, {}, [], []
    try:
        graph = onnx_blocks.Graph(proto)
        matches = list(operators(graph, half))
    except (NoMatch, *onnx_blocks.ODD):
        return {}
    claimed = {value.name for value in (*proto.graph.value_info, *proto.graph.output)}
    for number, (name, x, weights, sizes, attributes, *more) in enumerate(matches):
        if name not in graph.shapes:  # for example float64, by a constant outside the block
            return {}
        domain, inputs = sizes.name(prefix), []
        for kind, value in weights._asdict().items():
            inputs.append(f"{prefix}/{number}/{kind}")
            if inputs[-1] in graph.names:
                return {}
            constants.append(numpy_helper.from_array(np.ascontiguousarray(value), inputs[-1]))
        node = helper.make_node(
            KINDS[sizes.part], [x, *inputs, *more], [name], name, domain=domain, **attributes
        )
        places[name] = node
        found[domain] = sizes
        if name not in claimed:  # onnx infers no shape for a custom operator
            values.append(
                helper.make_tensor_value_info(name, TensorProto.FLOAT, graph.shapes[name])
            )
    onnx_blocks.replace(proto, places)
    proto.graph.initializer.extend(constants)
    proto.graph.value_info.extend(values)
    for domain in found:
        proto.opset_import.add(domain=domain, version=1)
    return found


# Names of the operators by the `part` of their sizes.
KINDS = {
    "inner": "InnerTransformer",
    "outer_half": "OuterTransformer",
    "patches_half": "WordsToPatches",
}


def operators(graph, half):
    """Finds the blocks of a graph for which there are C++ operators.

    Args:
        graph: an `onnx_blocks.Graph`.
        half: as in `use_native`.

    Yields:
        (name of the result, name of the words or tokens, weights, sizes, attributes, names of
        further inputs).

    Raises:
        NoMatch: if the graph is not valid.
    """
    if not graph.shapes:
        return
    for node in graph.of("Add"):
        with contextlib.suppress(NoMatch, *onnx_blocks.ODD):
            yield transformer(graph, node.output[0], half)
    for norm in graph.of("LayerNormalization") if half else []:
        with contextlib.suppress(NoMatch, *onnx_blocks.ODD):
            yield words_to_patches(graph, norm)


def transformer(graph, name, half):
    """Returns the operator for an inner or, with `half`, outer block, as `operators` yields it.

    Raises:
        NoMatch: if the tensor is not produced by a block for which there is an operator.
    """
    x, shape, weights, heads, epsilon, across_words = onnx_blocks.transformer_block(graph, name)
    hidden = len(weights.fc2_kernel)
    half = half and kernels.takes_half(shape[-1] // heads, hidden)
    attributes = {"epsilon": epsilon}
    if len(shape) == 4:
        sizes = kernels.InnerSizes(*shape[2:], heads, hidden, across_words, half)
        if shape[2] % kernels.LANES or not sizes.fits_stack():
            raise NoMatch
    elif half:
        sizes = kernels.OuterSizes(heads, hidden, half)
        attributes["heads"] = heads
    else:
        raise NoMatch
    return name, x, weights, sizes, attributes


def words_to_patches(graph, norm):
    """Returns the operator for a projection from words to patches, as `operators` yields it.

    If tokens and positions are added to the result, the operator includes the addition.

    Raises:
        NoMatch: if `norm` is not the last node of such a projection.
    """
    x, weights, epsilon = onnx_blocks.words_to_patches(graph, norm)
    inputs, dim = weights.kernel.shape
    if not kernels.takes_half(inputs):
        raise NoMatch
    sizes, name, prefix, more = kernels.PatchSizes(dim, half=True), norm.output[0], 0, []
    with contextlib.suppress(NoMatch):
        name, prefix, *more = onnx_blocks.added_tokens(graph, name)
    return name, x, weights, sizes, {"epsilon": epsilon, "prefix": prefix}, *more
