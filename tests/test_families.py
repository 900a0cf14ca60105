"""DeiT, CaiT and PyramidTNT match the references; properties of every family."""

import functools

import keras
import numpy as np
import pytest
from keras import ops
from safetensors.numpy import save_file

import keras_tnt
from keras_tnt.layers import PositionEmbedding, RelativePosition
from keras_tnt.layers.embedding import resample_positions
from tests.helpers import golden
from tests.helpers.checks import (
    MODES,
    assert_equal,
    check_fresh_process,
    check_model,
    entries,
    normal,
    predict,
)
from tests.helpers.golden import assert_close
from tests.helpers.tiny_models import BUILDERS, tiny_tnt
from tests.helpers.tiny_models import tiny_of as tiny

# Names in the reference configurations that differ from ours.
RENAMED = {"depth_class_attention": "class_attention_depth", "sr_ratios": "reductions"}
ABOUT = ("family", "source", "img_size", "num_classes")


def reference(family, directory, **arguments):
    """Returns the golden values and a model with the reference's weights."""
    numbers = golden.load(family)
    architecture = {
        RENAMED.get(key, key): value for key, value in numbers.config.items() if key not in ABOUT
    }
    model = BUILDERS[family](
        include_preprocessing=False,
        weights=numbers.save_checkpoint(directory / f"{family}.safetensors"),
        input_shape=numbers.images.shape[1:],
        classes=numbers.config["num_classes"],
        classifier_activation=None,
        **architecture,
        **arguments,
    )
    return numbers, model


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Returns a function from a family to its (golden values, model), built once."""
    directory, built = tmp_path_factory.mktemp("checkpoints"), {}
    return lambda family: (
        built.get(family) or built.setdefault(family, reference(family, directory))
    )


def run(model, images):
    """Returns the model's eager outputs as arrays; models share compiled operations."""
    return keras.tree.map_structure(ops.convert_to_numpy, model(images, training=False))


# === The reference ===


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", BUILDERS)
def test_logits_match_the_reference(references, family, mode):
    numbers, model = references(family)
    assert_close(predict(model, numbers.images, mode), numbers.outputs["logits"])


def test_distilled_heads_match_the_reference(references):
    numbers, model = references("deit_distilled")
    layers = ("head", "head_distillation", "norm", "predictions")
    outputs = keras.Model(model.input, [model.get_layer(name).output for name in layers])
    head, head_distillation, tokens, predictions = run(outputs, numbers.images)
    assert_close(head, numbers.outputs["class_logits"])
    assert_close(head_distillation, numbers.outputs["distillation_logits"])
    assert_close(tokens, numbers.outputs["tokens"][:, :2])
    assert_close(predictions, (head + head_distillation) / 2, 1e-6)


@pytest.mark.parametrize("family", ["deit_distilled", "cait"])
def test_headless_output_matches_the_reference_patches(family, tmp_path):
    numbers, model = reference(family, tmp_path, include_top=False)
    prefix_tokens = 2 if "distilled" in family else 1
    patches = numbers.outputs["tokens"][:, prefix_tokens:]
    assert_close(run(model, numbers.images), patches.reshape(2, 4, 4, 32))


@pytest.mark.parametrize("family", BUILDERS)
def test_variables_convert_back_to_the_reference_tensors(references, family):
    numbers, model = references(family)
    tensors = torch_tensors(model)
    assert tensors.keys() == numbers.weights.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, numbers.weights[name])


def torch_tensors(model):
    """Returns the model's weights under their checkpoint names."""
    return {
        name: tensor
        for entry in entries(model)
        for name, tensor in zip(
            entry.names, entry.to_torch(ops.convert_to_numpy(entry.variable)), strict=True
        )
    }


# === Every family ===


@pytest.mark.slow
@pytest.mark.parametrize("family", BUILDERS)
def test_model_passes_the_keras_checks(family):
    check_model(tiny, family=family, size=(32, 32))


@pytest.mark.slow
@pytest.mark.one_backend
def test_files_load_in_a_process_that_imports_only_the_package(tmp_path):
    models = {family: tiny(family) for family in ("deit_distilled", "cait", "pyramid_tnt")}
    check_fresh_process(models, tmp_path)


@pytest.mark.parametrize("family", BUILDERS)
def test_weights_of_another_resolution_are_resampled_from_any_file(family, tmp_path):
    square, other = tiny(family, (64, 64)), tiny(family, (32, 48))
    for variable in square.variables:
        variable.assign(normal(variable.shape))
    files = [str(tmp_path / f"square{ending}") for ending in (".weights.h5", ".keras")]
    square.save_weights(files[0])
    square.save(files[1])
    save_file(torch_tensors(square), tmp_path / "square.safetensors")

    for load in (
        *(lambda file=file: other.load_weights(file) for file in files),
        lambda: keras_tnt.load_checkpoint(other, tmp_path / "square.safetensors"),
    ):
        for variable in other.variables:
            variable.assign(np.zeros(variable.shape))
        load()
        assert_resampled(square, other)

    other.save_weights(files[0])
    square.load_weights(files[0])
    assert_resampled(other, square)


def assert_resampled(source, target):
    """Asserts that `target` has the weights of `source`, with position tables resampled."""
    for theirs, ours in zip(source.layers, target.layers, strict=True):
        expected = [ops.convert_to_numpy(variable) for variable in theirs.variables]
        if isinstance(theirs, PositionEmbedding):
            grids = theirs.grid, ours.grid
            expected = [resample_positions(*expected, *grids, theirs.prefix_tokens)]
        elif isinstance(theirs, RelativePosition):
            expected = [resampled_relative_positions(*expected, theirs, ours)]
        for value, variable in zip(expected, ours.variables, strict=True):
            np.testing.assert_allclose(variable, value, rtol=1e-5, atol=1e-5)


def resampled_relative_positions(table, theirs, ours):
    """Resamples over patches, with pooled patches as channels, and then vice versa."""
    heads = len(table)
    for reduction in (1, theirs.reduction):
        grids = [[side // reduction for side in layer.grid] for layer in (theirs, ours)]
        patches, pooled = table.shape[1:]
        table = np.transpose(table, (1, 0, 2)).reshape(patches, heads * pooled)
        table = resample_positions(table, *grids).reshape(-1, heads, pooled)
        table = np.transpose(table, (1, 2, 0))
    return table


@pytest.mark.parametrize("family", ["tnt", *BUILDERS])
def test_channels_first_and_external_preprocessing_predict_the_same(family):
    build = tiny_tnt if family == "tnt" else functools.partial(tiny, family)
    model = build(size=(32, 48))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), "uint8")
    expected = run(model, pixels)

    keras.config.set_image_data_format("channels_first")
    turned = np.transpose(pixels, (0, 3, 1, 2))
    inside = build(size=(32, 48))
    inside.set_weights(model.get_weights())
    assert_close(run(inside, turned), expected, 1e-5)
    found = keras_tnt.anatomy(inside)
    assert (found.image.data_format, found.grid) == (
        "channels_first",
        keras_tnt.anatomy(model).grid,
    )

    outside = build(size=(32, 48), include_preprocessing=False)
    assert outside.input_shape == (None, 3, 32, 48)
    outside.set_weights(model.get_weights())
    module = getattr(keras_tnt, family.removesuffix("_distilled"))
    images = module.preprocess_input(turned)
    assert images.dtype == "float32"
    assert_close(run(outside, images), expected, 1e-5)


def test_gray_images_are_normalized_equally_inside_and_outside():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), "uint8")
    model = tiny("deit", input_shape=(32, 32, 1))
    outside = tiny("deit", input_shape=(32, 32, 1), include_preprocessing=False)
    outside.set_weights(model.get_weights())
    images = keras_tnt.deit.preprocess_input(pixels)
    assert images.shape == pixels.shape
    assert_close(run(outside, images), run(model, pixels), 1e-5)


@pytest.mark.parametrize("family", ["deit", "cait", "pyramid_tnt"])
def test_preprocess_input_takes_arrays_and_tensors_in_either_data_format(family):
    module = getattr(keras_tnt, family)
    last = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), "uint8")
    mean, std = np.array(module.IMAGE.mean), np.array(module.IMAGE.std)
    expected = ((last / 255 - mean) / std).astype("float32")
    assert_equal(module.preprocess_input(last), expected)
    assert_equal(module.preprocess_input(last.astype("float32")), expected)
    assert_equal(module.preprocess_input(ops.convert_to_tensor(last)), expected)
    first = np.transpose(last, (0, 3, 1, 2))
    expected = np.transpose(expected, (0, 3, 1, 2))
    assert_equal(module.preprocess_input(first, data_format="channels_first"), expected)


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("pooling", ["avg", "max", "token"])
def test_pooling_reduces_the_feature_map_or_the_tokens(family, pooling):
    if family == "pyramid_tnt" and pooling == "token":
        with pytest.raises(ValueError, match="must be one of None, 'avg', 'max'"):
            tiny(family, include_top=False, pooling=pooling)
        return
    images = normal((2, 32, 48, 3))
    model = tiny(family, include_top=False, pooling=pooling)
    features = tiny(family, include_top=False)
    features.set_weights(model.get_weights())
    if pooling == "token":
        tokens = keras.Model(features.input, features.get_layer("norm").output)
        prefix_tokens = 2 if "distilled" in family else 1
        expected = run(tokens, images)[:, :prefix_tokens].mean(axis=1)
    else:
        reduce = {"avg": np.mean, "max": np.max}[pooling]
        expected = reduce(run(features, images), axis=(1, 2))
    assert_close(run(model, images), expected, 1e-5)


@pytest.mark.parametrize("family", BUILDERS)
def test_model_can_be_built_on_other_layers(family):
    images = keras.Input((16, 24, 3))
    model = tiny(family, input_shape=None, input_tensor=keras.layers.UpSampling2D()(images))
    assert model.input_shape == (None, 16, 24, 3)
    assert run(model, normal((2, 16, 24, 3))).shape == (2, 3)


# === Invalid arguments ===


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("deit", {"size": (32, 40)}, "multiples of 16.*32x48"),
        ("cait", {"size": (32, 40)}, "multiples of 16.*32x48"),
        ("pyramid_tnt", {"size": (32, 44)}, "multiples of 8.*32x48"),
        ("deit", {"num_heads": 3}, "3 heads for dimension 16"),
        ("cait", {"num_heads": 3}, "3 heads for dimension 16"),
        ("deit", {"depth": 0}, "`depth` must be a positive integer. Received: 0"),
        ("pyramid_tnt", {"depths": (1, 0)}, "`depths` must be a positive integer. Received: 0"),
        ("cait", {"class_attention_depth": 0}, "at least 1.*keras_tnt.DeiT"),
        ("pyramid_tnt", {"size": (32, 8)}, "Stage 1 has 4x1 patches, fewer than the 2x2"),
        ("pyramid_tnt", {"reductions": (2, 1, 1)}, r"one value for each stage.*\(2, 1, 1\)"),
    ],
)
def test_invalid_arguments_raise(family, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(family, **arguments)
