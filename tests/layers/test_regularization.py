"""LayerScale, Dropout and StochasticDepth."""

import numpy as np
import pytest
from keras import ops

from keras_tnt.layers import Dropout, LayerScale, StochasticDepth
from tests.helpers.checks import BACKEND, check_layer, check_random_layer, run_python


def test_layer_scale_is_a_valid_keras_layer():
    check_layer(LayerScale, (2, 5, 8), initial_value=0.5)


def test_layer_scale_starts_from_its_initial_value():
    x = np.ones((1, 2, 4), "float32")
    np.testing.assert_allclose(ops.convert_to_numpy(LayerScale(1e-5)(x)), 1e-5 * x)


@pytest.mark.parametrize("layer_class", [Dropout, StochasticDepth])
def test_random_layers_are_valid_keras_layers(layer_class):
    check_layer(layer_class, (2, 5, 8), rate=0.3, seed=1)
    check_random_layer(layer_class, (64, 5, 8), rate=0.3)


def kept(rate, shape, sample_axes):
    """Returns the drop-path factor of each sample, after checking that it is one per sample."""
    layer = StochasticDepth(rate, sample_axes, seed=1)
    x = ops.convert_to_numpy(layer(np.ones(shape, "float32"), training=True))
    factors = x.reshape((*shape[:sample_axes], -1))
    assert np.ptp(factors, axis=-1).max() == 0
    return factors[..., 0]


def test_stochastic_depth_drops_samples_and_preserves_the_expectation():
    factors = kept(0.25, (4000, 3, 2), sample_axes=1)
    np.testing.assert_allclose(np.unique(factors), [0, 1 / 0.75], rtol=1e-6)
    assert abs(factors.mean() - 1) < 0.05


def test_stochastic_depth_drops_words_per_patch():
    factors = kept(0.5, (100, 40, 3, 2), sample_axes=2)
    assert abs(factors.mean() - 1) < 0.1
    within_images = factors.mean(axis=1)
    assert np.all(within_images > 0) and np.all(within_images < 2)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_stochastic_depth_rate_outside_0_to_1_raises(rate):
    with pytest.raises(ValueError, match=rf"`rate` must lie in \[0, 1\).*rate={rate}"):
        StochasticDepth(rate)


def test_rate_of_zero_is_a_stateless_identity():
    layer = StochasticDepth(0.0)
    x = ops.ones((2, 3, 4))
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
def test_replicas_of_a_strategy_draw_different_masks():
    assert run_python(REPLICAS).split() == ["different", "different"]


RANKS = """
import os, sys
import keras, torch
import torch.distributed as dist
from keras_tnt.layers import Dropout, StochasticDepth

torch.set_num_threads(1)
path = sys.argv[1]
child = os.fork()
rank = 0 if child else 1
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
keras.utils.set_random_seed(0)
layers = [Dropout(0.5), StochasticDepth(0.5)]
network = keras.Sequential([keras.Input((16,)), keras.layers.Dense(32, use_bias=False), *layers])
model = torch.nn.parallel.DistributedDataParallel(network)
answers = []
for step in range(2):
    masks = model(torch.ones(8, 16), training=True).detach() != 0
    both = [torch.zeros_like(masks) for _ in range(2)]
    dist.all_gather(both, masks)
    answers.append("same" if torch.equal(*both) else "different")
    with model.no_sync():
        model(torch.ones(8, 16), training=True).sum().backward()
states = [torch.stack([layer.seed_generator.state.value for layer in layers])]
both = [torch.zeros_like(states[0]) for _ in range(2)]
dist.all_gather(both, states[0])
if rank == 0:
    print(*answers, "same" if torch.equal(*both) else "different", flush=True)
dist.destroy_process_group()
if child:
    os.waitpid(child, 0)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "torch", reason="DistributedDataParallel belongs to torch")
def test_ranks_draw_different_masks_and_share_the_seed_state(tmp_path):
    answers = run_python(RANKS, str(tmp_path / "store"), GLOO_SOCKET_IFNAME="lo").split()
    assert answers == ["different", "different", "same"]


@pytest.mark.skipif(BACKEND != "torch", reason="ranks belong to torch")
def test_rank_0_draws_the_masks_of_a_single_process(monkeypatch):
    def masks(rank):
        monkeypatch.setattr("keras_tnt.kernels.runtimes.torch_rank", lambda: rank)
        layer = Dropout(0.5, seed=3)
        return [ops.convert_to_numpy(layer(np.ones((40, 5)), training=True)) for _ in range(2)]

    alone, also_alone, second = masks(0), masks(0), masks(1)
    np.testing.assert_array_equal(alone, also_alone)
    assert all(np.any(a != b) for a, b in zip(alone, second, strict=True))


FIT_ON_REPLICAS = """
import keras, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from keras_tnt.layers import Dropout, StochasticDepth

class Masks(keras.metrics.Metric):
    def __init__(self):
        super().__init__(name="masks")
        self.kept = self.add_weight(shape=(32,), initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        first = keras.ops.cast(y_pred[0] != 0, "float32")
        self.kept.assign(self.kept + first)

    def result(self):
        return keras.ops.sum(keras.ops.cast(self.kept == 1, "float32"))

with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = keras.Sequential([keras.Input((32,)), Dropout(0.5), keras.layers.Activation("linear")])
    model.compile("sgd", "mse", metrics=[Masks()], jit_compile=False)
ones = np.ones((2, 32), "float32")
print(model.fit(ones, ones, batch_size=2, epochs=1, verbose=0).history["masks"][0])
"""


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute belongs to TensorFlow")
def test_replicas_draw_different_masks_in_fit():
    kept_by_one_of_two = float(run_python(FIT_ON_REPLICAS))
    assert kept_by_one_of_two > 4
