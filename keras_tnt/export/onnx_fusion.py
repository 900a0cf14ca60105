"""Norms and GELUs of an ONNX graph in the forms that runtimes have fast kernels for.

tf2onnx writes a layer norm as a dozen operators, and GELU as ONNX Runtime does not recognise it.
"""

import numpy as np


def fuse(proto):
    """Write layer norms as one operator, and GELUs with the division that ONNX Runtime looks for.

    Args:
        proto: an ONNX model, changed in place; of an opset below 18 its norms stay as they are.

    Returns:
        (number of norms, number of GELUs) rewritten.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = Graph(proto.graph)
    (opset,) = (entry.version for entry in proto.opset_import if not entry.domain)
    found = [graph.norm(node) for node in proto.graph.node if node.op_type == "Neg"]
    norms = [norm for norm in found if norm] if opset >= 18 else []
    for number, (last, x, scale, bias, axes, epsilon) in enumerate(norms):
        weights = {"scale": scale} if bias is None else {"scale": scale, "bias": bias}
        names = [f"layer_norm_{number}/{key}" for key in weights]
        shape = scale.shape[scale.ndim - len(axes) :]
        for name, value in zip(names, weights.values(), strict=True):
            value = np.broadcast_to(value, scale.shape).reshape(shape)
            proto.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
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
        x, _ = graph.split(node)
        node.CopyFrom(
            helper.make_node("Div", [x, "gelu/root_two"], list(node.output), name=node.name)
        )
    drop_unused(proto.graph)
    return len(norms), len(gelus)


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

    def taker(self, name, kind):
        """The one node of this kind that takes a tensor."""
        found = [node for node in self.takers.get(name, ()) if node.op_type == kind]
        return found[0] if len(found) == 1 else None

    def split(self, node):
        """A node's tensor and its constant, in whichever order they stand; None for no constant."""
        for name, other in (node.input, reversed(node.input)):
            if other in self.constants:
                return name, self.constants[other]
        return None, None

    def norm(self, negative):
        """What is normalised where `negative` is the negated mean.

        Returns:
            (last node, tensor, scale, bias or None, axes, epsilon); None if it is no layer norm.
        """
        mean = self.maker.get(negative.input[0])
        if mean is None or mean.op_type != "ReduceMean":
            return None
        x = mean.input[0]
        chain = self.taker(mean.output[0], "Sub")
        for kind in ("Mul", "ReduceMean", "Add"):
            chain = chain and self.taker_of(chain, kind)
        epsilon = chain and self.split(chain)[1]
        for kind in ("Sqrt", "Reciprocal", "Mul"):
            chain = chain and self.taker_of(chain, kind)
        if not chain or epsilon is None:
            return None
        scale = self.split(chain)[1]
        shifted = self.taker(negative.output[0], "Mul")
        last = shifted and self.taker_of(shifted, "Add")
        bias = last and self.split(last)[1]
        if bias is not None:
            last = self.taker_of(last, "Add")
        if scale is None or last is None:
            return None
        axes = sorted(self.constants[mean.input[1]] % scale.ndim - scale.ndim)
        if axes != list(range(-len(axes), 0)):
            return None
        return last, x, scale, bias, axes, float(epsilon)

    def taker_of(self, node, kind):
        return self.taker(node.output[0], kind)

    def scaled_for_gelu(self, node):
        """Whether a node is the product with sqrt(1/2) before the erf of a GELU."""
        if node.op_type != "Mul" or not self.taker(node.output[0], "Erf"):
            return False
        _, factor = self.split(node)
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
