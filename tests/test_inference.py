"""`compile_inference` predicts what the model predicts, for any batch, from few programs."""

import keras
import numpy as np
import pytest

import keras_tnt
from keras_tnt import inference
from keras_tnt.layers import TransformerBlock
from keras_tnt.layers.fused import fused_inner_transformers
from tests.checks import assert_equal, compute, normal

TINY = {
    "input_shape": (16, 16, 3),
    "classes": 5,
    "patch_size": 8,
    "inner_stride": 4,
    "depth": 2,
    "outer_dim": 16,
    "inner_dim": 4,
    "outer_heads": 2,
    "inner_heads": 2,
}


@pytest.fixture
def images():
    return np.random.default_rng(0).uniform(0, 255, (11, 16, 16, 3)).astype("float32")


@pytest.mark.slow
def test_predicts_what_the_model_predicts_at_any_batch_size(images, monkeypatch):
    model = keras_tnt.TNT(**TINY)
    predict = keras_tnt.compile_inference(model, max_batch=4)
    expected = model.predict(images, verbose=0)
    call, traced = model.call, []
    monkeypatch.setattr(model, "call", lambda *a, **k: (traced.append(a), call(*a, **k))[1])
    for count in (3, 4, 11, 7, 3):
        result = predict(images[:count])
        assert isinstance(result, np.ndarray)
        np.testing.assert_allclose(result, expected[:count], atol=1e-5)
    assert len(traced) == 1

    tensor = predict(keras.ops.convert_to_tensor(images[:4]))
    assert keras.ops.is_tensor(tensor)
    for variable in model.trainable_variables:
        variable.assign(np.zeros(variable.shape))
    np.testing.assert_allclose(predict(images[:4]), 1 / 5, atol=1e-6)


@pytest.mark.one_backend
def test_programs_are_for_powers_of_two():
    sizes = []
    program = inference.in_powers_of_two(lambda images: sizes.append(images.shape[0]) or images)
    for count in (1, 2, 3, 4, 5, 8, 9):
        numbers = keras.ops.reshape(keras.ops.arange(count), (count, 1))
        assert program(numbers)[:, 0].shape == (count,)
    assert sizes == [1, 2, 4, 4, 8, 8, 16]


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the operator is torch's")
@pytest.mark.parametrize(
    "options",
    [{}, {"qkv_bias": True}, {"layer_scale": 0.5}, {"norm_axis": (-2, -1)}, {"mlp_ratio": 3}],
)
@pytest.mark.parametrize("shape", [(2, 3, 16, 8), (1, 2, 32, 12)])
def test_the_fused_inner_transformer_is_the_inner_transformer(options, shape, monkeypatch):
    block = TransformerBlock(num_heads=2, sample_axes=2, **options)
    words = normal(shape)
    block.build(words.shape)
    block.set_weights([normal(w.shape, seed=i) for i, w in enumerate(block.get_weights())])
    expected = compute(block, words)
    fused, calls = block.fused, []
    monkeypatch.setattr(block, "fused", lambda x: (calls.append(x), fused(x))[1])
    with fused_inner_transformers():
        assert_equal(block(keras.ops.convert_to_tensor(words)), expected)
    assert len(calls) == 1


def test_refuses_images_of_another_size(images):
    predict = keras_tnt.compile_inference(keras_tnt.TNT(**TINY))
    with pytest.raises(ValueError, match=r"shape \(batch, 16, 16, 3\).*\(11, 8, 16, 3\)"):
        predict(images[:, :8])


def test_refuses_a_batch_limit_that_is_no_power_of_two():
    with pytest.raises(ValueError, match="power of two"):
        keras_tnt.compile_inference(keras_tnt.TNT(**TINY), max_batch=6)
