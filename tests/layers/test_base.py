"""Functions and norms that all layers share."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_tnt.layers.base import LayerNormalization, at_least_float32, gelu
from tests.helpers.checks import assert_close, compute, normal


def test_gelu_is_exact():
    x = np.linspace(-6, 6, 101, dtype="float32")
    expected = [v * 0.5 * (1 + math.erf(v / 2**0.5)) for v in x.astype("float64")]
    np.testing.assert_allclose(ops.convert_to_numpy(gelu(ops.array(x))), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gelu_preserves_the_dtype(dtype):
    assert keras.backend.standardize_dtype(gelu(ops.ones((2,), dtype=dtype)).dtype) == dtype


@pytest.mark.parametrize(
    ("dtype", "wider"),
    [
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ],
)
def test_at_least_float32_widens_low_precision_only(dtype, wider):
    assert at_least_float32(dtype) == wider


@pytest.mark.parametrize(("axis", "shape"), [(-1, (5,)), ((-2, -1), (4, 5))])
def test_layer_normalization_matches_its_equation(axis, shape):
    layer = LayerNormalization(axis=axis, epsilon=1e-3)
    x = normal((2, 3, 4, 5)) + 2
    layer.build(x.shape)
    gamma, beta = normal(shape, seed=1), normal(shape, seed=2)
    layer.set_weights([gamma, beta])
    centered = x - x.mean(axis, keepdims=True)
    deviation = np.sqrt((centered**2).mean(axis, keepdims=True) + 1e-3)
    assert_close(compute(layer, x), centered / deviation * gamma + beta, 1e-5)
