"""`anatomy` of built, loaded, cloned, quantized and wrapped models."""

import keras
import numpy as np
import pytest

import keras_tnt
from keras_tnt.layers import ClassAttentionBlock, TNTBlock
from tests.helpers.checks import assert_equal, compute, normal
from tests.helpers.tiny_models import tiny_of as tiny
from tests.helpers.tiny_models import tiny_tnt

NAMES = ["cat", "dog", "owl"]


def told(model):
    """Returns what `anatomy` describes, as comparable values."""
    found = keras_tnt.anatomy(model)
    return (
        *(found.family, found.image, found.patch_size, found.grid),
        *(found.prefix_tokens, found.class_tokens, found.stem.name, found.norm.name),
        [layer.name for layer in (*found.tokens, *found.positions, *found.merges)],
        [(b.name, b.number, b.stage, b.grid, b.reduction, b.inner is None) for b in found.blocks],
        [layer.name for layer in (*found.class_blocks, *found.heads)],
        keras_tnt.class_names(model),
    )


def test_anatomy_describes_a_tnt():
    found = keras_tnt.anatomy(tiny_tnt(distilled=True, inner_blocks=(0,)))
    assert (found.family, found.patch_size, found.grid) == ("tnt", 16, (2, 2))
    assert (found.prefix_tokens, found.class_tokens) == (2, 2)
    assert [head.name for head in found.heads] == ["head", "head_distillation"]
    assert [block.inner is not None for block in found.blocks] == [True, False]
    assert isinstance(found.blocks[0].layer, TNTBlock)
    assert found.predictions.name == "predictions"
    image = found.image
    assert (image.height, image.width, image.channels, image.crop) == (32, 32, 3, 0.9)
    assert image.normalizes and image.mean == (0.5, 0.5, 0.5)


def test_anatomy_of_other_families():
    cait = keras_tnt.anatomy(tiny("cait"))
    assert (cait.prefix_tokens, cait.class_tokens) == (0, 1)
    assert [type(layer) for layer in cait.class_blocks] == [ClassAttentionBlock]
    pyramid = keras_tnt.anatomy(tiny("pyramid_tnt", size=(64, 32)))
    assert [[b.name for b in stage] for stage in pyramid.stages] == [
        ["stage_0_block_0", "stage_0_block_1"],
        ["stage_1_block_0"],
    ]
    assert [b.grid for b in pyramid.blocks] == [(8, 4), (8, 4), (4, 2)]
    assert [b.reduction for b in pyramid.blocks] == [2, 2, 1]
    assert (pyramid.class_tokens, pyramid.patch_size, len(pyramid.merges)) == (0, 8, 2)


@pytest.mark.parametrize(
    ("family", "side", "crop"),
    [("deit", 224, 0.9), ("deit", 384, 1.0), ("cait", 224, 1.0), ("pyramid_tnt", 192, 0.9)],
)
@pytest.mark.one_backend
def test_crop_is_the_published_one(family, side, crop):
    with keras.StatelessScope(initialize_variables=False):
        model = tiny(family, size=(side, side))
    image = keras_tnt.anatomy(model).image
    assert image.crop == crop
    assert image.covered_size() == (int(side / crop),) * 2


ONE_BACKEND = pytest.mark.one_backend


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "tnt",
        *(
            pytest.param(name, marks=ONE_BACKEND)
            for name in ("deit_distilled", "cait", "pyramid_tnt")
        ),
    ],
)
def test_loaded_cloned_and_quantized_models_have_the_same_anatomy(family, tmp_path):
    build = tiny_tnt if family == "tnt" else lambda **options: tiny(family, **options)
    model = build(class_names=NAMES)
    expected = told(model)
    assert expected[-1] == NAMES
    for ending in (".keras", ".h5"):
        model.save(tmp_path / f"model{ending}")
        loaded = keras.models.load_model(tmp_path / f"model{ending}", compile=False)
        assert told(loaded) == expected
    images = 100 * normal((2, *model.input_shape[1:]))
    assert_equal(compute(loaded, images), compute(model, images))
    assert told(keras.models.clone_model(model)) == expected
    model.quantize("int8")
    assert told(model) == expected


def test_anatomy_of_a_nested_model():
    backbone = tiny("deit", include_top=False, pooling="token", include_preprocessing=False)
    head = keras.layers.Dense(5, activation="softmax")
    outer = keras.Sequential(
        [keras.Input((32, 48, 3)), keras.layers.Rescaling(1 / 255), backbone, head]
    )
    found = keras_tnt.anatomy(outer)
    assert found.model is backbone and found.heads == (head,)
    # The outer model takes pixels and passes values in [0, 1] to the nested model.
    assert found.image.normalizes
    np.testing.assert_allclose(found.image.mean, 0, atol=1e-6)
    np.testing.assert_allclose(found.image.std, 1, atol=1e-5)
    assert not keras_tnt.anatomy(backbone).image.normalizes
    assert keras_tnt.class_names(outer) is None


def test_anatomy_inside_an_unbuilt_sequential_model():
    model = tiny("deit", classes=3)
    outer = keras.Sequential([model, keras.layers.Softmax()])
    found = keras_tnt.anatomy(outer)
    assert found.model is model and found.image == keras_tnt.anatomy(model).image
    pixels = np.zeros((32, 48, 3), "uint8")
    assert keras_tnt.load_image(pixels, outer).shape == (32, 48, 3)
    maps = keras_tnt.inspection.attention_maps(outer, np.zeros((1, 32, 48, 3)))
    assert list(maps)[0] == "block_0/outer"


@pytest.mark.parametrize("family", ["tnt", "deit_distilled", "cait", "pyramid_tnt"])
def test_models_of_one_kind_have_equal_layer_names(family):
    build = tiny_tnt if family == "tnt" else lambda: tiny(family)
    first, second = build(), build()
    assert [layer.name for layer in first.layers] == [layer.name for layer in second.layers]
    assert first.layers[0].name == "images"


def test_no_or_several_keras_tnt_models_raise():
    plain = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="not built from one of keras_tnt"):
        keras_tnt.anatomy(plain)
    x = keras.Input((32, 32, 3))
    models = [tiny("deit", size=(32, 32), name=name) for name in ("first", "second")]
    both = keras.Model(x, [model(x) for model in models])
    with pytest.raises(ValueError, match=r"from several of keras_tnt's \(deit, deit\)"):
        keras_tnt.anatomy(both)


def test_models_can_share_an_input_and_a_user_layer_name():
    """Layer names that are already used are prefixed with the model's name."""
    x = keras.Input((32, 32, 3))
    scaled = keras.layers.Rescaling(1.0, name="rescaling")(x)
    first = tiny("deit", input_shape=None, input_tensor=scaled)
    second = tiny("deit", input_shape=None, input_tensor=scaled, name="second")
    third = tiny_tnt(input_shape=None, input_tensor=scaled)
    both = keras.Model(x, [first.output, second.output, third.output])
    assert len(compute(both, normal((1, 32, 32, 3)))) == 3
    assert first.get_layer("head") and second.get_layer("second_head")
    second.set_weights(first.get_weights())
    images = 100 * normal((2, 32, 32, 3))
    assert_equal(compute(second, images), compute(first, images))


def test_weights_transfer_between_models_with_and_without_prefix(tmp_path):
    x = keras.Input((32, 32, 3))
    tiny("deit", input_shape=None, input_tensor=x)
    named = tiny("deit", input_shape=None, input_tensor=x, name="named")
    plain = tiny("deit", size=(32, 32))
    assert keras_tnt.anatomy(named).layer_prefix == "named_"
    keras_tnt.save_checkpoint(named, tmp_path / "named.safetensors")
    keras_tnt.load_checkpoint(plain, tmp_path / "named.safetensors")
    for ours, theirs in zip(plain.get_weights(), named.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert "block_1/outer" in keras_tnt.inspection.attention_maps(named, normal((1, 32, 32, 3)))


def test_class_names_set_the_classes_and_decode_predictions():
    model = tiny_tnt(classes=3, class_names=NAMES, depth=1)
    [best] = keras_tnt.decode_predictions(np.array([[0.2, 0.7, 0.1]]), top=2, model=model)
    assert best == [("dog", "dog", 0.7), ("cat", "cat", 0.2)]
    with pytest.raises(ValueError, match="3 names for classes=4"):
        tiny_tnt(classes=4, class_names=NAMES)
    for wrong, message in (
        (["a", "a"], "differ from each other. Received twice: 'a'"),
        (["a", 3], "must be a string. Received: 3"),
        ("abc", "must be a list of names"),
        (["a", "b\n"], "one line"),
        ([], "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            keras_tnt.DeiTTiny(weights=None, class_names=wrong)
    with pytest.raises(ValueError, match="has no names of its classes"):
        keras_tnt.decode_predictions(np.ones((1, 3)), model=tiny_tnt(depth=1))


def test_dtype_argument_applies_to_all_layers_without_changing_the_global_policy():
    model = tiny_tnt(dtype="mixed_bfloat16", distilled=True)
    assert keras.config.dtype_policy().name == "float32"
    policies = {layer.name: layer.dtype_policy.name for layer in model.layers[1:]}
    assert policies.pop("predictions") == "float32"
    assert set(policies.values()) == {"mixed_bfloat16"}
    assert {v.dtype for v in model.weights} == {"float32"}
    for family in ("deit_distilled", "cait", "pyramid_tnt"):
        half = tiny(family, dtype="mixed_float16")
        assert {x.dtype_policy.name for x in half.layers[1:-1]} == {"mixed_float16"}
        assert half.output.dtype == "float32"
