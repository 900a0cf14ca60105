"""Skips the trainer's tests on backends other than TensorFlow, which the trainer requires.

The tests have two CPU devices. They share one MirroredStrategy, because TensorFlow supports only
one per process.
"""

import keras
import pytest

if keras.backend.backend() != "tensorflow":
    collect_ignore_glob = ["test_*.py"]
else:
    import tensorflow as tf

    @pytest.fixture(scope="session")
    def mirrored():
        return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

    @pytest.fixture(scope="session")
    def one_device():
        return tf.distribute.OneDeviceStrategy("CPU:0")

    @pytest.fixture
    def tiny(monkeypatch):
        """Replaces tnt_digits by its smallest configuration."""
        from training import models

        sizes = {"depth": 1, "outer_dim": 16, "inner_dim": 4, "outer_heads": 2, "inner_stride": 4}
        monkeypatch.setattr(models, "TNT_DIGITS", models.TNT_DIGITS | sizes)
