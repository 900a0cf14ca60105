"""On JAX, Keras's own `fit` shares a batch between devices."""

import os

import keras
import numpy as np
import pytest

from tests.checks import run_python

FIT = """
import sys
import keras
import numpy as np
import keras_tnt

assert len(keras.distribution.list_devices()) == 2
if sys.argv[1] == "both":
    keras.distribution.set_distribution(keras.distribution.DataParallel())
keras.utils.set_random_seed(0)
model = keras_tnt.TNT(
    input_shape=(16, 16, 3), classes=3, patch_size=8, inner_stride=4, depth=1,
    outer_dim=16, inner_dim=4, outer_heads=2, inner_heads=2,
)
model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
random = np.random.default_rng(0)
images = random.uniform(0, 255, (16, 16, 16, 3)).astype("float32")
model.fit(images, random.integers(0, 3, 16), batch_size=8, epochs=2, shuffle=False, verbose=0)
np.savez(sys.argv[2], *[np.asarray(v.value) for v in model.trainable_variables])
"""


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="keras.distribution is JAX's")
def test_two_devices_learn_what_one_does(tmp_path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    weights = []
    for devices in ("one", "both"):
        path = tmp_path / f"{devices}.npz"
        run_python(FIT, devices, path, XLA_FLAGS=flags)
        with np.load(path) as file:
            weights.append([file[name] for name in file.files])
    for one, both in zip(*weights, strict=True):
        np.testing.assert_allclose(both, one, atol=1e-5)
