"""Exported files match the model, and invalid exports are refused early."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_tnt
from keras_tnt.export import files
from keras_tnt.export.verification import draw_picture
from tests.helpers.checks import ROOT, SHALLOW, compute, shallow
from tests.helpers.onnx_models import OTHER, TINY, images_of, metadata_of, randomize, run_onnx

tf = pytest.importorskip("tensorflow")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("tensorflow_serving")

BACKEND = keras.backend.backend()
LABELS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


# === Every backend ===


def test_saved_model_and_onnx_match_the_model(tmp_path):
    model = keras_tnt.TNT(**TINY)
    version = keras_tnt.export.saved_model(
        model, tmp_path / "tnt", labels=LABELS, signatures=["serving_bytes"]
    )
    path = keras_tnt.export.onnx(model, tmp_path / "tnt.onnx", labels=LABELS)
    assert version == str(tmp_path / "tnt" / "1")
    signatures = tf.saved_model.load(version).signatures
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 32, 32, 3]
    assert [output.shape for output in session.get_outputs()] == [["batch", 7]] * 2
    for batch in (1, 5):
        images = images_of(model, batch)
        expected = compute(model, images)
        served = signatures["serving_default"](images=tf.constant(images))["probabilities"]
        np.testing.assert_allclose(served, expected, atol=1e-5)
        found, logits = session.run(["probabilities", "logits"], {"images": images})
        np.testing.assert_allclose(found, expected, atol=1e-5)
        softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        np.testing.assert_allclose(softmax, expected, atol=1e-5)
    pictures = [draw_picture(seed) for seed in range(3)]
    expected = compute(model, keras_tnt.load_images(pictures, model))
    served = signatures["serving_bytes"](image_bytes=tf.constant(pictures))
    np.testing.assert_allclose(served["probabilities"], expected, atol=2e-3)
    best = [LABELS[i].encode() for i in served["probabilities"].numpy().argmax(-1)]
    assert served["classes"].numpy()[:, 0].tolist() == best


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "opset"),
    [
        *((name, 18) for name in SHALLOW),
        # The others with opset 23 are tested below; this one has an attention bias.
        pytest.param("PyramidTNTTiny", 23, marks=pytest.mark.one_backend),
    ],
)
def test_onnx_of_each_family(name, opset, tmp_path):
    model = shallow(name)
    randomize(model)
    path = keras_tnt.export.onnx(model, tmp_path / "model.onnx", opset=opset)
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert ("Attention" in nodes) == (opset == 23)
    logits = keras.Model(model.inputs[0], model.layers[-1].input)
    for batch in (1, 5):
        images = images_of(model, batch)
        expected = compute(logits, images)
        (found,) = run_onnx(path, images, "logits")
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.ptp(expected), rtol=0)


@pytest.mark.one_backend
def test_onnx_has_fusable_norms_and_gelus(tmp_path):
    model = keras_tnt.TNT(**TINY)
    randomize(model)
    path = keras_tnt.export.onnx(model, tmp_path / "model.onnx")
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    # Two norms in the stem, six in the block, one before the head; a GELU per transformer.
    assert nodes.count("LayerNormalization") == 9
    assert nodes.count("Erf") == nodes.count("Div") == 2
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    fused = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert (fused.count("Gelu"), fused.count("BiasGelu")) == (0, 2) and "Erf" not in fused


# Number of Attention operators, and of remaining softmaxes: those of CaiT's talking heads.
ATTENTIONS = {
    "tnt": (lambda: keras_tnt.TNT(**{**TINY, "depth": 2}), 4, 0),
    "distilled": (lambda: keras_tnt.TNT(**TINY, distilled=True, qkv_bias=True), 2, 0),
    "class_attention": (lambda: keras_tnt.TNT(**TINY, class_attention_depth=1), 3, 0),
    "deit": (lambda: keras_tnt.DeiT(**OTHER, depth=2, num_heads=2), 2, 0),
    "one_head": (lambda: keras_tnt.DeiT(**OTHER, depth=2, num_heads=1), 2, 0),
    "cait": (lambda: keras_tnt.CaiT(**OTHER, depth=2, num_heads=2), 2, 2),
}


@pytest.mark.slow
@pytest.mark.one_backend
@pytest.mark.parametrize("name", ATTENTIONS)
def test_onnx_opset_23_uses_attention_operators(name, tmp_path):
    make, attentions, softmaxes = ATTENTIONS[name]
    model = make()
    randomize(model)
    path = keras_tnt.export.onnx(model, tmp_path / "model.onnx", opset=23)
    proto = onnx.load(path)
    assert [entry.version for entry in proto.opset_import if not entry.domain] == [23]
    nodes = [node.op_type for node in proto.graph.node]
    assert nodes.count("Attention") == attentions
    assert nodes.count("Softmax") == softmaxes + 1  # of the classifier
    for batch in (1, 5):
        images = images_of(model, batch)
        expected = compute(model, images)
        (found,) = run_onnx(path, images, "probabilities")
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.one_backend
@pytest.mark.parametrize("opset", [13, 18])
def test_onnx_has_no_shape_computation_for_dense_layers(opset, tmp_path):
    model = keras_tnt.TNT(**TINY)
    randomize(model)
    path = keras_tnt.export.onnx(model, tmp_path / "model.onnx", opset=opset)
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes.count("Shape") == 1  # the batch size, for the class tokens
    assert "Gather" not in nodes


# === Kinds of models ===


def wrapped():
    inner = keras_tnt.TNT(**TINY)
    return keras.Sequential([keras.Input((32, 32, 3)), keras.layers.RandomFlip(), inner])


def finetuned():
    backbone = keras_tnt.TNT(**{**TINY, "include_top": False, "pooling": "token"})
    outputs = keras.layers.Dense(7, activation="softmax")(backbone.output)
    return keras.Model(backbone.input, outputs)


MAKES = {
    "distilled": lambda: keras_tnt.TNT(**TINY, distilled=True),
    "logits": lambda: keras_tnt.TNT(**TINY, classifier_activation=None),
    "normalised": lambda: keras_tnt.DeiT(
        input_shape=(32, 32, 3), classes=7, embed_dim=16, depth=1, num_heads=2,
        include_preprocessing=False,
    ),
    "gray": lambda: keras_tnt.TNT(**{**TINY, "input_shape": (32, 48, 1)}),
    "wrapped": wrapped,
    "finetuned": finetuned,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.one_backend
@pytest.mark.parametrize("make", MAKES)
def test_every_kind_of_model_is_served(make, tmp_path):
    model = MAKES[make]()
    path = keras_tnt.export.saved_model(model, tmp_path / make)
    signatures = tf.saved_model.load(path).signatures
    assert set(signatures) == {"serving_default", "serving_bytes", "classify", "features"}
    images = images_of(model, 2)
    if make == "normalised":
        images = keras_tnt.deit.preprocess_input(images)
    expected = compute(model, images, training=False)  # otherwise RandomFlip is active
    if make == "logits":
        expected = keras.ops.convert_to_numpy(keras.ops.softmax(expected))
    served = signatures["serving_default"](images=tf.constant(images))["probabilities"]
    np.testing.assert_allclose(served, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.one_backend
def test_channels_first_model_is_served(tmp_path):
    keras.config.set_image_data_format("channels_first")
    model = keras_tnt.TNT(**{**TINY, "input_shape": (3, 32, 32)})
    path = keras_tnt.export.saved_model(model, tmp_path / "tnt")
    pictures = [draw_picture(seed) for seed in range(2)]
    expected = compute(model, keras_tnt.load_images(pictures, model))
    served = tf.saved_model.load(path).signatures["serving_bytes"](tf.constant(pictures))
    np.testing.assert_allclose(served["probabilities"], expected, atol=2e-3)


@pytest.mark.slow
@pytest.mark.one_backend
def test_headless_model_returns_features(tmp_path):
    model = keras_tnt.TNT(**{**TINY, "include_top": False, "pooling": "avg"})
    path = keras_tnt.export.saved_model(model, tmp_path / "tnt")
    signatures = tf.saved_model.load(path).signatures
    assert set(signatures) == {"serving_default", "serving_bytes", "features"}
    images = images_of(model, 2)
    for name in ("serving_default", "features"):
        served = signatures[name](images=tf.constant(images))["features"]
        np.testing.assert_allclose(served, compute(model, images), atol=1e-5)


@pytest.mark.slow
def test_mixed_precision_model_is_exported_in_float32(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = keras_tnt.TNT(**TINY)
    keras.config.set_dtype_policy("float32")
    exact = keras_tnt.TNT(**TINY)
    exact.set_weights(model.get_weights())
    path = keras_tnt.export.onnx(model, tmp_path / "tnt.onnx")
    images = images_of(model, 3)
    (found,) = run_onnx(path, images, "probabilities")
    np.testing.assert_allclose(found, compute(exact, images), atol=1e-5)


@pytest.mark.one_backend
def test_outputs_are_found_in_models_of_every_kind():
    from keras_tnt.export.network import serving_network

    backbone = keras_tnt.TNT(**{**TINY, "include_top": False, "pooling": "token"})
    x = keras.layers.Dense(7, name="predictions")(backbone.output)
    linear = keras.Model(backbone.input, x)
    softmax = keras.Model(backbone.input, keras.layers.Softmax()(x))
    sigmoid = keras.Sequential([backbone, keras.layers.Dense(7, activation="sigmoid")])
    images = images_of(linear, 2)
    logits = compute(linear, images)
    for model in (linear, softmax):
        outputs = compute(serving_network(model), images)
        np.testing.assert_allclose(outputs["logits"], logits, atol=1e-6)
        expected = compute(softmax, images)
        np.testing.assert_allclose(outputs["probabilities"], expected, atol=1e-6)
    outputs = compute(serving_network(sigmoid), images)
    np.testing.assert_allclose(outputs["probabilities"], compute(sigmoid, images))
    np.testing.assert_allclose(1 / (1 + np.exp(-outputs["logits"])), outputs["probabilities"], 1e-5)
    np.testing.assert_allclose(outputs["features"], compute(backbone, images), atol=1e-6)

    inner = keras_tnt.TNT(**TINY)
    doubled = keras.layers.Add()([inner.input, inner.input])
    side = keras.layers.Rescaling(0.5)(doubled)
    forked = keras.Model(inner.input, keras.layers.Add()([inner(side), inner(doubled)]))
    assert set(serving_network(forked).output) == {"features"}


# === ONNX ===


@pytest.mark.slow
@pytest.mark.one_backend
@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_onnx_of_lower_precision_is_smaller_and_records_its_agreement(precision, opset, tmp_path):
    model = keras_tnt.TNT(**{**TINY, "outer_dim": 96, "depth": 2})
    exact = keras_tnt.export.onnx(model, tmp_path / "exact.onnx", opset=opset)
    path = keras_tnt.export.onnx(model, tmp_path / "small.onnx", opset=opset, precision=precision)
    assert os.path.getsize(path) < (0.65 if precision == "float16" else 0.45) * os.path.getsize(
        exact
    )
    images = images_of(model, 5)
    (expected,), (found,) = (run_onnx(p, images, "logits") for p in (exact, path))
    difference = np.abs(found - expected).max() / np.ptp(expected)
    assert 0 < difference < 0.05
    told = metadata_of(path)
    assert told["precision"] == precision
    agreement = json.loads(told["agreement"])
    assert agreement["images"] == 6
    assert 0 < agreement["largest_difference_of_spread"] < 0.05
    assert 0 <= agreement["same_top1"] <= 1


@pytest.mark.one_backend
def test_onnx_of_features_and_its_metadata(tmp_path):
    model = keras_tnt.DeiT(input_shape=(32, 32, 3), classes=7, embed_dim=16, depth=1, num_heads=2)
    path = keras_tnt.export.onnx(
        model, tmp_path / "deit.onnx", opset=17, signature="features", labels=LABELS, weights="mine"
    )
    vectors = keras.Model(model.inputs[0], model.get_layer("head").input)
    images = images_of(model, 2)
    (found,) = run_onnx(path, images, "features")
    np.testing.assert_allclose(found, compute(vectors, images), atol=1e-5)
    told = metadata_of(path)
    assert json.loads(told["labels"]) == LABELS
    np.testing.assert_allclose(json.loads(told["mean"]), keras_tnt.deit.IMAGE.mean, atol=1e-5)
    np.testing.assert_allclose(json.loads(told["std"]), keras_tnt.deit.IMAGE.std, atol=1e-5)
    assert json.loads(told["image_size"]) == [32, 32]
    assert told["weights"] == "mine"


NODE = """
const ort = require('onnxruntime-node');
const fs = require('fs');
const [path, side] = [process.argv[2], Number(process.argv[3])];
const bytes = fs.readFileSync(0);
const pixels = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
ort.InferenceSession.create(path).then(async (session) => {
  const batch = pixels.length / (side * side * 3);
  const images = new ort.Tensor('float32', pixels, [batch, side, side, 3]);
  const {logits} = await session.run({images});
  fs.writeSync(1, JSON.stringify({dims: logits.dims, data: Array.from(logits.data)}));
});
"""


@pytest.mark.one_backend
@pytest.mark.slow
def test_onnx_gives_the_same_logits_in_node(tmp_path, pytestconfig):
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node and npm are not installed")
    folder = pytestconfig.cache.mkdir("onnxruntime-node")
    if not (folder / "node_modules" / "onnxruntime-node").is_dir():
        install = ["npm", "install", "--no-audit", "--no-fund", "onnxruntime-node@1.24.3"]
        environment = {**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip"}
        try:
            done = subprocess.run(
                install, cwd=folder, env=environment, capture_output=True, timeout=120
            )
        except subprocess.TimeoutExpired:
            pytest.skip("npm gave no onnxruntime-node within two minutes")
        if done.returncode:
            pytest.skip(f"npm cannot install onnxruntime-node: {done.stderr[-200:]}")
    model = keras_tnt.TNT(**TINY)
    path = keras_tnt.export.onnx(model, tmp_path / "tnt.onnx")
    (folder / "run.js").write_text(NODE, encoding="utf-8")
    for batch in (1, 5):
        images = images_of(model, batch)
        done = subprocess.run(
            ["node", "run.js", path, "32"], cwd=folder, input=images.tobytes(), capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()
        answer = json.loads(done.stdout)
        assert answer["dims"] == [batch, 7]
        (expected,) = run_onnx(path, images, "logits")
        np.testing.assert_allclose(np.reshape(answer["data"], (batch, 7)), expected, atol=1e-5)


# === LiteRT and OpenVINO ===


@pytest.mark.slow
def test_litert_matches_the_model(tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    names = [f"class {i}" for i in range(TINY["classes"])]
    model = keras_tnt.TNT(**TINY, class_names=names)
    path = keras_tnt.export.litert(model, tmp_path / "tnt.tflite", weights="this test")
    with zipfile.ZipFile(path) as archive:
        assert archive.read("labels.txt").decode().splitlines() == names
        assert json.loads(archive.read("model.json"))["weights"] == "this test"
    run = Interpreter(path).get_signature_runner()
    for batch in (1, 5):
        images = images_of(model, batch)
        found = run(images=images)
        assert set(found) == {"probabilities", "logits", "features"}
        expected = compute(model, images)
        np.testing.assert_allclose(found["probabilities"], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.one_backend  # uses the same TensorFlow process as LiteRT
def test_openvino_matches_the_model(tmp_path):
    import openvino

    model = keras_tnt.TNT(**TINY)
    path = keras_tnt.export.openvino(model, tmp_path / "tnt.xml")
    assert sorted(os.listdir(tmp_path)) == ["tnt.bin", "tnt.xml"]
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (1, 5):
        images = images_of(model, batch)
        found = compiled({"images": images})["probabilities"]
        np.testing.assert_allclose(found, compute(model, images), atol=1e-5)


def test_missing_package_error_names_it(tmp_path, monkeypatch):
    from importlib import util

    find_spec = util.find_spec
    monkeypatch.setattr(
        util, "find_spec", lambda name: None if name in ("openvino", "tf2onnx") else find_spec(name)
    )
    model = keras_tnt.TNT(**TINY)
    with pytest.raises(ImportError, match=r'pip install "openvino"'):
        keras_tnt.export.openvino(model, tmp_path / "tnt.xml")
    with pytest.raises(ImportError, match=r'tf2onnx, which is.*pip install "keras-tnt\[export\]"'):
        keras_tnt.export.onnx(model, tmp_path / "tnt.onnx")


# === Versions ===


@pytest.mark.slow
@pytest.mark.one_backend
def test_versions_increase_and_are_never_replaced(tmp_path):
    model = keras_tnt.TNT(**TINY)
    directory = tmp_path / "tnt"

    def export(version=None):
        return Path(
            keras_tnt.export.saved_model(
                model, directory, version=version, signatures=["serving_default"]
            )
        ).name

    assert [export(), export(7), export()] == ["1", "7", "8"]
    with pytest.raises(FileExistsError, match="Leave `version` out for the next one, 9"):
        export(7)
    assert sorted(os.listdir(directory)) == ["1", "7", "8"]


# Loads the module alone, because importing the package takes longer than the test.
WRITER = """
import importlib.util, os, sys
for name, path in zip(("keras_tnt.files", "files"), sys.argv[1:3]):
    spec = importlib.util.spec_from_file_location(name, path)
    files = importlib.util.module_from_spec(spec)
    sys.modules[name] = files
    spec.loader.exec_module(files)
directory = sys.argv[3]
while True:
    with files.new_version(directory) as place:
        for name in ("saved_model.pb", "variables"):
            with open(os.path.join(place.aside, name), "wb") as file:
                for _ in range(20):
                    file.write(bytes(50_000))
                    file.flush()
"""


def test_polling_reader_sees_only_complete_versions_of_killed_writers(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    random = np.random.default_rng(0)
    seen = set()
    for _ in range(int(os.environ.get("KERAS_TNT_KILLS", 20))):
        modules = [keras_tnt.files.__file__, files.__file__]
        writer = subprocess.Popen([sys.executable, "-c", WRITER, *modules, str(directory)])
        until = None
        while until is None or time.monotonic() < until:
            assert writer.poll() is None
            for number in files.versions(directory):
                if number not in seen:
                    seen.add(number)
                    # A version is complete as soon as it appears.
                    for name in ("saved_model.pb", "variables"):
                        size = os.path.getsize(directory / str(number) / name)
                        assert size == 1_000_000
                    until = until or time.monotonic() + random.uniform(0, 0.05)
            time.sleep(0.001)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    with files.new_version(directory):
        pass
    # The next writer removes files of killed ones.
    assert sorted(map(int, os.listdir(directory))) == files.versions(directory)


@pytest.mark.one_backend
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["saved_model", "onnx"])
def test_polling_reader_loads_only_complete_exports_of_killed_processes(tmp_path, kind):
    """Kills KERAS_TNT_KILLS exports. Defaults to 2."""
    kills = os.environ.get("KERAS_TNT_KILLS", "2")
    command = [sys.executable, "-m", "tests.helpers.export_crashes", str(tmp_path), kind, kills]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    logs = "".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert result.returncode == 0, result.stderr[-2000:] + logs
    counted = json.loads(result.stdout)
    assert counted["killed"] == int(kills) and counted["read"] > 0


# === Errors ===


def test_invalid_exports_raise_before_any_work(tmp_path, monkeypatch):
    model = keras_tnt.TNT(**TINY)
    monkeypatch.setattr(
        "keras_tnt.export.verification.example", lambda *_: pytest.fail("began to work")
    )
    (tmp_path / "file").write_text("")

    def refused(error, match, call=keras_tnt.export.saved_model, model=model, to="tnt", **settings):
        with pytest.raises(error, match=match):
            call(model, tmp_path / to, **settings)

    onnx = {"call": keras_tnt.export.onnx, "to": "tnt.onnx"}
    refused(ValueError, "names out of serving_default.*Received: 'predict'", signatures=["predict"])
    refused(ValueError, "each of the model's 7 classes. Received: 2 labels", labels=["a", "b"])
    refused(NotADirectoryError, "file' is a file", to="file")
    refused(NotADirectoryError, "file' is a file", to="file/tnt")
    refused(ValueError, "`version` must be a positive integer or None. Received: 0", version=0)
    refused(ValueError, "must end in .onnx", call=keras_tnt.export.onnx)
    refused(ValueError, "`signature` must be one of images, features", **onnx, signature="bytes")
    refused(ValueError, "float32, float16, int8. Received: 'int4'", **onnx, precision="int4")
    refused(ValueError, "`opset` must lie in 13 to 18 or be 23. Received: 99", **onnx, opset=99)
    refused(ValueError, "`opset` must lie in 13 to 18 or be 23. Received: 20", **onnx, opset=20)
    refused(ValueError, "functional keras.Model", model=keras.layers.Dense(3))
    headless = keras_tnt.TNT(**{**TINY, "include_top": False})
    refused(ValueError, "has no classifier", model=headless, labels=LABELS)
    refused(ValueError, "can have the signatures", model=headless, signatures=["classify"])
    quantized = keras_tnt.TNT(**TINY)
    quantized.quantize("int8")
    refused(ValueError, 'quantized.*precision="int8"', model=quantized, **onnx)
    full = shutil.disk_usage(tmp_path)._replace(free=1000)  # noqa: TID251
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    refused(OSError, "The export takes 0.0 MB, and the disk has 0.0 MB free")
    refused(OSError, "The export takes 0.0 MB, and the disk has 0.0 MB free", **onnx)
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_weights_with_nan_raise_and_leave_no_files(tmp_path):
    model = keras_tnt.TNT(**TINY)
    model.get_layer("head").bias.assign([np.nan] * 7)
    with pytest.raises(ValueError, match="gives NaN or infinite"):
        keras_tnt.export.saved_model(model, tmp_path / "tnt")
    assert not os.listdir(tmp_path)


@pytest.mark.one_backend
def test_exported_file_that_differs_from_the_model_raises(tmp_path, monkeypatch):
    from keras_tnt.export import servable

    model = keras_tnt.TNT(**TINY)
    write = servable.write_saved_model

    def write_another(network, *arguments, **settings):
        network.get_layer("head").bias.assign(np.arange(7.0))
        return write(network, *arguments, **settings)

    monkeypatch.setattr(servable, "write_saved_model", write_another)
    with pytest.raises(RuntimeError, match="differs from the model at batch 1"):
        keras_tnt.export.saved_model(model, tmp_path / "tnt")
    assert os.listdir(tmp_path / "tnt") == []
