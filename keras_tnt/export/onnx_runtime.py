"""An exported file in ONNX Runtime, its inner transformers in C++."""

import os
import tempfile

import numpy as np

from keras_tnt import native
from keras_tnt.export.onnx_fusion import Graph, attributes_of
from keras_tnt.export.requirements import require


def onnx_session(path, options=None):
    """Open a file of `keras_tnt.export.onnx` in ONNX Runtime on the CPU, as fast as it can be.

    The transformers among words become an operator of ours, which the machine's C++ compiler makes
    for its processor, a second of work for a model. Where there is no compiler, a warning says so,
    and the file runs as it is. So do files in float16 or int8, and of models without words.

    Args:
        path: of the file.
        options: an `onnxruntime.SessionOptions`; None: ONNX Runtime's own.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        FileNotFoundError: if there is no such file.

    Example:

    >>> session = keras_tnt.export.onnx_session("tnt_small.onnx")
    >>> session.run(["probabilities"], {"images": images})
    """
    require("onnx", "onnxruntime")
    import onnx
    import onnxruntime

    path = os.path.abspath(os.fspath(path))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file '{path}'; `keras_tnt.export.onnx` writes one.")
    options = options or onnxruntime.SessionOptions()
    proto = onnx.load(path)
    with tempfile.TemporaryDirectory() as folder:
        for sizes in use_native(proto):
            domain = native.name_of(sizes)
            library = native.build(folder, "onnxruntime.cpp", sizes, f'-DDOMAIN="{domain}"')
            if library is None:
                return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
            options.register_custom_ops_library(library)
        model = proto.SerializeToString()
        return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])


def use_native(proto):
    """Put our operator in the place of each inner transformer of a graph.

    Returns:
        The sizes of those that were found, each once.
    """
    graph, found = Graph(proto), {}
    pairs = []
    for attended, tensors, scale, heads in attentions(graph):
        try:
            last, words, weights, sizes, epsilon = inner_transformer(
                graph, attended, tensors, heads
            )
        except NoMatch:
            continue
        if not np.isclose(scale, (sizes["DIM"] / heads) ** -0.5):
            continue
        domain, (name,) = native.name_of(sizes), last.output
        inputs = [graph.add_constant(f"{name}/{i}", value) for i, value in enumerate(weights)]
        node = graph.node("InnerTransformer", [words, *inputs], [name], epsilon=epsilon)
        node.domain = domain
        pairs.append((last, [node]))
        if domain not in found:
            proto.opset_import.add(domain=domain, version=1)
            found[domain] = sizes
    graph.replace(pairs)
    return list(found.values())


class NoMatch(Exception):
    """What stands in a graph is no inner transformer."""


def attentions(graph):
    """Each attention without a bias: (its result, query, key and value, scale, heads)."""
    for node in graph.of("Attention"):
        if len(node.input) == 3:
            attributes = attributes_of(node)
            tensors = [graph.origin(name) for name in node.input]
            yield node.output[0], tensors, attributes["scale"], attributes["q_num_heads"]
    for softmax in graph.of("Softmax"):
        found = graph.attention(softmax)
        if found is not None:
            last, tensors, _, bias, scale, heads = found
            if bias is None:
                yield last.output[0], tensors, scale, heads


def inner_transformer(graph, attended, tensors, heads):
    """The transformer block around an attention.

    Args:
        graph: a `Graph`.
        attended: name of the attention's result.
        tensors: names of query, key and value.
        heads: of the attention.

    Returns:
        (last node, name of the words, weights as inner_transformer.h has them, sizes, epsilon).

    Raises:
        NoMatch: if it is anything but norm, attention, MLP and residuals of words in float32.
    """

    def maker(name, *kinds):
        node = graph.maker.get(graph.origin(name))
        if node is None or node.op_type not in kinds:
            raise NoMatch
        return node

    def taker(node, *kinds):
        nodes = [x for x in readers.get(node.output[0], ()) if x.op_type in kinds]
        if len(nodes) != 1:
            raise NoMatch
        return nodes[0]

    def other(node, name):
        """The input of a sum or product beside this one, through reshapes."""
        first, second = map(graph.origin, node.input)
        if name not in (first, second):
            raise NoMatch
        return second if first == name else first

    def constants(node, count):
        """The constants behind a node's first input, the last of which may not be there."""
        values = [graph.constants.get(name) for name in node.input[1:]]
        if any(value is None or value.dtype != np.float32 for value in values):
            raise NoMatch
        return values + [None] * (count - len(values))

    readers = {}
    for node in graph.proto.graph.node:
        if node.op_type != "Reshape":
            for name in node.input:
                readers.setdefault(graph.origin(name), []).append(node)

    dense = "MatMul", "Gemm"
    split = maker(tensors[0], "Split")
    if list(split.output) != tensors:
        raise NoMatch
    qkv = maker(split.input[0], *dense)
    norm_attention = maker(qkv.input[0], "LayerNormalization")
    words = norm_attention.input[0]
    shape = graph.shapes.get(words, ())
    if len(shape) != 4 or None in shape[1:] or shape[2] % native.LANES:
        raise NoMatch
    origin = graph.maker.get(graph.origin(attended), split)
    projection = taker(origin, *dense)
    middle = taker(projection, "Add")
    if other(middle, projection.output[0]) != graph.origin(words):
        raise NoMatch
    norm_mlp = taker(middle, "LayerNormalization")
    fc1 = taker(norm_mlp, *dense)
    gelu = taker(taker(taker(taker(fc1, "Div"), "Erf"), "Add"), "Mul")
    fc2 = taker(gelu, *dense)
    last = taker(fc2, "Add")
    if other(last, fc2.output[0]) != middle.output[0]:
        raise NoMatch

    axes = {attributes_of(norm)["axis"] for norm in (norm_attention, norm_mlp)}
    epsilons = {attributes_of(norm)["epsilon"] for norm in (norm_attention, norm_mlp)}
    if len(axes) > 1 or len(epsilons) > 1:
        raise NoMatch
    weights = []
    for norm, layers in ((norm_attention, (qkv, projection)), (norm_mlp, (fc1, fc2))):
        for value in constants(norm, 2):
            value = np.zeros(1, "float32") if value is None else value
            weights.append(np.broadcast_to(value, shape[2:]).T)
        for layer in layers:
            kernel, bias = constants(layer, 2)
            weights += [kernel, np.zeros(kernel.shape[1], "float32") if bias is None else bias]
    hidden = len(weights[-2])
    sizes = native.sizes_of(*shape[2:], heads, hidden, across_words=axes == {-2})
    return last, words, weights, sizes, epsilons.pop()
