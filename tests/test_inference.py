"""`compile_inference` predicts what the model predicts, for any batch, from few programs."""

import keras
import numpy as np
import pytest

import keras_tnt
from keras_tnt import inference
from keras_tnt.layers import TransformerBlock
from keras_tnt.layers.base import during, program_device
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


def block_and_words(shape, **options):
    """A block with words to transform, and what it makes of them without the C++."""
    block = TransformerBlock(num_heads=2, sample_axes=2, **options)
    words = normal(shape)
    block.build(words.shape)
    # Of scores twice as large XLA's and TensorFlow's own rounding is more than 1e-6.
    size = 1.0 if keras.backend.backend() == "torch" else 0.5
    weights = enumerate(block.get_weights())
    block.set_weights([size * normal(weight.shape, seed=i) for i, weight in weights])
    return block, keras.ops.convert_to_tensor(words), compute(block, words)


@pytest.mark.parametrize(
    "options",
    [{}, {"qkv_bias": True}, {"layer_scale": 0.5}, {"norm_axis": (-2, -1)}, {"mlp_ratio": 3}],
)
@pytest.mark.parametrize("shape", [(2, 3, 16, 8), (1, 2, 32, 12), (5, 9, 16, 4)])
def test_the_inner_transformer_in_cpp_is_the_inner_transformer(options, shape, monkeypatch):
    block, words, expected = block_and_words(shape, **options)
    fused, called = block.fused, []
    monkeypatch.setattr(block, "fused", lambda x: called.append(fused(x)) or called[-1])
    with during(program_device, "cpu"):
        assert_equal(block(words), expected)
    assert called[0] is not None


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Inductor finds torch's compiler")
def test_without_a_compiler_xla_takes_the_place_of_the_cpp(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    block, words, expected = block_and_words((1, 2, 16, 10))
    warned = pytest.warns(UserWarning, match="CXX names the compiler.*no-such-compiler")
    with during(program_device, "cpu"), warned:
        result = block(words)
    assert_equal(result, expected)


def test_refuses_images_of_another_size(images):
    predict = keras_tnt.compile_inference(keras_tnt.TNT(**TINY))
    with pytest.raises(ValueError, match=r"shape \(batch, 16, 16, 3\).*\(11, 8, 16, 3\)"):
        predict(images[:, :8])


def test_refuses_a_batch_limit_that_is_no_power_of_two():
    with pytest.raises(ValueError, match="power of two"):
        keras_tnt.compile_inference(keras_tnt.TNT(**TINY), max_batch=6)
