"""LayerScale, Dropout and StochasticDepth."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_tnt.layers import Dropout, LayerScale, StochasticDepth
from tests.checks import BACKEND, check_layer, check_random_layer, run_python


def test_layer_scale_meets_what_keras_users_expect():
    check_layer(LayerScale, (2, 5, 8), initial_value=0.5)


def test_layer_scale_starts_from_its_initial_value():
    x = np.ones((1, 2, 4), "float32")
    np.testing.assert_allclose(ops.convert_to_numpy(LayerScale(1e-5)(x)), 1e-5 * x)


@pytest.mark.parametrize("layer_class", [Dropout, StochasticDepth])
def test_random_layers_meet_what_keras_users_expect(layer_class):
    check_layer(layer_class, (2, 5, 8), rate=0.3, seed=1)
    check_random_layer(layer_class, (64, 5, 8), rate=0.3)


def kept(rate, shape, sample_axes):
    """For each sample, the factor that its branch came out with; it must be one for all of it."""
    layer = StochasticDepth(rate, sample_axes, seed=1)
    x = ops.convert_to_numpy(layer(np.ones(shape, "float32"), training=True))
    factors = x.reshape((*shape[:sample_axes], -1))
    assert np.ptp(factors, axis=-1).max() == 0
    return factors[..., 0]


def test_stochastic_depth_drops_whole_samples_and_keeps_the_expectation():
    factors = kept(0.25, (4000, 3, 2), sample_axes=1)
    np.testing.assert_allclose(np.unique(factors), [0, 1 / 0.75], rtol=1e-6)
    assert abs(factors.mean() - 1) < 0.05


def test_stochastic_depth_drops_words_patch_by_patch():
    factors = kept(0.5, (100, 40, 3, 2), sample_axes=2)
    assert abs(factors.mean() - 1) < 0.1
    within_images = factors.mean(axis=1)
    assert np.all(within_images > 0) and np.all(within_images < 2)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_stochastic_depth_refuses_a_rate_outside_0_to_1(rate):
    with pytest.raises(ValueError, match=rf"`rate` must lie in \[0, 1\).*rate={rate}"):
        StochasticDepth(rate)


def test_a_rate_of_zero_keeps_no_state_and_returns_its_input():
    layer = StochasticDepth(0.0)
    x = keras.random.normal((2, 3, 4))
    assert layer(x, training=True) is x
    assert not layer.variables


REPLICAS = """
import keras, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from keras_tnt.layers import Dropout, StochasticDepth

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    layers = [Dropout(0.5, seed=1), StochasticDepth(0.5, seed=1)]

@tf.function
def step(x):
    return strategy.run(lambda: [layer(x, training=True) for layer in layers])

for results in step(tf.ones((64, 8))):
    first, second = (r.numpy() for r in strategy.experimental_local_results(results))
    assert first.shape == second.shape == (64, 8)
    assert {0.0, 2.0} == set(first.flat) == set(second.flat)
    print("same" if np.array_equal(first, second) else "different")
"""


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute belongs to TensorFlow")
def test_replicas_of_a_strategy_draw_masks_of_their_own():
    assert run_python(REPLICAS).split() == ["different", "different"]
