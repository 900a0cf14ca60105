"""JAX programs for GPUs and TPUs, lowered without such a device, have no native calls."""

import re

import keras
import pytest
from keras import ops

from tests.helpers.tiny_models import tiny_of, tiny_tnt

pytestmark = pytest.mark.skipif(keras.backend.backend() != "jax", reason="this is JAX's export")

# Custom calls that XLA supports on every device, or on the one in their name.
KNOWN = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "cu_threefry2x32_ffi"}


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("family", ["tnt", "pyramid_tnt", "deit_distilled", "cait"])
def test_forward_pass_and_training_step_lower_for_gpus_and_tpus(family, dtype):
    import jax

    settings = {"stochastic_depth": 0.1, "dtype": dtype}
    if family == "tnt":
        model = tiny_tnt(depth=1, **settings)
    else:
        model = tiny_of(family, (32, 32), **settings)
    optimizer = keras.optimizers.AdamW(1e-3)
    optimizer.build(model.trainable_variables)

    def step(trainable, others, state, images, labels):
        predicted, _ = model.stateless_call(trainable, others, images, training=False)

        def loss_of(trainable):
            y, others_now = model.stateless_call(trainable, others, images, training=True)
            loss = keras.losses.sparse_categorical_crossentropy(labels, y)
            return ops.mean(loss), others_now

        gradients, others = jax.grad(loss_of, has_aux=True)(trainable)
        return predicted, others, optimizer.stateless_apply(state, gradients, trainable)

    values = (
        [v.value for v in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            optimizer.variables,
        )
    )
    arguments = *values, ops.ones((2, 32, 32, 3)), ops.zeros(2, "int32")
    exported = jax.export.export(jax.jit(step), platforms=["cuda", "tpu"])(*arguments)
    called = set(re.findall(r"custom_call @([\w.]+)", exported.mlir_module()))
    assert called <= KNOWN
