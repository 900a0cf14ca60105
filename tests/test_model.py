"""Keras operations on models: training, quantization, adapters, rematerialization, composition."""

import gc
import importlib.util
import json

import keras
import numpy as np
import pytest

import keras_tnt
from keras_tnt.layers import SelfAttention
from tests.helpers.checks import (
    BACKEND,
    assert_equal,
    compute,
    gradients,
    normal,
    predict,
    run_python,
)
from tests.helpers.golden import assert_close
from tests.helpers.tiny_models import randomize
from tests.helpers.tiny_models import tiny_tnt as tiny

IMAGES, LABELS = 100 * normal((6, 32, 32, 3)), np.arange(6) % 3
RANDOM = {"dropout": 0.1, "attention_dropout": 0.1, "stochastic_depth": 0.1}


# === Training ===


def compiled(learning_rate=3e-3, **options):
    model = tiny(depth=1, **options)
    loss = "sparse_categorical_crossentropy"
    model.compile(keras.optimizers.Adam(learning_rate), loss, metrics=["accuracy"])
    return model


@pytest.mark.slow
def test_model_trains_on_arrays_and_tf_data():
    model = compiled(**RANDOM)
    sources = {"arrays": ({"x": IMAGES, "y": LABELS, "batch_size": 3}, IMAGES)}
    if importlib.util.find_spec("tensorflow"):
        import tensorflow as tf

        batches = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(3)
        sources["tf.data"] = ({"x": batches}, batches)
    start = model.evaluate(**sources["arrays"][0], verbose=0)[0]
    for labeled, images in sources.values():
        before = model.get_weights()
        model.fit(**labeled, epochs=10, verbose=0)
        assert any(np.any(a != b) for a, b in zip(before, model.get_weights(), strict=True))
        loss, accuracy = model.evaluate(**labeled, verbose=0)
        predictions = model.predict(images, verbose=0)
        assert predictions.shape == (6, 3)
        np.testing.assert_allclose(predictions.sum(axis=-1), 1, atol=1e-5)
        assert accuracy == pytest.approx(np.mean(predictions.argmax(axis=-1) == LABELS))
    assert loss < 0.85 * start


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_model_trains_with_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    model = compiled(1e-3, squeeze_excite=True, layer_scale=0.1, **RANDOM)
    before = model.get_weights()
    history = model.fit(IMAGES, LABELS, batch_size=6, epochs=2, verbose=0)
    assert np.all(np.isfinite(history.history["loss"]))
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())
    assert any(np.any(a != b) for a, b in zip(before, model.get_weights(), strict=True))


def scales_loss(model):
    model.compile("adam", "sparse_categorical_crossentropy")
    return isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)


SMALL = {"input_shape": (32, 32, 3), "depth": 1, "weights": None}
PYRAMID = {
    "depths": (1, 1),
    "outer_dims": (8, 8),
    "inner_dims": (4, 4),
    "outer_heads": (2, 2),
    "inner_heads": (2, 2),
    "reductions": (2, 1),
}
BUILDERS = {
    "tnt": lambda **options: tiny(depth=1, weights=None, **options),
    "deit": lambda **options: keras_tnt.DeiT(
        embed_dim=16, num_heads=2, patch_size=8, **SMALL, **options
    ),
    "cait": lambda **options: keras_tnt.CaiT(
        embed_dim=16, num_heads=2, patch_size=8, **SMALL, **options
    ),
    "pyramid_tnt": lambda **options: keras_tnt.PyramidTNT(
        input_shape=(32, 32, 3), **PYRAMID, **options
    ),
}


@pytest.mark.parametrize("family", BUILDERS)
def test_float16_dtype_argument_enables_loss_scaling(family):
    model = BUILDERS[family](dtype="mixed_float16")
    assert model.dtype_policy.name == "mixed_float16"
    assert scales_loss(model)
    assert scales_loss(keras_tnt.backbone(model, levels=["P3"]))


def test_dtype_policy_survives_cloning_reset_and_saving(tmp_path):
    model = tiny(depth=1, dtype=keras.DTypePolicy("mixed_float16"))
    model.save(tmp_path / "half.keras")
    for again in (
        keras.models.clone_model(model),
        keras_tnt.reset_classifier(model, 2),
        keras.models.load_model(tmp_path / "half.keras"),
        type(model).from_config(model.get_config()),
    ):
        assert again.dtype_policy.name == "mixed_float16"
        assert scales_loss(again)


@pytest.mark.parametrize(
    "policy",
    [
        "float32",
        "mixed_bfloat16",
        pytest.param(
            "float64",
            marks=pytest.mark.skipif(BACKEND == "jax", reason="JAX has no float64 by default"),
        ),
    ],
)
def test_other_dtype_policies_do_not_scale_the_loss(policy):
    model = tiny(depth=1, dtype=policy)
    assert model.dtype_policy.name == policy
    assert not scales_loss(model)


def test_dtype_policy_of_a_model_overrides_the_global_one():
    keras.config.set_dtype_policy("mixed_float16")
    assert not scales_loss(tiny(depth=1, dtype="float32"))
    assert scales_loss(tiny(depth=1))


REPLICAS = """
import keras, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from tests.helpers.tiny_models import tiny_tnt as tiny

with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = tiny(dropout=0.1, attention_dropout=0.1, stochastic_depth=0.3)
    model.compile("adam", "sparse_categorical_crossentropy")
images, labels = np.random.normal(size=(8, 32, 32, 3)), np.arange(8) % 3
print(model.fit(images, labels, batch_size=4, epochs=1, verbose=0).history["loss"][0])
"""


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.distribute belongs to TensorFlow")
def test_model_trains_on_two_replicas():
    assert np.isfinite(float(run_python(REPLICAS)))


@pytest.mark.slow
def test_rematerialized_blocks_have_the_same_gradients():
    plain = randomize(tiny(depth=1))
    # Mode "full" does not support models that index tensors: Keras's own indexing fails in it.
    with keras.RematScope(mode="list_of_layers", layer_names=["block_0"]):
        remat = tiny(depth=1)
    remat.set_weights(plain.get_weights())
    found = gradients(remat, lambda x: remat(x, training=True), [IMAGES])
    expected = gradients(plain, lambda x: plain(x, training=True), [IMAGES])
    for variable, actual, wanted in zip(plain.trainable_variables, found, expected, strict=True):
        error = np.abs(actual - wanted).max()
        assert error <= 1e-3 * np.abs(wanted).max() + 1e-6, variable.path
    remat.compile("sgd", "sparse_categorical_crossentropy", jit_compile=BACKEND == "jax")
    assert np.isfinite(remat.fit(IMAGES, LABELS, verbose=0).history["loss"][0])


# === Images of a wrong size ===


@pytest.mark.parametrize("family", BUILDERS)
def test_images_of_another_size_raise_with_advice(family):
    model = BUILDERS[family]()
    model.compile("sgd", "sparse_categorical_crossentropy")
    wrong = np.zeros((2, 48, 40, 3), "float32")
    before = model.get_weights()
    for compute_wrongly in (
        model,
        lambda x: model.predict(x, verbose=0),
        lambda x: model.fit(x, np.zeros(2), verbose=0),
        lambda x: model(keras.Input(x.shape[1:])),
    ):
        with pytest.raises(ValueError, match="batch, 32, 32, 3") as error:
            compute_wrongly(wrong)
        assert "input_shape=(48, 40, 3)" in str(error.value)
        assert "(None, None, 3)" in str(error.value)
    for weight, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, old)


def test_channels_first_error_has_the_size_in_its_order():
    keras.config.set_image_data_format("channels_first")
    model = tiny(depth=1, input_shape=(3, 32, 32))
    with pytest.raises(ValueError, match="batch, 3, 32, 32.*channels first"):
        model(np.zeros((2, 3, 48, 48), "float32"))
    with pytest.raises(ValueError, match=r"\(3, None, None\)"):
        model(np.zeros((2, 32, 32, 3), "float32"))


@pytest.mark.slow
def test_model_still_works_after_images_of_a_wrong_size():
    def trained(wrong):
        keras.utils.set_random_seed(4)
        model = compiled()
        for call in wrong:
            with pytest.raises(ValueError, match="batch, 32, 32, 3"):
                call(model)
        model.fit(IMAGES, LABELS, batch_size=6, verbose=0)
        return model.predict(IMAGES, verbose=0)

    others = np.zeros((6, 48, 48, 3), "float32")
    wrong = [
        lambda model: model.fit(others, LABELS, verbose=0),
        lambda model: model.predict(others, verbose=0),
        lambda model: model.evaluate(others, LABELS, verbose=0),
    ]
    np.testing.assert_allclose(trained(wrong), trained([]), atol=1e-5)


# === Quantization and adapters ===


def dense_layers(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Dense)]


def attention_projections(model):
    """Returns the Dense layers of every attention layer."""
    attention = [layer for layer in model._flatten_layers() if isinstance(layer, SelfAttention)]
    return [dense for layer in attention for dense in (layer.qkv, layer.projection)]


@pytest.mark.parametrize(
    "options",
    [{"legacy": True, "distilled": True}, {"class_attention_depth": 1, "layer_scale": 0.1}],
)
def test_int8_model_predicts_similarly_and_round_trips(options, tmp_path):
    model = randomize(tiny(classifier_activation=None, depth=1, **options))
    expected = compute(model, IMAGES)
    gc.freeze()  # Keras collects garbage after every layer; objects of other tests are excluded.
    model.quantize("int8")
    gc.unfreeze()
    assert all(d.kernel.dtype == "int8" for d in dense_layers(model))
    quantized = compute(model, IMAGES)
    assert_close(quantized, expected, 0.1)

    model.save(tmp_path / "q.keras")
    loaded = keras.models.load_model(tmp_path / "q.keras")
    assert all(d.kernel.dtype == "int8" for d in dense_layers(loaded))
    assert_equal(compute(loaded, IMAGES), quantized)
    model.save_weights(tmp_path / "q.weights.h5")
    loaded = keras.models.clone_model(model)
    loaded.load_weights(tmp_path / "q.weights.h5")
    assert_equal(compute(loaded, IMAGES), quantized)


@pytest.mark.slow
def test_adapters_train_alone_and_round_trip(tmp_path):
    model = compiled()
    projections = attention_projections(model)
    for layer in model._flatten_layers():
        if not list(layer._flatten_layers(include_self=False)):
            layer.trainable = False
    for projection in projections:
        projection.trainable = True
        projection.enable_lora(rank=2)
        if projection.bias is not None:
            projection.bias.trainable = False
    adapters = {v.path for d in projections for v in (d.lora_kernel_a, d.lora_kernel_b)}
    trained = {v.path for v in model.trainable_variables}
    assert trained == adapters

    frozen = {v.path: keras.ops.convert_to_numpy(v) for v in model.non_trainable_weights}
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(IMAGES, LABELS, batch_size=6, epochs=2, verbose=0)
    for variable in model.non_trainable_weights:
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), frozen[variable.path])
    assert all(np.any(keras.ops.convert_to_numpy(d.lora_kernel_b) != 0) for d in projections)

    expected = compute(model, IMAGES)
    model.save(tmp_path / "lora.keras")
    # Files contain the kernels with the adapters merged, and no adapters.
    loaded = keras.models.load_model(tmp_path / "lora.keras", compile=False)
    assert_close(compute(loaded, IMAGES), expected, 1e-5)
    assert not any(d.lora_enabled for d in attention_projections(loaded))


# === Composition ===


def test_model_can_be_built_on_an_input_or_other_layers():
    inputs = keras.Input((32, 32, 3), name="photo")
    on_input = randomize(tiny(input_shape=None, input_tensor=inputs))
    assert on_input.input is inputs
    small = keras.Input((16, 16, 3))
    enlarged = keras.layers.UpSampling2D(2)(small)
    on_layers = tiny(input_shape=None, input_tensor=enlarged)
    assert on_layers.input_shape == (None, 16, 16, 3)
    on_layers.set_weights(on_input.get_weights())
    images = IMAGES[:, ::2, ::2]
    larger = np.repeat(np.repeat(images, 2, axis=1), 2, axis=2)
    assert_close(compute(on_layers, images), compute(on_input, larger), 1e-5)


def test_nested_backbone_round_trips(tmp_path):
    backbone = randomize(tiny(include_top=False, pooling="token"))
    inputs = keras.Input((32, 32, 3))
    model = keras.Model(inputs, keras.layers.Dense(5)(backbone(inputs)))
    model.save(tmp_path / "nested.keras")
    loaded = keras.models.load_model(tmp_path / "nested.keras")
    assert_equal(compute(loaded, IMAGES), compute(model, IMAGES))


def test_layer_names_are_stable():
    names = [[layer.name for layer in tiny(distilled=True).layers] for _ in range(2)]
    ours = [[name for name in each if not name.startswith(("input", "get_item"))] for each in names]
    assert ours[0] == ours[1]
    assert ours[0][-1] == "predictions"
    assert {"head", "head_distillation", "logits", "block_0", "norm"} <= set(ours[0])


def test_config_is_plain_json():
    config = tiny(distilled=True, **RANDOM).get_config()
    assert json.loads(json.dumps(config))["name"] == "tnt"


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", None])
def test_classifier_activation_is_in_the_last_layer(activation):
    model = randomize(tiny(classifier_activation=activation))
    logits = keras.Model(model.input, model.get_layer("head").output)
    expected = keras.activations.get(activation)(compute(logits, IMAGES))
    assert_close(predict(model, IMAGES), keras.ops.convert_to_numpy(expected), 1e-5)
    assert model.layers[-1].name == "predictions"


def test_default_input_shape_follows_the_image_data_format():
    keras.config.set_image_data_format("channels_first")
    with keras.StatelessScope(initialize_variables=False):
        model = keras_tnt.TNTTiny(weights=None, include_top=False)
    assert model.input_shape == (None, 3, 224, 224)
