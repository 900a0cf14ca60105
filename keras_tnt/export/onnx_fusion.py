"""Norms and GELUs of an ONNX graph in the forms that runtimes have fast kernels for.

tf2onnx writes a layer norm as a dozen operators, and GELU as ONNX Runtime does not recognise it.
"""

import numpy as np


def fuse(proto):
    """Write layer norms as one operator, and GELUs with the division that ONNX Runtime looks for.

    Args:
        proto: an ONNX model, changed in place; of an opset below 18 its norms stay as they are.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = Graph(proto.graph)
    (opset,) = (entry.version for entry in proto.opset_import if not entry.domain)
    found = [graph.norm(node) for node in proto.graph.node if node.op_type == "Neg"]
    norms = [norm for norm in found if norm] if opset >= 18 else []
    for number, (last, x, scale, bias, axes, epsilon) in enumerate(norms):
        names, shape = [], scale.shape[-len(axes) :]
        for name, value in (("scale", scale), ("bias", bias)):
            if value is not None:
                names.append(f"layer_norm_{number}/{name}")
                value = np.broadcast_to(value, scale.shape).reshape(shape)
                proto.graph.initializer.append(numpy_helper.from_array(value.copy(), names[-1]))
        node = helper.make_node(
            "LayerNormalization",
            [x, *names],
            list(last.output),
            name=f"layer_norm_{number}",
            axis=-len(axes),
            epsilon=epsilon,
        )
        last.CopyFrom(node)
    gelus = [node for node in proto.graph.node if graph.scaled_for_gelu(node)]
    if gelus:
        root = helper.make_tensor("gelu/root_two", TensorProto.FLOAT, [], [2**0.5])
        proto.graph.initializer.append(root)
    for node in gelus:
        x = next(name for name in node.input if name not in graph.constants)
        node.CopyFrom(
            helper.make_node("Div", [x, "gelu/root_two"], list(node.output), name=node.name)
        )
    drop_unused(proto.graph)


class Graph:
    """Who makes a tensor and who takes it, and the patterns that are looked for."""

    def __init__(self, graph):
        from onnx import numpy_helper

        self.constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.maker = {output: node for node in graph.node for output in node.output}
        self.takers = {}
        for node in graph.node:
            for name in set(node.input):
                self.takers.setdefault(name, []).append(node)

    def follow(self, name, *kinds):
        """The last of a chain of nodes of these kinds, from a tensor on; None if there is none.

        At each step there must be one such node; nodes of other kinds may take the tensor too.
        """
        for kind in kinds:
            found = [node for node in self.takers.get(name, ()) if node.op_type == kind]
            if len(found) != 1:
                return None
            (node,) = found
            name = node.output[0]
        return node

    def constant(self, node):
        """The constant among a node's inputs; None if there is none."""
        return next((self.constants[x] for x in node.input if x in self.constants), None)

    def norm(self, negative):
        """What is normalised where `negative` is the negated mean.

        Returns:
            (last node, tensor, scale, bias or None, axes, epsilon); None if it is no layer norm.
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
        """Whether a node is the product with sqrt(1/2) before the erf of a GELU."""
        if node.op_type != "Mul" or not self.follow(node.output[0], "Erf"):
            return False
        factor = self.constant(node)
        return factor is not None and factor.size == 1 and abs(float(factor) - 0.5**0.5) < 1e-6


def drop_unused(graph):
    """Remove the nodes and constants whose result nobody takes."""
    needed, kept = {output.name for output in graph.output}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    constants = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(constants)
