"""The transformer blocks of an ONNX graph, for which there are operators in C++.

A file may come from anyone. A block is found from its last node backward, and each node, the order
of its operands, its attributes and constants must be the block's. Then the shape of every tensor in
between is derived from the shape of what goes in, and from nothing that the file claims: the
operator computes what the nodes do, for whatever batch they do, or the nodes stay.
"""

import contextlib
import functools
import math
from collections import Counter

import numpy as np

from keras_tnt import native

OPSETS = range(17, 24)  # in which the operators mean what is written here
FLOAT, INT32, INT64 = 1, 6, 7
GRAPH, GRAPHS = 5, 10  # kinds of attributes
MAX_RANK = 16
# What a step of the search may raise where a graph is built in strange ways.
ODD = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


class NoMatch(Exception):
    """What a graph computes is nothing that there is an operator for."""


def expect(condition) -> None:
    """Raises NoMatch unless a condition holds."""
    if not condition:
        raise NoMatch


class Graph:
    """The nodes and constants of a graph by the names of their tensors.

    Args:
        proto: an ONNX model.

    Raises:
        NoMatch: if names are not unique, or nodes may mean something else than they say.
    """

    def __init__(self, proto):
        graph = proto.graph
        versions = [
            entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")
        ]
        expect(len(versions) == 1 and versions[0] in OPSETS)
        expect(not proto.functions and not graph.sparse_initializer)
        tensors = [tensor.name for tensor in graph.initializer]
        inputs = {value.name for value in graph.input}
        made = [name for node in graph.node for name in node.output if name]
        expect(len(set(tensors)) == len(tensors) and len(set(made)) == len(made))
        expect(not set(made) & (inputs | set(tensors)))
        self.proto = proto
        self.maker = {name: node for node in graph.node for name in node.output}
        # The values of initializers that are inputs, too, are defaults.
        self.initializers = {t.name: t for t in graph.initializer if t.name not in inputs}
        self.names = {*tensors, *inputs, *made, ""}
        self.values = {}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple]:
        """The shapes that follow from inputs and constants; `None` for an axis of unknown size.

        Raises:
            NoMatch: if the graph is not valid, or claims other shapes or types.
        """
        import onnx

        bare = without_weights(self.proto)
        try:
            onnx.checker.check_model(bare)
            claims = [*bare.graph.value_info, *bare.graph.output]
            claims = [(value.name, type_of(value), shape_of(value)) for value in claims]
            del bare.graph.value_info[:]
            for output in bare.graph.output:
                output.type.tensor_type.ClearField("shape")
            found = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
        except Exception as error:  # of whatever kind a file brings about
            raise NoMatch from error
        values = [*found.input, *found.value_info, *found.output]
        types = {value.name: type_of(value) for value in values}
        shapes = {value.name: shape_of(value) for value in values}
        for name, kind, claimed in claims:
            shape = shapes.get(name)
            expect(types.get(name, kind) == kind)
            if shape is not None and claimed is not None:
                expect(len(shape) == len(claimed))
                for one, other in zip(shape, claimed, strict=True):
                    expect(one == other or None in (one, other))
        return {name: shape for name, shape in shapes.items() if types[name] == FLOAT and shape}

    def of(self, kind):
        return [node for node in self.proto.graph.node if is_kind(node, kind)]

    def node(self, name, kind):
        """The node of this kind that makes a tensor."""
        node = self.maker.get(name)
        expect(node is not None and is_kind(node, kind))
        return node

    def is_constant(self, name):
        return name in self.initializers

    def constant(self, name):
        """The values of a constant."""
        if name not in self.values:
            from onnx import numpy_helper

            expect(name in self.initializers)
            try:
                self.values[name] = numpy_helper.to_array(self.initializers[name])
            except Exception as error:  # of whatever kind a damaged tensor brings about
                raise NoMatch from error
            # NumPy takes a dimension of -1 for whatever is left.
            expect(self.values[name].shape == tuple(self.initializers[name].dims))
        return self.values[name]

    def weight(self, name):
        """A constant of finite float32."""
        value = self.constant(name)
        expect(value.dtype == np.float32 and np.isfinite(value).all())
        return value

    def is_number(self, name, value):
        """Whether a tensor is a constant of one number, this one."""
        if not self.is_constant(name):
            return False
        found = self.constant(name)
        return found.dtype == np.float32 and found.size == 1 and abs(found.item() - value) < 1e-6


def is_kind(node, kind):
    return node.op_type == kind and node.domain in ("", "ai.onnx")


def attributes_of(node):
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def subgraphs_of(node):
    for attribute in node.attribute:
        if attribute.type == GRAPH:
            yield attribute.g
        elif attribute.type == GRAPHS:
            yield from attribute.graphs


def used_by(node):
    """The names of the tensors that a node may read, its subgraphs included."""
    names = set(node.input)
    for graph in subgraphs_of(node):
        names.update(output.name for output in graph.output)
        for inner in graph.node:
            names |= used_by(inner)
    return names


def without_weights(proto):
    """A copy of a model in which large constants are inputs, of their type and shape."""
    import onnx

    bare = onnx.ModelProto()
    bare.ir_version = proto.ir_version
    bare.opset_import.extend(proto.opset_import)
    graph = bare.graph
    graph.name = proto.graph.name
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    graph.value_info.extend(proto.graph.value_info)
    inputs = {value.name for value in proto.graph.input}
    for tensor in proto.graph.initializer:
        if (
            tensor.data_type in (INT32, INT64)
            and len(tensor.dims) < 2
            and tensor.name not in inputs
        ):
            graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return bare


def type_of(value):
    return value.type.tensor_type.elem_type


def shape_of(value):
    """The shape of a `ValueInfoProto`; `None` if it tells none."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)


# === Shapes ===
#
# A size is a number times names of sizes that are known when the graph runs: (12, ("batch",)).


def size(value):
    return value if isinstance(value, tuple) else (int(value), ())


def product(sizes):
    number, names = 1, []
    for factor, more in sizes:
        number, names = number * factor, [*names, *more]
    return number, tuple(sorted(names))


def quotient(size, divisor):
    """How often one size has the other, whatever the names stand for."""
    (number, names), (by, without) = size, divisor
    left = Counter(names)
    left.subtract(without)
    expect(by > 0 and number % by == 0 and min(left.values(), default=0) >= 0)
    return number // by, tuple(sorted(left.elements()))


class Shapes:
    """The shapes of what is computed of one tensor.

    Args:
        graph: a `Graph`.
        name: of the tensor.
        shape: of the tensor; `None` for an axis of unknown size.
    """

    def __init__(self, graph, name, shape):
        self.graph = graph
        given = [(1, (f"axis {i}",)) if n is None else size(n) for i, n in enumerate(shape)]
        self.found, self.vectors = {name: tuple(given)}, {}

    def __getitem__(self, name):
        """The shape of a tensor.

        Raises:
            NoMatch: if it is not certain, or a node does not take what it is given.
        """
        if name not in self.found:
            node = self.graph.maker.get(name)
            expect(node is not None and node.domain in ("", "ai.onnx"))
            rule = getattr(self, f"shape_of_{node.op_type.lower()}", None)
            expect(rule is not None)
            self.found[name] = rule(node)
        return self.found[name]

    def shape_of_reshape(self, node):
        expect(len(node.input) == 2 and not attributes_of(node).get("allowzero", 0))
        given, wanted = self[node.input[0]], self.vector(node.input[1])
        wanted = [given[i] if n == (0, ()) and i < len(given) else n for i, n in enumerate(wanted)]
        total, open_axes = product(given), [i for i, n in enumerate(wanted) if n == (-1, ())]
        expect(len(open_axes) <= 1)
        known = [n for n in wanted if n != (-1, ())]
        expect(all(number > 0 for number, _ in known))
        left = quotient(total, product(known))
        if open_axes:
            wanted[open_axes[0]] = left
        else:
            expect(left == (1, ()))
        return tuple(wanted)

    def vector(self, name):
        """The sizes in a tensor of integers."""
        if name not in self.vectors:
            self.vectors[name] = self.find_vector(name)
            expect(len(self.vectors[name]) <= MAX_RANK)
        return self.vectors[name]

    def find_vector(self, name):
        if self.graph.is_constant(name):
            values = self.graph.constant(name)
            expect(values.ndim == 1 and values.dtype in (np.int32, np.int64))
            return [size(n) for n in values.tolist()]
        node = self.graph.maker.get(name)
        expect(node is not None and node.domain in ("", "ai.onnx"))
        attributes = attributes_of(node)
        if node.op_type == "Cast":
            expect(attributes.get("to") in (INT32, INT64))
            return self.vector(node.input[0])
        if node.op_type == "Shape":
            expect(not attributes)
            return list(self[node.input[0]])
        if node.op_type == "Concat":
            expect(attributes.get("axis") == 0)
            return [n for part in node.input for n in self.vector(part)]
        if node.op_type == "Gather":
            expect(attributes.get("axis", 0) == 0 and len(node.input) == 2)
            values, places = self.vector(node.input[0]), self.vector(node.input[1])
            expect(all(not names and 0 <= i < len(values) for i, names in places))
            return [values[i] for i, _ in places]
        expect(node.op_type == "Slice" and len(node.input) in (4, 5))
        values = self.vector(node.input[0])
        start, end, axis, *step = [self.vector(part) for part in node.input[1:]]
        expect(axis == [(0, ())] and step in ([], [[(1, ())]]) and len(start) == len(end) == 1)
        (first, names), (last, more) = start[0], end[0]
        expect(not names and not more and 0 <= first < last)
        return values[first:last]

    def shape_of_transpose(self, node):
        shape, order = self[node.input[0]], attributes_of(node).get("perm")
        expect(order is not None and sorted(order) == list(range(len(shape))))
        return tuple(shape[axis] for axis in order)

    def shape_of_add(self, node):
        """Of equal shapes, or with a constant that is added to each row."""
        first, second = node.input
        if self.graph.is_constant(first):
            first, second = second, first
        shape = self[first]
        if not self.graph.is_constant(second):
            expect(self[second] == shape)
            return shape
        constant = self.graph.constant(second).shape
        trailing = tuple(map(size, constant))
        expect(constant in ((), (1,)) and shape or trailing and trailing == shape[-1:])
        return shape

    shape_of_mul = shape_of_add

    def shape_of_div(self, node):
        expect(not self.graph.is_constant(node.input[0]))
        return self.shape_of_add(node)

    def shape_of_erf(self, node):
        return self[node.input[0]]

    def shape_of_softmax(self, node):
        shape = self[node.input[0]]
        expect(attributes_of(node).get("axis", -1) in (-1, len(shape) - 1))
        return shape

    def shape_of_layernormalization(self, node):
        shape = self[node.input[0]]
        expect(self.norm_axis(node) in (-1, -2))
        return shape

    def norm_axis(self, node):
        """The first axis of a layer norm, from the end."""
        rank, axis = len(self[node.input[0]]), attributes_of(node).get("axis", -1)
        expect(-rank <= axis < rank)
        return axis - rank if axis >= 0 else axis

    def shape_of_matmul(self, node):
        first, second = node.input
        if self.graph.is_constant(second):
            kernel, shape = self.graph.constant(second).shape, self[first]
            expect(len(kernel) == 2 and shape[-1:] == (size(kernel[0]),))
            return *shape[:-1], size(kernel[1])
        one, other = self[first], self[second]
        expect(len(one) == len(other) > 2 and one[:-2] == other[:-2] and one[-1] == other[-2])
        return *one[:-1], other[-1]

    def shape_of_split(self, node):
        """Of one of three equal parts of the last axis."""
        *lead, last = self[node.input[0]]
        attributes = attributes_of(node)
        expect(attributes.get("axis", 0) in (-1, len(lead)) and len(node.output) == 3)
        part = quotient(last, size(3))
        if len(node.input) == 2:
            expect(self.vector(node.input[1]) == [part] * 3)
        else:
            expect(attributes.get("num_outputs", 3) == 3)
        return *lead, part

    def shape_of_attention(self, node):
        expect(len(node.input) == 3)
        query, key, value = (self[name] for name in node.input)
        expect(len(query) == 3 and query == key == value)
        return query


# === Patterns ===


class Pattern:
    """Steps backward from tensor to tensor of a graph; any of them may raise NoMatch."""

    def __init__(self, graph):
        self.graph = graph

    def before_reshapes(self, name):
        """The tensor that a tensor is a reshape of, or the tensor itself."""
        seen = set()
        while name in self.graph.maker and is_kind(self.graph.maker[name], "Reshape"):
            expect(name not in seen)
            seen.add(name)
            name = self.graph.maker[name].input[0]
        return name

    def with_constant(self, node):
        """(the other operand, the constant) of a node that takes a constant in either place."""
        expect(len(node.input) == 2)
        first, second = node.input
        if self.graph.is_constant(first):
            first, second = second, first
        expect(self.graph.is_constant(second) and not self.graph.is_constant(first))
        return first, second

    def dense(self, name):
        """(input, kernel, bias) of the dense layer that makes a tensor."""
        name, bias = self.before_reshapes(name), None
        node = self.graph.maker.get(name)
        expect(node is not None)
        if is_kind(node, "Add"):
            name, bias = self.with_constant(node)
            name = self.before_reshapes(name)
        node = self.graph.node(name, "MatMul")
        kernel = self.graph.weight(node.input[1])
        expect(kernel.ndim == 2 and min(kernel.shape) > 0)
        bias = np.zeros(kernel.shape[1:], "float32") if bias is None else self.graph.weight(bias)
        expect(bias.shape == kernel.shape[1:])
        return node.input[0], kernel, bias

    def norm(self, name):
        """The layer norm that makes a tensor."""
        node = self.graph.node(self.before_reshapes(name), "LayerNormalization")
        attributes = attributes_of(node)
        expect(len(node.input) in (2, 3) and not any(node.output[1:]))
        expect(attributes.get("stash_type", 1) == 1)
        epsilon = attributes.get("epsilon", 1e-5)
        expect(math.isfinite(epsilon) and epsilon > 0)
        return node, epsilon

    def norm_weights(self, node, shape):
        """Scale and offset of a norm over axes of this shape, each `(dim, words)` or `(dim,)`."""
        scale = self.graph.weight(node.input[1])
        if len(node.input) == 3 and node.input[2]:
            offset = self.graph.weight(node.input[2])
        else:
            offset = np.zeros(shape, "float32")
        expect(scale.shape == offset.shape == shape)
        return scale, offset

    def gelu(self, name):
        """What GELU is computed of: half of it, times one and the erf of it over sqrt(2)."""
        node = self.graph.node(self.before_reshapes(name), "Mul")
        for half, one in (node.input, node.input[::-1]):
            with contextlib.suppress(NoMatch):
                x = self.scaled(half, "Mul", 0.5)
                erf = self.graph.node(self.scaled(one, "Add", 1.0), "Erf")
                division = self.graph.node(erf.input[0], "Div")
                expect(division.input[0] == x)
                expect(self.graph.is_number(division.input[1], 2**0.5))
                return x
        raise NoMatch

    def scaled(self, name, kind, number):
        """The operand of a node whose other operand is this number."""
        x, constant = self.with_constant(self.graph.node(name, kind))
        expect(self.graph.is_number(constant, number))
        return x

    def residuals(self, name):
        """Both ways to read a sum: (residual, branch)."""
        node = self.graph.node(name, "Add")
        expect(len(node.input) == 2 and node.input[0] != node.input[1])
        return [tuple(node.input), tuple(node.input[::-1])]

    def moved(self, name, *kinds):
        """The tensor whose numbers a tensor has in another order, and the nodes between them.

        Args:
            name: of the tensor.
            kinds: further kinds of nodes to go through.
        """
        nodes = []
        while name in self.graph.maker:
            node = self.graph.maker[name]
            if node.domain not in ("", "ai.onnx") or len(nodes) > 16:
                break
            if node.op_type not in ("Reshape", "Transpose", *kinds):
                break
            nodes.append(node)
            name = node.input[0]
            if node.op_type == "Mul":
                name, _ = self.with_constant(node)
        return name, nodes[::-1]


def transformer_block(graph, name):
    """The transformer block that makes a tensor: norm, attention, MLP and residuals in float32.

    Args:
        graph: a `Graph`.
        name: of the tensor.

    Returns:
        (input, shape of the input, `native.Weights`, heads, epsilon, whether norms run over all
        words).

    Raises:
        NoMatch: if it is anything else.
    """
    pattern = Pattern(graph)
    for middle, branch in pattern.residuals(name):
        with contextlib.suppress(NoMatch):
            active, fc2, fc2_bias = pattern.dense(branch)
            hidden, fc1, fc1_bias = pattern.dense(pattern.gelu(active))
            norm_mlp, epsilon = pattern.norm(hidden)
            expect(norm_mlp.input[0] == middle)
            mlp = norm_mlp, epsilon, (fc1, fc1_bias, fc2, fc2_bias)
            return attention_and(graph, pattern, name, middle, mlp)
    raise NoMatch


def attention_and(graph, pattern, name, middle, mlp):
    """The block whose MLP was found, as `transformer_block` returns it."""
    norm_mlp, epsilon, mlp_weights = mlp
    for x, branch in pattern.residuals(middle):
        with contextlib.suppress(NoMatch):
            attended, projection, projection_bias = pattern.dense(branch)
            attention = attention_of(pattern, attended)
            split = attention[0]
            normed, qkv, qkv_bias = pattern.dense(split.input[0])
            norm, same = pattern.norm(normed)
            expect(norm.input[0] == x and same == epsilon)

            shape = graph.shapes.get(x)
            expect(shape is not None and len(shape) in (3, 4) and shape[-1])
            dim, hidden = shape[-1], len(mlp_weights[2])
            expect(len(shape) == 3 or shape[2])
            expect(qkv.shape == (dim, 3 * dim) and projection.shape == (dim, dim))
            expect(mlp_weights[0].shape == (dim, hidden) and mlp_weights[2].shape == (hidden, dim))

            shapes = Shapes(graph, x, shape)
            expect(shapes[name] == shapes[middle] == shapes[x])
            heads = check_attention(shapes, attended, shapes[x], attention)
            axis = shapes.norm_axis(norm)
            expect(axis == shapes.norm_axis(norm_mlp) and (axis == -1 or len(shape) == 4))
            over = shape[-1:] if axis == -1 else shape[-2:]
            rows = [pattern.norm_weights(each, over) for each in (norm, norm_mlp)]
            if len(shape) == 4:
                rows = [[np.broadcast_to(w, shape[2:]).T for w in both] for both in rows]
            weights = native.Weights(
                *(*rows[0], qkv, qkv_bias, projection, projection_bias),
                *(*rows[1], *mlp_weights),
            )
            return x, shape, weights, heads, epsilon, axis == -2
    raise NoMatch


def attention_of(pattern, name):
    """The attention that makes a tensor.

    Returns:
        (the split into query, key and value, the node that attends, the nodes behind it, those
        between the split and it for each of the three, scale).
    """
    graph = pattern.graph
    source, after = pattern.moved(name)
    node = graph.maker.get(source)
    expect(node is not None and node.domain in ("", "ai.onnx"))
    scale = 1.0
    if node.op_type == "Attention":
        operands, attributes = list(node.input), attributes_of(node)
        expect(len(operands) == 3 and not any(node.output[1:]))
        known = {"scale", "q_num_heads", "kv_num_heads"}
        expect(known == set(attributes) and attributes["q_num_heads"] == attributes["kv_num_heads"])
        scale = attributes["scale"]
        paths = [pattern.moved(operand) for operand in operands]
    else:
        expect(node.op_type == "MatMul" and len(node.input) == 2)
        softmax = graph.node(node.input[0], "Softmax")
        scores = graph.node(softmax.input[0], "MatMul")
        paths = [
            pattern.moved(scores.input[0], "Mul"),
            pattern.moved(scores.input[1]),
            pattern.moved(node.input[1]),
        ]
        for each in paths[0][1]:
            if each.op_type == "Mul":
                factor = graph.weight(pattern.with_constant(each)[1])
                expect(factor.size == 1)
                scale *= factor.item()
    sources, between = zip(*paths, strict=True)
    split = graph.node(sources[0], "Split")
    expect(tuple(split.output) == sources)
    return split, node, after, between, scale


def check_attention(shapes, attended, shape, attention):
    """Check that rows attend to rows of the same block, head by head.

    Args:
        shapes: `Shapes`.
        attended: name of the attention's result.
        shape: of the block's input.
        attention: as `attention_of` returns it.

    Returns:
        The number of heads.
    """
    split, node, after, between, scale = attention
    *lead, rows, (dim, _) = shape
    expect(shapes[split.output[0]] == shape and shapes[attended][-1] == shape[-1])
    if node.op_type == "Attention":
        heads = attributes_of(node)["q_num_heads"]
        expect(0 < heads <= dim and dim % heads == 0)
        expect(shapes[node.output[0]] == (product(lead), rows, size(dim)))
        expect(all(each.op_type == "Reshape" for path in (after, *between) for each in path))
    else:
        result = shapes[node.output[0]]
        expect(len(result) >= 4 and result[-2] == rows and not result[-3][1])
        heads, head_dim = result[-3][0], result[-1][0]
        expect(0 < heads and heads * head_dim == dim and product(result[:-3]) == product(lead))
        # The orders of axes, tried on the numbers of a few blocks.
        for least in (2, 3):
            sizes = {name: least + i for i, name in enumerate(names_in(shape))}
            blocks, length = number_of(product(lead), sizes), number_of(rows, sizes)
            numbers = np.arange(blocks * length * dim).reshape(blocks, length, heads, head_dim)
            swapped = numbers.transpose(0, 2, 1, 3)  # (blocks, heads, rows, head_dim)
            wanted = swapped, swapped.transpose(0, 1, 3, 2), swapped
            for path, order in zip(between, wanted, strict=True):
                expect(np.array_equal(follow(shapes, path, numbers, sizes), order.ravel()))
            back = follow(shapes, after, swapped, sizes)
            expect(np.array_equal(back, numbers.ravel()))
    expect(math.isclose(scale, (dim / heads) ** -0.5, rel_tol=1e-5))
    return heads


def names_in(shape):
    return sorted({name for _, names in shape for name in names})


def number_of(size, sizes):
    """A size as a number, where names stand for these sizes."""
    number, names = size
    return number * math.prod(sizes[name] for name in names)


def follow(shapes, nodes, numbers, sizes):
    """Numbers in the order in which reshapes and transposes leave them."""
    for node in nodes:
        if node.op_type == "Transpose":
            given = [number_of(n, sizes) for n in shapes[node.input[0]]]
            numbers = numbers.reshape(given).transpose(attributes_of(node)["perm"])
    return numbers.ravel()


def words_to_patches(graph, norm):
    """A norm, a dense layer and a norm, of which this is the last, over patches.

    Returns:
        (input, `native.PatchWeights`, epsilon).

    Raises:
        NoMatch: if it is anything else.
    """
    pattern = Pattern(graph)
    last, epsilon = pattern.norm(norm.output[0])
    words, kernel, bias = pattern.dense(last.input[0])
    first, same = pattern.norm(words)
    x = first.input[0]
    shape = graph.shapes.get(x)
    expect(same == epsilon and shape is not None and len(shape) == 3 and shape[2])
    inputs, dim = kernel.shape
    shapes = Shapes(graph, x, shape)
    expect(inputs == shape[2] and shapes[last.output[0]] == (*shapes[x][:2], size(dim)))
    expect(shapes.norm_axis(first) == shapes.norm_axis(last) == -1)
    weights = native.PatchWeights(
        *(*pattern.norm_weights(first, (inputs,)), kernel, bias),
        *pattern.norm_weights(last, (dim,)),
    )
    return x, weights, epsilon


def added_tokens(graph, name):
    """The sum of patches, padded in front, and tokens, if patches become nothing else.

    Returns:
        (name of the sum, how many tokens stand before the patches, name of the tokens).

    Raises:
        NoMatch: if there is none.
    """
    pads = [node for node in graph.of("Pad") if node.input[0] == name]
    expect(len(pads) == 1 and len(pads[0].input) == 2 and not pads[0].attribute)
    counts, padded = graph.constant(pads[0].input[1]), pads[0].output[0]
    expect(counts.shape == (6,) and counts[1] >= 0 and not np.delete(counts, 1).any())
    sums = [node for node in graph.of("Add") if padded in node.input]
    expect(len(sums) == 1 and list(sums[0].input).count(padded) == 1)
    (tokens,) = (other for other in sums[0].input if other != padded)
    total = sums[0].output[0]
    shape = graph.shapes.get(total)
    expect(shape is not None and len(shape) == 3 and None not in shape[1:])
    expect(graph.shapes.get(tokens) == graph.shapes.get(padded) == shape)
    return total, int(counts[1]), tokens


# === Replacing ===


def replace(proto, places):
    """Puts nodes in the place of others, and removes what only those needed.

    Nodes that nobody needed before stay: they are part of what a runtime checks.

    Args:
        proto: an ONNX model, changed in place.
        places: a dict from the name of a tensor to the node that makes it from now on.
    """
    graph = proto.graph
    outputs = {output.name for output in graph.output}
    before = needed(graph.node, outputs)
    for node in graph.node:
        if before.isdisjoint(node.output):
            outputs.update(node.output)
    nodes = [
        next((places[name] for name in node.output if name in places), node) for node in graph.node
    ]
    gone = needed(graph.node, outputs) - needed(nodes, outputs)
    nodes = [node for node in nodes if not gone.issuperset(filter(None, node.output))]
    del graph.node[:]
    graph.node.extend(nodes)
    for values in (graph.initializer, graph.value_info):
        for place in reversed(range(len(values))):
            if values[place].name in gone:
                del values[place]


def needed(nodes, outputs):
    """The names of tensors that outputs are computed of, and the outputs."""
    names = set(outputs)
    for node in reversed(nodes):
        if names.intersection(node.output):
            names |= used_by(node)
    return names
