"""`keras_tnt.backbone`: feature maps by level for every family, and Keras's operations on it."""

import json

import keras
import numpy as np
import pytest
from keras import ops

import keras_tnt
from keras_tnt.inspection import feature_maps
from keras_tnt.models.backbone import Backbone, PyramidLevel
from tests.helpers.checks import assert_equal, check_gradients, check_layer, compute, normal
from tests.helpers.golden import assert_close
from tests.helpers.tiny_models import tiny_of as tiny

LEVELS = ("P2", "P3", "P4", "P5")


def tiny_tnt(size=(64, 96), **arguments):
    shape = (*size, 3) if keras.config.image_data_format() == "channels_last" else (3, *size)
    architecture = {"depth": 4, "outer_dim": 16, "inner_dim": 4, "outer_heads": 2, "inner_heads": 2}
    return keras_tnt.TNT(**{"input_shape": shape, "classes": 3, **architecture, **arguments})


@pytest.fixture(scope="module")
def classifier():
    keras.utils.set_random_seed(0)
    return tiny_tnt()


@pytest.fixture(scope="module")
def backbone(classifier):
    return keras_tnt.backbone(classifier)


@pytest.fixture(scope="module")
def images(classifier):
    return 100 * normal((2, *classifier.input_shape[1:]))


# === Feature maps ===


def test_block_quarters_are_resized_to_their_strides(classifier, backbone, images):
    found = compute(backbone, images)
    quarters = compute(feature_maps(classifier, (1, 2, 3, 4)), images)
    assert [x.shape for x in found.values()] == [
        (2, 64 // stride, 96 // stride, 16) for stride in (4, 8, 16, 32)
    ]
    assert_equal(found["P4"], quarters[2])
    largest = quarters[3].reshape(2, 2, 2, 3, 2, 16).max(axis=(2, 4))
    assert_equal(found["P5"], largest)
    assert_close(found["P3"], transposed_convolution(backbone, "p3", 0, quarters[1]), 1e-5)


def transposed_convolution(backbone, level, number, x):
    """Returns the output of `ops.conv_transpose` for a map, with the weights of our level."""
    projection = backbone.get_layer(level).projections[number]
    kernel = ops.convert_to_numpy(projection.kernel).reshape(16, 2, 2, 16)
    bias = ops.convert_to_numpy(projection.bias).reshape(2, 2, 16)
    maps = ops.conv_transpose(x, kernel.transpose(1, 2, 3, 0), 2, data_format="channels_last")
    return ops.convert_to_numpy(maps) + np.tile(bias, (x.shape[1], x.shape[2], 1))


@pytest.mark.parametrize("steps", [2, 1, 0, -2])
def test_pyramid_level_is_a_valid_keras_layer(steps):
    check_layer(PyramidLevel, (2, 4, 8, 6), steps=steps, data_format="channels_last", epsilon=1e-5)


def test_norm_and_gelu_separate_two_transposed_convolutions():
    level = PyramidLevel(2)
    x = normal((1, 2, 3, 4))
    level(x)
    first, second = (PyramidLevel(1) for _ in range(2))
    for one, projection in zip((first, second), level.projections, strict=True):
        one(x)
        one.set_weights(projection.get_weights())
    between = ops.gelu(keras.layers.LayerNormalization(epsilon=1e-6)(first(x)), approximate=False)
    assert_close(ops.convert_to_numpy(level(x)), ops.convert_to_numpy(second(between)), 1e-5)


@pytest.mark.parametrize("patch_size", [4, 8, 32])
@pytest.mark.one_backend
def test_patch_sizes_that_are_powers_of_two_give_the_same_strides(patch_size):
    inner = {"inner_stride": patch_size // 4}
    found = keras_tnt.backbone(tiny_tnt(patch_size=patch_size, **inner))
    assert [found.pyramid_outputs[level].shape[1:3] for level in LEVELS] == [
        (16, 24), (8, 12), (4, 6), (2, 3)
    ]  # fmt: skip


def test_pyramid_tnt_levels_are_its_stages():
    model = tiny("pyramid_tnt", size=(32, 64))
    found = keras_tnt.backbone(model)
    assert list(found.pyramid_outputs) == ["P3", "P4"]
    images = 100 * normal((1, 32, 64, 3))
    assert_equal(list(compute(found, images).values()), compute(feature_maps(model), images))


@pytest.mark.one_backend
def test_pyramid_tnt_levels_are_p3_to_p6():
    found = keras_tnt.backbone("pyramid_tnt_tiny", weights=None, input_shape=(64, 128, 3))
    assert {level: x.shape[1:3] for level, x in found.pyramid_outputs.items()} == {
        "P3": (8, 16), "P4": (4, 8), "P5": (2, 4), "P6": (1, 2)
    }  # fmt: skip


@pytest.mark.parametrize("family", ["deit", "deit_distilled", "cait"])
@pytest.mark.one_backend
def test_other_families_have_levels(family):
    found = keras_tnt.backbone(tiny(family, size=(32, 64), depth=2), levels=("P3", "P5"))
    assert {level: x.shape for level, x in found.pyramid_outputs.items()} == {
        "P3": (None, 4, 8, 16),
        "P5": (None, 1, 2, 16),
    }
    assert not keras_tnt.anatomy(found).class_blocks


@pytest.mark.one_backend
def test_twelve_blocks_use_blocks_3_6_9_and_12():
    found = keras_tnt.backbone("deit_tiny", weights=None, input_shape=(32, 32, 3), depth=12)
    sources = [x._keras_history.operation.input for x in found.pyramid_outputs.values()]
    blocks = [upstream_block(x) for x in sources]
    assert blocks == ["block_2", "block_5", "block_8", "block_11"]


def upstream_block(x):
    while not x._keras_history.operation.name.startswith("block_"):
        x = x._keras_history.operation.input
    return x._keras_history.operation.name


@pytest.mark.one_backend
def test_registered_family_with_stages_has_levels_by_stride():
    from tests.helpers.toy_stages import StageNet

    found = keras_tnt.backbone(StageNet(input_shape=(32, 32, 3), distilled=True))
    assert {level: x.shape[1:3] for level, x in found.pyramid_outputs.items()} == {
        "P2": (8, 8),
        "P3": (4, 4),
    }


def test_channels_first_backbone_gives_channels_first_maps(classifier, backbone, images):
    if keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow has no channels-first convolution on CPUs.")
    expected = compute(backbone, images)
    keras.config.set_image_data_format("channels_first")
    first = keras_tnt.backbone(tiny_tnt())
    first.set_weights(backbone.get_weights())
    found = compute(first, images.transpose(0, 3, 1, 2))
    for level in LEVELS:
        assert tuple(found[level].shape) == (2, *first.pyramid_outputs[level].shape[1:])
        assert_close(found[level].transpose(0, 2, 3, 1), expected[level], 1e-5)


# === Weights ===


def test_backbone_shares_the_weights_of_the_classifier(classifier, backbone):
    shared = [layer for layer in backbone.layers if layer in classifier.layers]
    assert {"word_embedding", "block_3"} <= {layer.name for layer in shared}
    new = [layer.name for layer in backbone.layers if layer.weights and layer not in shared]
    assert new == ["p2", "p3"]
    assert not {"norm", "head", "predictions"} & {layer.name for layer in backbone.layers}


def test_backbone_by_name_loads_weights_of_another_size(classifier, tmp_path):
    classifier.save_weights(tmp_path / "classifier.weights.h5")
    found = keras_tnt.backbone(
        "tnt",
        weights=str(tmp_path / "classifier.weights.h5"),
        input_shape=(32, 64, 3),
        **{"depth": 4, "outer_dim": 16, "inner_dim": 4, "outer_heads": 2, "inner_heads": 2},
    )
    assert found.name == "tnt_backbone"
    for layer in ("word_embedding", "block_3"):
        assert_equal(
            found.get_layer(layer).get_weights(), classifier.get_layer(layer).get_weights()
        )


def test_loss_on_the_maps_reaches_every_weight(backbone, images):
    # The class token after the last block has no gradient, because no patch reads it.
    check_gradients(backbone, backbone, [images])


# === Keras operations ===


@pytest.mark.slow
def test_save_load_clone_and_serialize_without_custom_objects(backbone, images, tmp_path):
    backbone.save(tmp_path / "backbone.keras")
    copies = [
        keras.saving.load_model(tmp_path / "backbone.keras"),
        keras.models.clone_model(backbone),
        Backbone.from_config(json.loads(json.dumps(backbone.get_config()))),
        keras.layers.deserialize(json.loads(json.dumps(keras.layers.serialize(backbone)))),
    ]
    expected = compute(backbone, images)
    for i, copy in enumerate(copies):
        assert type(copy) is Backbone
        assert list(copy.pyramid_outputs) == list(LEVELS)
        if i:
            copy.set_weights(backbone.get_weights())
        if i in (0, 2):
            found = compute(copy, images)
            assert_equal([found[k] for k in LEVELS], [expected[k] for k in LEVELS])


@pytest.mark.one_backend
def test_dtype_policy_is_preserved():
    found = keras_tnt.backbone(tiny_tnt(dtype="mixed_bfloat16"))
    copy = keras.layers.deserialize(keras.layers.serialize(found))
    for model in (found, copy):
        assert {x.dtype for x in model.pyramid_outputs.values()} == {"bfloat16"}
        assert all(v.dtype == "float32" for v in model.trainable_variables)


@pytest.mark.slow
@pytest.mark.one_backend
def test_quantized_backbone_round_trip(tmp_path):
    keras.utils.set_random_seed(0)
    found = keras_tnt.backbone(tiny_tnt())
    images = 100 * normal((2, 64, 96, 3))
    before = compute(found, images)
    found.quantize("int8")
    found.save(tmp_path / "quantized.keras")
    loaded = keras.saving.load_model(tmp_path / "quantized.keras")
    assert loaded.get_layer("p2").projections[0].quantization_mode == "int8"
    after = compute(loaded, images)
    for level in LEVELS:
        assert_equal(after[level], compute(found, images)[level])
        assert_close(after[level], before[level], 0.2)


# === Anatomy and fine-tuning ===


def test_anatomy_includes_the_levels(classifier, backbone):
    found = keras_tnt.anatomy(backbone)
    assert [layer.name for layer in found.levels] == ["p2", "p3", "p4", "p5"]
    assert [b.grid for b in found.blocks] == [(4, 6)] * 4
    assert (found.norm, found.heads, found.predictions) == (None, (), None)
    assert keras_tnt.anatomy(classifier).levels == ()


@pytest.mark.one_backend
def test_backbone_referenced_twice_is_one_model():
    """KerasHub's models hold the backbone next to a model of its layers."""
    found = keras_tnt.backbone(tiny_tnt())
    inputs = keras.Input((64, 96, 3))
    features = keras.Model(found.inputs, found.pyramid_outputs)
    holder = keras.Model(inputs, features(inputs)["P5"])
    holder.image_encoder = found
    assert keras_tnt.anatomy(holder).family == "tnt"
    keras_tnt.finetuning.freeze(holder, up_to=4)
    assert [layer.name for layer in found.layers if layer.trainable_weights] == ["p2", "p3"]


@pytest.mark.one_backend
def test_freezing_keeps_the_levels_trainable():
    found = keras_tnt.backbone(tiny_tnt())

    def trained():
        return [layer.name for layer in found.layers if layer.trainable_weights]

    keras_tnt.finetuning.freeze(found, up_to=2)
    assert set(trained()) == {"block_2", "block_3", "p2", "p3"}
    keras_tnt.finetuning.freeze(found, up_to="head")
    assert set(trained()) == {"p2", "p3"}
    keras_tnt.finetuning.unfreeze(found)
    assert "word_embedding" in trained()


@pytest.mark.one_backend
def test_levels_have_distance_zero(backbone):
    distances = keras_tnt.finetuning.distances(backbone)
    assert {distances[w.path] for w in backbone.get_layer("p2").weights} == {0}
    assert {distances[w.path] for w in backbone.get_layer("block_3").weights} == {1}


# === Free image sizes ===


@pytest.fixture(scope="module", params=["tnt", "pyramid_tnt"])
def free_backbone(request):
    """Returns (backbone for images of any size, function that builds one for a given size)."""
    keras.utils.set_random_seed(0)

    def make(size):
        model = tiny_tnt(size) if request.param == "tnt" else tiny("pyramid_tnt", size)
        return keras_tnt.backbone(model, ("P3", "P4", "P5")[: 3 if request.param == "tnt" else 2])

    return make((None, None)), make


@pytest.mark.slow
def test_free_size_backbone_matches_one_of_fixed_size(free_backbone, tmp_path):
    free, make = free_backbone
    free.save_weights(tmp_path / "free.weights.h5")
    images = 100 * normal((1, 64, 96, 3))
    fixed = make((64, 96))
    fixed.load_weights(tmp_path / "free.weights.h5")
    found, expected = compute(free, images), compute(fixed, images)
    assert list(found) == list(expected)
    for level in found:
        assert_close(found[level], expected[level], 1e-5)


@pytest.mark.one_backend
def test_free_size_backbone_requires_multiples_of_its_coarsest_stride(free_backbone):
    free, _ = free_backbone
    stride = 2 ** int(list(free.pyramid_outputs)[-1][1:])
    assert keras_tnt.anatomy(free).image.multiple_of == stride
    photo = normal((30, 3 * stride + 2, 3))
    assert keras_tnt.pad_to_fit(photo, free).shape == (32, 4 * stride, 3)


@pytest.mark.one_backend
def test_map_that_cannot_be_halved_raises_with_the_size_in_pixels():
    free = keras_tnt.backbone(tiny_tnt((None, None)), ("P5",))
    told = "Level 'p5': .* multiples of 32. Received: 48x64. The nearest .* 64x64;.*pad_to_fit"
    with pytest.raises(ValueError, match=told):
        free(np.zeros((1, 48, 64, 3), "float32"))


# === Invalid input ===


def small(**arguments):
    return tiny_tnt(size=(32, 32), **arguments)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: keras_tnt.backbone(small(), ("P3", "P6")), "of tnt must be .* Received: 'P6'"),
        (lambda: keras_tnt.backbone(small(), ()), "`levels` of tnt must be one or more of"),
        (lambda: keras_tnt.backbone(tiny("pyramid_tnt", (32, 32)), ("P2",)), r"\('P3', 'P4'\)"),
        (lambda: keras_tnt.backbone(tiny_tnt(size=(64, 80))), "multiples of 32.*64x64|64x96"),
        (lambda: keras_tnt.backbone(small(patch_size=16).get_layer("head")), "needs a model"),
        (lambda: keras_tnt.backbone(keras.Sequential([keras.Input((8,))])), r"list_models\(\)"),
        (lambda: keras_tnt.backbone(keras.Sequential([small()])), "Pass its layer 'tnt' instead"),
        (lambda: keras_tnt.backbone(small(), weights=None), "built by its name.*weights"),
        (lambda: keras_tnt.backbone("tnt_smal"), "Did you mean tnt_small"),
    ],
)
def test_invalid_arguments_raise_one_line_errors(call, told):
    with pytest.raises(ValueError, match=told) as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.one_backend
def test_only_required_levels_limit_patch_and_image_sizes():
    with pytest.raises(ValueError, match="patches of 12 pixels"):
        keras_tnt.backbone(
            tiny_tnt(size=(96, 96), patch_size=12, inner_stride=3), levels=("P2", "P3")
        )
    found = keras_tnt.backbone(tiny_tnt(size=(48, 80)), levels=("P4", "P2"))
    assert list(found.pyramid_outputs) == ["P2", "P4"]
