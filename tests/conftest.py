"""The backend under test, and Keras's defaults and one seed for each test.

Warnings are errors: pyproject.toml says so, and lists those of other packages that are let pass.
"""

import os

# Set before Keras is imported, so that no keras.json of a home directory chooses for the tests.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if os.environ["KERAS_BACKEND"] == "jax":
    # On models this small JAX does little but compile: four times less of it without optimisation.
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    )

import keras
import pytest

keras.config.set_floatx("float32")
keras.config.set_image_data_format("channels_last")


def pytest_report_header():
    return f"keras {keras.__version__} on {keras.backend.backend()} {_backend_version()}"


def _backend_version():
    return __import__(keras.backend.backend()).__version__


if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    # Two devices, for the trainer's strategies: it has to be said before TensorFlow starts.
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )


def pytest_collection_modifyitems(config, items):
    if keras.backend.backend() == "tensorflow":
        return
    left_out = [item for item in items if item.get_closest_marker("one_backend")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def keras_defaults():
    """A test starts from Keras's defaults and the same seed, and leaves the defaults behind.

    Behind, because fixtures of a module or a session are made before this one runs.
    """
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    keras.config.set_image_data_format("channels_last")
