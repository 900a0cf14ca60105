"""Fusion of ONNX operators into the forms for which runtimes have fast kernels.

tf2onnx writes a layer norm as a dozen operators, GELU in a form that ONNX Runtime does not
recognize, dense layers with a computed output shape, and attention without its operator.
"""

import functools

import numpy as np


def fuse(proto):
    """Fuses layer norms, GELUs, dense layers, attention and reshapes.

    Args:
        proto: an ONNX model, changed in place. Norms are fused from opset 18 on, attention from
            opset 23 on.
    """
    (opset,) = (entry.version for entry in proto.opset_import if not entry.domain)
    steps = [(norms, 18), (gelus, 13), (products, 13), (attention, 23), (reshapes, 13)]
    for step, since in steps:
        if opset >= since:
            graph = Graph(proto)
            graph.replace(step(graph))


# Each step yields the last node of a pattern, and the nodes that replace it.


def norms(graph):
    """Yields layer norms as single operators."""
    for node in graph.of("Neg"):
        found = graph.norm(node)
        if found is None:
            continue
        last, x, scale, bias, axes, epsilon = found
        (name,) = last.output
        nodes, inputs, result, shape = [], [x], name, scale.shape[-len(axes) :]
        if bias is not None and np.broadcast_shapes(bias.shape, scale.shape) != scale.shape:
            # A position embedding was folded into the bias, and is added after the norm.
            result, total = f"{name}/norm", graph.add_constant(f"{name}/total", bias)
            nodes, bias = [graph.node("Add", [result, total], [name])], None
        for kind, value in (("scale", scale), ("bias", bias)):
            if value is not None:
                value = np.broadcast_to(value, scale.shape).reshape(shape)
                inputs.append(graph.add_constant(f"{name}/{kind}", value))
        attributes = {"axis": -len(axes), "epsilon": epsilon}
        yield last, [graph.node("LayerNormalization", inputs, [result], **attributes), *nodes]


def gelus(graph):
    """Yields GELUs with the division by sqrt(2) that ONNX Runtime's fusion looks for."""
    for node in graph.of("Mul"):
        if graph.scaled_for_gelu(node):
            (name,) = node.output
            root = graph.add_constant(f"{name}/root_two", np.float32(2**0.5))
            yield node, [graph.node("Div", [graph.variable(node), root], [name])]


def products(graph):
    """Yields the matrix products of dense layers without flattening and computed shapes."""
    for node in graph.of("MatMul"):
        weight = graph.constants.get(node.input[1])
        flat = graph.maker.get(node.input[0])
        last = graph.follow(node.output[0], "Reshape")
        if weight is None or weight.ndim != 2 or last is None or flat is None:
            continue
        x = flat.input[0]
        if flat.op_type == "Reshape" and graph.is_shape_of(last.input[1], x, weight.shape[1]):
            yield last, [graph.node("MatMul", [x, node.input[1]], last.output)]


def attention(graph):
    """Yields attention as single operators, except for talking heads."""
    for softmax in graph.of("Softmax"):
        found = graph.attention(softmax)
        if found is None:
            continue
        last, tensors, sizes, bias, scale, heads = found
        (name,) = last.output
        if None in graph.shapes[name][1:] or None in sum(sizes, ()):
            continue  # images of any size: the reshapes would have two unknown sizes
        inputs = [f"{name}/{kind}" for kind in ("query", "key", "value")]
        nodes = [
            graph.reshape(tensor, (-1, *size), x)
            for tensor, size, x in zip(tensors, sizes, inputs, strict=True)
        ]
        inputs += [bias] if bias else []
        attributes = {"q_num_heads": heads, "kv_num_heads": heads, "scale": scale}
        nodes += [
            graph.node("Attention", inputs, [f"{name}/merged"], **attributes),
            graph.reshape(f"{name}/merged", (-1, *graph.shapes[name][1:]), name),
        ]
        yield last, nodes


def reshapes(graph):
    """Yields chains of reshapes as single reshapes."""
    for node in graph.of("Reshape"):
        x, origin = node.input[0], graph.origin(node.input[0])
        # A 0 copies the size of the reshaped tensor, and another tensor may have another size.
        if origin != x and 0 not in graph.constants.get(node.input[1], [0]):
            yield node, [graph.node("Reshape", [origin, node.input[1]], node.output)]


class Graph:
    """Producer and consumer index of an ONNX graph, with pattern matchers."""

    def __init__(self, proto):
        """Indexes an ONNX model; `replace` changes it in place."""
        from onnx import numpy_helper

        self.proto = proto
        self.constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        self.maker = {output: node for node in proto.graph.node for output in node.output}
        self.takers = {}
        for node in proto.graph.node:
            for name in set(node.input):
                self.takers.setdefault(name, []).append(node)

    @functools.cached_property
    def shapes(self):
        """Shapes of all tensors except constants by name; `None` for an axis of unknown size."""
        from onnx import shape_inference

        graph = shape_inference.infer_shapes(self.proto, data_prop=True).graph
        return {
            tensor.name: tuple(dim.dim_value or None for dim in tensor.type.tensor_type.shape.dim)
            for tensor in (*graph.input, *graph.value_info, *graph.output)
        }

    # === Reading ===

    def of(self, kind):
        """Returns the nodes of an operator type."""
        return [node for node in self.proto.graph.node if node.op_type == kind]

    def follow(self, name, *kinds):
        """Returns the last of a chain of consumers of these operator types, or `None`.

        At each step there must be exactly one consumer of the type. Consumers of other types are
        ignored.
        """
        for kind in kinds:
            found = [node for node in self.takers.get(name, ()) if node.op_type == kind]
            if len(found) != 1:
                return None
            (node,) = found
            name = node.output[0]
        return node

    def origin(self, name):
        """Returns the tensor before a chain of reshapes, or `name` if there is none."""
        while name in self.maker and self.maker[name].op_type == "Reshape":
            name = self.maker[name].input[0]
        return name

    def constant(self, node):
        """Returns the first constant among a node's inputs, or `None`."""
        return next((self.constants[x] for x in node.input if x in self.constants), None)

    def variable(self, node):
        """Returns the name of a node's first input that is not a constant."""
        return next(x for x in node.input if x not in self.constants)

    # === Writing ===

    def node(self, kind, inputs, outputs, **attributes):
        """Builds a node that is named after its first output."""
        from onnx import helper

        return helper.make_node(kind, inputs, outputs, name=outputs[0], **attributes)

    def add_constant(self, name, value):
        """Adds an initializer, and returns its name."""
        from onnx import numpy_helper

        tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        self.proto.graph.initializer.append(tensor)
        return name

    def reshape(self, x, shape, name):
        """Builds a Reshape node to a constant shape, which it adds as an initializer."""
        target = self.add_constant(f"{name}/shape", np.array(shape, "int64"))
        return self.node("Reshape", [x, target], [name])

    def replace(self, pairs):
        """Replaces nodes, and removes nodes and constants that are not needed any more."""
        graph = self.proto.graph
        places = {last.output[0]: nodes for last, nodes in pairs}
        nodes = [x for node in graph.node for x in places.get(node.output[0], [node])]
        needed, kept = {output.name for output in graph.output}, []
        for node in reversed(nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        constants = [tensor for tensor in graph.initializer if tensor.name in needed]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(reversed(kept))
        graph.initializer.extend(constants)

    # === Patterns ===

    def norm(self, negative):
        """Matches the layer norm in which `negative` is the negated mean.

        Returns:
            (last node, input, scale, bias or None, axes, epsilon), or `None` if it is not a layer
            norm.
        """
        mean = self.maker.get(negative.input[0])
        if mean is None or mean.op_type != "ReduceMean":
            return None
        shifted = self.follow(mean.output[0], "Sub", "Mul", "ReduceMean", "Add")
        factor = shifted and self.follow(shifted.output[0], "Sqrt", "Reciprocal", "Mul")
        last = self.follow(negative.output[0], "Mul", "Add")
        if not (factor and last):
            return None
        epsilon, scale, bias = (self.constant(node) for node in (shifted, factor, last))
        if bias is not None:
            last = self.follow(last.output[0], "Add")
        if last is None or epsilon is None or scale is None:
            return None
        axes = sorted(self.constants[mean.input[1]] % scale.ndim - scale.ndim)
        if axes != list(range(-len(axes), 0)):
            return None
        return last, mean.input[0], scale, bias, axes, float(epsilon)

    def scaled_for_gelu(self, node):
        """Returns whether a node multiplies the erf's argument in a GELU by sqrt(1/2)."""
        factor = self.constant(node)
        if factor is None or factor.size != 1 or not self.follow(node.output[0], "Erf"):
            return False
        return abs(float(factor) - 0.5**0.5) < 1e-6

    def is_shape_of(self, name, x, size):
        """Returns whether a tensor is computed as `x`'s shape with the last axis `size`."""
        node, constants = self.maker.get(name), []
        while node is not None and node.op_type in ("Cast", "Concat", "Gather"):
            constants += [self.constants[x].tolist() for x in node.input if x in self.constants]
            node = self.maker.get(node.input[0])
        if node is None or node.op_type != "Shape" or node.input[0] != x or len(constants) != 2:
            return False
        last, kept = constants
        return last == [size] and kept == list(range(len(kept)))

    def attention(self, softmax):
        """Matches the attention whose weights `softmax` computes.

        Returns:
            (last node, names of query, key and value before the split into heads, their (tokens,
            dim) with None for an unknown number of tokens, name of the bias or None, scale, number
            of heads), or `None` if it is not attention.
        """
        scores, bias = self.maker.get(softmax.input[0]), None
        if scores is not None and scores.op_type == "Add" and self.constant(scores) is not None:
            bias = next(x for x in scores.input if x in self.constants)
            scores = self.maker.get(self.variable(scores))
        product = self.follow(softmax.output[0], "MatMul")
        if scores is None or scores.op_type != "MatMul" or product is None:
            return None
        names = [*scores.input, product.input[1]]
        query, key, value = [self.shapes.get(name, ()) for name in names]
        rank = len(query)
        if rank < 4 or None in (*query[-3:-2], *query[-1:]):
            return None
        if not query[:-2] == key[:-2] == value[:-2]:
            return None
        if bias and self.constants[bias].shape != (1, query[-3], query[-2], value[-2]):
            return None
        last = self.follow(product.output[0], "Transpose") or product
        swapped = [*range(rank - 3), rank - 2, rank - 3, rank - 1]
        turned = [*range(rank - 3), rank - 2, rank - 1, rank - 3]
        tensors = [
            self.before(name, axes)
            for name, axes in zip(names, (swapped, turned, swapped), strict=True)
        ]
        if None in tensors or self.before(last.output[0], swapped) != product.output[0]:
            return None
        scale, scaled = 1.0, self.maker.get(tensors[0])
        factor = None if scaled is None else self.constant(scaled)
        if factor is not None and scaled.op_type == "Mul" and factor.size == 1:
            scale = factor.item()
            tensors[0] = self.origin(self.variable(scaled))
        heads = query[-3]
        sizes = [(tokens, heads * dim) for tokens, dim in (query[-2:], key[:-3:-1], value[-2:])]
        return last, tensors, sizes, bias, scale, heads

    def before(self, name, axes):
        """Returns the tensor that a tensor is the transpose of, along these axes, or `None`.

        A transpose that only moves axes of size 1 is equivalent to a reshape, and is ignored.
        """
        node, shape = self.maker.get(name), self.shapes[name]
        found = range(len(shape))
        if node is not None and node.op_type == "Transpose":
            name, found = node.input[0], attributes_of(node)["perm"]
        first, second = (
            np.argsort(
                [axis for axis, size in zip(order, shape, strict=True) if size != 1]
            ).tolist()
            for order in (found, axes)
        )
        return self.origin(name) if first == second else None


def attributes_of(node):
    """Returns a node's attributes by name."""
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}
