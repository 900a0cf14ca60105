"""Selects the backend under test, and resets Keras's defaults and the seed for each test.

pyproject.toml turns warnings into errors and lists the ignored warnings of other packages.
"""

import importlib.metadata
import math
import os
import time

import pytest

# Set before Keras is imported, so that a keras.json in the home directory has no effect.
BACKEND = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Set by `make test-jax-defaults`: JAX compiles and draws as it does for users.
FAST_JAX = BACKEND == "jax" and not os.environ.get("KERAS_TNT_TEST_JAX_DEFAULTS")
if FAST_JAX:
    # The models are so small that JAX mostly compiles: without optimization that is 4 times faster.
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    )


def pytest_configure(config):
    if getattr(config.option, "numprocesses", None):
        return  # The controller of pytest-xdist runs no tests and needs no Keras.
    import keras

    keras.config.set_floatx("float32")
    keras.config.set_image_data_format("channels_last")
    if BACKEND == "tensorflow":
        import tensorflow as tf

        # The trainer's strategies are tested on two devices, which must be configured before
        # TensorFlow starts.
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
        )
        keep_functions_between_tests(tf)
    elif FAST_JAX:
        draw_weights_by_one_program()


def keep_functions_between_tests(tf):
    """Makes `tf.random.set_seed` a no-op if the seed is already set.

    It discards every instantiated TensorFlow function: a compiled function that several tests share
    would be optimized again in each, which took longer than most tests.
    """
    set_seed = tf.random.set_seed
    seeds = []

    def set_new_seed(seed):
        if seeds != [seed]:
            seeds[:] = [seed]
            set_seed(seed)

    tf.random.set_seed = set_new_seed


def draw_weights_by_one_program():
    """Makes JAX draw weights of all shapes as a prefix of an array of one of a few lengths.

    Otherwise it compiles a program per shape: 9 of the 22 seconds of one test of a model.
    """
    import jax
    import numpy as np

    def by_length(draw):
        def drawn(key, shape=(), dtype=float, *bounds, **settings):
            if isinstance(key, jax.core.Tracer):
                return draw(key, shape, dtype, *bounds, **settings)
            count = math.prod(shape)
            length = max(1 << 12, 1 << (count - 1).bit_length())
            values = np.asarray(draw(key, (length,), dtype, *bounds, **settings))
            return values[:count].reshape(shape)

        return drawn

    jax.random.normal = by_length(jax.random.normal)
    jax.random.uniform = by_length(jax.random.uniform)


def pytest_report_header():
    versions = {name: importlib.metadata.version(name) for name in ("keras", BACKEND)}
    return f"keras {versions['keras']} on {BACKEND} {versions[BACKEND]}"


def pytest_collection_modifyitems(config, items):
    if BACKEND == "tensorflow":
        return
    left_out = [item for item in items if item.get_closest_marker("one_backend")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_runtest_setup(item):
    """Skips tests that would start after KERAS_TNT_TEST_DEADLINE, in seconds since 1970."""
    deadline = os.environ.get("KERAS_TNT_TEST_DEADLINE")
    if deadline and time.time() > float(deadline):
        pytest.skip("the time for tests is over (KERAS_TNT_TEST_DEADLINE)")


@pytest.fixture(autouse=True)
def keras_defaults():
    """Seeds each test, and restores Keras's defaults after it.

    They are restored after a test, because module and session fixtures run before this one.
    """
    import keras

    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    keras.config.set_image_data_format("channels_last")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Sets an empty hub cache for the test and returns its directory."""
    from huggingface_hub import constants

    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def hub(monkeypatch, cache):
    """Yields a fake hub without repositories, set as HF_ENDPOINT."""
    from tests.helpers.hub_server import Hub

    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.shutdown()
    server.server_close()
