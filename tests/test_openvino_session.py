"""`openvino_session` matches ONNX Runtime, with kernels in C++ where supported."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import keras_tnt
from keras_tnt import kernels
from keras_tnt.export import openvino_runtime
from keras_tnt.export.onnx_runtime import use_native
from keras_tnt.kernels import processor, runtimes
from tests.helpers.checks import in_fork, run_python
from tests.helpers.onnx_models import MODELS, TINY, exported, images_of, randomize, run_onnx

onnx = pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino")

pytestmark = pytest.mark.one_backend


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Returns a file with inner transformers, images, and ONNX Runtime's outputs."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    path, images = exported(path, *MODELS["tnt"][:2])
    names = ["probabilities", "logits"]
    return path, images, dict(zip(names, run_onnx(path, images, *names), strict=True))


def check(found, expected, within=1e-5):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=within * np.ptp(value))


@pytest.mark.parametrize("precision", [None, "float32"])
def test_session_matches_onnx_runtime(precision, tiny, monkeypatch):
    path, images, expected = tiny
    extended, extend = [], runtimes.extend_openvino
    monkeypatch.setattr(
        runtimes, "extend_openvino", lambda *args: extended.append(extend(*args)) or extended[-1]
    )
    predict = keras_tnt.export.openvino_session(path, precision)
    assert extended == [True]
    for batch in (1, 40, 3):
        found = predict(images[:batch])
        predict(np.zeros_like(images[:batch]))  # must not overwrite earlier results
        check(found, {name: value[:batch] for name, value in expected.items()})
    turned = np.asfortranarray(images[:3].astype("float64"))
    check(predict(turned), {name: value[:3] for name, value in expected.items()})


@pytest.mark.parametrize("dims", [[0], [3], [2, 2]])
def test_constants_without_their_shape_raise_as_in_openvino(dims, tiny, tmp_path):
    model = onnx.load(tiny[0])
    number = next(t for t in model.graph.initializer if not t.dims and t.data_type == t.FLOAT)
    number.dims.extend(dims)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(RuntimeError, match="does not match the number of elements"):
        openvino_runtime.core().read_model(tmp_path / "m.onnx")
    with pytest.raises(RuntimeError, match="does not match the number of elements"):
        keras_tnt.export.openvino_session(tmp_path / "m.onnx")


@pytest.mark.slow
def test_file_with_attention_operators_is_opened(tmp_path):
    path, images = exported(tmp_path / "bias.onnx", *MODELS["bias"][:2], opset=23)
    (expected,) = run_onnx(path, images, "logits")
    check(
        {"logits": keras_tnt.export.openvino_session(path)(images)["logits"]}, {"logits": expected}
    )


def test_openvino_file_is_opened(tmp_path):
    model = keras_tnt.TNT(**TINY)
    randomize(model)
    path = keras_tnt.export.openvino(model, tmp_path / "tnt.xml")
    images = images_of(model, 3)
    found = keras_tnt.export.openvino_session(path)(images)
    assert set(found) == {"probabilities", "logits", "features"}
    np.testing.assert_allclose(found["probabilities"], model.predict_on_batch(images), atol=1e-5)
    (tmp_path / "tnt.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file '.*tnt.bin'"):
        keras_tnt.export.openvino_session(path)


def test_without_bfloat16_support_warns_and_uses_float32(tiny, monkeypatch):
    path, images, expected = tiny
    monkeypatch.setattr(processor, "features", lambda: frozenset({"avx2"}))
    with pytest.warns(UserWarning, match="no instructions for bfloat16.*float32 is computed"):
        predict = keras_tnt.export.openvino_session(path, precision="bfloat16")
    check(predict(images), expected)


def test_bfloat16_precision_is_passed_to_openvino(tiny, monkeypatch):
    path, images, expected = tiny
    monkeypatch.setattr(processor, "features", lambda: frozenset({"amx_bf16"}))
    asked = []

    class Core(openvino.Core):
        def compile_model(self, model, device, settings):
            asked.append(settings)
            return super().compile_model(model, device, settings)

    recording = Core()
    monkeypatch.setattr(openvino_runtime, "core", lambda: recording)
    predict = keras_tnt.export.openvino_session(path, precision="bfloat16")
    assert asked == [{"INFERENCE_PRECISION_HINT": "bf16"}]
    # On a processor without these instructions, the result is that of float32.
    check(predict(images), expected, within=5e-2)


@pytest.mark.skipif(not processor.has_pairs(), reason="the C++ is not for this processor")
@pytest.mark.parametrize(
    ("name", "opset", "parts"),
    [
        ("tnt", 18, {"inner", "outer_half", "patches_half"}),
        ("bias", 23, {"inner", "outer_half", "patches_half"}),
        pytest.param("deit", 18, {"outer_half"}, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_session_uses_kernels_for_transformers(name, opset, parts, tmp_path, monkeypatch):
    make, options, _ = MODELS[name]  # the last block computes only one token
    path = tmp_path / "model.onnx"
    path, images = exported(path, make, {**options, "depth": 2}, opset=opset)
    (expected,) = run_onnx(path, images, "logits")
    extended, extend = [], runtimes.extend_openvino
    monkeypatch.setattr(
        runtimes,
        "extend_openvino",
        lambda core, *more: extended.append(more) or extend(core, *more),
    )
    predict = keras_tnt.export.openvino_session(path, precision="bfloat16")
    assert {sizes.part for sizes, _ in extended} == parts
    assert all(sizes.half for sizes, _ in extended)
    found = predict(images)["logits"]
    assert 1e-5 < np.abs(found - expected).max() / np.ptp(expected) < 2e-2
    with ThreadPoolExecutor(4) as pool:  # the first calls of a session pack its kernels
        fresh = keras_tnt.export.openvino_session(path, precision="bfloat16")
        for result in pool.map(lambda _: fresh(images)["logits"], range(8)):
            np.testing.assert_array_equal(result, found)


def norm_dense_norm(
    between=(), bias="constant", epsilon=1e-5, tokens=None, pads=(0, 1, 0, 0, 0, 0)
):
    """Returns a graph of norm, dense layer and norm, and a sum with tokens if they have a shape."""
    make = onnx.helper.make_node
    norm = {"axis": -1, "epsilon": 1e-5}
    nodes = [make("LayerNormalization", ["x", "one"], ["first"], **norm)]
    nodes += [make("Reshape", ["first", "shape"], ["flat"])] if between else []
    nodes += [
        make("MatMul", ["flat" if between else "first", "kernel"], ["product"]),
        make("Add", ["product", "x" if bias == "variable" else "bias"], ["dense"]),
        make("LayerNormalization", ["dense", "scale"], ["y"], **{**norm, "epsilon": epsilon}),
    ]
    inputs, outputs = {"x": (2, 6, 8)}, {"y": (2, *(between or (6, 8))[:1], 8)}
    if tokens:
        nodes += [make("Pad", ["y", "pads"], ["pad"]), make("Add", ["pad", "tokens"], ["sum"])]
        inputs["tokens"], outputs = tokens, {"sum": (2, 7, 8)}
    size = between[1] if between else 8
    constants = {
        "one": np.ones(8, "float32"),
        "scale": np.ones(8, "float32"),
        "kernel": np.ones((size, 8), "float32"),
        "bias": np.ones(8, "float32"),
        "shape": np.array([2, *between], "int64"),
        "pads": np.array(pads, "int64"),
    }
    described = [
        [onnx.helper.make_tensor_value_info(*one) for one in ends]
        for ends in (
            [(name, onnx.TensorProto.FLOAT, shape) for name, shape in some.items()]
            for some in (inputs, outputs)
        )
    ]
    initializers = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "graph", *described, initializers)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])


@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        ({}, 7),
        ({"tokens": (2, 7, 8)}, 8),
        ({"tokens": (1, 7, 8)}, 7),
        ({"tokens": (2, 7, 8), "pads": (0, 0, 0, 0, 1, 0)}, 7),
        ({"between": (3, 16)}, None),
        ({"bias": "variable"}, None),
        ({"epsilon": 1e-3}, None),
    ],
)
def test_words_to_patches_is_replaced_only_on_an_exact_match(options, inputs, monkeypatch):
    monkeypatch.setattr(kernels, "takes_half", lambda *_: True)
    proto = norm_dense_norm(**options)
    found = use_native(proto, "keras_tnt", half=True)
    ours = [node for node in proto.graph.node if node.op_type == "WordsToPatches"]
    assert len(found) == len(ours) == (inputs is not None)
    assert [len(node.input) for node in ours] == [inputs] * len(ours)
    assert not use_native(norm_dense_norm(**options), "keras_tnt")


def test_operation_supports_bfloat16_tensors(tiny, tmp_path):
    """OpenVINO passes bfloat16 tensors if the whole program is in bfloat16."""
    proto = onnx.load(tiny[0])
    ((domain, sizes),) = use_native(proto, "keras_tnt").items()
    node = next(node for node in proto.graph.node if node.op_type == "InnerTransformer")
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    words = np.random.default_rng(0).normal(size=(2, 3, 16, sizes.dim)).astype("float32")
    found = {}
    for kind in ("FLOAT", "BFLOAT16"):
        kind = getattr(onnx.TensorProto, kind)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
        ends = [
            onnx.helper.make_tensor_value_info(name, kind, words.shape)
            for name in (node.input[0], node.output[0])
        ]
        graph = onnx.helper.make_graph(
            [node],
            "words",
            ends[:1],
            ends[1:],
            [
                onnx.numpy_helper.from_array(weights[name].astype(dtype), name)
                for name in node.input[1:]
            ],
        )
        core = openvino_runtime.core()
        assert runtimes.extend_openvino(core, sizes, domain)
        opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(domain, 1)]
        model = core.read_model(
            onnx.helper.make_model(graph, opset_imports=opsets).SerializeToString()
        )
        element = model.inputs[0].element_type
        given, result = openvino.Tensor(element, words.shape), openvino.Tensor(element, words.shape)
        given.data[:] = words.astype(dtype) if kind == onnx.TensorProto.FLOAT else as_bits(words)
        assert model.evaluate([result], [given])
        found[kind] = from_bits(result.data) if result.data.dtype != "float32" else result.data
    exact, half = found.values()
    difference = np.abs(half - exact).max() / np.ptp(exact)
    assert 1e-5 < difference < 2e-2


def test_threads_can_share_a_session(tiny):
    path, images, expected = tiny
    predict = keras_tnt.export.openvino_session(path)
    parts = [slice(i, i + 5) for i in range(0, 40, 5)]
    with ThreadPoolExecutor(4) as pool:
        for part, found in zip(parts, pool.map(lambda p: predict(images[p]), parts), strict=True):
            check(found, {name: value[part] for name, value in expected.items()})


@pytest.mark.parametrize("obstacle", ["no-such-compiler", "0.0", "refused"])
def test_without_kernels_the_file_runs_unchanged(obstacle, tiny, monkeypatch):
    path, images, expected = tiny
    kernels.warn_slower.cache_clear()
    if obstacle == "0.0":
        monkeypatch.setitem(runtimes.SEEN, "openvino", (obstacle,))
    elif obstacle == "refused":

        class Core(openvino.Core):
            def add_extension(self, extension):
                raise RuntimeError(f"{extension} refused")

        refusing = Core()
        monkeypatch.setattr(openvino_runtime, "core", lambda: refusing)
    else:
        monkeypatch.setenv("CXX", obstacle)
    with pytest.warns(UserWarning, match=f"slower.*{obstacle}"):
        predict = keras_tnt.export.openvino_session(path)
    check(predict(images), expected)


def test_forked_process_cannot_use_an_inherited_session(tiny):
    path, images, _ = tiny
    predict = keras_tnt.export.openvino_session(path)

    def run_in_child(queue):
        try:
            predict(images)
        except RuntimeError as error:
            queue.put(str(error))

    (message,) = in_fork(run_in_child)
    assert "forked" in message and "spawn" in message


SIGNAL_AFTER_SESSIONS = """
import os, signal, sys, keras_tnt
handled = []
signal.signal(signal.SIGTERM, lambda number, frame: handled.append(number))
first, second = (keras_tnt.export.openvino_session(sys.argv[1]) for _ in range(2))
del first
del second
os.kill(os.getpid(), signal.SIGTERM)
print(handled == [signal.SIGTERM])
"""


def test_signals_are_handled_after_sessions_are_deleted(tiny):
    assert run_python(SIGNAL_AFTER_SESSIONS, tiny[0], KERAS_BACKEND="jax").split()[-1] == "True"


def test_invalid_files_and_images_raise_one_line_errors(tiny, tmp_path):
    path, images, _ = tiny
    session = keras_tnt.export.openvino_session
    with pytest.raises(ValueError, match="one of float32, bfloat16. Received: 'float16'"):
        session(path, "float16")
    with pytest.raises(FileNotFoundError, match=r"no file '.*nothing.onnx'.*export.onnx"):
        session(tmp_path / "nothing.onnx")
    with pytest.raises(ValueError, match=r"end in .onnx or .xml. Received: '.*model.pb'"):
        session(tmp_path / "model.pb")
    predict = session(path)
    for wrong in (images[0], images[:0], images[:, 1:]):
        with pytest.raises(ValueError, match=r"Images must have the shape .*Received: \("):
            predict(wrong)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx512_bf16 avx2\n", {"fpu", "avx512_bf16", "avx2"}),
        ("Features\t: fp asimd bf16\n", {"fp", "asimd", "bf16"}),
        ("nothing\n", set()),
    ],
)
def test_cpu_features_are_read_from_cpuinfo(text, expected, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(processor, "CPUINFO", str(tmp_path / "cpuinfo"))
    processor.features.cache_clear()
    assert processor.features() == expected
    processor.features.cache_clear()


def as_bits(x):
    import ml_dtypes

    return x.astype(ml_dtypes.bfloat16).view("uint16").view("float16")


def from_bits(x):
    import ml_dtypes

    return x.view("uint16").view(ml_dtypes.bfloat16).astype("float32")
