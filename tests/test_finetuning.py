"""Layer-wise learning rates and frozen layers."""

import contextlib
import dataclasses
import functools

import keras
import numpy as np
import pytest
from keras import ops

import keras_tnt
from keras_tnt import finetuning
from tests.helpers.checks import BACKEND, assert_equal, normal

TINY = {
    "input_shape": (16, 16, 3),
    "patch_size": 8,
    "inner_stride": 4,
    "outer_dim": 16,
    "inner_dim": 4,
    "outer_heads": 2,
    "inner_heads": 2,
    "classes": 4,
}
RATE, WEIGHT_DECAY, DECAY = 1e-2, 0.1, 0.5


def tiny(**arguments):
    return keras_tnt.TNT(**{**TINY, "depth": 2, **arguments})


def pyramid():
    return keras_tnt.PyramidTNT(
        input_shape=(64, 64, 3),
        classes=4,
        depths=(2, 1, 1, 1),
        outer_dims=(8, 8, 16, 16),
        inner_dims=(4, 4, 4, 4),
        outer_heads=(2, 2, 2, 2),
        inner_heads=(2, 2, 2, 2),
    )


@pytest.fixture(scope="module")
def model():
    """Returns a model whose weights no test changes."""
    return tiny()


@dataclasses.dataclass(frozen=True)
class Trial:
    """A weight of the model with initial values and ten gradients."""

    path: str
    distance: int
    start: np.ndarray
    gradients: np.ndarray

    @property
    def decays(self):
        return self.path.endswith(("kernel", "distillation_token/token"))

    def variable(self):
        *scopes, name = self.path.split("/")
        with contextlib.ExitStack() as stack:
            for scope in scopes:
                stack.enter_context(keras.name_scope(scope))
            variable = keras.Variable(self.start, dtype="float32", name=name)
        assert variable.path == self.path
        return variable


@pytest.fixture(scope="module")
def trials(model):
    """Returns a kernel and another weight at each distance."""
    distance_of = finetuning.distances(model)
    found = {(distance_of[v.path], v.path.endswith("kernel")): v for v in model.weights}
    rng = np.random.default_rng(0)
    return [
        Trial(v.path, distance, rng.normal(size=v.shape), gradients(rng, (10, *v.shape)))
        for (distance, _), v in found.items()
    ]


def gradients(rng, shape):
    """Returns gradients away from zero, where optimizers differ by the position of epsilon."""
    return rng.choice([-0.1, 0.1], shape) * rng.uniform(0.5, 1.5, shape)


def updated(optimizer, trials):
    """Returns the variables of the trials after ten updates."""
    variables = [trial.variable() for trial in trials]
    optimizer.build(variables)
    with no_gradients():
        for step in range(10):
            each = [trial.gradients[step].astype("float32") for trial in trials]
            optimizer.apply([ops.convert_to_tensor(g) for g in each])
    return [ops.convert_to_numpy(v) for v in variables]


def no_gradients():
    if BACKEND != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


# === Distances ===


DISTANCES = {
    "tnt": (
        lambda: tiny(class_attention_depth=1, distilled=False),
        {"word_embedding": 4, "word_position": 4, "patch_embedding": 4, "patch_position": 4}
        | {"class_token": 4, "block_0": 3, "block_1": 2, "class_block_0": 1, "norm": 0, "head": 0},
    ),
    "distilled": (
        lambda: keras_tnt.DeiT(
            input_shape=(16, 16, 3), embed_dim=8, depth=2, num_heads=1, classes=4, distilled=True
        ),
        {"patch_embedding": 3, "class_token": 3, "distillation_token": 3, "patch_position": 3}
        | {"block_0": 2, "block_1": 1, "norm": 0, "head": 0, "head_distillation": 0},
    ),
    "pyramid": (
        lambda: pyramid(),
        {"stem": 6, "patch_position": 6, "word_position": 6, "stage_0_relative_position": 6}
        | {"stage_0_block_0": 5, "stage_0_block_1": 4, "merge_patches_0": 4, "merge_words_0": 4}
        | {"stage_1_relative_position": 4, "stage_1_block_0": 3, "merge_patches_1": 3}
        | {"merge_words_1": 3, "stage_2_relative_position": 3, "stage_2_block_0": 2}
        | {"merge_patches_2": 2, "merge_words_2": 2, "stage_3_relative_position": 2}
        | {"stage_3_block_0": 1, "norm": 0, "head": 0},
    ),
}


@pytest.mark.one_backend
@pytest.mark.parametrize("kind", DISTANCES)
def test_distances_count_blocks_from_the_head(kind):
    build, expected = DISTANCES[kind]
    found = finetuning.distances(build())
    assert {path.partition("/")[0]: far for path, far in found.items()} == expected


# === Updates ===


def test_adamw_sgd_and_lion_match_numpy(model, trials):
    for optimizer, reference in (
        (keras.optimizers.AdamW(RATE, weight_decay=WEIGHT_DECAY, epsilon=1e-8), adamw),
        (keras.optimizers.SGD(RATE, weight_decay=WEIGHT_DECAY, momentum=0.9), sgd),
        (keras.optimizers.Lion(RATE, weight_decay=WEIGHT_DECAY), lion),
    ):
        found = updated(finetuning.layerwise(optimizer, model, DECAY), trials)
        for trial, value in zip(trials, found, strict=True):
            rate = RATE * DECAY**trial.distance
            expected = reference(trial.start, trial.gradients, rate, WEIGHT_DECAY * trial.decays)
            np.testing.assert_allclose(value, expected, rtol=0, atol=4e-6, err_msg=trial.path)


def adamw(value, gradients, rate, weight_decay):
    mean = square = 0.0
    for step, gradient in enumerate(gradients, 1):
        value = value - rate * weight_decay * value
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        root = np.sqrt(square / (1 - 0.999**step))
        value = value - rate * (mean / (1 - 0.9**step)) / (root + 1e-8)
    return value


def sgd(value, gradients, rate, weight_decay):
    velocity = 0.0
    for gradient in gradients:
        value = value - rate * weight_decay * value
        velocity = 0.9 * velocity - rate * gradient
        value = value + velocity
    return value


def lion(value, gradients, rate, weight_decay):
    momentum = 0.0
    for gradient in gradients:
        value = value - rate * weight_decay * value
        value = value - rate * np.sign(0.9 * momentum + 0.1 * gradient)
        momentum = 0.99 * momentum + 0.01 * gradient
    return value


@pytest.mark.parametrize("name", ["Muon", "Lamb", "Adafactor", "Nadam", "ScheduleFreeAdamW"])
def test_any_optimizer_uses_the_learning_rate_of_the_layer(model, trials, name):
    """Muon leaves all but matrices to AdamW, with a separate weight decay."""
    make = functools.partial(getattr(keras.optimizers, name), weight_decay=WEIGHT_DECAY)
    found = updated(finetuning.layerwise(make(RATE), model, DECAY), trials)
    for distance in {trial.distance for trial in trials}:
        plain = make(RATE * DECAY**distance)
        plain.exclude_from_weight_decay(var_names=["bias", "beta", "gamma", "token", "table"])
        chosen = [i for i, trial in enumerate(trials) if trial.distance == distance]
        expected = updated(plain, [trials[i] for i in chosen])
        for i, value in zip(chosen, expected, strict=True):
            np.testing.assert_allclose(found[i], value, rtol=0, atol=2e-6, err_msg=trials[i].path)


@pytest.mark.slow
@pytest.mark.one_backend
def test_adamw_matches_the_layer_decay_of_the_trainer():
    import tensorflow as tf

    from training import configuration, optimization

    model = tiny(depth=1, distilled=True, layer_scale=1e-3)
    start = model.get_weights()
    rng = np.random.default_rng(0)
    steps = [[gradients(rng, v.shape).astype("float32") for v in model.weights] for _ in range(10)]
    settings = configuration.make(
        "digits", layer_decay=0.75, weight_decay=WEIGHT_DECAY, clip_norm=5.0, ema=0.0
    )
    trainer = optimization.Optimizer(model, settings)
    for step, each in enumerate(steps):
        trainer.apply([tf.constant(g) for g in each], tf.constant(float(step)), tf.constant(RATE))
    expected = model.get_weights()

    model.set_weights(start)
    optimizer = finetuning.layerwise(
        keras.optimizers.AdamW(
            RATE,
            weight_decay=WEIGHT_DECAY,
            beta_2=settings.beta_2,
            epsilon=1e-8,
            global_clipnorm=5.0,
        ),
        model,
        0.75,
    )
    for each in steps:
        optimizer.apply([tf.constant(g) for g in each], model.trainable_variables)
    for variable, value in zip(model.weights, expected, strict=True):
        np.testing.assert_allclose(variable, value, rtol=0, atol=1e-6, err_msg=variable.path)


# === In fit ===


def batch():
    return 255 * np.abs(normal((8, 16, 16, 3))), np.arange(8) % 4


@keras.saving.register_keras_serializable(package="tests")
class OwnOptimizer(keras.optimizers.SGD):
    """A user's optimizer class."""


def small(dtype=None):
    return keras_tnt.DeiT(
        input_shape=(16, 16, 3),
        patch_size=8,
        embed_dim=8,
        depth=1,
        num_heads=1,
        classes=4,
        dtype=dtype,
    )


def fit(model):
    images, labels = batch()
    model.fit(images, labels, batch_size=2, shuffle=False, verbose=0)
    return [ops.convert_to_numpy(v) for v in model.trainable_variables]


def compiled(model, optimizer):
    model.compile(optimizer, loss="sparse_categorical_crossentropy", jit_compile=BACKEND == "jax")
    return model


@pytest.mark.slow
def test_decay_of_1_matches_the_wrapped_optimizer_in_fit():
    """Covers a schedule, clipping, accumulation, a moving average and loss scaling."""

    def optimizer():
        schedule = keras.optimizers.schedules.CosineDecay(1e-2, 20)
        return keras.optimizers.Adam(
            schedule, global_clipnorm=0.1, use_ema=True, gradient_accumulation_steps=2
        )

    plain, ours = small("mixed_float16"), small("mixed_float16")
    ours.set_weights(plain.get_weights())
    before = plain.get_weights()
    expected = fit(compiled(plain, optimizer()))
    found = fit(compiled(ours, finetuning.layerwise(optimizer(), ours, 1.0)))
    for a, b, start in zip(found, expected, before, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
        assert np.any(a != start)


def test_saved_model_resumes_identically(tmp_path):
    model = keras.Sequential([keras.Input((16, 16, 3)), keras.layers.Rescaling(0.5), small()])
    optimizer = OwnOptimizer(
        keras.optimizers.schedules.CosineDecay(1e-2, 20), momentum=0.9, weight_decay=0.1
    )
    first = fit(compiled(model, finetuning.layerwise(optimizer, model, 0.5)))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, OwnOptimizer)
    expected, found = fit(model), fit(loaded)
    for a, b, before in zip(found, expected, first, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
        assert np.any(a != before)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("optimizer", "decay", "message"),
    [
        (keras.optimizers.SGD, 0.0, "above 0"),
        (keras.optimizers.SGD, 1.5, "at most 1"),
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), 0.5, "wraps others"),
        (lambda: built(keras.optimizers.SGD()), 0.5, "in use"),
    ],
)
def test_invalid_arguments_of_layerwise_raise(model, optimizer, decay, message):
    with pytest.raises(ValueError, match=message):
        finetuning.layerwise(optimizer(), model, decay)


def built(optimizer):
    optimizer.build([keras.Variable(0.0)])
    return optimizer


# === Frozen layers ===


def trained(model):
    return {v.path.partition("/")[0] for v in model.trainable_variables}


@pytest.mark.one_backend
def test_freeze_up_to_a_block():
    model = tiny(class_attention_depth=1)
    everything = trained(model)
    stem = {"word_embedding", "word_position", "patch_embedding", "patch_position", "class_token"}
    for up_to, frozen in {
        "stem": stem,
        2: stem | {"block_0", "block_1"},
        "head": everything - {"head"},
        0: stem,
    }.items():
        finetuning.freeze(model, up_to)
        assert trained(model) == everything - frozen
    finetuning.unfreeze(model)
    assert trained(model) == everything
    for up_to in (4, -1, True, "tail"):
        with pytest.raises(ValueError, match="from 0 to 3"):
            finetuning.freeze(model, up_to)


@pytest.mark.one_backend
def test_frozen_stem_uses_inference_batch_normalization():
    model = pyramid()
    images = 255 * np.abs(normal((2, 64, 64, 3)))
    before = model.get_layer("stem").get_weights()
    assert np.any(stem_of(model, images, training=True) != stem_of(model, images))
    model.get_layer("stem").set_weights(before)
    finetuning.freeze(model, "stem")
    assert_equal(stem_of(model, images, training=True), stem_of(model, images))
    assert_equal(model.get_layer("stem").get_weights(), before)


def stem_of(model, images, training=False):
    patches, words = model.get_layer("stem")(images, training=training)
    return ops.convert_to_numpy(patches)


# === Variables added later ===


def adapted(model):
    """Enables LoRA on every dense layer, including the heads, and returns the model."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Dense):
            layer.enable_lora(2)
    return model


def test_adapters_added_later_have_the_rate_of_their_layer():
    core = keras_tnt.DeiT(
        input_shape=(16, 16, 3), patch_size=8, embed_dim=8, depth=2, num_heads=1, classes=4
    )
    outer = keras.Sequential([core, keras.layers.Dense(3, name="behind")])
    optimizer = finetuning.layerwise(keras.optimizers.AdamW(RATE), outer, DECAY)
    adapted(outer)
    expected = finetuning.distances(outer)  # which includes the adapters
    optimizer.build(outer.trainable_variables)
    found = dict(zip([v.path for v in outer.trainable_variables], optimizer.rates, strict=True))
    adapters = [path for path in found if "lora" in path]
    # The patch embedding, two blocks, and the layers after them.
    assert {found[path] for path in adapters} == {DECAY**far for far in range(4)}
    for path, rate in found.items():
        assert rate == pytest.approx(DECAY ** expected.get(path, 0)), path


@pytest.mark.one_backend
def test_variable_outside_of_the_model_raises():
    model = keras_tnt.DeiT(
        input_shape=(16, 16, 3), patch_size=8, embed_dim=8, depth=1, num_heads=1, classes=4
    )
    optimizer = finetuning.layerwise("adamw", model)
    outer = keras.Sequential([model, keras.layers.Dense(3, name="elsewhere")])
    with pytest.raises(ValueError, match="without the variable '.*elsewhere/kernel'"):
        optimizer.build(outer.trainable_variables)
    again = keras.optimizers.deserialize(
        keras.optimizers.serialize(finetuning.layerwise("adamw", model))
    )
    with pytest.raises(ValueError, match="without the variable"):
        again.build(outer.trainable_variables)


@pytest.mark.one_backend
def test_optimizers_in_older_files_know_only_some_variables():
    model = keras_tnt.DeiT(
        input_shape=(16, 16, 3), patch_size=8, embed_dim=8, depth=1, num_heads=1, classes=4
    )
    config = keras.optimizers.serialize(finetuning.layerwise("adamw", model))
    del config["config"]["complete"]
    config["config"]["factors"] = {"head/kernel": 1.0}
    optimizer = keras.optimizers.deserialize(config)
    optimizer.build(model.trainable_variables)
    assert set(optimizer.rates) == {1.0}
