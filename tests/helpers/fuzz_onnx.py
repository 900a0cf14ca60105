"""Mutation fuzzing of ONNX graphs: our sessions must agree with plain ONNX Runtime and not crash.

    python tests/helpers/fuzz_onnx.py --count=10000

A small graph contains two blocks that a session replaces with C++ kernels, and operators before and
after them. It is mutated in one to four places: nodes, operands, attributes, weights, shapes and
declared types. Each mutant runs in plain ONNX Runtime and in `onnx_session`, in a forked process
with limited memory. A mutant passes if both refuse the file or both give the same numbers. It also
passes if only ours refuses it, with an explicit error about a node of our domains, or about an
attribute or constant for which ONNX Runtime aborts.
"""

import argparse
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).parents[2]
PATCHES, WORDS, DIM, HEADS, HIDDEN, OUT = 2, 16, 8, 2, 16, 8
TOLERANCE = 1e-4
MEMORY, SECONDS, BATCH = 6 << 30, 300, 100


# === The graph ===


# Parts of the messages for what our sessions refuse on purpose.
FATAL, RESERVED = "ends the process", "are for operators that are put into a graph"


def block(number, x, rng, nodes, weights, opset):
    """Appends a transformer block on words as `keras_tnt.export.onnx` writes it."""

    def weight(name, value):
        weights.append(numpy_helper.from_array(np.asarray(value), f"b{number}/{name}"))
        return f"b{number}/{name}"

    def normal(*shape):
        return (rng.normal(size=shape) * 0.3).astype("float32")

    def node(kind, inputs, count=1, **attributes):
        outputs = [f"b{number}/{len(nodes)}/{i}" for i in range(count)]
        nodes.append(
            helper.make_node(kind, inputs, outputs, f"b{number}/{len(nodes)}", **attributes)
        )
        return outputs if count > 1 else outputs[0]

    def ints(name, values):
        return weight(name, np.array(values, "int64"))

    def norm(name, x):
        scale, bias = weight(f"{name}_scale", 1 + normal(DIM)), weight(f"{name}_bias", normal(DIM))
        return node("LayerNormalization", [x, scale, bias], axis=-1, epsilon=1e-5)

    def dense(name, x, inputs, outputs):
        product = node("MatMul", [x, weight(f"{name}_kernel", normal(inputs, outputs))])
        return node("Add", [product, weight(f"{name}_bias", normal(outputs))])

    head_dim = DIM // HEADS
    scale = np.float32(head_dim**-0.5)
    qkv = dense("qkv", norm("norm_attention", x), DIM, 3 * DIM)
    parts = node("Split", [qkv], 3, axis=-1, num_outputs=3)
    if opset == 23:
        shape = ints("rows", [-1, WORDS, DIM])
        parts = [node("Reshape", [part, shape]) for part in parts]
        mixed = node("Attention", parts, q_num_heads=HEADS, kv_num_heads=HEADS, scale=float(scale))
    else:
        shape = ints("heads", [-1, PATCHES, WORDS, HEADS, head_dim])
        query, key, value = (node("Reshape", [part, shape]) for part in parts)
        query = node("Mul", [query, weight("scale", scale)])
        query, value = (node("Transpose", [each], perm=[0, 1, 3, 2, 4]) for each in (query, value))
        key = node("Transpose", [key], perm=[0, 1, 3, 4, 2])
        scores = node("Softmax", [node("MatMul", [query, key])])
        mixed = node("Transpose", [node("MatMul", [scores, value])], perm=[0, 1, 3, 2, 4])
    mixed = node("Reshape", [mixed, ints("words", [-1, PATCHES, WORDS, DIM])])
    middle = node("Add", [x, dense("projection", mixed, DIM, DIM)])
    hidden = dense("fc1", norm("norm_mlp", middle), DIM, HIDDEN)
    over = node("Div", [hidden, weight("root", np.array([2**0.5], "float32"))])
    one = node("Add", [weight("one", np.float32(1)), node("Erf", [over])])
    half = node("Mul", [weight("half", np.float32(0.5)), hidden])
    return node("Add", [middle, dense("fc2", node("Mul", [half, one]), HIDDEN, DIM)])


def graph(seed=0, opset=18):
    """Returns the model to mutate: words, two blocks, a mean over words, and a dense layer."""
    rng = np.random.default_rng(seed)
    nodes, weights = [], []

    def weight(name, value):
        weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    position = weight("position", rng.normal(size=(WORDS, DIM)).astype("float32"))
    nodes.append(helper.make_node("Reshape", ["words", weight("shape", np.array(
        [-1, PATCHES, WORDS, DIM], "int64"))], ["reshaped"], "reshaped"))  # fmt: skip
    nodes.append(helper.make_node("Add", ["reshaped", position], ["placed"], "placed"))
    x = block(1, "placed", rng, nodes, weights, opset)
    x = block(2, x, rng, nodes, weights, opset)
    axes = weight("axes", np.array([1, 2], "int64"))
    nodes.append(helper.make_node("ReduceMean", [x, axes], ["mean"], "mean", keepdims=0))
    kernel = weight("kernel", rng.normal(size=(DIM, OUT)).astype("float32"))
    nodes.append(helper.make_node("MatMul", ["mean", kernel], ["scores"], "scores"))
    model = helper.make_graph(
        nodes,
        "fuzz",
        [
            helper.make_tensor_value_info(
                "words", TensorProto.FLOAT, ["batch", PATCHES * WORDS, DIM]
            )
        ],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", OUT])],
        weights,
    )
    return helper.make_model(model, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def words(batch=3):
    shape = batch, PATCHES * WORDS, DIM
    return np.random.default_rng(1).normal(size=shape).astype("float32")


# === Mutations ===


def tensors(model):
    names = [name for node in model.graph.node for name in node.output if name]
    return [*names, "words", *(tensor.name for tensor in model.graph.initializer)]


def swap_operands(model, draw):
    node = draw.choice([n for n in model.graph.node if len(n.input) > 1])
    one, other = draw.sample(range(len(node.input)), 2)
    node.input[one], node.input[other] = node.input[other], node.input[one]


def rewire(model, draw):
    node = draw.choice(model.graph.node)
    node.input[draw.randrange(len(node.input))] = draw.choice(tensors(model))


def take_other_kind(model, draw):
    """Changes the operator of a node, mostly to one that the graph contains."""
    node = draw.choice(model.graph.node)
    kinds = ["Sub", "Pow", "Mul", "Add", "Div", "Max", "Erf", "Tanh", "Relu", "Identity", "Softmax"]
    kinds += ["LogSoftmax", "MatMul", "Reshape", "Transpose", "LayerNormalization", "Flatten"]
    node.op_type = draw.choice(kinds)


def remove_node(model, draw):
    """Removes a node and mostly connects its first input to its consumers."""
    place = draw.randrange(len(model.graph.node))
    node = model.graph.node[place]
    past, gone = node.input[0], node.output[0]
    del model.graph.node[place]
    if draw.random() < 0.8:
        for other in model.graph.node:
            other.input[:] = [past if name == gone else name for name in other.input]


def repeat_node(model, draw):
    """Duplicates a node, with the same or a new output name that other nodes may consume."""
    place = draw.randrange(len(model.graph.node))
    copy = onnx.NodeProto.FromString(model.graph.node[place].SerializeToString())
    if draw.random() < 0.8:
        gone, copy.name = copy.output[0], copy.name + "/again"
        copy.output[:] = [name + "/again" for name in copy.output]
        for other in model.graph.node:
            if draw.random() < 0.5:
                other.input[:] = [copy.output[0] if name == gone else name for name in other.input]
    model.graph.node.insert(place + draw.randrange(2), copy)


def put_between(model, draw):
    """Inserts a node on an edge; most of the operators preserve the shape."""
    node = draw.choice(model.graph.node)
    place, name = draw.randrange(len(node.input)), f"between/{draw.random()}"
    kind = draw.choice(["Identity", "Neg", "Abs", "Relu", "Cast", "Softmax", "Transpose", "Exp"])
    attributes = {"to": draw.choice([1, 10, 11])} if kind == "Cast" else {}
    made = helper.make_node(kind, [node.input[place]], [name], name, **attributes)
    model.graph.node.insert(list(model.graph.node).index(node), made)
    node.input[place] = name


def change_attribute(model, draw):
    nodes = [node for node in model.graph.node if node.attribute]
    node = draw.choice(nodes)
    attribute = draw.choice(node.attribute)
    if draw.random() < 0.1:
        node.attribute.remove(attribute)
    elif attribute.type == attribute.INT:
        attribute.i = draw.choice([-3, -2, -1, 0, 1, 2, 3, 4, 8, 2**31, attribute.i + 1])
    elif attribute.type == attribute.FLOAT:
        factors = [0, -1, 0.5, 2, 1 + 1e-3, float("inf"), float("nan")]
        attribute.f = attribute.f * draw.choice(factors)
    elif attribute.type == attribute.INTS:
        draw.shuffle(attribute.ints)
        if draw.random() < 0.2:
            attribute.ints.append(draw.choice([-1, 0, 9]))


def add_attribute(model, draw):
    node = draw.choice(model.graph.node)
    name = draw.choice(["axis", "epsilon", "perm", "keepdims", "allowzero", "is_causal", "softcap",
                        "stash_type", "num_outputs", "start", "alpha"])  # fmt: skip
    value = {"perm": [1, 0, 2, 3], "epsilon": 0.1, "softcap": 0.5}.get(name, draw.choice([0, 1, 2]))
    if name not in [attribute.name for attribute in node.attribute]:
        node.attribute.append(helper.make_attribute(name, value))


def change_shape(model, draw):
    """Changes the shape of a constant, with or without changing the number of elements."""
    tensor = draw.choice(model.graph.initializer)
    value = numpy_helper.to_array(tensor)
    kind = draw.randrange(6)
    if kind == 0:
        value = value.T
    elif kind == 1:
        value = value.reshape(-1)
    elif kind == 2:
        value = value[None]
    elif kind == 3 and value.ndim:
        axis = draw.randrange(value.ndim)
        size = draw.choice([1, 2, 4, 6, 7, 8, 16, 24])
        value = np.take(value, np.arange(size) % value.shape[axis], axis)
    elif kind == 4 and value.ndim == 2:
        value = value[: draw.choice([1, 2, 4, 8]), : draw.choice([2, 6, 8, 12])]
    else:
        value = value.reshape(*value.shape, 1)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))


def claim_shape(model, draw):
    """Declares dimensions of a constant that do not match its data."""
    tensor = draw.choice(model.graph.initializer)
    if tensor.dims:
        tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice([0, 1, -1, 7, 4096, 2**40])
    else:
        tensor.dims.append(draw.choice([0, 1, 3]))


def change_value(model, draw):
    tensor = draw.choice(model.graph.initializer)
    value = np.array(numpy_helper.to_array(tensor))
    flat = value.reshape(-1)
    if value.dtype == np.int64:
        flat[draw.randrange(len(flat))] = draw.choice([-1, 0, 1, 2, 3, 4, 8, 16, 32, 4096, 2**40])
    elif draw.random() < 0.3:
        flat[draw.randrange(len(flat))] = draw.choice([0, 1, -1, 1e-9, 1e4, np.nan, np.inf])
    else:
        flat *= draw.choice([0, -1, 0.5, 2, 1.001])
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def clear_integers(model, draw):
    """Sets an integer constant, such as a shape or a size, to 0."""
    integers = [t for t in model.graph.initializer if t.data_type == TensorProto.INT64]
    tensor = draw.choice(integers)
    value = np.zeros_like(numpy_helper.to_array(tensor))
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def split_to_sequence(model, draw):
    """Splits a tensor into parts of a size, 0 included, and joins them again."""
    node = draw.choice([n for n in model.graph.node if n.op_type in ("Add", "Mul", "Reshape")])
    made, size = f"sequence/{draw.random()}", draw.choice([-1, 0, 1, 2, 3, 99])
    split = numpy_helper.from_array(np.array(size), made + "/split")
    model.graph.initializer.append(split)
    place = draw.randrange(len(node.input))
    nodes = [
        helper.make_node("SplitToSequence", [node.input[place], split.name], [made], axis=-1),
        helper.make_node("ConcatFromSequence", [made], [made + "/joined"], axis=-1),
    ]
    node.input[place] = made + "/joined"
    for before in reversed(nodes):
        model.graph.node.insert(list(model.graph.node).index(node), before)


def change_type(model, draw):
    tensor = draw.choice(model.graph.initializer)
    value = numpy_helper.to_array(tensor)
    kind = draw.choice(["float64", "float16", "int32", "int64", "float32"])
    tensor.CopyFrom(numpy_helper.from_array(np.nan_to_num(value).astype(kind), tensor.name))


def claim_value_info(model, draw):
    """Declares a shape and type of a tensor, right or wrong, such as 2048 words for 16."""
    name = draw.choice(tensors(model))
    sizes = [1, 2, 3, 4, 8, 16, 24, 32, 2048, 4096, "batch", "n", None, 0]
    shape = [draw.choice(sizes) for _ in range(draw.choice([0, 1, 2, 3, 4, 4, 4, 5]))]
    if len(shape) == 4 and draw.random() < 0.7:
        shape = ["batch", PATCHES, draw.choice([16, 32, 2048, 4096]), draw.choice([8, 16])]
    kind = draw.choice([1, 1, 1, 1, 7, 10, 16])
    model.graph.value_info.append(helper.make_tensor_value_info(name, kind, shape))


def claim_end(model, draw):
    """Changes a declared dimension of the input or the output."""
    end = draw.choice([model.graph.input[0], model.graph.output[0]])
    dim = draw.choice(end.type.tensor_type.shape.dim)
    dim.Clear()
    value = draw.choice([1, 2, 3, 16, 32, 4096, "n"])
    if isinstance(value, int):
        dim.dim_value = value
    else:
        dim.dim_param = value


def add_output(model, draw):
    name = draw.choice(tensors(model))
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))


def add_input(model, draw):
    """Declares a constant as a graph input too."""
    tensor = draw.choice(model.graph.initializer)
    model.graph.input.append(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
    )


def repeat_constant(model, draw):
    """Duplicates, removes or renames a constant."""
    place = draw.randrange(len(model.graph.initializer))
    tensor = model.graph.initializer[place]
    kind = draw.randrange(3)
    if kind == 0:
        value = numpy_helper.to_array(tensor)
        model.graph.initializer.append(numpy_helper.from_array(value * 2, tensor.name))
    elif kind == 1:
        del model.graph.initializer[place]
    else:
        tensor.name = draw.choice(tensors(model))


def reorder(model, draw):
    place = draw.randrange(len(model.graph.node))
    node = onnx.NodeProto.FromString(model.graph.node[place].SerializeToString())
    del model.graph.node[place]
    model.graph.node.insert(draw.randrange(len(model.graph.node)), node)


def use_our_operator(model, draw):
    """Adds a node of our operator to the file, with inputs of any shape."""
    names = tensors(model)
    inputs = [draw.choice(names) for _ in range(draw.choice([1, 12, 13, 13, 13, 14]))]
    domain = draw.choice(["keras_tnt", "keras_tnt_0_16_8_2_16_0_0", "keras_tnt_1_16_8_2_16_0_0"])
    kind = draw.choice(["InnerTransformer", "InnerTransformer", "OuterTransformer"])
    node = helper.make_node(kind, inputs, ["forged"], "forged", domain=domain, epsilon=1e-5)
    model.graph.node.insert(draw.randrange(len(model.graph.node)), node)
    model.opset_import.append(helper.make_opsetid(domain, 1))
    model.graph.output.append(helper.make_tensor_value_info("forged", TensorProto.FLOAT, None))


def put_into_branch(model, draw):
    """Adds an `If` whose branches capture a tensor of the outer graph."""
    name, made = draw.choice(tensors(model)), f"if/{draw.random()}"
    body = helper.make_graph(
        [helper.make_node("Identity", [name], [made + "/inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info(made + "/inner", TensorProto.FLOAT, None)],
    )
    condition = numpy_helper.from_array(np.array(True), made + "/condition")
    model.graph.initializer.append(condition)
    model.graph.node.append(
        helper.make_node("If", [condition.name], [made], then_branch=body, else_branch=body)
    )
    model.graph.output.append(helper.make_tensor_value_info(made, TensorProto.FLOAT, None))


def add_function(model, draw):
    """Adds a function to the file, possibly under the name of a standard operator."""
    domain = draw.choice(["", "own", "keras_tnt"])
    kind = draw.choice(["Erf", "Softmax", "Own"])
    function = helper.make_function(
        domain, kind, ["x"], ["y"], [helper.make_node("Neg", ["x"], ["y"])],
        [helper.make_opsetid("", 18)],
    )  # fmt: skip
    model.functions.append(function)
    if domain:
        model.opset_import.append(helper.make_opsetid(domain, 1))
        draw.choice([n for n in model.graph.node if len(n.input) == 1]).CopyFrom(
            helper.make_node(kind, ["placed"], ["own"], "own", domain=domain)
        )


def change_opset(model, draw):
    model.opset_import[0].version = draw.choice([1, 7, 12, 13, 17, 18, 19, 20, 21, 22, 23, 24, 99])
    if draw.random() < 0.2:
        model.opset_import.append(helper.make_opsetid("", draw.choice([13, 18])))


def change_domain(model, draw):
    draw.choice(model.graph.node).domain = draw.choice(["ai.onnx", "com.microsoft", "x"])


MUTATIONS = [
    *(swap_operands, rewire, take_other_kind, remove_node, repeat_node, put_between),
    *(change_attribute, add_attribute, change_shape, change_shape, claim_shape, change_value),
    *(change_value, change_type, claim_value_info, claim_value_info, claim_end, add_output),
    *(add_input, repeat_constant, reorder, use_our_operator, put_into_branch, add_function),
    *(change_opset, change_domain, clear_integers, split_to_sequence),
]


def mutate(seed):
    """Returns the mutated model of a seed, and the names of its mutations."""
    draw = random.Random(seed)
    model, done = graph(opset=draw.choice([18, 18, 23])), []
    for _ in range(draw.choice([1, 1, 1, 2, 2, 3, 4])):
        mutation = draw.choice(MUTATIONS)
        try:
            mutation(model, draw)
            done.append(mutation.__name__)
        except Exception:  # an earlier mutation made this one impossible
            continue
    return model, done


# === Running ===


def answers(session, given):
    """Returns the outputs of a session, or "refused: ..." with the error."""
    try:
        session = session()
        names = [value.name for value in session.get_inputs()]
        return session.run(None, {name: given for name in names if name == "words"})
    except Exception as error:  # of any kind
        return describe(error)


def describe(error):
    """Returns "refused: ...", or "raw ..." for an error of a bug rather than of a check."""
    if isinstance(error, (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError)):
        return f"raw {type(error).__name__}: {error}"
    return f"refused: {error}"


def is_refused(found, *reasons):
    """Returns whether a result is a refusal for one of these reasons."""
    return isinstance(found, str) and any(reason in found for reason in reasons)


def compare(expected, found):
    """Returns a description of the difference between two results. `None` if they agree."""
    if is_refused(found, RESERVED):
        return None
    if isinstance(found, str) and found.startswith("raw "):
        return found
    if isinstance(expected, str) or isinstance(found, str):
        if isinstance(expected, str) and isinstance(found, str):
            return None
        return f"plain: {str(expected)[:300]} / ours: {str(found)[:300]}"
    for one, other in zip(expected, found, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"shapes {one.shape} and {other.shape}"
        if one.dtype.kind != "f":
            if not np.array_equal(one, other):
                return "other integers"
            continue
        if not np.array_equal(np.isnan(one), np.isnan(other)):
            return "NaN in other places"
        finite = np.isfinite(one) & np.isfinite(other)
        if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
            return "infinite in other places"
        scale = np.abs(one[finite]).max(initial=1.0)
        worst = np.abs(one[finite] - other[finite]).max(initial=0) / scale
        if not worst <= TOLERANCE:
            return f"differs by {worst:.2e}"
    return None


def try_one(seed, path, runtime):
    """Runs one mutant, and returns (difference or None, outcome, names of mutations)."""
    import onnxruntime

    model, done = mutate(seed)
    try:
        onnx.save(model, path)
    except Exception:
        return None, "not written", done
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.inter_op_num_threads = 1

    def plain():
        return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])

    if runtime == "onnxruntime":
        from keras_tnt.export.onnx_runtime import fatal_in, nodes_and_constants, onnx_session

        if any(
            fatal_in(*found) for found in nodes_and_constants(model)
        ):  # plain() would abort the process
            refusal = answers(lambda: onnx_session(path, options), words())
            refused = is_refused(refusal, FATAL, RESERVED)
            return None if refused else f"not refused: {refusal}", "fatal to ONNX Runtime", done
        expected = answers(plain, words())
        found = answers(lambda: onnx_session(path, options), words())
    else:
        expected, found = openvino_answers(path)
        if is_refused(found, FATAL):  # OpenVINO may accept what ONNX Runtime does not survive
            return None, "fatal to ONNX Runtime", done
    ending = "refused" if isinstance(expected, str) else "answered"
    if isinstance(found, str) and not isinstance(expected, str):
        ending = "refused by ours"
    return compare(expected, found), ending, done


def openvino_answers(path):
    """Returns the results of plain OpenVINO and of our session."""
    from keras_tnt.export import openvino_runtime

    def plain():
        core = openvino_runtime.core()
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        return core.compile_model(core.read_model(path), "CPU", settings)([words()])

    results = []
    for run in (plain, lambda: openvino_runtime.openvino_session(path)(words())):
        try:
            results.append([np.array(x) for x in run().values()])
        except Exception as error:  # of any kind
            results.append(describe(error))
    return results


def run_batch(seeds, runtime, results):
    """Runs seeds in this forked process, and writes each result as soon as it is known."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as folder, open(results, "ab") as file:
        for seed in seeds:
            signal.alarm(SECONDS)
            result = try_one(seed, os.path.join(folder, "mutated.onnx"), runtime)
            file.write(pickle.dumps((seed, *result)))
            file.flush()
    os._exit(0)


def fuzz(seeds, runtime="onnxruntime", progress=None):
    """Runs mutants in forked processes.

    Args:
        seeds: seeds of the mutations.
        runtime: "onnxruntime" or "openvino".
        progress: optional function that is called with both results after each process.

    Returns:
        (counts of outcomes, list of (seed, difference, names of mutations)).
    """
    import onnxruntime  # noqa: F401, which each process would import

    import keras_tnt.export.openvino_runtime  # noqa: F401

    seeds, counts, wrong = list(seeds), Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        results = os.path.join(folder, "results")
        while seeds:
            batch = seeds[:BATCH]
            Path(results).write_bytes(b"")
            child = os.fork()
            if not child:
                try:
                    sys.stderr = open(os.devnull, "w")
                    os.dup2(sys.stderr.fileno(), 2)
                    run_batch(batch, runtime, results)
                finally:
                    os._exit(1)
            status = os.waitpid(child, 0)[1]
            done = 0
            with open(results, "rb") as file:
                while True:
                    try:
                        seed, problem, ending, mutations = pickle.load(file)
                    except EOFError:
                        break
                    done += 1
                    counts[ending] += 1
                    if problem:
                        wrong.append((seed, problem, mutations))
            if done < len(batch):  # the process crashed at this seed
                seed = batch[done]
                counts["crashed"] += 1
                wrong.append((seed, f"the process ended with status {status}", mutate(seed)[1]))
                done += 1
            seeds = seeds[done:]
            if progress:
                progress(counts, wrong)
    return counts, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="mutations (default: 200)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--runtime", default="onnxruntime", choices=["onnxruntime", "openvino"])
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.count)

    told = 0

    def progress(counts, wrong):
        nonlocal told
        for seed, problem, mutations in wrong[told:]:
            print(f"seed {seed}: {', '.join(mutations)}: {problem}", flush=True)
        told = len(wrong)
        print(dict(counts), f"wrong: {told}", flush=True)

    counts, wrong = fuzz(seeds, options.runtime, progress)
    print(f"{sum(counts.values())} mutations: {dict(counts)}; {len(wrong)} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("KERAS_BACKEND", "numpy")
    sys.exit(main())
