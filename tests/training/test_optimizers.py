"""Optimizer updates: equal to Keras's, equal on two devices, and bit-identical after resuming."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from training import configuration, optimization, optimizers, recipes

RATE, DECAY = 1e-2, 0.1


def model_of_two():
    """Returns a model of two matrices and a vector; Muon leaves the head's matrix to AdamW."""
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(4, name="fc"), keras.layers.Dense(2, use_bias=False, name="head")]
    return keras.Sequential([keras.Input((3,)), *layers], name="two")


def gradients(model, updates=5):
    random = np.random.default_rng(0)
    return [
        [random.normal(size=v.shape).astype("float32") for v in model.trainable_variables]
        for _ in range(updates)
    ]


def take(optimizer, strategy, steps, first=0):
    """Applies gradients, divided evenly among replicas."""
    replicas = strategy.num_replicas_in_sync

    @tf.function(autograph=False)
    def update(step, gradients):
        return strategy.run(
            lambda: optimizer.apply([g / replicas for g in gradients], step, tf.constant(RATE))
        )

    for i, each in enumerate(steps[first:], start=first):
        update(tf.constant(float(i)), [tf.constant(g) for g in each])


def trained(name, strategy, updates=5, **values):
    values = {"weight_decay": DECAY, "beta_2": 0.99, "optimizer": name, **values}
    with strategy.scope():
        model = model_of_two()
        optimizer = optimization.Optimizer(model, configuration.make("digits", **values))
    take(optimizer, strategy, gradients(model)[:updates])
    return model, optimizer


@pytest.mark.parametrize("name", ["sgd", "lion", "lamb", "muon"])
def test_rule_matches_the_keras_optimizer(name, one_device):
    found, _ = trained(name, one_device, weight_decay=0.0)
    expected = model_of_two()
    config = configuration.make("digits", beta_2=0.99, optimizer=name)
    keras_own = optimizers.find_optimizer(name)(expected.trainable_variables, config).optimizer
    keras_own.learning_rate = RATE
    keras_own.weight_decay = keras_own.adam_weight_decay = None
    for step in gradients(expected):
        keras_own.apply([tf.constant(g) for g in step], expected.trainable_variables)
    for mine, theirs in zip(found.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_lion_matches_its_equation_and_decays_only_kernels(one_device):
    found, _ = trained("lion", one_device)
    for i, value in enumerate(model_of_two().get_weights()):
        mean, decay = 0.0, DECAY if value.ndim == 2 else 0.0
        for step in gradients(model_of_two()):
            value = value - RATE * (np.sign(0.9 * mean + 0.1 * step[i]) + decay * value)
            mean = 0.99 * mean + 0.01 * step[i]
        np.testing.assert_allclose(found.get_weights()[i], value, rtol=1e-5, atol=1e-7)


def test_sgd_has_nesterov_momentum(one_device):
    found, _ = trained("sgd", one_device, weight_decay=0.0)
    for i, value in enumerate(model_of_two().get_weights()):
        speed = 0.0
        for step in gradients(model_of_two()):
            speed = 0.9 * speed - RATE * step[i]
            value = value + 0.9 * speed - RATE * step[i]
        np.testing.assert_allclose(found.get_weights()[i], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_two_devices_match_one(name, one_device, mirrored):
    values = {"ema": 0.9, "clip_norm": 1.0, "precision": "float16"}
    _, one = trained(name, one_device, **values)
    _, two = trained(name, mirrored, **values)
    assert one.state().keys() == two.state().keys()
    for key, value in one.state().items():
        np.testing.assert_allclose(two.state()[key].numpy(), value.numpy(), atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_restored_state_resumes_bit_identically(name, one_device):
    model, through = trained(name, one_device, ema=0.9)
    half, optimizer = trained(name, one_device, updates=3, ema=0.9)
    again, other = trained(name, one_device, updates=1, ema=0.9)
    again.set_weights(half.get_weights())
    for key, variable in other.state().items():
        variable.assign(optimizer.state()[key].numpy())
    take(other, one_device, gradients(model), first=3)
    for key, variable in through.state().items():
        np.testing.assert_array_equal(other.state()[key], variable, err_msg=key)
    for value, expected in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_float16_overflow_changes_only_the_loss_scale(name, one_device):
    model, optimizer = trained(name, one_device, updates=2, precision="float16", ema=0.9)
    before = {key: value.numpy() for key, value in optimizer.state().items()}
    weights = model.get_weights()
    overflow = [[np.full_like(g, np.inf) for g in gradients(model)[0]]]
    take(optimizer, one_device, 3 * overflow, first=2)
    for key, value in optimizer.state().items():
        if key == "loss_scale":
            assert value.numpy() == before[key] / 2
        elif key != "loss_scale_age":
            np.testing.assert_array_equal(value, before[key], err_msg=key)
    for value, expected in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_scaled_loss_matches_the_unscaled_and_its_scale_grows(one_device, monkeypatch):
    monkeypatch.setattr(optimization.Optimizer, "growth_steps", 2)
    values = {"optimizer": "sgd", "weight_decay": DECAY, "ema": 0.9}
    with one_device.scope():
        models = [model_of_two(), model_of_two()]
        plain, scaled = (
            optimization.Optimizer(model, configuration.make("digits", precision=each, **values))
            for model, each in zip(models, ("float32", "float16"), strict=True)
        )
    steps = gradients(models[0])
    take(plain, one_device, steps)
    scales = []
    for i in range(5):
        scale = float(scaled.loss_scale())
        scales.append((scale, float(scaled.state()["loss_scale_age"])))
        take(scaled, one_device, [*steps[:i], [g * scale for g in steps[i]]], first=i)
    assert scales == [(2.0**e, age) for e, age in ((15, 0), (15, 1), (16, 0), (16, 1), (17, 0))]
    for each in ("averages", "variables"):
        for one, other in zip(getattr(plain, each), getattr(scaled, each), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    overflow = [[np.full_like(g, np.inf) for g in steps[0]]]
    scaled.scale[0].assign(1.5)
    take(scaled, one_device, 2 * overflow)
    assert float(scaled.loss_scale()) == 1.0  # the lower limit


def test_layer_rate_scales_weight_decay_too(one_device):
    with one_device.scope():
        model = model_of_two()
        values = {"weight_decay": DECAY, "optimizer": "adamw", "clip_norm": 0.0}
        optimizer = optimization.Optimizer(model, configuration.make("digits", **values))
    optimizer.rates = [0.5, 0.5, 0.25]
    start = model.get_weights()
    nothing = [[np.zeros(v.shape, "float32") for v in model.trainable_variables]]
    take(optimizer, one_device, nothing)
    factors = (1 - RATE * 0.5 * DECAY, 1, 1 - RATE * 0.25 * DECAY)
    for value, first, factor in zip(model.get_weights(), start, factors, strict=True):
        np.testing.assert_allclose(value, first * factor, rtol=1e-6)


def test_custom_optimizer_can_be_registered(one_device, monkeypatch):
    monkeypatch.setattr(optimizers, "OPTIMIZERS", dict(optimizers.OPTIMIZERS))

    def adamax(variables, config):
        return optimizers.KerasRule(keras.optimizers.Adamax(), variables)

    optimizers.register_optimizer("adamax", adamax)
    model, _ = trained("adamax", one_device)
    assert np.abs(model.get_weights()[0] - model_of_two().get_weights()[0]).min() > 0
    with pytest.raises(ValueError, match="an optimizer 'adamax' already"):
        optimizers.register_optimizer("adamax", optimizers.sgd)


def test_unknown_optimizer_error_suggests_the_nearest():
    with pytest.raises(ValueError, match="no 'adam'. Did you mean adamw.*: adamw, sgd, lion"):
        optimizers.find_optimizer("adam")
    with pytest.raises(ValueError, match="no 'tnt_smal'. Did you mean tnt_small"):
        recipes.get("tnt_smal")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("step", [1.0, 1.0, 0.5, 0.25]),
        ("linear", [1.0, 0.91, 0.55, 0.19]),
        ("cosine", [1.0, 0.9779754323, 0.55, 0.1220245677]),
    ],
)
def test_learning_rates_of_each_schedule(schedule, expected):
    values = {"schedule": schedule, "epochs": 10, "learning_rate": 1.0, "min_learning_rate": 0.1}
    values |= {"warmup_epochs": 0.0, "step_epochs": 4.0, "step_factor": 0.5}
    config = configuration.make("digits", **values)
    rates = [optimization.learning_rate(config, step, 10) for step in (0, 10, 50, 90)]
    np.testing.assert_allclose(rates, expected, atol=1e-9)


# === Recipes ===


def test_recipe_defaults_to_that_of_the_data_set():
    for dataset in ("folder", "table", "tfds:cifar10"):
        assert configuration.make(dataset=dataset, data_dir="images").recipe == "finetune"
    assert configuration.make(dataset="synthetic").recipe == "digits"
    assert configuration.make().recipe == "digits"


def test_transfer_recipes_state_the_published_accuracies():
    found = {name: recipe for name, recipe in recipes.RECIPES.items() if "transfer_" in name}
    assert len(found) == 10 and all("Table 9" in recipe.result for recipe in found.values())
    assert "98.7%" in found["transfer_cifar10"].result
    assert "83.2%" in found["transfer_inaturalist_base"].result
    assert configuration.make("transfer_pets").epochs == 300
