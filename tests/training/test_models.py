"""Models of the trainer: building, initial weights, teachers, freezing."""

import dataclasses
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_tnt
from training import configuration, models


def test_forward_flops_match_the_published_number():
    # The published 5.2 G, less the last block's patch outputs, which are not computed.
    macs = models.forward_flops(keras_tnt.TNTSmall(weights=None)) / 2e9
    assert 4.85 < macs < 5.2


def test_normalized_noise_is_inverted_to_pixels():
    model = models.tnt_digits()
    scale, offset = models.normalization(model)
    noise = np.random.default_rng(0).normal(size=(2, 4, 4, 3))
    np.testing.assert_allclose(models.pixels(model, noise) * scale + offset, noise, atol=1e-4)
    assert models.mean_color(model) == (128, 128, 128)


def test_peak_tflops_is_the_given_one_or_0_on_a_cpu():
    assert models.peak_tflops(configuration.make("digits", peak_tflops=3.5)) == 3.5
    assert models.peak_tflops(configuration.make("digits")) == 0


def test_model_has_the_class_names_of_the_data_set():
    names = [f"class {i}" for i in range(10)]
    values = configuration.make("digits")
    assert keras_tnt.class_names(models.build(values, 10, names)) == names
    # There are more outputs than names, as with --classes.
    assert keras_tnt.class_names(models.build(values, 12, names)) is None


def test_checkpoint_of_other_classes_loads_all_but_the_head(tmp_path):
    donor = keras_tnt.DeiTTiny(weights=None, distilled=True)
    keras_tnt.save_checkpoint(donor, tmp_path / "donor.safetensors")
    values = {"model": "deit_tiny", "distilled": True, "image_size": 64}
    weights = str(tmp_path / "donor.safetensors")
    model = models.build(configuration.make("digits", weights=weights, **values), classes=7)
    assert model.output_shape == (None, 7)
    theirs = {v.path: v.numpy() for v in donor.weights}
    same = {v.path for v in model.weights if np.array_equal(v.numpy(), theirs[v.path])}
    others = {v.path for v in model.weights} - same
    # Resampled for 64x64; a zero bias of another length.
    assert others == {"patch_position/table", *(p for p in theirs if p.startswith("head"))}


def test_weights_of_other_classes_in_any_format_load_all_but_the_heads(tmp_path, capsys):
    """Covers a run directory, Keras files and safetensors; the reset heads are printed."""
    donor = models.tnt_digits(classes=8, depth=1)
    donor.save(tmp_path / "final.keras")
    donor.save_weights(tmp_path / "donor.weights.h5")
    keras_tnt.save_checkpoint(donor, tmp_path / "donor.safetensors")
    theirs = {v.path: v.numpy() for v in donor.weights}
    for name in ("", "final.keras", "donor.weights.h5", "donor.safetensors"):
        weights = str(tmp_path / name)
        config = dataclasses.replace(configuration.make("digits"), weights=weights)
        with mock.patch.dict(models.TNT_DIGITS, depth=1):
            model = models.build(config, classes=6)
            with pytest.raises(ValueError, match="8.*classes|classes.*8"):
                models.build(config, classes=6, fresh_heads=False)
        said = capsys.readouterr().out
        assert f"--weights={weights} has 8 classes, the data 6: head/bias, head/kernel" in said
        for variable in model.weights:
            if not variable.path.startswith("head/"):
                np.testing.assert_array_equal(variable.numpy(), theirs[variable.path])
    (tmp_path / "empty").mkdir()
    config = dataclasses.replace(configuration.make("digits"), weights=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="holds no final.keras"):
        models.build(config, classes=6)


def test_teacher_has_its_public_weights(monkeypatch):
    asked = []

    def deit_tiny(weights):
        asked.append(weights)
        return keras_tnt.DeiTTiny(weights=None, input_shape=(32, 32, 3), classes=10)

    monkeypatch.setattr(models.registry, "find_model", {"deit_tiny": deit_tiny}.__getitem__)
    student = models.tnt_digits(depth=1)
    teacher = models.build_teacher(
        configuration.make("digits", distill="soft", teacher="deit_tiny"), student
    )
    assert asked == ["imagenet"]
    assert teacher(np.zeros((2, 32, 32, 3), "float32")).shape == (2, 10)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="--teacher: There is no model 'deit_huge'. Did you mean"):
        models.build_teacher(
            configuration.make("digits", distill="soft", teacher="deit_huge"), student
        )


@pytest.mark.parametrize("model", ["tnt_digits", "tnt_tiny", "tnt"])
def test_missing_public_weights_error_names_the_flag(model):
    config = configuration.make("digits", model=model, weights="imagenet", image_size=32)
    with pytest.raises(ValueError, match=f"no public weights of {model}. Type --weights= to"):
        models.build(config, 10)


def test_freeze_disables_training_of_the_selected_layers():
    model = models.tnt_digits(depth=2)
    models.freeze(configuration.make("digits", freeze="head"), model)
    assert {v.path for v in model.trainable_variables} == {"head/kernel", "head/bias"}
    models.freeze(configuration.make("digits", freeze="1"), model)
    learning = {v.path.split("/")[0] for v in model.trainable_variables}
    assert learning == {"block_1", "norm", "head"}
    with pytest.raises(ValueError, match="--freeze=3: .* a number of blocks from 0 to 2"):
        models.freeze(configuration.make("digits", freeze="3"), model)


def test_crop_defaults_to_that_of_the_model():
    model = keras_tnt.CaiT(input_shape=(32, 32, 3), depth=1, embed_dim=32, num_heads=2)
    assert models.crop_share(configuration.make("digits", crop=0.0), model) == 1.0
    assert models.crop_share(configuration.make("digits", crop=0.8), model) == 0.8
    assert models.crop_share(configuration.Config(), models.tnt_digits()) == 0.9


# === --model_args, --weights=none, --teacher_preprocessing ===


@pytest.mark.parametrize(
    ("model", "arguments", "blocks"),
    [
        (
            "tnt",
            '{"depth": 4, "outer_dim": 16, "inner_dim": 4, "outer_heads": 2, "inner_heads": 2}',
            4,
        ),
        ("deit", '{"depth": 3, "embed_dim": 16, "num_heads": 2}', 3),
        ("cait", '{"depth": 1, "embed_dim": 16, "num_heads": 2, "layer_scale": null}', 1),
        (
            "pyramid_tnt",
            '{"depths": [1, 2], "outer_dims": [16, 16], "inner_dims": [4, 4], '
            '"outer_heads": [2, 2], "inner_heads": [2, 2], "reductions": [2, 1]}',
            3,
        ),
        ("tnt_digits", '{"depth": 1}', 1),
    ],
)
def test_model_args_build_any_architecture(model, arguments, blocks):
    config = configuration.make("digits", model=model, model_args=arguments, image_size=32)
    built = models.build(config, 7)
    assert len(keras_tnt.anatomy(built).blocks) == blocks
    assert built.output_shape == (None, 7) and built.input_shape == (None, 32, 32, 3)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("tnt", '{"dept": 4}', "tnt has no argument 'dept'. Did you mean depth"),
        ("deit", '{"inner_dim": 4}', "deit has no argument 'inner_dim'.*There are: .*embed_dim"),
        ("tnt_digits", '{"depht": 4}', "Did you mean depth"),
        ("deit", '{"depth": "4"}', "depth"),
        ("deit", '{"depth": [4]}', "depth"),
        ("pyramid_tnt", '{"depths": 4}', "--model_args"),
        ("tnt", '{"depth": true}', "tnt takes numbers as 'depth'.* Received: true"),
        ("tnt_digits", '{"patch_size": false}', "tnt_digits takes numbers as 'patch_size'"),
        ("deit_tiny", '{"mlp_ratio": true}', "takes numbers as 'mlp_ratio'"),
        ("tnt", '{"inner_blocks": [0, true]}', r"'inner_blocks'.* Received: \[0, true\]"),
        ("pyramid_tnt", '{"depths": [1, true]}', r"Received: \[1, true\]"),
    ],
)
def test_invalid_model_args_raise(model, arguments, message):
    config = configuration.make("digits", model=model, model_args=arguments, image_size=32)
    with pytest.raises(ValueError, match=message):
        models.build(config, 7)


@pytest.mark.parametrize("values", [{"model_args": '{"depth": 4}'}, {"distilled": True}])
def test_missing_weights_error_gives_flags(values):
    config = configuration.make("digits", model="tnt_small", weights="imagenet", **values)
    message = "^--model=tnt_small.*: There are no public weights .* Use --weights=none for random"
    with pytest.raises(ValueError, match=message) as caught:
        models.build(config, 1000)
    assert "weights=None" not in str(caught.value) and "weights='" not in str(caught.value)


def test_argument_that_a_model_lacks_raises_a_value_error():
    config = configuration.make("digits", model="pyramid_tnt", distilled=True, image_size=32)
    with pytest.raises(ValueError, match="^--model=pyramid_tnt: .*distilled"):
        models.build(config, 10)


def test_connection_error_gives_flags():
    def fail(**arguments):
        raise ConnectionError("No network. Say weights=None for random weights.")

    builder = models.with_errors_as_flags(fail, configuration.make("digits"))
    with pytest.raises(ConnectionError, match="Say --weights=none for random"):
        builder()


def test_model_args_take_booleans_where_the_builder_does():
    config = configuration.make("digits", model_args='{"qkv_bias": true, "squeeze_excite": false}')
    found = models.custom_arguments(config, models.find_builder(config.model))
    assert found == {"qkv_bias": True, "squeeze_excite": False}


def test_final_files_have_the_custom_architecture(tmp_path):
    config = configuration.make("digits", model_args='{"depth": 1}')
    model = models.build(config, 10)
    files = models.save_final(model, config, 10, None, tmp_path)
    again = keras.saving.load_model(files["final.keras"])
    assert len(keras_tnt.anatomy(again).blocks) == 1


def test_weights_none_is_accepted():
    config = dataclasses.replace(configuration.make("digits"), weights="none")
    assert (
        models.build(config, 10).count_params()
        == models.build(dataclasses.replace(config, weights=""), 10).count_params()
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("auto", [0.0, 127.5, 255.0]),
        ("same", [0.0, 127.5, 255.0]),
        ("none", [0.0, 127.5, 255.0]),
        ("unit", [0.0, 0.5, 1.0]),
        ("tf", [-1.0, 0.0, 1.0]),
        ("torch", [(x - 0.485) / 0.229 for x in (0, 0.5, 1)]),
        ("caffe", [x - 123.68 for x in (0, 127.5, 255)]),
    ],
)
@pytest.mark.filterwarnings("ignore:Cannot tell:UserWarning")
def test_teacher_preprocessing_is_applied_to_pixels(name, expected, tmp_path):
    inputs = keras.Input((8, 8, 3))
    # This teacher returns its input as logits: the first (last) channel of three pixels.
    path = tmp_path / "teacher.keras"
    keras.Model(inputs, inputs[:, 0, :3, 2 if name == "caffe" else 0]).save(path)
    config = dataclasses.replace(
        configuration.make("digits"),
        distill="hard",
        teacher=str(path),
        teacher_preprocessing=name,
    )
    student = models.tnt_digits(classes=3, depth=1, input_shape=(8, 8, 3))
    images = np.zeros((2, 8, 8, 3), "float32")
    images[:, 0, :3] = np.float32([0, 127.5, 255])[:, None]
    logits = tf.function(models.build_teacher(config, student))(tf.constant(images))
    np.testing.assert_allclose(logits[1], expected, atol=1e-4)
