"""TNT matches the references; its architecture options and errors."""

import keras
import numpy as np
import pytest

import keras_tnt
from keras_tnt.layers import PositionEmbedding, TNTBlock, TransformerBlock
from keras_tnt.layers.embedding import resample_positions
from tests.helpers import golden
from tests.helpers.checks import (
    MODES,
    assert_equal,
    check_fresh_process,
    check_model,
    compute,
    normal,
    predict,
)
from tests.helpers.golden import assert_close
from tests.helpers.tiny_models import randomize
from tests.helpers.tiny_models import tiny_tnt as tiny

GOLDEN = {
    "tnt_official": {},
    "tnt_legacy": {"legacy": True},
    "tnt_original_names": {},
    "tnt_se_original_names": {"squeeze_excite": True},
}
# Names in the reference configurations that differ from ours.
RENAMED = {
    "embed_dim": "outer_dim",
    "num_heads_outer": "outer_heads",
    "num_heads_inner": "inner_heads",
    "outer_num_heads": "outer_heads",
    "inner_num_heads": "inner_heads",
}
ABOUT = ("family", "source", "img_size", "num_classes", "se")
# Covers every option that adds weights or changes the computation, in few models.
OPTIONS = {
    "plain": {},
    "legacy": {"legacy": True, "qkv_bias": True, "squeeze_excite": True, "inner_blocks": (0,)},
    "distilled": {"distilled": True, "layer_scale": 0.1, "mlp_ratio": 2.0, "depth": 1},
    "class_attention": {"class_attention_depth": 1, "layer_scale": 0.1, "depth": 1},
}


def reference(name, directory, **arguments):
    """Returns the golden values and a model with the reference's weights."""
    numbers = golden.load(name)
    architecture = {
        RENAMED.get(key, key): value for key, value in numbers.config.items() if key not in ABOUT
    }
    model = keras_tnt.TNT(
        include_preprocessing=False,
        classifier_activation=None,
        classes=numbers.config["num_classes"],
        **{"input_shape": numbers.images.shape[1:], **architecture, **GOLDEN[name], **arguments},
    )
    keras_tnt.load_checkpoint(model, numbers.save_checkpoint(directory / f"{name}.safetensors"))
    return numbers, model


# === The reference ===


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", GOLDEN)
def test_logits_match_the_reference(name, mode, tmp_path):
    numbers, model = reference(name, tmp_path)
    assert_close(predict(model, numbers.images, mode), numbers.outputs["logits"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["tnt_official", "tnt_legacy"])
def test_words_patches_and_tokens_match_the_reference(name, mode, tmp_path):
    # With its top, the model does not compute the patches of the last block.
    numbers, model = reference(name, tmp_path, include_top=False)
    stem = model.get_layer("word_position").output
    blocks = [model.get_layer(f"block_{i}").output[0] for i in range(3)]
    inside = keras.Model(model.input, [stem, *blocks, model.get_layer("norm").output])
    words, *blocks, tokens = predict(inside, numbers.images, mode)
    assert_close(words.reshape((-1, *words.shape[2:])), numbers.outputs["words_after_stem"])
    for i, block in enumerate(blocks):
        assert_close(block[:, 1:], numbers.outputs[f"patches_after_block{i}"])
    assert_close(tokens, numbers.outputs["tokens"])
    feature_map = numbers.outputs["tokens"][:, 1:].reshape((2, 4, 4, 32))
    assert_close(predict(model, numbers.images, mode), feature_map)


# === Keras operations ===


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_model_passes_the_keras_checks(option):
    check_model(tiny, **OPTIONS[option])


@pytest.mark.slow
def test_headless_model_passes_the_keras_checks():
    # The last block's words only affect its patches, so that every weight gets a gradient.
    check_model(tiny, include_top=False, pooling="avg")


@pytest.mark.slow
def test_files_of_every_option_load_in_a_process_that_imports_only_the_package(tmp_path):
    check_fresh_process({name: tiny(**options) for name, options in OPTIONS.items()}, tmp_path)


def test_float16_supports_images_whose_squares_overflow():
    images = 2000 * normal((2, 32, 32, 3))
    options = {"include_preprocessing": False, "classifier_activation": None}
    model = randomize(tiny(**options))
    keras.config.set_dtype_policy("mixed_float16")
    half = tiny(**options)
    half.set_weights(model.get_weights())
    assert_close(compute(half, images), compute(model, images), 2e-2)


@pytest.mark.slow
def test_random_masks_depend_on_the_seed():
    images = normal((4, 32, 32, 3))

    def draw():
        keras.utils.set_random_seed(3)
        model = tiny(dropout=0.2, attention_dropout=0.2, stochastic_depth=0.5)
        return [compute(model, images, training=True) for _ in range(2)]

    first, second = draw()
    assert_equal(draw()[0], first)
    if keras.backend.backend() != "jax":  # JAX does not update state in a single call
        assert np.any(first != second)


# === Loading weights ===


@pytest.mark.parametrize("size", [(64, 64), (48, 16)])
@pytest.mark.parametrize("ending", [".weights.h5", ".keras"])
def test_weights_of_one_resolution_load_at_another(size, ending, tmp_path):
    saved = randomize(tiny((32, 48), distilled=True))
    path = str(tmp_path / f"saved{ending}")
    saved.save(path) if ending == ".keras" else saved.save_weights(path)
    assert_resampled(saved, tiny(size, distilled=True, weights=path))
    loaded = tiny(size, distilled=True)
    loaded.load_weights(path)
    assert_resampled(saved, loaded)


def assert_resampled(source, target):
    """Asserts that `target` has the weights of `source`, with position tables resampled."""
    for theirs, ours in zip(source.layers, target.layers, strict=True):
        expected = theirs.get_weights()
        if isinstance(theirs, PositionEmbedding):
            grids = theirs.grid, ours.grid
            expected = [resample_positions(*expected, *grids, theirs.prefix_tokens)]
        for value, variable in zip(expected, ours.get_weights(), strict=True):
            np.testing.assert_allclose(variable, value, rtol=1e-5, atol=1e-6)


def test_checkpoint_loads_at_another_resolution(tmp_path):
    numbers, original = reference("tnt_official", tmp_path)
    _, larger = reference("tnt_official", tmp_path, input_shape=(96, 80, 3))
    assert_resampled(original, larger)
    assert predict(larger, normal((1, 96, 80, 3))).shape == (1, 10)


def test_weights_transfer_between_models_with_and_without_dropout(tmp_path):
    plain = randomize(tiny())
    random = tiny(dropout=0.2, attention_dropout=0.2, stochastic_depth=0.2)
    images = normal((2, 32, 32, 3))
    for source, target in ((plain, random), (random, plain)):
        randomize(source)
        source.save_weights(tmp_path / "w.weights.h5")
        for variable in target.trainable_variables:
            variable.assign(np.zeros(variable.shape))
        target.load_weights(tmp_path / "w.weights.h5")
        assert_equal(compute(target, images), compute(source, images))


# === Architecture ===


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("include_preprocessing", [True, False])
def test_any_number_of_channels_is_supported(channels, include_preprocessing):
    model = tiny(channels=channels, include_preprocessing=include_preprocessing)
    assert predict(model, normal((2, 32, 32, channels))).shape == (2, 3)


def test_preprocessing_inside_and_outside_agree():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), "uint8")
    inside, outside = randomize(tiny()), tiny(include_preprocessing=False)
    outside.set_weights(inside.get_weights())
    images = keras_tnt.tnt.preprocess_input(pixels)
    np.testing.assert_allclose(images, pixels / 127.5 - 1, atol=1e-6)
    assert_close(compute(outside, images), compute(inside, pixels.astype("float32")), 1e-5)


@pytest.mark.parametrize("legacy", [False, True])
def test_channels_first_predicts_the_same(legacy):
    images = 100 * normal((2, 32, 48, 3))
    last = randomize(tiny((32, 48), legacy=legacy))
    keras.config.set_image_data_format("channels_first")
    first = tiny((32, 48), legacy=legacy)
    assert first.input_shape == (None, 3, 32, 48)
    first.set_weights(last.get_weights())
    assert_close(compute(first, images.transpose((0, 3, 1, 2))), compute(last, images), 1e-5)


@pytest.mark.parametrize(
    ("patch_size", "inner_stride", "words"), [(8, 2, 16), (4, 1, 16), (16, 8, 4), (32, 4, 64)]
)
def test_other_patch_and_word_sizes(patch_size, inner_stride, words):
    model = tiny((32, 64), patch_size=patch_size, inner_stride=inner_stride, include_top=False)
    patches = (32 // patch_size) * (64 // patch_size)
    assert model.get_layer("word_position").output.shape == (None, patches, words, 8)
    shape = (32 // patch_size, 64 // patch_size, 16)
    assert predict(model, normal((2, 32, 64, 3))).shape == (2, *shape)


def test_inner_blocks_selects_blocks_with_inner_transformers():
    model = tiny(depth=4, inner_blocks=(0, 2))
    blocks = [model.get_layer(f"block_{i}") for i in range(4)]
    kinds = [TNTBlock, TransformerBlock, TNTBlock, TransformerBlock]
    assert [type(block) for block in blocks] == kinds
    assert predict(model, normal((2, 32, 32, 3))).shape == (2, 3)


def test_model_without_inner_transformers_has_plain_blocks():
    model = tiny(inner_blocks=())
    assert all(type(model.get_layer(f"block_{i}")) is TransformerBlock for i in range(2))


def test_stochastic_depth_grows_linearly_in_both_transformers():
    model = tiny(depth=3, stochastic_depth=0.2)
    blocks = [model.get_layer(f"block_{i}") for i in range(3)]
    for part in ("inner", "outer"):
        rates = [getattr(block, part).drop_mlp.rate for block in blocks]
        np.testing.assert_allclose(rates, [0.0, 0.1, 0.2])
    assert [block.inner.drop_mlp.sample_axes for block in blocks] == [2, 2, 2]


def test_last_block_computes_only_the_class_token():
    model = randomize(tiny(classifier_activation=None))
    assert model.get_layer("block_1").output[0].shape == (None, 1, 16)
    features = tiny(include_top=False)
    features.set_weights(model.get_weights()[:-2])
    tokens = keras.Model(features.input, features.get_layer("norm").output)
    images = normal((2, 32, 32, 3))
    logits = model.get_layer("head")(compute(tokens, images)[:, 0])
    assert_close(compute(model, images), keras.ops.convert_to_numpy(logits), 1e-5)


@pytest.mark.parametrize(("distilled", "class_attention_depth"), [(False, 0), (True, 1)])
def test_pooling_reduces_the_feature_map_or_the_tokens(distilled, class_attention_depth):
    options = {"distilled": distilled, "class_attention_depth": class_attention_depth}
    images = normal((2, 32, 48, 3))
    features = randomize(tiny((32, 48), include_top=False, **options))
    tokens = keras.Model(features.input, features.get_layer("norm").output)
    prefix_tokens = 1 + distilled
    feature_map, tokens = compute(features, images), compute(tokens, images)
    assert_equal(feature_map.reshape((2, 6, 16)), tokens[:, prefix_tokens:])
    expected = {
        "avg": feature_map.mean(axis=(1, 2)),
        "max": feature_map.max(axis=(1, 2)),
        "token": tokens[:, :prefix_tokens].mean(axis=1),
    }
    for pooling, vectors in expected.items():
        model = tiny((32, 48), include_top=False, pooling=pooling, **options)
        model.set_weights(features.get_weights())
        assert_close(compute(model, images), vectors, 1e-5)


def test_distilled_model_predicts_the_mean_of_its_logits():
    model = randomize(tiny(distilled=True))
    names = ("head", "head_distillation", "predictions")
    heads = keras.Model(model.input, [model.get_layer(name).output for name in names])
    first, second, predictions = compute(heads, normal((2, 32, 32, 3)))
    mean = np.exp((first + second) / 2)
    assert np.any(np.abs(first - second) > 1e-2)
    assert_close(predictions, mean / mean.sum(axis=-1, keepdims=True), 1e-5)


def test_variants_have_the_dimensions_of_the_paper():
    for builder, outer_dim in (
        (keras_tnt.TNTTiny, 192),
        (keras_tnt.TNTSmall, 384),
        (keras_tnt.TNTBase, 640),
    ):
        with keras.StatelessScope(initialize_variables=False):
            model = builder(weights=None, include_top=False)
        assert model.output_shape == (None, 14, 14, outer_dim)
        assert model.input_shape == (None, 224, 224, 3)


# === Invalid arguments ===


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (32, 40)}, r"multiples of 16.*\(32, 40, 3\).*nearest size that fits is 32x48"),
        ({"input_shape": (32, 32)}, r"three sizes \(height, width, channels\).*\(32, 32\)"),
        ({"input_shape": (32, 32, None)}, r"three sizes.*\(32, 32, None\)"),
        ({"outer_heads": 3}, "3 heads for dimension 16"),
        ({"inner_heads": 3}, "3 heads for dimension 8"),
        ({"inner_stride": 3}, "`inner_stride` must divide.*inner_stride=3, patch_size=16"),
        ({"inner_blocks": (0, 2)}, r"`inner_blocks` are indices from 0 to 1.*\(0, 2\)"),
        ({"pooling": "mean"}, "`pooling` must be one of None, 'avg', 'max', 'token'.*'mean'"),
        ({"classes": 0}, "`classes` must be a positive integer. Received: 0"),
        ({"classifier_activation": "softmix"}, "softmix"),
        ({"dropout": 1.0}, r"must lie in \[0, 1\).*1.0"),
        ({"attention_dropout": -0.1}, r"must lie in \[0, 1\).*-0.1"),
        ({"stochastic_depth": 1.5}, r"must lie in \[0, 1\).*1.5"),
        ({"depth": 0}, "`depth` must be a positive integer. Received: 0"),
        ({"weights": "no/such/file.weights.h5"}, "no/such/file.weights.h5"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        tiny(**arguments)


def test_unknown_argument_raises():
    with pytest.raises(TypeError, match="heads"):
        tiny(heads=3)


def test_input_shape_and_input_tensor_must_agree():
    with pytest.raises(ValueError, match=r"differ: \(32, 32, 3\) and \(16, 16, 3\)"):
        tiny(input_tensor=keras.Input((16, 16, 3)))
