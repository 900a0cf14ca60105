"""Learning rate schedules, parameter groups, AdamW, weight averages and configuration checks."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_tnt
from keras_tnt import finetuning
from training import checkpoint, configuration, models, optimization, recipes

GOLDEN = Path(__file__).parent.parent / "golden" / "cosine_schedule.json"


def test_schedule_matches_the_published_one():
    expected = json.loads(GOLDEN.read_text())["lr"]
    values = configuration.make("tnt_small")
    rates = [optimization.learning_rate(values, 1251 * epoch, 1251) for epoch in range(310)]
    np.testing.assert_allclose(rates[:300], expected[:300], rtol=1e-6)
    np.testing.assert_allclose(rates[300:], 1e-5, rtol=1e-9)


def test_schedule_per_epoch_matches_the_published_one_in_every_update():
    expected = json.loads(GOLDEN.read_text())["lr"]
    values = configuration.make("tnt_small", schedule_per_epoch=True)
    for epoch in (0, 1, 4, 5, 6, 150, 298, 299):
        for step in (0, 1, 617, 1250):
            rate = optimization.learning_rate(values, 1251 * epoch + step, 1251)
            assert rate == pytest.approx(expected[epoch], rel=1e-9)


def test_schedule_per_epoch_lags_as_in_deit():
    """In main.py:432, the rate after epoch e is that of e: epochs 0 and 1 have the initial rate."""
    values = configuration.make("deit_small", schedule_per_epoch=True)
    tnt = configuration.make("deit_small", schedule_per_epoch=True, schedule_delay=0)
    for epoch, source in ((0, 0), (1, 0), (2, 1), (5, 4), (6, 5), (300, 299)):
        rate = optimization.learning_rate(values, 10 * epoch + 3, 10)
        assert rate == optimization.learning_rate(tnt, 10 * source + 9, 10)
    assert optimization.learning_rate(values, 19, 10) == 1e-6


def test_schedule_delay_has_no_effect_on_a_schedule_per_update():
    rates = [
        optimization.learning_rate(configuration.make("deit_small", schedule_delay=delay), 77, 10)
        for delay in (0, 1)
    ]
    assert rates[0] == rates[1]


@pytest.mark.parametrize(
    ("schedule", "rate"),
    [("cosine", 0.2), ("linear", 0.2), ("constant", 1), ("step", 0.125)],
)
def test_cooldown_epochs_have_the_last_rate(schedule, rate):
    config = configuration.make("digits", schedule=schedule, cooldown_epochs=4, **RATES)
    assert config.total_epochs == 14
    for epoch in (10, 10.05, 12.5, 13.95):
        assert optimization.learning_rate(config, 20 * epoch, 20) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("epochs", "step_epochs", "drops"), [(30, 30, 0), (31, 30, 1), (30, 10, 2), (30, 40, 0)]
)
def test_step_schedule_does_not_drop_in_the_cooldown(epochs, step_epochs, drops):
    values = {**RATES, "epochs": epochs, "step_epochs": step_epochs, "schedule": "step"}
    config = configuration.make("digits", cooldown_epochs=50, **values)
    for epoch in (epochs - 0.05, epochs, epochs + 0.05, epochs + 20, epochs + 49.95):
        assert optimization.learning_rate(config, round(20 * epoch), 20) == 0.5**drops


def test_learning_rate_changes_in_every_update():
    values = configuration.make("tnt_small")
    rates = [optimization.learning_rate(values, step, 100) for step in range(1000)]
    assert len(set(rates)) == 1000


def test_learning_rate_scales_with_the_batch_size():
    rates = [
        optimization.learning_rate(configuration.make("tnt_small", batch_size=size), 600, 100)
        for size in (512, 1024)
    ]
    # The minimum is not scaled.
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
def test_learning_rate_follows_its_schedule(schedule, epoch, rate):
    config = configuration.make("digits", schedule=schedule, **RATES)
    assert optimization.learning_rate(config, 20 * epoch, 20) == pytest.approx(rate)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate_below_the_minimum_is_constant(schedule):
    values = {**RATES, "min_learning_rate": 2.0, "schedule": schedule}
    config = configuration.make("digits", **values)
    assert optimization.learning_rate(config, 140, 20) == pytest.approx(1)


def test_learning_rate_without_a_reference_batch_is_not_scaled():
    values = {**RATES, "learning_rate_batch": 0, "schedule": "constant"}
    assert optimization.learning_rate(configuration.make("digits", **values), 60, 20) == 0.25


@pytest.fixture(scope="module")
def model():
    return models.tnt_digits(distilled=True, layer_scale=1e-3, depth=2)


# Weight decay by family in the published code. timm 0.3.2, which it requires, excludes vectors,
# biases and the model's `no_weight_decay` (optim_factory.py:25-37): tnt.py:286 outer_pos,
# inner_pos, cls_token; pyramid_tnt.py:423 outer_pos, inner_pos; timm vision_transformer.py:256 and
# cait_models.py:223 pos_embed, cls_token. So `dist_token` (DeiT models.py:23) and `relative_pos`
# (pyramid_tnt.py:343) decay.
VIT = {"embed_dim": 16, "depth": 1, "num_heads": 2}
DECAYS = {
    "tnt": (
        {"depth": 2, "outer_dim": 16, "inner_dim": 4, "outer_heads": 2, "inner_heads": 2}
        | {"distilled": True, "squeeze_excite": True, "layer_scale": 0.1},
        {"distillation_token/token"},
        {"word_position/table", "patch_position/table", "class_token/token"},
    ),
    "pyramid_tnt": (
        {"depths": (1, 1), "outer_dims": (16, 16), "inner_dims": (4, 4), "outer_heads": (2, 2)}
        | {"inner_heads": (2, 2), "reductions": (2, 1)},
        {"stage_0_relative_position/table", "stage_1_relative_position/table"},
        {"word_position/table", "patch_position/table"},
    ),
    "deit": (
        {**VIT, "distilled": True},
        {"distillation_token/token"},
        {"patch_position/table", "class_token/token"},
    ),
    "cait": (VIT, set(), {"patch_position/table", "class_token/token"}),
}


@pytest.mark.parametrize("family", DECAYS)
def test_weight_decay_matches_the_published_code(family):
    arguments, decayed, spared = DECAYS[family]
    model = keras_tnt.create_model(
        family, weights=None, input_shape=(32, 32, 3), classes=5, **arguments
    )
    found = {v.path for v in model.trainable_variables if finetuning.decays(v)}
    assert {path for path in found if not path.endswith("kernel")} == decayed
    rest = {v.path for v in model.trainable_variables} - found
    assert {path for path in rest if path.endswith(("token", "table"))} == spared
    assert {path.rpartition("/")[2] for path in rest} - {"token", "table"} <= {
        "bias",
        "beta",
        "gamma",
    }


def test_weight_decay_does_not_depend_on_the_outer_model():
    inner = keras_tnt.DeiT(
        weights=None, input_shape=(32, 32, 3), classes=5, distilled=True, name="nested", **VIT
    )
    inputs = keras.Input((32, 32, 3))
    outer = keras.Model(inputs, inner(inputs))
    decayed = [v.path for v in outer.trainable_variables if finetuning.decays(v)]
    assert any(path.endswith("distillation_token/token") for path in decayed)


def test_layer_decay_reduces_the_rate_of_earlier_layers(model):
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


def test_adamw_matches_keras():
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


def test_ema_follows_the_weights_and_replaces_them_temporarily():
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


def model_ema_v3(decay, step, gamma=1.0, power=2 / 3):
    """Returns the decay of timm's ModelEmaV3 in its `step`-th update, counted from 1."""
    past = max(0, step - 1)
    return 0.0 if past == 0 else min(1 - (1 + past / gamma) ** -power, decay)


@pytest.mark.parametrize("ema", [0.5, 0.9, 0.99996])
def test_ema_warmup_matches_timm(ema):
    config = configuration.make("digits", ema=ema, ema_warmup=True)
    for step in (0, 1, 2, 5, 100, 20_000):
        decay = optimization.ema_decay(config, tf.constant(float(step)))
        assert float(decay) == pytest.approx(model_ema_v3(ema, step + 1), rel=1e-5)


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_warmup_forgets_the_initial_weights(warmup):
    config = configuration.make("digits", ema=0.9999, ema_warmup=warmup)
    optimizer = optimization.Optimizer(model := dense(), config)
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    random = np.random.default_rng(0)
    initial = expected = model.get_weights()[0]
    for step in range(1, 6):
        gradients = [tf.constant(random.normal(size=v.shape), tf.float32) for v in model.weights]
        arguments = (gradients, tf.constant(step - 1.0), tf.constant(1e-2))
        strategy.run(optimizer.apply, args=arguments)
        weights = model.get_weights()[0]
        decay = model_ema_v3(0.9999, step) if warmup else 0.9999
        expected = decay * expected + (1 - decay) * weights
    average = optimizer.averages[0].numpy()
    np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-7)
    share = np.abs(average - initial).mean() / np.abs(weights - initial).mean()
    assert share > 0.5 if warmup else share < 0.01


def test_loss_scale_doubles_periodically_and_halves_on_overflow(monkeypatch):
    keras_s = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    assert optimization.Optimizer.growth_steps == keras_s.dynamic_growth_steps
    monkeypatch.setattr(optimization.Optimizer, "growth_steps", 2)
    config = configuration.make("digits", precision="float16", ema=0.9)
    optimizer = optimization.Optimizer(model := dense(), config)
    assert optimizer.state()["loss_scale"].numpy() == 2.0**15
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")

    def update(value):
        """Applies scaled gradients, and returns ([weights, average], loss scale, its age)."""
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


@pytest.fixture(scope="module")
def states():
    """Returns the variables to checkpoint of a small model, by precision."""
    found, sizes = {}, {"depth": 1, "outer_dim": 16, "inner_dim": 4, "outer_heads": 2}
    for precision in configuration.PRECISIONS:
        config = configuration.make("digits", precision=precision, ema=0.9)
        policy = "float32" if precision == "float32" else f"mixed_{precision}"
        model = models.tnt_digits(dtype=policy, stochastic_depth=0.1, inner_stride=4, **sizes)
        optimizer = optimization.Optimizer(model, config)
        found[precision] = models.state(model) | optimizer.state()
    return found


@pytest.mark.parametrize("new", configuration.PRECISIONS)
@pytest.mark.parametrize("old", configuration.PRECISIONS)
def test_checkpoint_is_restored_in_another_precision(states, tmp_path, old, new):
    def fill(variables, value):
        for variable in variables.values():
            variable.assign(tf.cast(tf.fill(variable.shape, value), variable.dtype))

    fill(states[old], 3)
    checkpoint.Checkpoints(tmp_path, states[old], 1).save(5, {"healthy": 4})
    fill(states[new], 7)
    restored = checkpoint.Checkpoints(tmp_path, states[new], 1, defaults=optimization.LOSS_SCALE)
    assert restored.restore()["step"] == 5
    absent = states[new].keys() - states[old].keys()
    assert absent == (set(optimization.LOSS_SCALE) if new == "float16" != old else set())
    for name, variable in states[new].items():
        expected = optimization.LOSS_SCALE[name] if name in absent else 3
        assert (variable.numpy() == expected).all(), name


# === Recipes ===


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipe_is_valid(name):
    recipe = recipes.get(name)
    assert configuration.make(name, data_dir="images", loss="bce").loss == "bce"
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
        ({"learning_rate": float("nan")}, "--learning_rate must be a finite number"),
        ({"clip_norm": float("inf")}, "--clip_norm must be a finite number"),
        ({"loss": "hinge"}, "--loss must be one of cross_entropy, bce"),
        ({"ema_warmup": True}, "--ema_warmup goes with --ema"),
        ({"teacher_preprocessing": "tf"}, "--teacher_preprocessing goes with --teacher"),
        ({"schedule": "step", "step_epochs": 0.0}, "--step_epochs must be more than 0"),
        ({"cooldown_epochs": -1}, "--cooldown_epochs must not be negative"),
        ({"model_args": "depth=4"}, "--model_args must be a JSON object, such as .*depth=4"),
        ({"model_args": "[4]"}, "--model_args must be a JSON object"),
        ({"model_args": '{"depth": 4, "depth": 5}'}, "--model_args .*'depth' is given twice"),
        ({"model_args": "[" * 100_000}, "--model_args must be .* nested too deeply"),
        ({"model_args": '{"depth": ' + "1" * 5000 + "}"}, "--model_args must be a JSON object"),
        ({"model_args": '{"classes": 4}'}, "must not set 'classes': give --classes"),
        ({"model_args": '{"input_shape": [8]}'}, "must not set 'input_shape': give --image_size"),
        ({"model_args": '{"pooling": "avg"}'}, "must not set 'pooling': the trainer sets it"),
    ],
)
def test_invalid_value_raises(values, message):
    with pytest.raises(ValueError, match=message):
        configuration.make("digits", **values)


def test_unknown_recipe_error_lists_recipes():
    with pytest.raises(ValueError, match="there is no 'tnt'.*tnt_small"):
        configuration.make("tnt")


def test_weights_none_overrides_the_recipe():
    assert configuration.make("finetune", data_dir="images", weights="none").weights == ""
    assert configuration.make("finetune", data_dir="images").weights == "imagenet"


@pytest.mark.parametrize(
    ("warmup", "epochs", "warned"),
    [(5.0, 5, True), (5.0, 2, True), (4.5, 5, False), (0.0, 1, False)],
)
def test_warmup_longer_than_the_run_warns(warmup, epochs, warned):
    config = configuration.make("digits", warmup_epochs=warmup, epochs=epochs)
    found = [w for w in configuration.warnings(config) if "--warmup_epochs" in w]
    assert bool(found) == warned
    if warned:
        assert f"--epochs={epochs}" in found[0] and f"={warmup:g} " in found[0]


COUNTS = ("epochs", "batch_size", "accumulation", "repeats", "evaluate_epochs", "keep")


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_at_least_one(name):
    with pytest.raises(ValueError, match=f"--{name} must be at least 1: 0"):
        configuration.make("digits", **{name: 0})
    assert getattr(configuration.make("digits", **{name: 1}), name) == 1


SHARES = ("stochastic_depth", "dropout", "label_smoothing", "ema", "erasing", "max_corrupt")
SHARES += ("distill_alpha", "min_crop", "crop", "validation_share")


@pytest.mark.parametrize("name", SHARES)
def test_shares_are_at_most_one(name):
    with pytest.raises(ValueError, match=f"--{name} is a share, at most 1: 1.01"):
        configuration.make("digits", **{name: 1.01})


def test_workdir_is_required_and_cpu_devices_need_a_matching_strategy():
    with pytest.raises(ValueError, match="--workdir must name a directory"):
        configuration.make("digits", workdir="")
    assert configuration.make("digits", cpu_devices=2, strategy="mirrored").cpu_devices == 2
    with pytest.raises(ValueError, match="--cpu_devices goes with"):
        configuration.make("digits", cpu_devices=2, strategy="multi_worker")


def test_values_missing_in_old_records_have_their_defaults():
    config = configuration.make("digits")
    recorded = {"recipe": "digits", **recipes.get("digits").values}
    assert configuration.differences(config, recorded) == {}
    recorded["keep"], recorded["workdir"] = 17, "elsewhere"
    assert configuration.differences(config, recorded) == {}
    recorded["seed"] = 5
    assert configuration.differences(config, recorded) == {"seed": (5, 0)}


@pytest.mark.parametrize(
    "text",
    [
        *('{"depth": 4, "mlp_ratio": 0.5}', '{"depth":4,"mlp_ratio":0.5}'),
        *('{"mlp_ratio": 5e-1, "depth": 4}', ' {"mlp_ratio": 0.50,\n"depth": 4} '),
    ],
)
def test_equal_model_args_are_the_same_run(tmp_path, text):
    (tmp_path / "run.yaml").write_text("model_args: {depth: 4, mlp_ratio: 0.5}\n")
    config = configuration.make("digits", config=str(tmp_path / "run.yaml"))
    other = configuration.make("digits", model_args=text)
    assert config.model_args == other.model_args == '{"depth": 4, "mlp_ratio": 0.5}'
    # Earlier versions recorded the text as it was given.
    recorded = vars(config) | {"model_args": text}
    assert configuration.differences(other, recorded) == {}
    another = configuration.make("digits", model_args='{"depth": 5, "mlp_ratio": 0.5}')
    assert configuration.differences(another, recorded).keys() == {"model_args"}
    assert configuration.make("digits", model_args="{}").model_args == ""
    for damaged in ("{", 3, {"depth": 4}):
        recorded["model_args"] = damaged
        assert configuration.differences(other, recorded).keys() == {"model_args"}


@pytest.mark.parametrize(
    ("name", "old", "new", "flag"),
    [
        *(("epochs", 5, 6, "extend"), ("epochs", 6, 5, ""), ("cooldown_epochs", 0, 1, "extend")),
        *(("cooldown_epochs", 1, 0, ""), ("weight_decay", 0.1, 0.2, "change")),
        *(("precision", "float32", "bfloat16", "change"), ("seed", 1, 2, ""), ("loss", "", "", "")),
    ],
)
def test_change_flag_of_each_value(name, old, new, flag):
    assert configuration.change_flag(name, old, new) == flag
