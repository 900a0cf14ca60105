"""Programs that may leave the process do not call C++ kernels; local programs do."""

import keras
import numpy as np
import pytest

import keras_tnt
from keras_tnt.kernels import runtimes
from tests.helpers.checks import run_python
from tests.helpers.tiny_models import tiny_of

BACKEND = keras.backend.backend()
TINY = {
    "input_shape": (32, 32, 3),
    "depth": 1,
    "outer_dim": 16,
    "inner_dim": 8,
    "outer_heads": 2,
    "inner_heads": 2,
    "classes": 3,
}
MODELS = {
    "tnt": lambda: keras_tnt.TNT(**TINY, stochastic_depth=0.1),
    "deit": lambda: tiny_of("deit_distilled", (32, 32)),
    "cait": lambda: tiny_of("cait", (32, 32)),
}
only = {
    name: pytest.mark.skipif(BACKEND != name, reason=f"this is {name}'s")
    for name in ("tensorflow", "jax", "torch")
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def asked(monkeypatch):
    """Returns a list of (answer of `runs_here`, training) that is filled by calls."""
    answers, ask = [], runtimes.runs_here

    def record(backend, x, training):
        answers.append((ask(backend, x, training), bool(training)))
        return answers[-1][0]

    monkeypatch.setattr(runtimes, "runs_here", record)
    return answers


# === TensorFlow ===


def saved_bytes(folder):
    return (folder / "saved_model.pb").read_bytes()


def check_plain(folder):
    """Checks that a SavedModel contains the model's operations and no custom calls of ours."""
    data = saved_bytes(folder)
    assert b"MatMul" in data and b"Erf" in data
    assert b"XlaCallModule" not in data and b"keras_tnt_inner" not in data


@only["tensorflow"]
@pytest.mark.parametrize("training", [False, True])
def test_export_archive_endpoint_has_no_native_call(training, model, tmp_path):
    import tensorflow as tf

    archive = keras.export.ExportArchive()
    archive.track(model)
    spec = [tf.TensorSpec((None, *model.input_shape[1:]))]
    archive.add_endpoint("serve", lambda x: model(x, training=training), spec)
    archive.write_out(tmp_path / "saved", verbose=False)
    check_plain(tmp_path / "saved")


@only["tensorflow"]
@pytest.mark.parametrize("compiled", [None, False, True])
@pytest.mark.parametrize("name", ["predict", "train", "one_step_on_data"])
def test_tf_function_run_before_export_has_no_native_call(name, compiled, tmp_path):
    import tensorflow as tf

    model = MODELS["tnt"]()

    def predict(x):
        return model(x, training=False)

    def train(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True))
        return tape.gradient(loss, [v.value for v in model.trainable_variables])[:2]

    def one_step_on_data(x):  # Keras has a function of this name
        return model(x, training=True)

    module = tf.Module()
    module.network = [v.value for v in model.variables]
    spec = [tf.TensorSpec((2, 32, 32, 3))]
    module.run = tf.function(
        locals()[name], input_signature=spec, jit_compile=compiled, autograph=False
    )
    module.run(tf.zeros((2, 32, 32, 3)))
    tf.saved_model.save(module, tmp_path / "saved")
    check_plain(tmp_path / "saved")


@only["tensorflow"]
@pytest.mark.parametrize("trained", [False, True])
def test_exported_keras_model_has_no_native_call(trained, tmp_path):
    model = MODELS["tnt"]()
    model.compile("sgd", "sparse_categorical_crossentropy")
    images = np.zeros((4, 32, 32, 3), "float32")
    if trained:
        model.fit(images, np.zeros(4, "int32"), verbose=0)
        model.predict(images, verbose=0)
    model.export(tmp_path / "saved", verbose=False)
    check_plain(tmp_path / "saved")


@only["tensorflow"]
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_fit_uses_kernels_and_predict_only_with_xla(compiled, steps, asked):
    model = MODELS["tnt"]()
    model.compile(
        "sgd",
        "sparse_categorical_crossentropy",
        jit_compile=compiled,
        steps_per_execution=steps,
    )
    images = np.zeros((6, 32, 32, 3), "float32")
    asked.clear()
    model.fit(images, np.zeros(6, "int32"), batch_size=3, verbose=0)
    assert asked and set(asked) == {(True, True)}
    asked.clear()
    model.predict(images, batch_size=3, verbose=0)
    assert asked and set(asked) == {(compiled, False)}


@only["tensorflow"]
def test_eager_layer_call_uses_kernels(asked):
    model = MODELS["tnt"]()
    asked.clear()
    model(np.zeros((1, 32, 32, 3), "float32"), training=True)
    assert asked and all(answer for answer, _ in asked)


@only["tensorflow"]
def test_local_program_uses_kernels(asked):
    import tensorflow as tf

    model = MODELS["tnt"]()
    step = runtimes.local_program()(lambda x: model(x, training=True))
    for function, expected in ((step, True), (lambda x: model(x, training=True), False)):
        asked.clear()
        tf.function(function, autograph=False)(tf.zeros((1, 32, 32, 3)))
        assert asked and set(asked) == {(expected, True)}


LOAD = """
import sys
import tensorflow as tf
images = tf.ones((2, 32, 32, 3))
loaded = tf.saved_model.load(sys.argv[1])
with tf.GradientTape() as tape:
    tape.watch(images)
    loss = tf.reduce_sum(loaded.sample(images) ** 2)
assert tape.gradient(loss, images) is not None
print(loaded.serve(images).shape, loaded.sample(images).shape)
"""


@only["tensorflow"]
@pytest.mark.slow
def test_archive_runs_in_a_process_without_this_package(tmp_path):
    import tensorflow as tf

    model = MODELS["tnt"]()
    archive = keras.export.ExportArchive()
    archive.track(model)
    spec = [tf.TensorSpec((None, 32, 32, 3))]
    archive.add_endpoint("serve", lambda x: model(x, training=False), spec)
    archive.add_endpoint("sample", lambda x: model(x, training=True), spec)
    archive.write_out(tmp_path / "saved", verbose=False)
    assert run_python(LOAD, str(tmp_path / "saved")).split("\n")[0] == "(2, 3) (2, 3)"


# === JAX ===


def calls_cpp(program):
    """Returns whether an MLIR program has a custom call of ours; locations do not count."""
    return any("keras_tnt" in line for line in program.splitlines() if "custom_call" in line)


@only["jax"]
@pytest.mark.parametrize("training", [False, True])
def test_jax_export_has_no_native_call(training, model):
    import jax

    values = [v.value for v in model.variables]
    images = jax.numpy.zeros((2, *model.input_shape[1:]))

    def run(values, images):
        with keras.StatelessScope(list(zip(model.variables, values, strict=True))):
            return keras.tree.flatten(model(images, training=training))[0]

    here = jax.jit(run).lower(values, images).as_text()
    exported = jax.export.export(jax.jit(run))(values, images)
    assert not calls_cpp(exported.mlir_module())
    gradient = jax.jit(jax.grad(lambda *args: run(*args).sum(), argnums=1))
    assert not calls_cpp(jax.export.export(gradient)(values, images).mlir_module())
    if model.name.startswith("tnt") or training and model.name.startswith("deit"):
        assert calls_cpp(here)  # a program that stays in this process


@only["jax"]
@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_saved_model_endpoint_of_jax_has_no_native_call(training, tmp_path):
    tf = pytest.importorskip("tensorflow")
    model = MODELS["tnt"]()
    archive = keras.export.ExportArchive()
    archive.track(model)
    spec = [tf.TensorSpec((2, 32, 32, 3))]
    archive.add_endpoint("serve", lambda x: model(x, training=training), spec)
    archive.write_out(tmp_path / "saved", verbose=False)
    assert b"keras_tnt_inner" not in saved_bytes(tmp_path / "saved")


# === torch ===


@only["torch"]
@pytest.mark.parametrize("training", [False, True])
def test_torch_export_has_no_native_call(training, model):
    import torch

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return keras.tree.flatten(self.model(x, training=training))[0]

    images = torch.zeros((2, *model.input_shape[1:]))
    exported = torch.export.export(Network(), (images,), strict=False)
    assert "keras_tnt" not in exported.graph_module.code


@only["torch"]
@pytest.mark.parametrize("training", [False, True])
def test_torch_fx_graph_has_no_native_call(training):
    import torch
    from torch.fx.experimental.proxy_tensor import make_fx

    model = MODELS["tnt"]()
    images = torch.zeros((2, 32, 32, 3))
    with torch.no_grad():
        recorded = make_fx(lambda x: model(x, training=training))(images)
    assert "keras_tnt" not in recorded.code


WRONG = {
    "words of another rank": lambda x, w: (x[0], w),
    "half of the words": lambda x, w: (x[:, :, :8], w),
    "a weight of one number": lambda x, w: (x, [w[0][:1, :1], *w[1:]]),
    "a kernel turned": lambda x, w: (x, [*w[:2], w[2].T, *w[3:]]),
    "a weight of another type": lambda x, w: (x, [*w[:3], w[3].double(), *w[4:]]),
    "an empty weight": lambda x, w: (x, [*w[:11], w[11][:0]]),
    "a weight less": lambda x, w: (x, w[:11]),
}


@only["torch"]
@pytest.mark.parametrize("case", [None, *WRONG])
def test_torch_operator_rejects_invalid_inputs(case):
    import torch

    from keras_tnt import kernels

    sizes = kernels.InnerSizes(words=16, dim=8, heads=2, hidden=16, across_words=False)
    if runtimes.operator("torch", sizes) is None:
        pytest.skip("there is no C++ here")
    x = torch.ones((2, 3, 16, 8))
    weights = [torch.ones(shape) for shape in sizes.weight_shapes(tuple(x.shape))]
    if case is None:
        assert (
            torch.ops.keras_tnt.compute(x, weights, None, 2, 1e-5, False, False)[0].shape == x.shape
        )
        return
    x, weights = WRONG[case](x, weights)
    with pytest.raises((ValueError, TypeError)):
        torch.ops.keras_tnt.compute(x, weights, None, 2, 1e-5, False, False)
