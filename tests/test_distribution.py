"""JAX: data-parallel `fit` with keras.distribution, and models under JAX meshes."""

import os

import keras
import numpy as np
import pytest

from tests.helpers.checks import run_python

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
def test_two_devices_learn_the_weights_of_one(tmp_path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    weights = []
    for devices in ("one", "both"):
        path = tmp_path / f"{devices}.npz"
        run_python(FIT, devices, path, XLA_FLAGS=flags)
        with np.load(path) as file:
            weights.append([file[name] for name in file.files])
    for one, both in zip(*weights, strict=True):
        np.testing.assert_allclose(both, one, atol=1e-5)


MESHES = """
import jax
import keras
import numpy as np
import keras_tnt
from jax.sharding import AxisType, PartitionSpec as P

RATES = {"dropout": 0.1, "attention_dropout": 0.1, "stochastic_depth": 0.2}
COMMON = {"weights": None, "classes": 3, **RATES}
TNT = {"input_shape": (32, 32, 3), "patch_size": 8, "inner_stride": 4, "depth": 1, "outer_dim": 8,
       "inner_dim": 4, "outer_heads": 2, "inner_heads": 2, **COMMON}
PLAIN = {"input_shape": (32, 32, 3), "patch_size": 8, "depth": 1, "embed_dim": 8, "num_heads": 2}
MODELS = {
    "tnt": lambda: keras_tnt.TNT(**TNT),
    "tnt, all options": lambda: keras_tnt.TNT(
        distilled=True, layer_scale=0.1, class_attention_depth=1, squeeze_excite=True,
        qkv_bias=True, **TNT),
    "tnt, legacy": lambda: keras_tnt.TNT(legacy=True, **TNT),
    "tnt, feature map": lambda: keras_tnt.TNT(include_top=False, **TNT),
    "tnt, token": lambda: keras_tnt.TNT(include_top=False, pooling="token", **TNT),
    "tnt, any size": lambda: keras_tnt.TNT(**TNT | {"input_shape": (None, None, 3)}),
    "deit": lambda: keras_tnt.DeiT(distilled=True, **PLAIN, **COMMON),
    "cait": lambda: keras_tnt.CaiT(**PLAIN, **COMMON),
    "pyramid_tnt": lambda: keras_tnt.PyramidTNT(
        input_shape=(40, 24, 3), depths=(1, 1), outer_dims=(8, 8), inner_dims=(4, 4),
        outer_heads=(2, 2), inner_heads=(2, 2), reductions=(2, 1), **COMMON),
    "backbone": lambda: keras_tnt.backbone(keras_tnt.TNT(**TNT), levels=["P2", "P4"]),
}

def learn(model, training):
    def loss(weights, state, images):
        outputs, _ = model.stateless_call(weights, state, images, training=training)
        return sum((x**2).sum() for x in keras.tree.flatten(outputs)), outputs
    return jax.value_and_grad(loss, has_aux=True)

def arguments(model, place_weights, place_images):
    shape = [side or 32 for side in model.input_shape[1:]]
    images = np.random.default_rng(0).uniform(0, 255, (4, *shape)).astype("float32")
    values = ([v.value for v in variables]
              for variables in (model.trainable_variables, model.non_trainable_variables))
    values = [[jax.device_put(np.asarray(v), place_weights) for v in vs] for vs in values]
    return *values, jax.device_put(images, place_images)

for kind in (AxisType.Explicit, AxisType.Auto):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    for name, make in MODELS.items():
        model = make()
        with jax.set_mesh(mesh):
            for training in (False, True):
                traced = jax.eval_shape(learn(model, training), *arguments(model, P(), P("data")))
        if name == "tnt":
            one = jax.jit(learn(model, True))(*arguments(model, None, None))
            with jax.set_mesh(mesh):
                two = jax.jit(learn(model, True))(*arguments(model, P(), P("data")))
            for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
        print(name)
"""


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="meshes are JAX's")
def test_every_family_trains_in_meshes_with_explicit_and_auto_axes():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    assert len(run_python(MESHES, XLA_FLAGS=flags).splitlines()) == 20
