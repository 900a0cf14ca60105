"""Files without the expected patterns run unchanged or are refused, without memory errors."""

import os
import subprocess
import sys

import numpy as np
import pytest

from keras_tnt import kernels
from keras_tnt.kernels import runtimes
from tests.helpers import fuzz_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from keras_tnt.export.onnx_runtime import onnx_session, use_native  # noqa: E402

pytestmark = pytest.mark.one_backend

ROOT = fuzz_onnx.ROOT
DIM, WORDS = fuzz_onnx.DIM, fuzz_onnx.WORDS


def saved(model, path):
    onnx.save(model, path)
    return str(path)


def constants(model):
    return {tensor.name: tensor for tensor in model.graph.initializer}


def set_constant(model, name, value):
    tensor = constants(model)[name]
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))


def node_of(model, kind, number=0):
    return [node for node in model.graph.node if node.op_type == kind][number]


def check_equal(path):
    """Checks that our session matches plain ONNX Runtime or both refuse; returns the answer."""
    given = {"words": fuzz_onnx.words()}

    def run(session):
        return fuzz_onnx.answers(session, given["words"])

    expected = run(lambda: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))
    assert fuzz_onnx.compare(expected, run(lambda: onnx_session(path))) is None
    return expected


@pytest.mark.parametrize("opset", [18, 23])
def test_both_blocks_of_the_original_graph_are_replaced(opset, tmp_path):
    model = fuzz_onnx.graph(opset=opset)
    assert not isinstance(check_equal(saved(model, tmp_path / "m.onnx")), str)
    assert len(use_native(model, "keras_tnt")) == 1
    assert [node.op_type for node in model.graph.node].count("InnerTransformer") == 2
    onnx.checker.check_model(model)


# === Subgraphs similar to a block ===


def swap(kind):
    def change(model):
        node = node_of(model, kind)
        node.input[0], node.input[1] = node.input[1], node.input[0]

    return change


def attribute(kind, name, value):
    def change(model):
        node = node_of(model, kind)
        for old in [a for a in node.attribute if a.name == name]:
            node.attribute.remove(old)
        node.attribute.append(onnx.helper.make_attribute(name, value))

    return change


def constant(name, value):
    def change(model):
        before = onnx.numpy_helper.to_array(constants(model)[name])
        set_constant(model, name, value(before) if callable(value) else value)

    return change


def narrow_attention(model):
    """Narrows query, key and value to 2 of 8 dimensions."""
    set_constant(model, "b1/qkv_kernel", np.ones((8, 6), "float32") * 0.1)
    set_constant(model, "b1/qkv_bias", np.zeros(6, "float32"))
    set_constant(model, "b1/heads", np.array([-1, 2, 16, 2, 1]))
    set_constant(model, "b1/words", np.array([-1, 2, 16, 2]))
    set_constant(model, "b1/projection_kernel", np.ones((2, 8), "float32"))


def other_input_of_a_residual(model):
    additions = [node for node in model.graph.node if node.op_type == "Add"]
    (residual,) = [node for node in additions if node.input[0] == "placed"]
    residual.input[0] = "reshaped"


def branch_twice(model):
    node = [n for n in model.graph.node if n.op_type == "Add" and n.input[0] == "placed"][0]
    node.input[0] = node.input[1]


def constant_that_is_an_input(model):
    tensor = constants(model)["b1/fc1_bias"]
    model.graph.input.append(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
    )


def values_for_keys(model):
    split = node_of(model, "Split")
    split.output[1], split.output[2] = split.output[2], split.output[1]


NO_BLOCKS = {
    "divided the other way": swap("Div"),
    "multiplied the other way": swap("MatMul"),
    "softmax over queries": attribute("Softmax", "axis", 3),
    "norm of other numbers": attribute("LayerNormalization", "axis", 2),
    "another epsilon": attribute("LayerNormalization", "epsilon", 0.5),
    "statistics in another type": attribute("LayerNormalization", "stash_type", 10),
    "heads side by side": attribute("Transpose", "perm", [0, 1, 2, 3, 4]),
    "split of other axes": attribute("Split", "axis", 2),
    "another scale": constant("b1/scale", np.float32(0.4)),
    "another half": constant("b1/half", np.float32(0.6)),
    "another one": constant("b1/one", np.float32(1.1)),
    "another root": constant("b1/root", np.array([1.5], "float32")),
    "scale of one number": constant("b1/norm_mlp_scale", lambda x: x[:1]),
    "weights of NaN": constant("b1/fc2_bias", lambda x: x * np.nan),
    "heads of another count": constant("b1/heads", np.array([-1, 2, 16, 4, 2])),
    "words across patches": constant("b1/heads", np.array([-1, 1, 32, 2, 4])),
    "a bias for each word": constant("b1/fc1_bias", lambda x: np.tile(x, (WORDS, 1))),
    "narrow attention": narrow_attention,
    "residual of what came before": other_input_of_a_residual,
    "a branch twice": branch_twice,
    "a weight that can be set": constant_that_is_an_input,
    "values for keys": values_for_keys,
}


@pytest.mark.parametrize("case", NO_BLOCKS)
def test_similar_subgraph_runs_unchanged(case, tmp_path):
    model = fuzz_onnx.graph()
    NO_BLOCKS[case](model)
    check_equal(saved(model, tmp_path / "m.onnx"))
    use_native(model, "keras_tnt")
    assert [node.op_type for node in model.graph.node].count("InnerTransformer") < 2


def test_weight_with_negative_size_is_refused(tmp_path):
    model = fuzz_onnx.graph()
    constants(model)["b1/norm_mlp_bias"].dims[0] = -1
    assert isinstance(check_equal(saved(model, tmp_path / "m.onnx")), str)


@pytest.mark.parametrize("words", [2048, 4096, 32])
@pytest.mark.parametrize("of", ["placed", "scores", "reshaped"])
def test_declared_shapes_are_not_trusted(of, words, tmp_path):
    model = fuzz_onnx.graph()
    claim = onnx.helper.make_tensor_value_info(of, 1, ["batch", 2, words, DIM])
    model.graph.value_info.append(claim)
    check_equal(saved(model, tmp_path / "m.onnx"))
    assert use_native(model, "keras_tnt") == {}


def test_words_that_exceed_the_stack_are_not_replaced():
    sizes = kernels.InnerSizes(16, 8, 2, 32, False)
    assert sizes.fits_stack() and not sizes._replace(words=4096).fits_stack()
    assert not sizes._replace(hidden=1 << 20).fits_stack()


# === Operators of ours in a file ===


def forged(domain="keras_tnt_0_16_8_2_16_0_0", output="forged"):
    inputs = ["placed", *["b1/fc2_bias"] * 12]
    return onnx.helper.make_node("InnerTransformer", inputs, [output], domain=domain, epsilon=1e-5)


def in_graph(model):
    model.graph.node.append(forged())
    model.opset_import.append(onnx.helper.make_opsetid("keras_tnt_0_16_8_2_16_0_0", 1))
    model.graph.output.append(onnx.helper.make_tensor_value_info("forged", 1, None))


def in_branch(model):
    fuzz_onnx.put_into_branch(model, fuzz_onnx.random.Random(0))
    body = node_of(model, "If").attribute[0].g
    body.node.insert(0, forged("KERAS_TNT", "inner"))


def in_function(model):
    function = onnx.helper.make_function(
        "mine", "Mine", ["x"], ["y"], [forged(output="y")], [onnx.helper.make_opsetid("", 18)]
    )
    model.functions.append(function)


@pytest.mark.parametrize("place", [in_graph, in_branch, in_function])
def test_file_with_our_operator_is_refused(place, tmp_path):
    model = fuzz_onnx.graph()
    place(model)
    path = saved(model, tmp_path / "forged.onnx")
    with pytest.raises(ValueError, match=r"forged.onnx' has an operator .*export\.onnx"):
        onnx_session(path)


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize(
    ("kind", "opset", "name", "value"),
    [("Split", 18, "num_outputs", 1), ("Attention", 23, "q_num_heads", 0)],
)
def test_attributes_that_abort_onnx_runtime_are_refused(kind, opset, name, value, branch, tmp_path):
    model = fuzz_onnx.graph(opset=opset)
    (attribute,) = [a for a in node_of(model, kind).attribute if a.name == name]
    attribute.i = value
    if branch:
        fuzz_onnx.put_into_branch(model, fuzz_onnx.random.Random(1))
    with pytest.raises(ValueError, match=rf"{kind} .*{name}={value} must be .*ends the process"):
        onnx_session(saved(model, tmp_path / "m.onnx"))


FATAL = {
    "parts of 0": ("SplitToSequence", [np.arange(4.0), np.array(0)], "split=0 must be at least 1"),
    "parts of an input's size": ("SplitToSequence", [np.arange(4.0), None], "could be 0"),
    "least integer / -1": ("Div", [np.array([-(2**63), 1]), np.array(-1)], "divided by -1"),
    "least integer % -1": ("Mod", [np.array([-(2**63), 1]), np.array([-1])], "divided by -1"),
    "frames of 0": ("STFT", [np.ones((1, 8, 1)), np.array(1), "", np.array(0)], "frame_length=0"),
    "a window of 0": ("STFT", [np.ones((1, 8, 1)), np.array(1), np.ones(0)], "`window` must not"),
}


def one_node(kind, inputs, place):
    """Returns a model of one node, whose inputs are arrays, "" or (`None`) those of the model."""
    names = ["" if isinstance(value, str) else f"i{i}" for i, value in enumerate(inputs)]
    arrays = {
        name: onnx.numpy_helper.from_array(np.asarray(value), name)
        for name, value in zip(names, inputs, strict=True)
        if name and value is not None
    }
    fed = [
        onnx.helper.make_tensor_value_info(name, 7, [])
        for name, value in zip(names, inputs, strict=True)
        if value is None
    ]
    node = onnx.helper.make_node(kind, names, ["y"])
    made = [
        onnx.helper.make_node("Constant", [], [name], value=value) for name, value in arrays.items()
    ]
    if place == "a function":
        function = onnx.helper.make_function(
            "own", "Own", [v.name for v in fed], ["y"], [*made, node],
            [onnx.helper.make_opsetid("", 18)],
        )  # fmt: skip
        call = onnx.helper.make_node("Own", [v.name for v in fed], ["y"], domain="own")
        graph = onnx.helper.make_graph([call], "g", fed, [onnx.ValueInfoProto(name="y")])
        return onnx.helper.make_model(graph, functions=[function])
    nodes, weights = [node], list(arrays.values())
    if place == "Constant nodes":
        nodes, weights = [*made, node], []
    if place == "a branch":
        body = onnx.helper.make_graph(nodes, "body", [], [onnx.ValueInfoProto(name="y")])
        condition = onnx.numpy_helper.from_array(np.array(True), "condition")
        nodes = [
            onnx.helper.make_node("If", ["condition"], ["z"], then_branch=body, else_branch=body)
        ]
        weights.append(condition)
    graph = onnx.helper.make_graph(nodes, "g", fed, [onnx.ValueInfoProto(name="y")], weights)
    return onnx.helper.make_model(graph)


@pytest.mark.parametrize("place", ["initializers", "Constant nodes", "a branch", "a function"])
@pytest.mark.parametrize("case", FATAL)
def test_constants_that_abort_onnx_runtime_are_refused(case, place, tmp_path):
    kind, inputs, message = FATAL[case]
    path = saved(one_node(kind, inputs, place), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=rf"{kind} .*{message}.*ends the process"):
        onnx_session(path)


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("SplitToSequence", [np.arange(4.0)]),
        ("SplitToSequence", [np.arange(4.0), np.array(3)]),
        ("SplitToSequence", [np.arange(4.0), np.array([0, 4])]),
        ("Div", [np.array([5, 1]), np.array(-1)]),
    ],
)
def test_other_constants_run(kind, inputs, tmp_path):
    model = one_node(kind, inputs, "initializers")
    model.ir_version, model.opset_import[0].version = 8, 18
    assert onnx_session(saved(model, tmp_path / "m.onnx")).run(None, {})


def test_domain_is_secret_and_differs_between_processes():
    from keras_tnt.export.onnx_runtime import secret

    name = secret(os.getpid())
    assert name == secret(os.getpid()) and name != secret(0) and len(name) >= 32


WRONG = {
    "words of another rank": (0, lambda x: x.reshape(-1, WORDS, DIM)),
    "fewer words": (0, lambda x: x[:, :, :8]),
    "more numbers a word": (0, lambda x: np.repeat(x, 2, -1)),
    "one number": (0, lambda x: x[:1, :1, :1, :1]),
    "a norm of one number": (1, lambda w: w[:1, :1]),
    "a kernel turned": (3, lambda w: w.T),
    "a bias of another size": (4, lambda w: w[:5]),
    "an empty weight": (12, lambda w: w[:0]),
    "a scalar": (9, lambda w: w.ravel()[0].reshape(())),
}


@pytest.mark.parametrize("case", [None, *WRONG])
def test_operator_validates_its_inputs_at_run_time(case):
    """The graph has only the operator; its inputs are fed, so they can have any shape."""
    model = fuzz_onnx.graph()
    ((domain, sizes),) = use_native(model, "keras_tnt_tested").items()
    node = node_of(model, "InnerTransformer")
    values = constants(model)
    given = {"x": fuzz_onnx.words().reshape(-1, 2, WORDS, DIM)}
    given |= {f"w{i}": onnx.numpy_helper.to_array(values[n]) for i, n in enumerate(node.input[1:])}
    if case:
        place, change = WRONG[case]
        name = list(given)[place]
        given[name] = np.ascontiguousarray(change(given[name]))
    made = onnx.helper.make_node(
        "InnerTransformer", list(given), ["y"], domain=domain, epsilon=1e-5
    )
    ends = [onnx.helper.make_tensor_value_info(name, 1, None) for name in (*given, "y")]
    graph = onnx.helper.make_graph([made], "one", ends[:-1], ends[-1:])
    imports = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(domain, 1)]
    proto = onnx.helper.make_model(graph, opset_imports=imports, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    assert runtimes.register_in_onnxruntime(options, sizes, domain)
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    if case is None:
        assert session.run(None, given)[0].shape == given["x"].shape
        assert session.run(None, given | {"x": given["x"][:0]})[0].shape[0] == 0
    else:
        with pytest.raises(Exception, match="InnerTransformer"):
            session.run(None, given)


# === Files ===


@pytest.mark.parametrize("kind", ["missing", "fifo", "folder"])
def test_external_weights_that_are_no_regular_file_raise(kind, tmp_path):
    model = fuzz_onnx.graph()
    tensor = constants(model)["kernel"]
    tensor.ClearField("raw_data")
    tensor.data_location = tensor.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    {
        "missing": lambda: None,
        "fifo": lambda: os.mkfifo(tmp_path / "weights.bin"),
        "folder": lambda: (tmp_path / "weights.bin").mkdir(),
    }[kind]()
    with pytest.raises(ValueError, match="'kernel' in the file 'weights.bin'"):
        onnx_session(path)


def external(*places):
    """Returns a tensor of one number in the files at `places`."""
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=1)
    for place in places:
        tensor.external_data.add(key="location", value=place)
    return tensor


def put_into_initializer(model, tensor):
    model.graph.initializer.append(tensor)


def put_into_sparse_initializer(model, tensor):
    indices = onnx.numpy_helper.from_array(np.array([0]), "indices")
    sparse = onnx.SparseTensorProto(values=tensor, indices=indices, dims=[4])
    model.graph.sparse_initializer.append(sparse)


def put_into_sparse_value(model, tensor):
    sparse = onnx.SparseTensorProto(values=tensor, dims=[4])
    node = onnx.helper.make_node("Constant", [], ["sparse"], sparse_value=sparse)
    model.graph.node.insert(0, node)


def put_into_function(model, tensor):
    node = onnx.helper.make_node("Constant", [], ["y"], value=tensor)
    imports = [onnx.helper.make_opsetid("", 18)]
    model.functions.append(onnx.helper.make_function("own", "Own", [], ["y"], [node], imports))


@pytest.mark.parametrize("places", [(), ("a", "b"), ("missing",)])
@pytest.mark.parametrize(
    "put",
    [
        put_into_initializer,
        put_into_sparse_initializer,
        put_into_sparse_value,
        put_into_function,
    ],
)
def test_external_weights_have_one_file_each(put, places, tmp_path):
    model = fuzz_onnx.graph()
    put(model, external(*places))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    said = "in the file 'missing'" if places == ("missing",) else "exactly one `location`"
    with pytest.raises(ValueError, match=f"the weight 'w' .*{said}"):
        onnx_session(path)


def test_external_weights_are_loaded(tmp_path):
    model = fuzz_onnx.graph()
    onnx.save(
        model, tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=200
    )
    assert not isinstance(check_equal(str(tmp_path / "m.onnx")), str)


@pytest.mark.parametrize("content", [b"", b"no protobuf", b"\x08" * 100])
def test_invalid_onnx_file_raises(content, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(Exception, match="(?i)onnx"):
        onnx_session(path)


def change_type(model, name, dtype):
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    values = onnx.numpy_helper.to_array(tensor).astype(dtype)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))


@pytest.mark.parametrize(("name", "dtype"), [("b1/words", "int32"), ("b2/words", "float64")])
def test_graphs_whose_types_cannot_be_inferred_are_not_rewritten(name, dtype, tmp_path):
    model, path = fuzz_onnx.graph(), tmp_path / "m.onnx"
    change_type(model, name, dtype)
    onnx.save(model, path)
    assert "refused" in check_equal(path)
    pytest.importorskip("openvino")
    assert fuzz_onnx.compare(*fuzz_onnx.openvino_answers(path)) is None


# === Fuzzing ===


def test_mutated_graphs_agree_with_onnx_runtime():
    """Runs `KERAS_TNT_FUZZ` mutations; docs/safety.md has the results of 10,000."""
    count = os.environ.get("KERAS_TNT_FUZZ", "120")
    command = [sys.executable, "tests/helpers/fuzz_onnx.py", f"--count={count}", "--first=1000000"]
    environment = {**os.environ, "KERAS_BACKEND": "numpy"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{count} mutations" in done.stdout and "answered" in done.stdout


HARNESS = """
#include <cstdio>
#include <vector>
#include "weights.h"
int main() {
  std::vector<std::vector<float>> weights;
  const float* pointers[weight_count];
  const auto shapes = shapes_of_weights(dim, hidden, words);
  for (int i = 0; i < weight_count; ++i) {
    weights.emplace_back(shapes[i].size(), 0.1f);  // not a number more than it is said to have
    pointers[i] = weights.back().data();
  }
  const int64_t patches = 3;
  std::vector<float> in(patches * words * dim, 0.5f), out(in.size());
  Forward{as_weights(pointers), 1e-5f}(in.data(), out.data(), 0, patches);
  std::printf("%g", out.back());
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(16, 8, 2, 32, False), (32, 3, 3, 5, True)])
def test_forward_pass_has_no_memory_errors_under_sanitizers(sizes, tmp_path):
    (tmp_path / "main.cpp").write_text(HARNESS)
    command = [
        *(*kernels.compiler(), "-std=c++17", "-O1", "-g", "-march=native", "-Wall", "-Wextra"),
        *("-Werror", "-Wno-unused-function", "-fsanitize=address,undefined"),
        *("-fno-sanitize-recover=all", *kernels.InnerSizes(*sizes).arguments()),
        *(f"-I{kernels.FOLDER}", str(tmp_path / "main.cpp"), "-o", str(tmp_path / "main")),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    if "asan" in built.stderr or "ubsan" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(tmp_path / "main")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr
