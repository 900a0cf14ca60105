"""Inspection: feature maps, attention maps, rollout and attention plots."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_tnt
from keras_tnt import inspection
from keras_tnt.inspection.maps import means
from tests.helpers.golden import assert_close

SMALL = {"input_shape": (32, 24, 3), "patch_size": 8, "classes": 5, "depth": 4}
TNT = {**SMALL, "inner_stride": 2, "outer_dim": 12, "inner_dim": 8}
TNT |= {"outer_heads": 3, "inner_heads": 2}
VIT = {**SMALL, "embed_dim": 12, "num_heads": 3}
PYRAMID = {
    "input_shape": (64, 64, 3),
    "classes": 5,
    "depths": (2, 1, 1, 1),
    "outer_dims": (8, 12, 16, 16),
    "inner_dims": (4, 4, 4, 4),
    "outer_heads": (2, 2, 2, 2),
    "inner_heads": (2, 2, 2, 2),
}

MODELS = {
    "tnt": (keras_tnt.TNT, TNT),
    "tnt_outer_only": (keras_tnt.TNT, {**TNT, "inner_blocks": (0, 2)}),
    "tnt_squeeze_excite": (keras_tnt.TNT, {**TNT, "distilled": True, "squeeze_excite": True}),
    "tnt_class_attention": (keras_tnt.TNT, {**TNT, "distilled": True, "class_attention_depth": 2}),
    "deit": (keras_tnt.DeiT, {**VIT, "distilled": True}),
    "cait": (keras_tnt.CaiT, {**VIT, "layer_scale": 0.1}),
}


def build(kind, **arguments):
    builder, given = MODELS[kind] if kind in MODELS else (keras_tnt.PyramidTNT, PYRAMID)
    model = builder(**{**given, **arguments})
    # Initial weights are so small that attention is nearly uniform.
    for variable in model.trainable_variables:
        if variable.name == "kernel":
            variable.assign(variable * 5)
    return model


def images_for(model, batch=2):
    return np.random.default_rng(0).uniform(0, 255, (batch, *model.input_shape[1:]))


# === Feature maps ===


@pytest.mark.parametrize("name", MODELS)
def test_feature_maps_are_the_patches_after_each_block(name):
    model = build(name)
    images = images_for(model)
    maps = inspection.feature_maps(model, blocks=(1, 3, 4))(images)
    assert [tuple(x.shape) for x in maps] == [(2, 4, 3, 12)] * 3

    # Without its top, the model's last block computes all patches, and the model returns them.
    headless = build(name, include_top=False)
    headless.set_weights([w.numpy() for w in model.weights if not w.path.startswith("head")])
    last = keras.Model(headless.inputs[0], headless.get_layer("norm").output)(images)
    norm = model.get_layer("norm")
    assert_close(norm(ops.reshape(maps[2], (2, 12, 12))), last[:, -12:])


def test_feature_maps_do_not_change_the_model():
    model = build("tnt")
    images = images_for(model)
    before = ops.convert_to_numpy(model(images))
    inspection.feature_maps(model)
    np.testing.assert_array_equal(ops.convert_to_numpy(model(images)), before)
    assert model.get_layer("block_3").output[0].shape[1] == 1


def test_blocks_default_to_quarters_of_the_depth():
    model = build("deit", depth=12)
    by_default = inspection.feature_maps(model)
    told = inspection.feature_maps(model, blocks=(3, 6, 9, 12))
    images = images_for(model)
    for actual, expected in zip(by_default(images), told(images), strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(actual), ops.convert_to_numpy(expected))
    assert len(inspection.feature_maps(build("deit", depth=2)).outputs) == 2


@pytest.mark.slow
def test_pyramid_feature_maps_are_its_stages():
    model = build("pyramid_tnt")
    maps = inspection.feature_maps(model)(images_for(model))
    assert [tuple(x.shape[1:]) for x in maps] == [(8, 8, 8), (4, 4, 12), (2, 2, 16), (1, 1, 16)]
    second = inspection.feature_maps(model, blocks=(2,))(images_for(model))
    assert_close(second, maps[1])


def test_feature_maps_of_channels_first_images_are_channels_last():
    model = build("tnt")
    images = images_for(model)
    expected = inspection.feature_maps(model)(images)
    keras.config.set_image_data_format("channels_first")
    first = build("tnt", input_shape=(3, 32, 24))
    first.set_weights(model.get_weights())
    maps = inspection.feature_maps(first)(np.moveaxis(images, -1, 1))
    for actual, wanted in zip(maps, expected, strict=True):
        assert_close(actual, wanted)


@pytest.mark.slow
def test_feature_maps_model_can_be_saved_and_trained(tmp_path):
    model = build("tnt")
    backbone = inspection.feature_maps(model, blocks=(2, 4))
    images = images_for(model)
    backbone.save(tmp_path / "backbone.keras")
    loaded = keras.models.load_model(tmp_path / "backbone.keras")
    for actual, expected in zip(loaded(images), backbone(images), strict=True):
        assert_close(actual, expected)

    x = keras.layers.Conv2D(4, 1, data_format="channels_last")(backbone.outputs[-1])
    segmenter = keras.Model(backbone.inputs[0], x)
    segmenter.compile("sgd", "mse", run_eagerly=True)
    before = model.get_layer("block_0").get_weights()[0].copy()
    segmenter.fit(images, np.ones((2, 4, 3, 4)), verbose=0)
    assert not np.array_equal(model.get_layer("block_0").get_weights()[0], before)


@pytest.mark.parametrize(
    "name, blocks, message",
    [
        ("tnt", (0,), "blocks from 1 to 4"),
        ("tnt", (3, 5), "blocks from 1 to 4"),
        ("tnt", (), "blocks from 1 to 4"),
        ("pyramid_tnt", (5,), "stages from 1 to 4"),
    ],
)
def test_unknown_blocks_raise(name, blocks, message):
    with pytest.raises(ValueError, match=message):
        inspection.feature_maps(build(name), blocks)


def test_wrapped_model_error_names_the_inner_model():
    inner = build("tnt", name="tnt_inside")
    with pytest.raises(ValueError, match="Pass its layer 'tnt_inside' instead"):
        inspection.feature_maps(keras.Sequential([keras.Input((32, 24, 3)), inner]))


# === Attention ===


@pytest.mark.parametrize("name", [*MODELS, "pyramid_tnt"])
def test_attention_sums_to_one(name):
    model = build(name)
    maps = inspection.attention_maps(model, images_for(model))
    for key, value in maps.items():
        assert value.dtype == "float32" and value.min() >= 0
        np.testing.assert_allclose(value.sum(axis=-1), 1, atol=1e-5, err_msg=key)
    rollout = inspection.attention_rollout(model, images_for(model))
    np.testing.assert_allclose(rollout.sum(axis=-1), 1, atol=1e-5)
    assert rollout.max() > 1.01 * rollout.min()


def shapes(name):
    model = build(name)
    maps = inspection.attention_maps(model, images_for(model))
    return {key: value.shape for key, value in maps.items()}


def test_attention_maps_are_named_by_block():
    assert list(shapes("tnt").items())[:3] == [
        ("block_0/inner", (2, 12, 2, 16, 16)),
        ("block_0/outer", (2, 3, 13, 13)),
        ("block_1/inner", (2, 12, 2, 16, 16)),
    ]
    found = shapes("tnt_outer_only")
    assert found["block_3/outer"] == (2, 3, 13, 13) and "block_3/inner" not in found
    found = shapes("tnt_class_attention")
    assert found["block_3/outer"] == (2, 3, 12, 12)
    assert found["class_block_1"] == (2, 3, 2, 14)
    assert shapes("deit")["block_3/outer"] == (2, 3, 14, 14)
    assert list(shapes("cait")) == [f"block_{i}/outer" for i in range(4)] + [
        "class_block_0",
        "class_block_1",
    ]
    found = shapes("pyramid_tnt")
    assert found["stage_0_block_0/inner"] == (2, 64, 2, 16, 16)
    assert found["stage_0_block_1/outer"] == (2, 2, 64, 4)


@pytest.mark.parametrize("name", ["tnt", "deit"])
def test_attention_maps_are_used_by_the_forward_pass(name):
    """Recomputes the outer attention of block 0 from the recorded weights."""
    model = build(name)
    images = images_for(model)
    attention = inspection.attention_maps(model, images)["block_0/outer"]

    block = model.get_layer("block_0")
    outer = block.outer if name == "tnt" else block
    tokens = keras.Model(model.inputs[0], block.input)(images)
    if name == "tnt":
        tokens, words = tokens
        patches = block.words_to_patches(block.inner(words))
        tokens = tokens + ops.pad(patches, [[0, 0], [1, 0], [0, 0]])
    count = tokens.shape[1]
    x = outer.norm_attention(tokens)
    value = ops.convert_to_numpy(outer.attention.qkv(x))[..., 24:]
    value = value.reshape(2, count, 3, 4).swapaxes(1, 2)  # (b, heads, tokens, head_dim)
    attended = (attention @ value).swapaxes(1, 2).reshape(2, count, 12)
    assert_close(outer.attention.projection(attended), outer.attention(x))


def test_attention_maps_of_a_wrapped_model(tmp_path):
    inner = build("tnt")
    images = images_for(inner)
    expected = inspection.attention_maps(inner, images)
    outer = keras.Sequential([keras.Input((32, 24, 3)), keras.layers.Rescaling(1.0), inner])
    outer.save(tmp_path / "outer.keras")
    for model in (outer, keras.models.load_model(tmp_path / "outer.keras")):
        maps = inspection.attention_maps(model, images)
        assert list(maps) == list(expected)
        assert_close(maps["block_3/inner"], expected["block_3/inner"])


def test_channels_first_images_have_the_same_attention():
    model = build("tnt")
    images = images_for(model)
    expected = inspection.attention_maps(model, images)
    keras.config.set_image_data_format("channels_first")
    first = build("tnt", input_shape=(3, 32, 24))
    first.set_weights(model.get_weights())
    maps = inspection.attention_maps(first, np.moveaxis(images, -1, 1))
    for key, value in expected.items():
        assert_close(maps[key], value)


@pytest.mark.slow
def test_float16_attention_sums_to_one():
    keras.config.set_dtype_policy("mixed_float16")
    model = build("tnt")
    for value in inspection.attention_maps(model, images_for(model)).values():
        np.testing.assert_allclose(value.sum(axis=-1), 1, atol=1e-5)


def test_images_of_a_wrong_shape_raise():
    model = build("deit")
    for shape in ((32, 24, 3), (1, 24, 32, 3)):
        with pytest.raises(ValueError, match=r"takes a batch of images \('batch', 32, 24, 3\)"):
            inspection.attention_maps(model, np.zeros(shape))


def test_model_without_attention_raises():
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten()], name="flat")
    with pytest.raises(ValueError, match="'flat' is not built from one of keras_tnt's"):
        inspection.attention_maps(model, np.zeros((1, 8, 8, 3)))


# === Rollout ===


def test_rollout_is_the_matrix_product_over_blocks():
    model = build("tnt_outer_only")
    images = images_for(model)
    maps = inspection.attention_maps(model, images)
    expected = np.eye(13)
    for i in range(4):
        expected = (maps[f"block_{i}/outer"].mean(axis=1) + np.eye(13)) / 2 @ expected
    np.testing.assert_allclose(inspection.attention_rollout(model, images), expected, atol=1e-6)


def test_rollout_includes_class_attention():
    model = build("cait")
    images = images_for(model)
    maps = inspection.attention_maps(model, images)
    patches = np.eye(12)
    for i in range(4):
        patches = (maps[f"block_{i}/outer"].mean(axis=1) + np.eye(12)) / 2 @ patches
    token, read = np.ones(2), np.zeros((2, 12))
    for i in range(2):
        row = maps[f"class_block_{i}"].mean(axis=1)[:, 0]  # (b, tokens)
        own = (1 + row[:, 0]) / 2
        read = own[:, None] * read + np.einsum("bp,bpq->bq", row[:, 1:] / 2, patches)
        token = own * token
    rollout = inspection.attention_rollout(model, images)
    np.testing.assert_allclose(rollout[:, 0, 1:], read, atol=1e-6)
    np.testing.assert_allclose(rollout[:, 0, 0], token, atol=1e-6)
    np.testing.assert_allclose(rollout[:, 1:, 1:], patches, atol=1e-6)


@pytest.mark.slow
def test_pyramid_rollout_maps_last_to_first_patches():
    model = build("pyramid_tnt")
    for variable in model.trainable_variables:
        if "attention/query/" in variable.path or variable.path.endswith("relative_position/table"):
            variable.assign(variable * 0)
    # Uniform attention mixes all patches equally, and half of each remains: the result is known.
    rollout = inspection.attention_rollout(model, images_for(model))
    assert rollout.shape == (2, 1, 64)
    np.testing.assert_allclose(rollout, 1 / 64, atol=1e-7)


def test_odd_grid_edges_are_dropped_by_pooling_and_merged_as_they_are():
    # Pooling drops incomplete windows; merging averages the patches that they contain.
    row = [[0.5, 0.5, 0]]
    np.testing.assert_array_equal(means((1, 3), (1, 1), 2)[:, :3], row)
    np.testing.assert_array_equal(means((1, 3), (1, 2), 2), [*row, [0, 0, 1]])
    np.testing.assert_array_equal(means((2, 3), (1, 2), 2)[1], [0, 0, 0.5, 0, 0, 0.5])


# === Plots ===


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tnt", "tnt_class_attention", "deit", "pyramid_tnt"])
def test_attention_plot_is_written(name, tmp_path):
    from matplotlib.image import imread

    model = build(name)
    path = tmp_path / "attention.png"
    assert inspection.plot_attention(model, images_for(model)[0], path) == path
    assert [file.name for file in tmp_path.iterdir()] == ["attention.png"]
    picture = imread(path)[..., :3]
    height, width = picture.shape[:2]
    assert height > 300 and width > 600
    # Orange marks attended patches.
    red, green, blue = np.moveaxis(picture, -1, 0)
    assert np.mean((red > green + 0.15) & (green > blue + 0.15)) > 0.01


def test_plot_of_a_headless_channels_first_model(tmp_path):
    keras.config.set_image_data_format("channels_first")
    model = build("tnt", input_shape=(3, 32, 24), include_top=False, include_preprocessing=False)
    image = np.random.default_rng(0).normal(size=(3, 32, 24))
    path = str(tmp_path / "attention.svg")
    inspection.plot_attention(model, image, path, patches=(0, 5, 11))
    text = (tmp_path / "attention.svg").read_text()
    assert "<svg" in text


def test_invalid_patch_indices_raise(tmp_path):
    model = build("tnt")
    with pytest.raises(ValueError, match="up to three numbers from 0 to 11"):
        inspection.plot_attention(model, images_for(model)[0], tmp_path / "a.png", (0, 1, 12))
    assert not list(tmp_path.iterdir())
