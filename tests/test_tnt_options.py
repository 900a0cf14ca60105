"""Combinations of distillation (DeiT), LayerScale and class attention (CaiT), and SE in TNT."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

from keras_tnt.layers import PositionEmbedding
from keras_tnt.layers.embedding import resample_positions
from tests.helpers.checks import assert_equal, compute, normal
from tests.helpers.golden import assert_close
from tests.helpers.tiny_models import randomize
from tests.helpers.tiny_models import tiny_tnt as tiny

OFF = {"distilled": False, "layer_scale": None, "class_attention_depth": 0, "squeeze_excite": False}
ON = {"distilled": True, "layer_scale": 0.1, "class_attention_depth": 1, "squeeze_excite": True}
COMBINATIONS = [
    {**OFF, **{option: ON[option] for option in options}}
    for count in range(len(ON) + 1)
    for options in itertools.combinations(ON, count)
]


def name(combination):
    return "+".join(option for option in ON if combination[option]) or "plain"


def arrays(model):
    return {variable.path: ops.convert_to_numpy(variable) for variable in model.variables}


def fill(model, source):
    """Assigns the values of `source` to the variables of `model` with the same path."""
    for variable in model.variables:
        if variable.path in source:
            variable.assign(source[variable.path])


@pytest.mark.slow
@pytest.mark.parametrize("combination", COMBINATIONS, ids=name)
def test_combination_is_saved_resampled_and_trained(combination, tmp_path):
    options = {"depth": 1, **combination}
    model = randomize(tiny(**options))
    weights, images = arrays(model), normal((2, 32, 32, 3))

    model.save(tmp_path / "model.keras")
    copy = keras.models.load_model(tmp_path / "model.keras")
    assert copy.to_json() == model.to_json()
    for path, value in arrays(copy).items():
        np.testing.assert_array_equal(value, weights[path])

    other = tiny((48, 32), **options)
    other.load_weights(tmp_path / "model.keras")
    assert_resampled(model, other)
    other = randomize(other)
    other.save_weights(tmp_path / "other.weights.h5")
    copy.load_weights(tmp_path / "other.weights.h5")
    assert_resampled(other, copy)

    # JAX compiles each operation separately in eager mode.
    eagerly = keras.backend.backend() != "jax"
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=eagerly)
    model.train_on_batch(images, np.array([0, 2]))
    trained = arrays(model)
    assert [path for path in weights if np.all(trained[path] == weights[path])] == []


def assert_resampled(source, target):
    """Asserts that `target` has the weights of `source`, with positions resampled."""
    found, expected = arrays(target), arrays(source)
    for ours in target.layers:
        if isinstance(ours, PositionEmbedding):
            path = ours.table.path
            grids = source.get_layer(ours.name).grid, ours.grid
            expected[path] = resample_positions(expected[path], *grids, ours.prefix_tokens)
    assert found.keys() == expected.keys()
    for path in found:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-6, err_msg=path)


def test_model_with_every_option_off_is_plain_tnt():
    keras.utils.set_random_seed(1)
    plain = arrays(tiny())
    keras.utils.set_random_seed(1)
    off = arrays(tiny(**OFF))
    assert off.keys() == plain.keys()
    for path in plain:
        np.testing.assert_array_equal(off[path], plain[path])


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name)
def test_options_add_weights_and_remove_none(combination):
    added = {
        "distilled": {"distillation_token", "head_distillation"},
        "layer_scale": {"scale_attention", "scale_mlp"},
        "class_attention_depth": {"class_block_0"},
        "squeeze_excite": {"excite"},
    }
    plain, options = arrays(tiny()).keys(), arrays(tiny(**combination)).keys()
    assert plain <= options
    wanted = set().union(*(added[option] for option in ON if combination[option]))
    for path in options - plain:
        assert wanted & set(path.split("/")), f"{path} belongs to no option that is on"
    for part in wanted:
        assert any(part in path.split("/") for path in options - plain), f"there is no {part}"


def test_identity_layer_scale_and_excitation_do_not_change_predictions():
    plain, images = randomize(tiny()), normal((2, 32, 32, 3))
    options = tiny(layer_scale=1.0, squeeze_excite=True)
    for layer in options.layers:
        if layer.name.startswith("block_"):
            layer.outer.excite.fc2.kernel.assign(np.zeros(layer.outer.excite.fc2.kernel.shape))
    fill(options, arrays(plain))
    assert_close(compute(options, images), compute(plain, images), 1e-5)


def test_layer_scale_is_on_both_branches_of_both_transformers():
    model = tiny(layer_scale=0.25)
    scales = {
        path: value
        for path, value in arrays(model).items()
        if path.endswith("scale_mlp/gamma") or path.endswith("scale_attention/gamma")
    }
    assert set(scales) == {
        f"block_{i}/{part}/scale_{branch}/gamma"
        for i in range(2)
        for part in ("inner", "outer")
        for branch in ("attention", "mlp")
    }
    for value in scales.values():
        np.testing.assert_array_equal(value, 0.25)


@pytest.mark.parametrize("distilled", [False, True])
def test_class_attention_keeps_patches_independent_of_class_tokens(distilled):
    options = {"class_attention_depth": 1, "distilled": distilled}
    images = normal((2, 32, 32, 3))
    model = randomize(tiny(include_top=False, **options))
    tokens = keras.Model(model.input, [model.output, model.get_layer("norm").output])
    patches, before = compute(tokens, images)
    for name in ("class_token", "distillation_token")[: 1 + distilled]:
        token = model.get_layer(name).token
        token.assign(token + 1.0)
    changed, after = compute(tokens, images)
    assert_equal(changed, patches)
    prefix_tokens = 1 + distilled
    assert np.all(np.any(after[:, :prefix_tokens] != before[:, :prefix_tokens], axis=-1))


def test_each_head_reads_its_own_token():
    model = randomize(tiny(**ON))
    heads = keras.Model(
        model.input, [model.get_layer(head).output for head in ("head", "head_distillation")]
    )
    images = normal((2, 32, 32, 3))
    by_head = compute(heads, images)
    norm = keras.Model(model.input, model.get_layer("norm").output)
    tokens = compute(norm, images)
    for i, (head, logits) in enumerate(zip(("head", "head_distillation"), by_head, strict=True)):
        kernel, bias = (ops.convert_to_numpy(v) for v in model.get_layer(head).weights)
        assert_close(tokens[:, i] @ kernel + bias, logits, 1e-5)
    model.layers[-1].activation = keras.activations.linear
    assert_close(compute(model, images), (by_head[0] + by_head[1]) / 2, 1e-5)
