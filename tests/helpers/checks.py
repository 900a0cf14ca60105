"""Checks of Keras's requirements for layers and models, shared by the tests."""

import contextlib
import functools
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
from keras import ops

import keras_tnt
from keras_tnt.models.pretrained import tensor_names
from keras_tnt.weights import names as names_of_tensors
from tests.helpers.golden import assert_close

ROOT = Path(__file__).parents[2]
BACKEND = keras.backend.backend()

# Ways to run `predict`: as a graph, through XLA, or eagerly.
MODES = {"tensorflow": ("graph", "xla"), "jax": ("xla",), "torch": ("eager",)}[BACKEND]
# Largest absolute error against float32, divided by the peak-to-peak range of the reference.
TOLERANCES = {"mixed_float16": 1e-2, "mixed_bfloat16": 8e-2, "float64": 1e-5}


# === Layers ===


def check_layer(layer_class, *shapes, call=None, half_scale=300.0, **config):
    """Checks a layer that is deterministic when not training.

    Args:
        layer_class: the layer's class.
        *shapes: shape of each input, including the batch.
        call: dict of further arguments of `call`.
        half_scale: scale of the inputs at low precision. The square of the default overflows
            float16, which reveals norms that are not computed in float32.
        **config: the layer's arguments.

    Returns:
        The built layer.
    """
    call = call or {}
    inputs = [normal(shape) for shape in shapes]
    layer = layer_class(**config)
    check_layer_shapes(layer, inputs, call)
    check_layer_config(layer, config, inputs)
    check_gradients(layer, lambda *x: layer(*x, **call), inputs)
    for policy in TOLERANCES:
        scale = 1.0 if policy == "float64" else half_scale
        check_layer_policy(layer, policy, [scale * x for x in inputs], call)
    return layer


def check_layer_shapes(layer, inputs, call):
    """Checks that symbolic shapes and dtypes match the outputs for any batch size."""
    symbolic = [keras.KerasTensor((None, *x.shape[1:]), dtype="float32") for x in inputs]
    expected = keras.tree.flatten(layer(*symbolic, **call))
    if not call:
        shapes = layer.compute_output_shape(*[x.shape for x in symbolic])
        nested = isinstance(shapes[0], (tuple, list))
        assert [tuple(s) for s in (shapes if nested else [shapes])] == [s.shape for s in expected]
    assert all(spec.shape[0] is None for spec in expected)
    for batch in (1, 3):
        batches = [np.resize(x, (batch, *x.shape[1:])) for x in inputs]
        for real, spec in zip(output_specs(layer, batches, call), expected, strict=True):
            assert tuple(real.shape) == (batch, *spec.shape[1:])
            assert keras.backend.standardize_dtype(real.dtype) == spec.dtype


def check_layer_config(layer, given, inputs):
    """Checks that `get_config` has every argument, survives JSON, and rebuilds an equal layer."""
    config = layer.get_config()
    missing = [name for name in given if name not in config]
    assert not missing, f"get_config leaves out {missing}"
    assert keras.saving.get_registered_name(type(layer)).startswith("keras_tnt>")

    serialized = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    copy = keras.saving.deserialize_keras_object(serialized)
    assert type(copy) is type(layer)
    assert copy.get_config() == config
    if not copy.built:
        copy.build(*[x.shape for x in inputs])
    count = len(copy.variables)
    paths = [v.path for v in layer.weights]
    assert [v.path for v in copy.weights] == paths, "build does not make the same weights"
    assert len(set(paths)) == len(paths), "two weights share a path"
    copy(*[keras.KerasTensor(x.shape) for x in inputs])
    assert len(copy.variables) == count, "a call made state that build should have made"


def check_layer_policy(layer, policy, inputs, call):
    """Checks that a dtype policy reaches all sublayers, and that outputs match float32.

    Norms and softmax must not lose precision: the reference is float32 on the same inputs.
    """
    expected = keras.tree.flatten(compute(layer, *inputs, **call))
    with wide_types(policy):
        copy = type(layer).from_config({**layer.get_config(), "dtype": policy})
        copy(*[keras.KerasTensor(x.shape) for x in inputs], **call)
        copy.set_weights(layer.get_weights())
        outputs = keras.tree.flatten(compute(copy, *inputs, **call))
    for part in copy._flatten_layers():
        assert part.dtype_policy.name == policy, f"{part.path} has {part.dtype_policy.name}"
    for variable in copy.trainable_variables:
        assert variable.dtype == copy.variable_dtype
    for actual, wanted in zip(outputs, expected, strict=True):
        assert keras.backend.standardize_dtype(actual.dtype) == copy.compute_dtype
        assert_close(actual, wanted, TOLERANCES[policy])


def check_random_layer(layer_class, shape, **config):
    """Checks a random layer: seeded, different at every training call, identity at inference."""
    x = normal(shape)

    def draw(seed):
        layer = layer_class(seed=seed, **config)
        return [ops.convert_to_numpy(layer(x, training=True)) for _ in range(2)]

    first, second = draw(1)
    assert np.any(first != second), "two calls drew the same"
    assert_equal(draw(1)[0], first)
    assert np.any(draw(2)[0] != first), "the seed makes no difference"
    assert_equal(layer_class(seed=1, **config)(x, training=False), x)


# === Models ===


def check_model(build, **arguments):
    """Checks the model of `build(**arguments)`, except for loading in a fresh process.

    Returns:
        The model.
    """
    model = build(**arguments)
    images = normal((2, *model.input_shape[1:]))

    copy = type(model).from_config(json.loads(json.dumps(model.get_config())))
    assert [v.path for v in copy.weights] == [v.path for v in model.weights]
    copy.set_weights(model.get_weights())
    expected = compute(copy, images)

    for batch in (1, 3):
        (output,) = output_specs(model, [np.resize(images, (batch, *images.shape[1:]))], {})
        assert tuple(output.shape) == (batch, *model.output_shape[1:])
    check_gradients(model, model, [images])
    for policy in TOLERANCES:
        check_model_policy(build, arguments, policy, model, images, expected)
    return model


def check_model_policy(build, arguments, policy, model, images, expected):
    """Checks that predictions under a policy match float32, and are float32 or wider."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        with wide_types(policy):
            copy = build(**arguments)
            copy.set_weights(model.get_weights())
            output = compute(copy, images)
        dtype = keras.config.dtype_policy().compute_dtype
        if any(layer.name == "predictions" for layer in copy.layers):
            dtype = "float64" if policy == "float64" else "float32"
        assert keras.backend.standardize_dtype(output.dtype) == dtype
        assert_close(output, expected, TOLERANCES[policy])
    finally:
        keras.config.set_dtype_policy(before)


FRESH_PROCESS = """
import sys
import warnings
import keras
import keras_tnt
import numpy as np

def predict(model, directory, name):
    model.compile(jit_compile=keras.backend.backend() == "jax")
    predictions = model.predict_on_batch(np.load(f"{directory}/images.npy"))
    np.save(f"{directory}/{name}.npy", predictions)

for directory in sys.argv[1:]:
    model = keras.models.load_model(f"{directory}/model.keras")
    predict(model, directory, "from_keras")
    copy = keras.models.clone_model(model)
    copy.load_weights(f"{directory}/model.weights.h5")
    predict(copy, directory, "from_weights")
"""


def check_fresh_process(models, directory, tolerance=1e-5):
    """Checks that `.keras` and `.weights.h5` files load in a process that imports only the package.

    Args:
        models: dict of models by name; one process loads all of them.
        directory: a temporary directory.
        tolerance: largest error relative to the peak-to-peak range. Defaults to 1e-5.
    """
    expected = {}
    for name, model in models.items():
        place = directory / name
        place.mkdir()
        images = normal((2, *model.input_shape[1:]))
        expected[name] = compute(model, images)
        np.save(place / "images.npy", images)
        model.save(place / "model.keras")
        model.save_weights(place / "model.weights.h5")
    run_python(FRESH_PROCESS, *[str(directory / name) for name in models])
    for name in models:
        for source in ("from_keras", "from_weights"):
            assert_close(np.load(directory / name / f"{source}.npy"), expected[name], tolerance)


def run_python(code, *arguments, **environment):
    """Runs code in a separate Python process with the same backend, and returns its output."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": BACKEND, **environment},
        capture_output=True,
        text=True,
        timeout=900,  # slow tests take minutes on a busy machine
    )
    assert result.returncode == 0, f"ended with {result.returncode}: {result.stderr}"
    return result.stdout


def in_fork(function, count=1):
    """Calls `function(queue)` in a forked process, and returns `count` items from the queue."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=function, args=(queue,), daemon=True)
    process.start()
    try:
        process.join(60)
        assert process.exitcode == 0, "the forked process hangs or failed"
        return [queue.get() for _ in range(count)]
    finally:
        process.kill()


# === Results and gradients ===


@contextlib.contextmanager
def unprivileged():
    """Context in which the process is not root, because root can write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def compute(layer, *inputs, **call):
    """Returns the outputs of `layer(*inputs, **call)` as NumPy arrays.

    On JAX the call is compiled as a whole: eagerly, JAX compiles every operation, which is far
    slower.
    """
    if BACKEND == "jax":
        if not layer.built:
            layer(*[keras.KerasTensor(x.shape) for x in inputs], **call)
        outputs = jitted(layer, **call)([v.value for v in layer.variables], inputs)
    else:
        outputs = layer(*inputs, **call)
    return keras.tree.map_structure(ops.convert_to_numpy, outputs)


def predict(model, images, mode=MODES[0]):
    """Returns the predictions of `model` for a batch, run in one of `MODES`."""
    model.compile(run_eagerly=mode == "eager", jit_compile=mode == "xla")
    return model.predict_on_batch(images)


@functools.lru_cache(maxsize=8)
def jitted(layer, **call):
    import jax

    return jax.jit(stateless(layer, **call))


def stateless(layer, **call):
    """Returns a pure function of the layer's variable values and inputs."""

    def function(values, inputs):
        with keras.StatelessScope(list(zip(layer.variables, values, strict=True))):
            return layer(*inputs, **call)

    return function


def output_specs(layer, inputs, call):
    """Returns shape and dtype of each output; JAX does not run the call."""
    if BACKEND == "jax":
        import jax

        values = [v.value for v in layer.variables]
        outputs = jax.eval_shape(stateless(layer, **call), values, inputs)
    else:
        outputs = layer(*inputs, **call)
    return keras.tree.flatten(outputs)


def check_gradients(layer, call, inputs):
    """Checks that every trainable variable gets a finite, nonzero gradient."""
    variables = layer.trainable_variables
    if not variables:
        return
    for variable, gradient in zip(variables, gradients(layer, call, inputs), strict=True):
        assert gradient is not None, f"no gradient reaches {variable.path}"
        assert np.all(np.isfinite(gradient)), f"the gradient of {variable.path} is not finite"
        assert np.any(gradient != 0), f"the gradient of {variable.path} is zero"


def gradients(layer, call, inputs):
    """Returns gradients of a random linear functional of the outputs, one array per variable.

    The functional is the same at every call, so that gradients of two models are comparable.
    """
    inputs = [ops.convert_to_tensor(x) for x in inputs]

    def loss():
        outputs = keras.tree.flatten(call(*inputs))
        draw = np.random.default_rng(1)
        return sum(ops.sum(y * ops.cast(draw.normal(size=y.shape), y.dtype)) for y in outputs)

    variables = layer.trainable_variables
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss()
        found = tape.gradient(value, [v.value for v in variables])
    elif BACKEND == "torch":
        layer.zero_grad()
        loss().backward()
        found = [v.value.grad for v in variables]
    else:
        import jax

        def loss_of(values):
            mapping = list(zip(variables, values, strict=True))
            with keras.StatelessScope(state_mapping=mapping):
                return loss()

        found = jax.jit(jax.grad(loss_of))([v.value for v in variables])
    return [None if g is None else ops.convert_to_numpy(g) for g in found]


def normal(shape, seed=0):
    """Returns a float32 array of normal numbers, a function of shape and seed."""
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def wide_types(policy):
    """Returns a context in which JAX supports float64, which is disabled by default."""
    if policy == "float64" and BACKEND == "jax":
        import jax

        return jax.enable_x64(True)
    return contextlib.nullcontext()


def assert_equal(actual, expected):
    """Asserts that nested results agree to a few units in the last place."""
    for a, b in zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True):
        assert_close(a, b, 1e-6)


# === Checkpoints ===


def entries(model, convention=0):
    """Returns the checkpoint entries of all variables of a model."""
    names = tensor_names(model)
    return names_of_tensors.entries(model, names.table, names.prefix, convention)


# === Variants for exports ===

# Each family's smallest variant, with fewer blocks: every signature is traced, written and run,
# which takes minutes for full models.
SHALLOW = {
    "TNTTiny": {"depth": 2},
    "PyramidTNTTiny": {"depths": (2, 1, 1, 1)},
    "DeiTTiny": {"depth": 2, "distilled": True},
    "CaiTXXS24": {"depth": 2},
}
if BACKEND != "tensorflow":  # one family shows the differences between backends
    SHALLOW = {"TNTTiny": {"depth": 2}}


def shallow(name):
    return getattr(keras_tnt, name)(weights=None, input_shape=(64, 64, 3), **SHALLOW[name])
