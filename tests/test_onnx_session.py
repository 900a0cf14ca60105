"""`onnx_session` matches plain ONNX Runtime, with inner transformers in C++ where supported."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import keras_tnt
from keras_tnt import kernels
from keras_tnt.export.onnx_runtime import use_native
from keras_tnt.kernels import runtimes
from tests.helpers.checks import in_fork
from tests.helpers.onnx_models import MODELS, TINY, exported, run_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.one_backend


@pytest.mark.slow
@pytest.mark.parametrize(("name", "opset"), [("tnt", 18), *((name, 23) for name in MODELS)])
def test_session_matches_onnx_runtime(name, opset, tmp_path):
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
def test_file_of_lower_precision_runs_unchanged(precision, tmp_path):
    path, images = exported(tmp_path / "m.onnx", keras_tnt.TNT, TINY, precision=precision)
    (found,) = keras_tnt.export.onnx_session(path).run(["logits"], {"images": images})
    np.testing.assert_array_equal(found, run_onnx(path, images, "logits")[0])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Returns a file with inner transformers, images, and the expected logits."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    path, images = exported(path, keras_tnt.TNT, TINY)
    return path, images, run_onnx(path, images, "logits")[0]


@pytest.mark.parametrize("obstacle", ["no-such-compiler", "0.0", "refused"])
def test_without_kernels_the_file_runs_unchanged(obstacle, tiny, monkeypatch):
    path, images, expected = tiny
    options = onnxruntime.SessionOptions()
    kernels.warn_slower.cache_clear()
    if obstacle == "0.0":
        monkeypatch.setitem(runtimes.SEEN, "onnxruntime", (obstacle,))
    elif obstacle == "refused":
        options = Refusing()
    else:
        monkeypatch.setenv("CXX", obstacle)
    with pytest.warns(UserWarning, match=f"slower.*{obstacle}"):
        session = keras_tnt.export.onnx_session(path, options)
    np.testing.assert_array_equal(session.run(["logits"], {"images": images})[0], expected)


class Refusing(onnxruntime.SessionOptions):
    def register_custom_ops_library(self, path):
        raise RuntimeError(f"{path} refused")


def test_session_options_can_be_reused(tiny):
    path, images, expected = tiny
    options = onnxruntime.SessionOptions()
    sessions = [keras_tnt.export.onnx_session(path, options) for _ in range(2)]
    for session in sessions:
        (found,) = session.run(["logits"], {"images": images})
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))


def test_threads_can_open_a_file_at_once(tiny, tmp_path, monkeypatch):
    path, images, expected = tiny
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run, compiled = kernels.run, []
    monkeypatch.setattr(kernels, "run", lambda command: (compiled.append(command), run(command))[1])

    def open_and_run(_):
        return keras_tnt.export.onnx_session(path).run(["logits"], {"images": images})[0]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(open_and_run, range(4)):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))
    assert sum("-shared" in command for command in compiled) == 1


def test_forked_process_can_open_but_not_inherit_a_session(tiny):
    path, images, _ = tiny
    session = keras_tnt.export.onnx_session(path)

    def run_in_child(queue):
        other = keras_tnt.export.onnx_session(path).run(["logits"], {"images": images})
        try:
            session.run(["logits"], {"images": images})
        except RuntimeError as error:
            queue.put((other[0], str(error)))

    ((found, message),) = in_fork(run_in_child)
    np.testing.assert_array_equal(found, session.run(["logits"], {"images": images})[0])
    assert "forked" in message and "spawn" in message


def test_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file '.*nothing.onnx'.*export.onnx"):
        keras_tnt.export.onnx_session(tmp_path / "nothing.onnx")
