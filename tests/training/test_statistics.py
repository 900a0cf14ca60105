"""Moving statistics of batch normalization: equal on every replica, averaged over all of them."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_tnt
from training import checkpoint, configuration, evaluate, loop, models, step_functions, strategies

TINY_PYRAMID = {
    "input_shape": (32, 32, 3),
    "depths": (1, 1),
    "outer_dims": (8, 8),
    "inner_dims": (2, 2),
    "outer_heads": (2, 2),
    "inner_heads": (1, 1),
    "reductions": (1, 1),
}


def normalized(strategy, batches, kept=None):
    """Returns each replica's means and variances after training steps of a BatchNormalization."""
    with strategy.scope():
        layer = keras.layers.BatchNormalization(momentum=0.9)
        model = keras.Sequential([keras.Input((3,)), layer])
    statistics = step_functions.moving_statistics(model)
    assert len(statistics) == 2

    def replica_step(x):
        before = [tf.identity(v) for v in statistics]
        model(x, training=True)
        step_functions.synchronize(statistics, before, kept)

    @tf.function(autograph=False)
    def step(x):
        strategy.run(replica_step, args=(x,))

    for batch in batches:
        step(
            strategy.experimental_distribute_values_from_function(
                lambda context, batch=batch: tf.constant(batch[context.replica_id_in_sync_group])
            )
        )
    return [[value.numpy() for value in strategy.experimental_local_results(v)] for v in statistics]


def batches(replicas, number=3):
    random = np.random.default_rng(3)
    return random.normal(2.0, 3.0, (number, replicas, 5, 3)).astype("float32")


def test_replicas_have_the_mean_of_their_statistics(mirrored):
    given = batches(2)
    means, variances = normalized(mirrored, given)
    mean, variance = np.zeros(3), np.ones(3)
    for batch in given.astype("float64"):
        mean = 0.9 * mean + 0.1 * batch.mean(1).mean(0)
        variance = 0.9 * variance + 0.1 * batch.var(1).mean(0)
    for found, expected in ((means, mean), (variances, variance)):
        np.testing.assert_array_equal(found[0], found[1])
        np.testing.assert_allclose(found[0], expected, rtol=1e-5)


def test_overflowed_update_does_not_change_statistics(mirrored, one_device):
    given = batches(2, 1) * np.float32(np.inf)
    for strategy in (mirrored, one_device):
        means, variances = normalized(strategy, given, kept=tf.constant(False))
        assert all((value == 0).all() for value in means)
        assert all((value == 1).all() for value in variances)
    means, _ = normalized(one_device, batches(1, 1), kept=tf.constant(True))
    assert (means[0] != 0).all()


def test_statistics_on_one_device_match_the_layer(one_device):
    given = batches(1)
    (mean,), _ = normalized(one_device, given)
    expected = 0.0
    for batch in given:
        expected = 0.9 * expected + 0.1 * batch[0].mean(0)
    np.testing.assert_allclose(mean, expected, rtol=1e-5)


@pytest.mark.slow
def test_statistics_are_equal_on_replicas_and_after_evaluation_and_resume(
    mirrored, tmp_path, monkeypatch
):
    build = functools.partial(keras_tnt.PyramidTNT, **TINY_PYRAMID)
    monkeypatch.setattr(models, "find_builder", lambda name, flag="": build)
    monkeypatch.setattr(strategies, "make", lambda config: mirrored)
    values = {"epochs": 2, "steps_per_epoch": 2, "batch_size": 8, "evaluate_epochs": 1}
    values |= {"checkpoint_steps": 1, "tensorboard": False, "report": False, "keep": 9}
    config = configuration.make("digits", workdir=str(tmp_path), **values)
    result = loop.train(config)
    replicas = []
    start = loop.Run.start

    def looked(self, changes):
        for later in self.checkpoints.paths()[:2]:
            later.unlink()
        step = start(self, changes)
        replicas.extend(
            [value.numpy() for value in mirrored.experimental_local_results(v)]
            for v in step_functions.moving_statistics(self.model)
        )
        return step

    monkeypatch.setattr(loop.Run, "start", looked)
    whole = checkpoint.read(tmp_path / "checkpoints" / checkpoint.NAME.format(4))[0]
    again = loop.train(config)
    assert replicas and all((first == second).all() for first, second in replicas)
    assert again["accuracy"] == result["accuracy"]
    assert again["evaluation_loss"] == result["evaluation_loss"]
    found = checkpoint.read(tmp_path / "checkpoints" / checkpoint.NAME.format(4))[0]
    for name, value in whole.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    evaluated = evaluate.evaluate({"strategy": "mirrored"}, run=str(tmp_path))
    assert evaluated["accuracy"] == result["accuracy"]
    assert evaluated["evaluation_loss"] == result["evaluation_loss"]


# === Several updates per execution ===


@pytest.mark.parametrize("lengths", [(1, 1, 1, 1, 1, 1), (3, 3), (2, 3, 1)])
def test_executions_of_any_length_run_their_updates_in_order_and_trace_once(mirrored, lengths):
    """The step function is sensitive to the order and to each of its arguments."""
    with mirrored.scope():
        weight = tf.Variable(1.0, aggregation=tf.VariableAggregation.MEAN)

    def replica_step(batch, step, rate, stop, mixing):
        gradient = tf.reduce_mean(batch) * weight + step + mixing[1]
        replica = tf.distribute.get_replica_context()
        gradient = replica.all_reduce(tf.distribute.ReduceOp.SUM, gradient)
        weight.assign(weight * 0.37 - rate * gradient)
        return tf.concat([[gradient], stop], 0), gradient

    @tf.function(autograph=False)
    def train_step(batch, step, rate, stop, mixing):
        sums, norms = mirrored.run(replica_step, args=(batch, step, rate, stop, mixing))
        sums = mirrored.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)
        norm = mirrored.reduce(tf.distribute.ReduceOp.MEAN, norms, axis=None)
        return sums[0], norm, sums[1:]

    values = np.random.default_rng(1).normal(size=(12, 3)).astype("float32")
    rates = [0.1, 0.02, 0.3, 0.04, 0.5, 0.06]
    mixings = np.random.default_rng(2).normal(size=(6, 2)).astype("float32")
    stop = tf.constant([1.0, 0.0])

    def batches():
        dataset = tf.data.Dataset.from_tensor_slices(values).batch(1)
        return iter(mirrored.distribute_datasets_from_function(lambda context: dataset))

    weight.assign(1.0)
    given, expected = batches(), []
    for i in range(6):
        loss, norm, _ = train_step(
            next(given), tf.constant(float(i)), tf.constant(rates[i]), stop, mixings[i]
        )
        expected.append((float(loss), float(norm)))
    end, found, given = weight.numpy(), [], batches()
    weight.assign(1.0)
    execute = step_functions.make_execution(train_step)
    for first, count in zip(np.cumsum((0, *lengths)), lengths, strict=False):
        some = slice(first, first + count)
        losses, norms, stops = execute(
            given,
            tf.constant(count),
            tf.constant(int(first)),
            tf.constant(rates[some]),
            stop,
            tf.constant(mixings[some]),
        )
        found += zip(losses.numpy().tolist(), norms.numpy().tolist(), strict=True)
        assert stops.numpy().tolist() == [2.0, 0.0]
        assert execute.experimental_get_tracing_count() == 1
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(weight.numpy(), end, rtol=1e-5)
