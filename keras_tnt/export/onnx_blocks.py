"""Pattern matching of transformer blocks in ONNX graphs, for the C++ operators.

Files are not trusted. A block is matched from its last node backward; each node, the order of its
operands, its attributes and its constants must be those of the block. The shape of every tensor in
between is then derived from the shape of the block's input, and not from what the file claims: the
operator computes the same as the nodes, for every batch size that they accept, or the nodes stay.
"""

import contextlib
import functools
import math
from collections import Counter

import numpy as np

from keras_tnt import kernels

OPSETS = range(17, 24)  # with the operator semantics that are assumed here
FLOAT, INT32, INT64 = 1, 6, 7
GRAPH, GRAPHS = 5, 10  # attribute types
MAX_RANK = 16
# Errors that a malformed graph may cause in a step of the search.
ODD = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


class NoMatch(Exception):
    """Raised when a graph does not match a supported pattern."""


def expect(condition) -> None:
    """Raises NoMatch if a condition is false."""
    if not condition:
        raise NoMatch


class Graph:
    """Index of an ONNX graph's nodes and constants by tensor name.

    Args:
        proto: an ONNX model.

    Raises:
        NoMatch: if the opset is not supported, tensor names are not unique, or the model has
            functions or sparse constants.
    """

    def __init__(self, proto):
        """Checks opset and names; shapes are inferred at first use."""
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
        # Initializers that are also graph inputs are only default values.
        self.initializers = {t.name: t for t in graph.initializer if t.name not in inputs}
        self.names = {*tensors, *inputs, *made, ""}
        self.values = {}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple]:
        """Inferred shapes of float32 tensors by name; `None` for an axis of unknown size.

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
        except Exception as error:  # of any type, depending on the file
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
        """Returns the nodes of an operator type."""
        return [node for node in self.proto.graph.node if is_kind(node, kind)]

    def node(self, name, kind):
        """Returns the node that produces a tensor, which must be of this operator type."""
        node = self.maker.get(name)
        expect(node is not None and is_kind(node, kind))
        return node

    def is_constant(self, name):
        """Returns whether a tensor is an initializer that callers cannot override."""
        return name in self.initializers

    def constant(self, name):
        """Returns the values of a constant as an array."""
        if name not in self.values:
            from onnx import numpy_helper

            expect(name in self.initializers)
            try:
                self.values[name] = numpy_helper.to_array(self.initializers[name])
            except Exception as error:  # of any type, depending on the damage
                raise NoMatch from error
            # NumPy's reshape infers a dimension of -1.
            expect(self.values[name].shape == tuple(self.initializers[name].dims))
        return self.values[name]

    def weight(self, name):
        """Returns the values of a constant, which must be finite float32."""
        value = self.constant(name)
        expect(value.dtype == np.float32 and np.isfinite(value).all())
        return value

    def is_number(self, name, value):
        """Returns whether a tensor is a float32 constant with `value` as its only element."""
        if not self.is_constant(name):
            return False
        found = self.constant(name)
        return found.dtype == np.float32 and found.size == 1 and abs(found.item() - value) < 1e-6


def is_kind(node, kind):
    """Returns whether a node has this operator type in ONNX's own domain."""
    return node.op_type == kind and node.domain in ("", "ai.onnx")


def attributes_of(node):
    """Returns a node's attributes by name."""
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def subgraphs_of(node):
    """Yields the graphs in a node's attributes, such as the branches of an `If`."""
    for attribute in node.attribute:
        if attribute.type == GRAPH:
            yield attribute.g
        elif attribute.type == GRAPHS:
            yield from attribute.graphs


def used_by(node):
    """Returns the names of the tensors that a node may read, its subgraphs included."""
    names = set(node.input)
    for graph in subgraphs_of(node):
        names.update(output.name for output in graph.output)
        for inner in graph.node:
            names |= used_by(inner)
    return names


def without_weights(proto):
    """Returns a copy of a model whose large constants are inputs of the same type and shape."""
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
    """Returns the element type of a `ValueInfoProto`."""
    return value.type.tensor_type.elem_type


def shape_of(value):
    """Returns the shape of a `ValueInfoProto`, or `None` if it has none."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)


# === Shapes ===
#
# A symbolic size is an integer times names of sizes that are known at run time, such as
# (12, ("batch",)).


def size(value):
    """Converts an integer to a symbolic size; symbolic sizes are returned unchanged."""
    return value if isinstance(value, tuple) else (int(value), ())


def product(sizes):
    """Returns the product of symbolic sizes."""
    number, names = 1, []
    for factor, more in sizes:
        number, names = number * factor, [*names, *more]
    return number, tuple(sorted(names))


def quotient(size, divisor):
    """Returns the exact quotient of two symbolic sizes, for any values of the names."""
    (number, names), (by, without) = size, divisor
    left = Counter(names)
    left.subtract(without)
    expect(by > 0 and number % by == 0 and min(left.values(), default=0) >= 0)
    return number // by, tuple(sorted(left.elements()))


class Shapes:
    """Symbolic shape inference from one tensor of a graph.

    Args:
        graph: a `Graph`.
        name: name of the tensor.
        shape: shape of the tensor; `None` for an axis of unknown size.
    """

    def __init__(self, graph, name, shape):
        """Gives each axis of unknown size a name."""
        self.graph = graph
        given = [(1, (f"axis {i}",)) if n is None else size(n) for i, n in enumerate(shape)]
        self.found, self.vectors = {name: tuple(given)}, {}

    def __getitem__(self, name):
        """Returns the symbolic shape of a tensor.

        Raises:
            NoMatch: if the shape is uncertain, or a node does not accept its operands.
        """
        if name not in self.found:
            node = self.graph.maker.get(name)
            expect(node is not None and node.domain in ("", "ai.onnx"))
            rule = getattr(self, f"shape_of_{node.op_type.lower()}", None)
            expect(rule is not None)
            self.found[name] = rule(node)
        return self.found[name]

    def shape_of_reshape(self, node):
        """Returns the target shape, in which 0 copies a size and one -1 is inferred."""
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
        """Returns the symbolic sizes in an integer tensor of one axis."""
        if name not in self.vectors:
            self.vectors[name] = self.find_vector(name)
            expect(len(self.vectors[name]) <= MAX_RANK)
        return self.vectors[name]

    def find_vector(self, name):
        """Evaluates constants and nodes of Cast, Shape, Concat, Gather and Slice."""
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
        """Returns the permuted shape."""
        shape, order = self[node.input[0]], attributes_of(node).get("perm")
        expect(order is not None and sorted(order) == list(range(len(shape))))
        return tuple(shape[axis] for axis in order)

    def shape_of_add(self, node):
        """Returns the operands' equal shape; a constant may also be a scalar or a row."""
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
        """Returns the shape of a quotient whose dividend is not a constant."""
        expect(not self.graph.is_constant(node.input[0]))
        return self.shape_of_add(node)

    def shape_of_erf(self, node):
        """Returns the input's shape."""
        return self[node.input[0]]

    def shape_of_softmax(self, node):
        """Returns the input's shape; the softmax must be over the last axis."""
        shape = self[node.input[0]]
        expect(attributes_of(node).get("axis", -1) in (-1, len(shape) - 1))
        return shape

    def shape_of_layernormalization(self, node):
        """Returns the input's shape; the norm must be over the last one or two axes."""
        shape = self[node.input[0]]
        expect(self.norm_axis(node) in (-1, -2))
        return shape

    def norm_axis(self, node):
        """Returns the first axis that a layer norm is over, counted from the end."""
        rank, axis = len(self[node.input[0]]), attributes_of(node).get("axis", -1)
        expect(-rank <= axis < rank)
        return axis - rank if axis >= 0 else axis

    def shape_of_matmul(self, node):
        """Returns the shape of a product with a constant matrix, or of a batch of products."""
        first, second = node.input
        if self.graph.is_constant(second):
            kernel, shape = self.graph.constant(second).shape, self[first]
            expect(len(kernel) == 2 and shape[-1:] == (size(kernel[0]),))
            return *shape[:-1], size(kernel[1])
        one, other = self[first], self[second]
        expect(len(one) == len(other) > 2 and one[:-2] == other[:-2] and one[-1] == other[-2])
        return *one[:-1], other[-1]

    def shape_of_split(self, node):
        """Returns the shape of each of three equal parts of the last axis."""
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
        """Returns the query's shape (batch, tokens, dim), which key and value must share."""
        expect(len(node.input) == 3)
        query, key, value = (self[name] for name in node.input)
        expect(len(query) == 3 and query == key == value)
        return query


# === Patterns ===


class Pattern:
    """Matching steps from tensor to tensor, backward; any of them may raise NoMatch."""

    def __init__(self, graph):
        """Matches patterns of a `Graph`."""
        self.graph = graph

    def before_reshapes(self, name):
        """Returns the tensor before a chain of reshapes, or `name` if there is none."""
        seen = set()
        while name in self.graph.maker and is_kind(self.graph.maker[name], "Reshape"):
            expect(name not in seen)
            seen.add(name)
            name = self.graph.maker[name].input[0]
        return name

    def with_constant(self, node):
        """Returns (other operand, constant) of a node with a constant as either operand."""
        expect(len(node.input) == 2)
        first, second = node.input
        if self.graph.is_constant(first):
            first, second = second, first
        expect(self.graph.is_constant(second) and not self.graph.is_constant(first))
        return first, second

    def dense(self, name):
        """Returns (input, kernel, bias) of the dense layer that produces a tensor."""
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
        """Returns (node, epsilon) of the layer norm that produces a tensor."""
        node = self.graph.node(self.before_reshapes(name), "LayerNormalization")
        attributes = attributes_of(node)
        expect(len(node.input) in (2, 3) and not any(node.output[1:]))
        expect(attributes.get("stash_type", 1) == 1)
        epsilon = attributes.get("epsilon", 1e-5)
        expect(math.isfinite(epsilon) and epsilon > 0)
        return node, epsilon

    def norm_weights(self, node, shape):
        """Returns (scale, offset) of a norm, which must be of this shape."""
        scale = self.graph.weight(node.input[1])
        if len(node.input) == 3 and node.input[2]:
            offset = self.graph.weight(node.input[2])
        else:
            offset = np.zeros(shape, "float32")
        expect(scale.shape == offset.shape == shape)
        return scale, offset

    def gelu(self, name):
        """Returns the input x of an exact GELU, written as (0.5 x) (1 + erf(x / sqrt(2)))."""
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
        """Returns the operand of a node whose other operand is the constant `number`."""
        x, constant = self.with_constant(self.graph.node(name, kind))
        expect(self.graph.is_number(constant, number))
        return x

    def residuals(self, name):
        """Returns both ways to read a sum as (residual, branch)."""
        node = self.graph.node(name, "Add")
        expect(len(node.input) == 2 and node.input[0] != node.input[1])
        return [tuple(node.input), tuple(node.input[::-1])]

    def moved(self, name, *kinds):
        """Returns the tensor that a tensor is a permutation of, and the nodes in between.

        Args:
            name: name of the tensor.
            *kinds: operator types to pass through in addition to Reshape and Transpose.
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
    """Matches the block that produces a tensor: norm, attention, MLP and residuals in float32.

    Args:
        graph: a `Graph`.
        name: name of the tensor.

    Returns:
        (input, shape of the input, `kernels.Weights`, number of heads, epsilon, whether the norms
        are over all words of a patch).

    Raises:
        NoMatch: if the tensor is produced by anything else.
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
    """Matches the attention of a block whose MLP is `mlp`; returns as `transformer_block`."""
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
            weights = kernels.Weights(
                *(*rows[0], qkv, qkv_bias, projection, projection_bias),
                *(*rows[1], *mlp_weights),
            )
            return x, shape, weights, heads, epsilon, axis == -2
    raise NoMatch


def attention_of(pattern, name):
    """Matches the attention that produces a tensor.

    Returns:
        (node that splits query, key and value, node that produces the weighted values, nodes after
        it, nodes before it for each of the three, scale).
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
    """Checks that rows attend to rows of the same sequence, separately for each head.

    Args:
        shapes: `Shapes`.
        attended: name of the attention's result.
        shape: symbolic shape of the block's input.
        attention: as returned by `attention_of`.

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
        # The orders of axes are checked on the element indices of small examples.
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
    """Returns the sorted names in a symbolic shape."""
    return sorted({name for _, names in shape for name in names})


def number_of(size, sizes):
    """Evaluates a symbolic size for values of its names."""
    number, names = size
    return number * math.prod(sizes[name] for name in names)


def follow(shapes, nodes, numbers, sizes):
    """Returns elements, flat, in the order in which reshapes and transposes leave them."""
    for node in nodes:
        if node.op_type == "Transpose":
            given = [number_of(n, sizes) for n in shapes[node.input[0]]]
            numbers = numbers.reshape(given).transpose(attributes_of(node)["perm"])
    return numbers.ravel()


def words_to_patches(graph, norm):
    """Matches the projection from words to patches: norm, dense layer and, last, `norm`.

    Returns:
        (input, `kernels.PatchWeights`, epsilon).

    Raises:
        NoMatch: if the nodes are anything else.
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
    weights = kernels.PatchWeights(
        *(*pattern.norm_weights(first, (inputs,)), kernel, bias),
        *pattern.norm_weights(last, (dim,)),
    )
    return x, weights, epsilon


def added_tokens(graph, name):
    """Matches the sum of patches, padded in front, and a tensor of tokens and positions.

    Returns:
        (name of the sum, number of tokens before the patches, name of the added tensor).

    Raises:
        NoMatch: if `name` is not padded once, or the result is not added once.
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
    """Replaces nodes, and removes those that only the replaced nodes needed.

    Nodes that nothing needed before are left in the graph, because runtimes check them too.

    Args:
        proto: an ONNX model, changed in place.
        places: dict from a tensor's name to the node that produces it afterwards.
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
    """Returns the names of the outputs and of the tensors from which they are computed."""
    names = set(outputs)
    for node in reversed(nodes):
        if names.intersection(node.output):
            names |= used_by(node)
    return names
