"""`onnx_session` computes what the file does, with the inner transformers in C++ where it can."""

import numpy as np
import pytest

import keras_tnt
from keras_tnt.export.onnx_runtime import use_native
from tests.test_export import OTHER, TINY, images_of, onnx, onnxruntime, randomize, run_onnx

pytestmark = pytest.mark.one_backend

# Which models have how many inner transformers that can be C++: words come in multiples of 16.
MODELS = {
    "tnt": (keras_tnt.TNT, {**TINY, "depth": 2}, 2),
    "bias": (keras_tnt.TNT, {**TINY, "inner_heads": 4, "qkv_bias": True, "distilled": True}, 1),
    "few_words": (keras_tnt.TNT, {**TINY, "inner_stride": 8}, 0),
    "deit": (keras_tnt.DeiT, {**OTHER, "depth": 1, "num_heads": 2}, 0),
}


def exported(path, make, options, **settings):
    model = make(**options)
    randomize(model)
    images = np.concatenate([images_of(model, 4)] * 10)
    return keras_tnt.export.onnx(model, path, **settings), images


@pytest.mark.parametrize(("name", "opset"), [("tnt", 18), *((name, 23) for name in MODELS)])
def test_a_session_computes_what_the_file_does(name, opset, tmp_path):
    make, options, count = MODELS[name]
    path, images = exported(tmp_path / "model.onnx", make, options, opset=opset)
    session = keras_tnt.export.onnx_session(path)
    for batch in (1, 40):
        (expected,) = run_onnx(path, images[:batch], "logits")
        (found,) = session.run(["logits"], {"images": images[:batch]})
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))

    proto = onnx.load(path)
    sizes = use_native(proto, "keras_tnt")
    nodes = [node.op_type for node in proto.graph.node]
    assert nodes.count("InnerTransformer") == count and len(sizes) == min(count, 1)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_a_file_of_less_precision_runs_as_it_is(precision, tmp_path):
    path, images = exported(tmp_path / "m.onnx", keras_tnt.TNT, TINY, precision=precision)
    (found,) = keras_tnt.export.onnx_session(path).run(["logits"], {"images": images})
    np.testing.assert_array_equal(found, run_onnx(path, images, "logits")[0])


def test_without_a_compiler_a_file_runs_as_it_is(tmp_path, monkeypatch):
    path, images = exported(tmp_path / "model.onnx", keras_tnt.TNT, TINY)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="CXX names the compiler.*no-such-compiler"):
        session = keras_tnt.export.onnx_session(path)
    (found,) = session.run(["logits"], {"images": images})
    np.testing.assert_array_equal(found, run_onnx(path, images, "logits")[0])


def test_options_open_more_than_one_file(tmp_path):
    path, images = exported(tmp_path / "model.onnx", keras_tnt.TNT, TINY)
    options = onnxruntime.SessionOptions()
    first, second = (keras_tnt.export.onnx_session(path, options) for _ in range(2))
    found, again = (session.run(["logits"], {"images": images}) for session in (first, second))
    np.testing.assert_array_equal(found, again)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file '.*nothing.onnx'.*export.onnx"):
        keras_tnt.export.onnx_session(tmp_path / "nothing.onnx")
