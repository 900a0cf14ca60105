"""An exported file in ONNX Runtime, its inner transformers in C++."""

import contextlib
import itertools
import os

import numpy as np

from keras_tnt import native
from keras_tnt.export.onnx_fusion import Graph, attributes_of
from keras_tnt.export.requirements import require
from keras_tnt.native import runtimes

# Options that open several files get an operator of each, which must differ by name.
_sessions = itertools.count()


def onnx_session(path: str | os.PathLike, options=None):
    """Open a file of `keras_tnt.export.onnx` in ONNX Runtime on the CPU, as fast as it can be.

    The transformers among words become an operator of ours, which the machine's C++ compiler makes
    for its processor, a second of work for the first process that needs it. Where it cannot be had,
    a warning says so, and the file runs as it is. So do files in float16 or int8, and of models
    without words.

    Args:
        path: of the file.
        options: an `onnxruntime.SessionOptions`; None: ONNX Runtime's own.

    Returns:
        An `onnxruntime.InferenceSession`, which raises a RuntimeError where it is run in a process
        forked after it was opened.

    Raises:
        FileNotFoundError: if there is no such file.

    Example:

    >>> session = keras_tnt.export.onnx_session("tnt_small.onnx")
    >>> session.run(["probabilities"], {"images": images})
    """
    require("onnx", "onnxruntime")
    import onnx
    import onnxruntime

    path = os.path.abspath(os.path.expanduser(os.fspath(path)))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file '{path}'; `keras_tnt.export.onnx` writes one.")
    options = options or onnxruntime.SessionOptions()
    proto = onnx.load(path)
    model = path
    operators = use_native(proto, f"keras_tnt_{next(_sessions)}")
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


def use_native(proto, prefix, half=False):
    """Put our operator in the place of each inner transformer of a graph.

    Args:
        proto: an ONNX model, changed in place.
        prefix: of the operators' domains.
        half: whether to multiply in bfloat16, and in the place of outer transformers and from words
            to patches too.

    Returns:
        A dict from the operator's domain, which begins with the prefix, to its sizes.
    """
    graph, found, pairs = Graph(proto), {}, []
    for operator in operators(graph, half):
        last, x, weights, sizes, attributes, *more = operator
        domain, (name,) = sizes.name(prefix), last.output
        inputs = [
            graph.add_constant(f"{name}/{kind}", value) for kind, value in weights._asdict().items()
        ]
        node = graph.node(KINDS[sizes.part], [x, *inputs, *more], [name], **attributes)
        node.domain = domain
        pairs.append((last, [node]))
        if domain not in found:
            proto.opset_import.add(domain=domain, version=1)
            found[domain] = sizes
    graph.replace(pairs)
    return found


# Our operators by what they compute.
KINDS = {
    "inner": "InnerTransformer",
    "outer_half": "OuterTransformer",
    "patches_half": "WordsToPatches",
}


class NoMatch(Exception):
    """What stands in a graph is nothing that there is an operator for."""


def operators(graph, half):
    """What of a graph our operators compute.

    Yields:
        (last node, name of the words or tokens, weights, sizes, attributes, names of what else they
        take).
    """
    for attended, tensors, scale, heads in attentions(graph):
        with contextlib.suppress(NoMatch):
            yield transformer(graph, attended, tensors, scale, heads, half)
    for norm in graph.of("LayerNormalization") if half else []:
        with contextlib.suppress(NoMatch):
            yield words_to_patches(graph, norm)


def attentions(graph):
    """Each attention without a bias: (its result, query, key and value, scale, heads)."""
    for node in graph.of("Attention"):
        attributes = attributes_of(node)
        if len(node.input) == 3 and {"scale", "q_num_heads"} <= set(attributes):
            tensors = [graph.origin(name) for name in node.input]
            yield node.output[0], tensors, attributes["scale"], attributes["q_num_heads"]
    for softmax in graph.of("Softmax"):
        found = graph.attention(softmax)
        if found is not None:
            last, tensors, _, bias, scale, heads = found
            if bias is None:
                yield last.output[0], tensors, scale, heads


def transformer(graph, attended, tensors, scale, heads, half):
    """The transformer block around an attention.

    Args:
        graph: a `Graph`.
        attended: name of the attention's result.
        tensors: names of query, key and value.
        scale: of the attention.
        heads: of the attention.
        half: whether to multiply in bfloat16.

    Returns:
        As `operators` yields it.

    Raises:
        NoMatch: if it is anything but norm, attention, MLP and residuals in float32, of words or,
            with `half`, of tokens.
    """
    walk = Walk(graph)
    split = walk.maker(tensors[0], "Split")
    if list(split.output) != tensors:
        raise NoMatch
    qkv = walk.product(split.input[0])
    norm_attention = walk.maker(qkv.input[0], "LayerNormalization")
    x = norm_attention.input[0]
    shape = graph.shapes.get(x, ())
    among_words = len(shape) == 4 and None not in shape[2:] and shape[2] % native.LANES == 0
    among_tokens = len(shape) == 3 and shape[2] is not None
    axis, epsilon = walk.settings(norm_attention)
    if not (among_words or among_tokens and half and axis == -1):
        raise NoMatch
    if not np.isclose(scale, (shape[-1] / heads) ** -0.5):
        raise NoMatch
    projection = walk.taker(graph.origin(attended), "MatMul")
    middle = walk.residual(walk.biased(projection), graph.origin(x))
    norm_mlp = walk.taker(middle, "LayerNormalization")
    fc1 = walk.taker(norm_mlp.output[0], "MatMul")
    hidden = walk.biased(fc1)
    for kind in ("Div", "Erf", "Add", "Mul"):  # of which GELU is made
        hidden = walk.taker(hidden, kind).output[0]
    fc2 = walk.taker(hidden, "MatMul")
    last = walk.residual(walk.biased(fc2), middle)

    if walk.settings(norm_mlp) != (axis, epsilon):
        raise NoMatch
    weights = native.Weights(
        *walk.norm_weights(norm_attention, shape[2:]),
        *walk.dense_weights(qkv),
        *walk.dense_weights(projection),
        *walk.norm_weights(norm_mlp, shape[2:]),
        *walk.dense_weights(fc1),
        *walk.dense_weights(fc2),
    )
    hidden = len(weights.fc2_kernel)
    half = half and native.takes_half(shape[-1] // heads, hidden)
    attributes = {"epsilon": epsilon}
    if among_words:
        sizes = native.InnerSizes(*shape[2:], heads, hidden, axis == -2, half)
    elif half:
        sizes = native.OuterSizes(heads, hidden, half)
        attributes["heads"] = heads
    else:
        raise NoMatch
    return graph.maker[last], x, weights, sizes, attributes


def words_to_patches(graph, norm):
    """A norm, a dense layer and a norm, of which this is the last, as `operators` yields them.

    Where tokens follow to which their result is added, that too.
    """
    walk = Walk(graph)
    product = walk.product(norm.input[0])
    first = walk.maker(product.input[0], "LayerNormalization")
    x = first.input[0]
    shape, settings = graph.shapes.get(x, ()), walk.settings(norm)
    axis, epsilon = settings
    if len(shape) != 3 or axis not in (-1, 2) or settings != walk.settings(first):
        raise NoMatch
    kernel, bias = walk.dense_weights(product)
    inputs, dim = kernel.shape
    result = (*shape[:2], dim)
    if shape[2] != inputs or graph.shapes.get(norm.output[0]) != result:
        raise NoMatch  # something between them is reshaped
    if not native.takes_half(inputs):
        raise NoMatch
    weights = native.PatchWeights(
        *walk.norm_weights(first, (inputs,)), kernel, bias, *walk.norm_weights(norm, (dim,))
    )
    found = x, weights, native.PatchSizes(dim, half=True)
    with contextlib.suppress(NoMatch):
        total, prefix, tokens = added(graph, walk, norm.output[0])
        return graph.maker[total], *found, {"epsilon": epsilon, "prefix": prefix}, tokens
    return norm, *found, {"epsilon": epsilon, "prefix": 0}


def added(graph, walk, patches):
    """The sum of patches and tokens, the last of which are the patches'.

    Returns:
        (name of the sum, how many tokens stand before, name of the tokens).

    Raises:
        NoMatch: if patches become anything else.
    """
    pad = walk.taker(patches, "Pad")
    total = walk.taker(pad.output[0], "Add")
    pads = graph.constants.get(pad.input[1], np.zeros(0)).tolist()
    if len(pad.input) != 2 or pad.attribute or len(pads) != 6 or pads != [0, pads[1], 0, 0, 0, 0]:
        raise NoMatch
    others = [name for name in total.input if name != pad.output[0]]
    shape = graph.shapes.get(total.output[0], ())
    if len(others) != 1 or graph.shapes.get(others[0]) != shape or len(shape) != 3:
        raise NoMatch
    return total.output[0], pads[1], others[0]


class Walk:
    """Steps from node to node of a graph, as if reshapes were not there; any may raise NoMatch."""

    def __init__(self, graph):
        self.graph = graph
        self.takers = {}
        for node in graph.proto.graph.node:
            if node.op_type != "Reshape":
                for name in set(map(graph.origin, node.input)):
                    self.takers.setdefault(name, []).append(node)

    def maker(self, name, *kinds):
        """The node of one of these kinds that makes a tensor."""
        node = self.graph.maker.get(self.graph.origin(name))
        if node is None or node.op_type not in kinds:
            raise NoMatch
        return node

    def taker(self, name, kind):
        """The one node of this kind that takes a tensor."""
        found = [node for node in self.takers.get(name, ()) if node.op_type == kind]
        if len(found) != 1:
            raise NoMatch
        return found[0]

    def product(self, name):
        """The product of a dense layer that makes a tensor."""
        node = self.maker(name, "Add", "MatMul")
        if node.op_type == "Add":
            if self.graph.constant(node) is None:
                raise NoMatch
            node = self.maker(self.graph.variable(node), "MatMul")
        return node

    def bias(self, product):
        """The sum of a dense layer's product with its bias; None if it has none."""
        found = self.takers.get(product.output[0], ())
        sums = [
            node
            for node in found
            if node.op_type == "Add" and self.graph.constant(node) is not None
        ]
        return sums[0] if len(found) == len(sums) == 1 else None

    def biased(self, product):
        """What a dense layer makes."""
        return (self.bias(product) or product).output[0]

    def residual(self, branch, residual):
        """The sum of a branch and its residual."""
        total = self.taker(branch, "Add")
        if {branch, residual} != set(map(self.graph.origin, total.input)):
            raise NoMatch
        return total.output[0]

    def settings(self, norm):
        attributes = attributes_of(norm)
        return attributes["axis"], attributes["epsilon"]

    def norm_weights(self, norm, shape):
        """Scale and bias of a norm, each `(dim, words)`."""
        values = [self.constant(name) for name in norm.input[1:]]
        values += [np.zeros(1, "float32")] * (2 - len(values))
        try:
            return [np.broadcast_to(value, shape).T for value in values]
        except ValueError:  # it runs over other axes
            raise NoMatch from None

    def dense_weights(self, product):
        """Kernel and bias of a dense layer."""
        kernel, total = self.constant(product.input[1]), self.bias(product)
        bias = np.zeros(1, "float32") if total is None else self.graph.constant(total)
        return [kernel, np.broadcast_to(bias, kernel.shape[1:])]

    def constant(self, name):
        value = self.graph.constants.get(name)
        if value is None or value.dtype != np.float32:
            raise NoMatch
        return value
