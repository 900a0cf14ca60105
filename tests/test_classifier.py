"""Fresh heads on a model whose other layers stay the same ones."""

import keras
import numpy as np
import pytest

import keras_tnt
from tests.checks import compute, normal

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
def test_heads_are_fresh_and_everything_else_is_shared(distilled):
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
def test_a_wrapped_model_is_wrapped_as_before(wrap):
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
def test_a_classifier_around_a_model_is_reset_and_keeps_no_names():
    model = headed(tiny(include_top=False, pooling="token"))
    found = keras_tnt.reset_classifier(model, classes=3)
    assert found.output_shape == (None, 3)
    assert found.layers[-1].activation is keras.activations.softmax
    assert found.layers[0] is model.layers[0]
    with pytest.raises(ValueError, match="keeps no names"):
        keras_tnt.reset_classifier(model, class_names=NAMES)


@pytest.mark.one_backend
def test_what_lora_and_quantization_made_of_a_head_is_gone():
    model = tiny()
    model.quantize("int8")
    head = keras_tnt.reset_classifier(model, 3).get_layer("head")
    assert head.dtype_policy.name == "float32"
    model = tiny()
    model.get_layer("head").enable_lora(2)
    head = keras_tnt.reset_classifier(model, 3).get_layer("head")
    assert [v.path for v in head.weights] == ["head/kernel", "head/bias"]


@pytest.mark.one_backend
def test_it_trains_is_saved_and_keeps_its_names(tmp_path):
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
def test_wrong_classes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_tnt.reset_classifier(tiny(), **arguments)


@pytest.mark.one_backend
def test_a_model_without_a_classifier_has_none_to_reset():
    with pytest.raises(ValueError, match="has no classifier"):
        keras_tnt.reset_classifier(tiny(include_top=False, pooling="token"), 3)
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="keras_tnt"):
        keras_tnt.reset_classifier(other, 3)
