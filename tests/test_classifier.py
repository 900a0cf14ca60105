"""`reset_classifier` and `set_class_names`: new heads or names, all other layers shared."""

import keras
import numpy as np
import pytest

import keras_tnt
from tests.helpers.checks import compute, normal

NAMES = ["cat", "dog", "bird"]


def tiny(**arguments):
    settings = {"input_shape": (16, 16, 3), "patch_size": 8, "embed_dim": 8, "depth": 1}
    return keras_tnt.DeiT(**{**settings, "num_heads": 1, "classes": 5, **arguments})


def sequential(model):
    return keras.Sequential([keras.Input((16, 16, 3)), keras.layers.Rescaling(1.0), model])


def functional(model):
    inputs = keras.Input((16, 16, 3))
    return keras.Model(inputs, model(keras.layers.Rescaling(1.0)(inputs)), name="around")


def headed(model):
    return keras.Sequential([model, keras.layers.Dense(5, activation="softmax")])


def values(variables):
    return {v.path: v.numpy() for v in variables}


@pytest.mark.parametrize("distilled", [False, True])
def test_reset_classifier_replaces_only_the_heads(distilled):
    model = tiny(distilled=distilled, dtype="mixed_bfloat16", classifier_activation=None)
    model.get_layer("block_0").trainable = False
    found = keras_tnt.reset_classifier(model, class_names=NAMES)
    assert found.output_shape == (None, 3)
    assert keras_tnt.class_names(found) == NAMES
    assert found.name == model.name
    heads = {"head", "head_distillation"} if distilled else {"head"}
    for layer in found.layers:
        if layer.weights:
            assert (layer is model.get_layer(layer.name)) == (layer.name not in heads)
    assert not found.get_layer("block_0").trainable
    for head in heads:
        new, old = found.get_layer(head), model.get_layer(head)
        assert new.dtype_policy.name == "mixed_bfloat16"
        assert np.std(new.get_weights()[0]) == pytest.approx(np.std(old.get_weights()[0]), rel=0.5)
    assert found.layers[-1].activation is keras.activations.linear
    assert model.output_shape == (None, 5), "the model that was given is changed"


@pytest.mark.parametrize("wrap", [sequential, functional])
def test_reset_classifier_preserves_wrapper_models(wrap):
    model = wrap(tiny())
    found = keras_tnt.reset_classifier(model, class_names=NAMES)
    assert type(found) is type(model)
    assert [layer.name for layer in found.layers] == [layer.name for layer in model.layers]
    assert keras_tnt.class_names(found) == NAMES
    shared = {id(v) for v in model.weights} & {id(v) for v in found.weights}
    assert len(shared) == len(model.weights) - 2

    images = 255 * np.abs(normal((2, 16, 16, 3)))
    inner = keras_tnt.anatomy(found).model
    assert compute(found, images).shape == (2, 3)
    np.testing.assert_allclose(compute(found, images), compute(inner, images), atol=1e-6)


@pytest.mark.one_backend
def test_reset_classifier_with_a_custom_head():
    model = headed(tiny(include_top=False, pooling="token"))
    found = keras_tnt.reset_classifier(model, classes=3)
    assert found.output_shape == (None, 3)
    assert found.layers[-1].activation is keras.activations.softmax
    assert found.layers[0] is model.layers[0]
    with pytest.raises(ValueError, match="keeps no names"):
        keras_tnt.reset_classifier(model, class_names=NAMES)


@pytest.mark.one_backend
def test_reset_head_has_no_lora_and_no_quantization():
    model = tiny()
    model.quantize("int8")
    head = keras_tnt.reset_classifier(model, 3).get_layer("head")
    assert head.dtype_policy.name == "float32"
    model = tiny()
    model.get_layer("head").enable_lora(2)
    head = keras_tnt.reset_classifier(model, 3).get_layer("head")
    assert [v.path for v in head.weights] == ["head/kernel", "head/bias"]


@pytest.mark.one_backend
def test_reset_model_trains_and_saves_its_class_names(tmp_path):
    found = keras_tnt.reset_classifier(tiny(), class_names=NAMES)
    images = 255 * np.abs(normal((6, 16, 16, 3)))
    found.compile("sgd", "sparse_categorical_crossentropy", jit_compile=False)
    found.fit(images, np.arange(6) % 3, verbose=0)
    found.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert keras_tnt.class_names(loaded) == NAMES
    np.testing.assert_allclose(compute(loaded, images), compute(found, images), atol=1e-6)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "classes"),
        ({"classes": 0}, "positive"),
        ({"classes": 2, "class_names": NAMES}, "3 names"),
        ({"class_names": ["cat", "cat"]}, "twice"),
        ({"class_names": "cat"}, "list"),
        ({"class_names": [1, 2]}, "string"),
    ],
)
def test_invalid_classes_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_tnt.reset_classifier(tiny(), **arguments)


@pytest.mark.one_backend
def test_reset_to_the_same_number_of_classes_warns():
    with pytest.warns(UserWarning, match=r"set_class_names\(model, names\).*warn=False") as found:
        keras_tnt.reset_classifier(tiny(classes=3), class_names=NAMES)
    assert len(found) == 1 and found[0].filename == __file__
    keras_tnt.reset_classifier(tiny(classes=3), class_names=NAMES, warn=False)
    keras_tnt.reset_classifier(tiny(classes=4), class_names=NAMES)


# === Class names of a trained head ===


def named(wrap=lambda model: model, **arguments):
    return wrap(tiny(classes=3, **arguments))


KINDS = {
    "plain": lambda: named(),
    "distilled": lambda: named(distilled=True),
    "logits": lambda: named(classifier_activation=None),
    "sequential": lambda: named(sequential),
    "functional": lambda: named(functional),
    "nested_twice": lambda: functional(sequential(named())),
    "headed": lambda: named(
        lambda model: keras.Sequential([model, keras.layers.Dense(3, activation="softmax")]),
        include_top=False,
        pooling="token",
    ),
    "headed_with_activation": lambda: named(
        lambda model: keras.Sequential([model, keras.layers.Dense(3), keras.layers.Softmax()]),
        include_top=False,
        pooling="avg",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_set_class_names_keeps_every_weight_and_is_saved(kind, tmp_path):
    model = KINDS[kind]()
    before = values(model.weights)
    with pytest.raises(ValueError, match="set_class_names"):
        keras_tnt.decode_predictions(np.eye(3), model=model)
    for names in (["x", "y", "z"], NAMES):
        assert keras_tnt.set_class_names(model, tuple(names)) is model
        assert keras_tnt.class_names(model) == names
    for path, value in values(model.weights).items():
        np.testing.assert_array_equal(value, before[path])
    assert keras_tnt.decode_predictions(np.eye(3), top=1, model=model)[1][0][1] == "dog"
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert keras_tnt.class_names(loaded) == NAMES


@pytest.mark.one_backend
def test_set_class_names_is_saved_in_a_bundle(tmp_path):
    model = keras_tnt.set_class_names(named(), NAMES)
    keras_tnt.save_pretrained(model, tmp_path / "bundle")
    assert keras_tnt.class_names(keras_tnt.load_pretrained(tmp_path / "bundle")) == NAMES


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (NAMES[:2], "Received: 2 names for the 3 classes of model"),
        ([*NAMES, "fish"], "4 names for the 3 classes"),
        (None, "Received: None"),
        ("cat", "list"),
        (["cat", "cat", "dog"], "twice"),
        ([1, 2, 3], "string"),
    ],
)
def test_set_class_names_rejects_invalid_names(names, message):
    model = keras_tnt.set_class_names(named(), NAMES)
    with pytest.raises(ValueError, match=message):
        keras_tnt.set_class_names(model, names)
    assert keras_tnt.class_names(model) == NAMES


@pytest.mark.one_backend
def test_set_class_names_rejects_models_without_a_classifier():
    with pytest.raises(ValueError, match="has no classifier"):
        keras_tnt.set_class_names(tiny(include_top=False, pooling="token"), NAMES)
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="keras_tnt"):
        keras_tnt.set_class_names(other, NAMES)


@pytest.mark.one_backend
def test_reset_classifier_rejects_models_without_a_classifier():
    with pytest.raises(ValueError, match="has no classifier"):
        keras_tnt.reset_classifier(tiny(include_top=False, pooling="token"), 3)
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="keras_tnt"):
        keras_tnt.reset_classifier(other, 3)


def test_layers_after_a_classifier_have_no_names_of_its_classes():
    inner = tiny(classes=3, class_names=NAMES)
    model = keras.Sequential([keras.Input((16, 16, 3)), inner, keras.layers.Dense(2)])
    assert keras_tnt.class_names(model) is None
    assert keras_tnt.class_names(inner) == NAMES
    for names in (["p", "q"], NAMES):
        with pytest.raises(ValueError, match="has 2 outputs, computed by layers of your own"):
            keras_tnt.set_class_names(model, names)
    same = keras.Sequential([keras.Input((16, 16, 3)), inner, keras.layers.Softmax()])
    assert keras_tnt.class_names(same) == NAMES
