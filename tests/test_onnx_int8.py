"""ONNX files in int8 that are calibrated with the user's images."""

import json

import numpy as np
import pytest

import keras_tnt
from keras_tnt.export.onnx_runtime import use_native
from tests.helpers.onnx_models import OTHER, TINY, images_of, metadata_of, randomize, run_onnx

onnx = pytest.importorskip("onnx")

pytestmark = pytest.mark.one_backend


def calibrated(model, path, images, **settings):
    return keras_tnt.export.onnx(model, path, precision="int8", calibration=images, **settings)


@pytest.fixture(scope="module")
def wide():
    model = keras_tnt.TNT(**{**TINY, "outer_dim": 96, "outer_heads": 2})
    randomize(model)
    return model, images_of(model, 11)


@pytest.mark.parametrize("opset", [18, 23])
def test_patch_layers_are_int8_and_the_agreement_is_recorded(opset, wide, tmp_path, caplog):
    model, images = wide
    path = calibrated(model, tmp_path / "int8.onnx", images, opset=opset)
    assert not [record for record in caplog.records if record.name == "root"]  # ONNX Runtime's
    proto = onnx.load(path)
    stored = {t.name: t for t in proto.graph.initializer}
    quantized = [t for t in stored.values() if t.data_type == onnx.TensorProto.INT8]
    # Embedding, words to patches, attention and MLP, and the last words to patches.
    matrices = [tuple(t.dims) for t in quantized if len(t.dims) == 2]
    dense = [w for w in model.weights if w.name == "kernel" and w.shape[-1] >= 96]
    assert len(matrices) == len(dense) and {96} <= {m[-1] for m in matrices}
    for kernel in quantized:
        if len(kernel.dims) == 2:
            (scale,) = (node.input[1] for node in proto.graph.node if node.input[0] == kernel.name)
            assert tuple(stored[scale].dims) == (kernel.dims[1],)  # a scale per column
            assert np.abs(onnx.numpy_helper.to_array(kernel)).max() <= 64  # seven bits
    # Ranges are constants, and are not computed at run time.
    assert "DynamicQuantizeLinear" not in {node.op_type for node in proto.graph.node}

    probabilities, logits = run_onnx(path, images, "probabilities", "logits")
    expected = model.predict_on_batch(images)
    told = json.loads(metadata_of(path)["agreement"])
    assert metadata_of(path)["precision"] == "int8"
    assert told["images"] == 11
    assert told["same_top1"] == np.mean(logits.argmax(-1) == expected.argmax(-1))
    difference = np.abs(probabilities - expected).max()
    np.testing.assert_allclose(told["largest_difference_of_probabilities"], difference, rtol=1e-2)
    assert 0 < difference < 0.02

    # Word layers are float32, and use the C++ kernel in our session.
    assert len(use_native(proto, "keras_tnt")) == 1
    (found,) = keras_tnt.export.onnx_session(path).run(["logits"], {"images": images})
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-2 * np.ptp(logits))


def test_ranges_come_from_the_calibration_images(wide, tmp_path):
    """A file calibrated on dark images agrees with the model on these, and less on bright ones."""
    model, images = wide
    dark = images[:4] * 0.02
    path = calibrated(model, tmp_path / "dark.onnx", dark)
    difference = {}
    for name, given in (("dark", dark), ("bright", images[:4])):
        (found,) = run_onnx(path, given, "probabilities")
        difference[name] = np.abs(found - model.predict_on_batch(given)).max()
    assert difference["dark"] < 0.5 * difference["bright"]


def test_model_of_another_family_is_calibrated(tmp_path):
    model = keras_tnt.DeiT(**{**OTHER, "embed_dim": 64, "depth": 1, "num_heads": 2})
    randomize(model)
    path = calibrated(model, tmp_path / "deit.onnx", images_of(model, 3))
    told = json.loads(metadata_of(path)["agreement"])
    assert 0 < told["largest_difference_of_probabilities"] < 0.02


def test_invalid_calibration_raises_a_one_line_error(wide, tmp_path):
    model, images = wide
    path = tmp_path / "never.onnx"

    def refused(match, calibration, precision="int8"):
        with pytest.raises(ValueError, match=match):
            keras_tnt.export.onnx(model, path, precision=precision, calibration=calibration)

    refused("for precision='int8'. Received: precision='float32'", images, "float32")
    refused(r"of the shape \(batch, 32, 32, 3\). Received: \(32, 32, 3\)", images[0])
    refused(r"of the shape .*Received: \(0, 32, 32, 3\)", images[:0])
    refused(r"of the shape .*Received: \(11, 16, 32, 3\)", images[:, :16])
    refused("NaN or infinite", np.full_like(images, np.nan))
    assert not path.exists()
