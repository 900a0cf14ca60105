"""The learning rate of each update, the groups, and AdamW itself."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_tnt
from training import configuration, models, optimization, recipes

GOLDEN = Path(__file__).parent.parent / "golden" / "cosine_schedule.json"


def test_the_schedule_runs_through_the_published_one():
    expected = json.loads(GOLDEN.read_text())["lr"]
    values = configuration.make("tnt_small")
    rates = [optimization.learning_rate(values, 1251 * epoch, 1251) for epoch in range(300)]
    np.testing.assert_allclose(rates, expected[:300], rtol=1e-6)


def test_the_rate_changes_with_every_update():
    values = configuration.make("tnt_small")
    rates = [optimization.learning_rate(values, step, 100) for step in range(1000)]
    assert len(set(rates)) == 1000


def test_the_rate_scales_with_the_batch():
    rates = [
        optimization.learning_rate(configuration.make("tnt_small", batch_size=size), 600, 100)
        for size in (512, 1024)
    ]
    # The minimum does not scale.
    assert rates[0] == pytest.approx(rates[1] / 2, rel=0.02)


RATES = {
    "warmup_epochs": 2,
    "warmup_learning_rate": 0.1,
    "learning_rate": 0.25,
    "learning_rate_batch": 16,
    "batch_size": 64,  # so that the peak is 1
    "min_learning_rate": 0.2,
    "epochs": 10,
    "step_factor": 0.5,
    "step_epochs": 3,
}


@pytest.mark.parametrize(
    ("schedule", "epoch", "rate"),
    [
        *(("cosine", 0, 0.1), ("linear", 0.5, 0.325), ("constant", 1.5, 0.775)),
        *(("cosine", 2.5, 0.2 + 0.8 * (1 + 0.5**0.5) / 2), ("cosine", 5, 0.6), ("cosine", 10, 0.2)),
        *(("linear", 2, 0.84), ("linear", 5, 0.6), ("linear", 7.5, 0.4), ("linear", 10, 0.2)),
        *(("step", 2, 1), ("step", 2.9, 1), ("step", 3, 0.5), ("step", 9.5, 0.125)),
        *(("constant", 2, 1), ("constant", 9, 1)),
    ],
)
def test_the_rate_is_that_of_its_schedule(schedule, epoch, rate):
    config = configuration.make("digits", schedule=schedule, **RATES)
    assert optimization.learning_rate(config, 20 * epoch, 20) == pytest.approx(rate)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_rate_below_the_least_stays_where_it_is(schedule):
    values = {**RATES, "min_learning_rate": 2.0, "schedule": schedule}
    config = configuration.make("digits", **values)
    assert optimization.learning_rate(config, 140, 20) == pytest.approx(1)


def test_without_a_batch_to_scale_by_the_rate_is_the_rate():
    values = {**RATES, "learning_rate_batch": 0, "schedule": "constant"}
    assert optimization.learning_rate(configuration.make("digits", **values), 60, 20) == 0.25


@pytest.fixture(scope="module")
def model():
    return models.tnt_digits(distilled=True, layer_scale=1e-3, depth=2)


def test_kernels_alone_decay(model):
    decayed = {v.path for v in model.trainable_variables if optimization.decays(v)}
    spared = {v.path for v in model.trainable_variables} - decayed
    assert all(path.endswith("kernel") for path in decayed) and "head/kernel" in decayed
    for part in ("word_position", "patch_position", "class_token", "distillation_token"):
        assert any(path.startswith(part) for path in spared)
    for leaf in ("bias", "beta", "gamma", "token", "table"):
        assert any(path.endswith(leaf) for path in spared)


def test_layers_learn_slower_the_earlier_they_stand(model):
    values = configuration.make("digits", layer_decay=0.5)
    rates = dict(
        zip(
            [v.path for v in model.trainable_variables],
            optimization.Optimizer(model, values).rates,
            strict=True,
        )
    )
    assert rates["head/kernel"] == rates["norm/gamma"] == 1
    assert rates["block_1/outer/mlp/fc1/kernel"] == 0.5
    assert rates["block_0/outer/mlp/fc1/kernel"] == 0.25
    assert rates["word_embedding/kernel"] == rates["class_token/token"] == 0.125


def updates(model, values, gradients):
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    with strategy.scope():
        optimizer = optimization.Optimizer(model, values)
    for i, step in enumerate(gradients):
        strategy.run(
            lambda step=step, i=i: optimizer.apply(
                [tf.constant(g) for g in step], tf.constant(float(i)), tf.constant(1e-2)
            )
        )
    return optimizer


def dense():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])


def test_adamw_takes_keras_s_steps():
    random = np.random.default_rng(0)
    gradients = [
        [random.normal(size=(3, 2)).astype("float32"), random.normal(size=2).astype("float32")]
        for _ in range(5)
    ]
    ours, theirs = dense(), dense()
    updates(ours, configuration.make("digits", weight_decay=0.1, beta_2=0.999), gradients)
    reference = keras.optimizers.AdamW(1e-2, weight_decay=0.1, epsilon=1e-8)
    reference.exclude_from_weight_decay(var_names=["bias"])
    for step in gradients:
        reference.apply([tf.constant(g) for g in step], theirs.trainable_variables)
    for mine, yours in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(mine, yours, atol=2e-6)


def test_gradients_are_clipped_to_their_global_norm():
    gradients = [[np.full((3, 2), 30.0, "float32"), np.full(2, -40.0, "float32")]]
    norm = np.float32(np.sqrt(6 * 900 + 2 * 1600))
    scaled = [[g / norm for g in gradients[0]]]
    clipped = updates(dense(), configuration.make("digits", clip_norm=1.0), gradients)
    expected = updates(dense(), configuration.make("digits"), scaled)
    for one, other in zip(clipped.rule.means, expected.rule.means, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_the_average_follows_the_weights_and_is_put_in_their_place_for_a_while():
    model = dense()
    start = model.get_weights()
    gradients = [[np.ones((3, 2), "float32"), np.ones(2, "float32")]]
    optimizer = updates(model, configuration.make("digits", ema=0.9), gradients)
    trained = model.get_weights()
    with optimizer.averaged():
        for value, first, last in zip(model.get_weights(), start, trained, strict=True):
            np.testing.assert_allclose(value, 0.9 * first + 0.1 * last, rtol=1e-5)
    for value, last in zip(model.get_weights(), trained, strict=True):
        np.testing.assert_array_equal(value, last)


def test_the_loss_scale_doubles_after_its_steps_and_halves_at_an_overflow(monkeypatch):
    keras_s = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    assert optimization.Optimizer.growth_steps == keras_s.dynamic_growth_steps
    monkeypatch.setattr(optimization.Optimizer, "growth_steps", 2)
    config = configuration.make("digits", precision="float16", ema=0.9)
    optimizer = optimization.Optimizer(model := dense(), config)
    assert optimizer.state()["loss_scale"].numpy() == 2.0**15
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")

    def update(value):
        """Update by gradients of a loss that was scaled; tell weights, their average and scale."""
        gradients = [value * optimizer.loss_scale() * tf.ones_like(w) for w in model.weights]
        arguments = (gradients, tf.constant(0.0), tf.constant(1e-2))
        norm = strategy.run(optimizer.apply, args=arguments)
        if np.isfinite(value):
            assert float(norm) == pytest.approx(value * 8**0.5)
        state = optimizer.state()
        changing = [model.get_weights()[0], optimizer.averages[0].numpy()]
        return changing, float(state["loss_scale"]), float(state["loss_scale_age"])

    (before, _), *told = update(1.0)
    assert told == [2.0**15, 1]
    assert update(1.0)[1:] == (2.0**16, 0)
    kept, *told = update(1.0)
    assert told == [2.0**16, 1] and not np.array_equal(kept[0], before)
    stayed, *told = update(np.inf)
    assert told == [2.0**15, 0]
    np.testing.assert_array_equal(stayed, kept)
    optimizer.scale[0].assign(1.0)
    assert update(np.inf)[1:] == (1.0, 0)


# === Recipes ===


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_is_one_that_can_be_run(name):
    recipe = recipes.get(name)
    values = configuration.make(name, data_dir="images")
    models.find_builder(values.model)
    assert not values.teacher or models.find_builder(values.teacher)
    assert recipe.source and recipe.result
    assert f"--recipe={name}" in recipe.command or name == "digits"


def test_every_variant_has_a_recipe():
    families = (keras_tnt.tnt, keras_tnt.pyramid_tnt, keras_tnt.deit, keras_tnt.cait)
    assert {name for family in families for name in family.VARIANTS} <= set(recipes.RECIPES)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"dropout": 1.5}, "--dropout is a share"),
        ({"learning_rate": -1.0}, "--learning_rate must not be negative"),
        ({"dataset": "mnist"}, "--dataset: there is no .mnist"),
        ({"dataset": "folder"}, "needs --data_dir"),
        ({"distill": "hard"}, "--teacher go together"),
        ({"depth": 3}, "no such value: depth"),
        ({"strategy": "tpu", "cpu_devices": 2}, "--cpu_devices goes with"),
    ],
)
def test_a_value_that_cannot_be_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        configuration.make("digits", **values)


def test_an_unknown_recipe_is_answered_with_the_list():
    with pytest.raises(ValueError, match="there is no 'tnt'.*tnt_small"):
        configuration.make("tnt")
