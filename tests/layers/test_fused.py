"""The inner transformer in C++ is the inner transformer, and stands in only where it may."""

import keras
import numpy as np
import pytest

import keras_tnt
from keras_tnt.layers import TransformerBlock, fused
from keras_tnt.layers.base import inference_on
from keras_tnt.native import runtimes
from tests.checks import assert_equal, compute, normal


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
    ("shape", "options"),
    [
        ((2, 3, 16, 8), {"qkv_bias": True, "layer_scale": 0.5}),
        ((2, 3, 16, 8), {"norm_axis": (-2, -1)}),
        ((1, 2, 32, 12), {"norm_axis": (-2, -1), "layer_scale": 0.5}),
        ((5, 9, 16, 4), {"mlp_ratio": 3}),
    ],
)
def test_the_inner_transformer_in_cpp_is_the_inner_transformer(shape, options, monkeypatch):
    block, words, expected = block_and_words(shape, **options)
    monkeypatch.setattr(block, "call", None)
    with inference_on("cpu"):
        assert_equal(fused.inner_transformer(block, words), expected)


@pytest.mark.parametrize(
    ("device", "training", "options", "words"),
    [
        (None, False, {}, 16),
        ("accelerator", False, {}, 16),
        ("cpu", True, {}, 16),
        ("cpu", False, {"squeeze_excite": True}, 16),
        ("cpu", False, {"dtype": "mixed_bfloat16"}, 16),
        ("cpu", False, {}, 9),
    ],
)
@pytest.mark.one_backend
def test_all_else_is_left_to_the_block(device, training, options, words, monkeypatch):
    monkeypatch.setattr(runtimes, "operator", lambda *_: pytest.fail("C++ was asked for"))
    block = TransformerBlock(num_heads=2, **options)
    called = []
    block.build((None, 3, words, 8))
    monkeypatch.setattr(block, "call", lambda x, training: called.append(training) or x)
    with inference_on(device):
        fused.inner_transformer(block, keras.ops.ones((1, 3, words, 8)), training=training)
    assert called == [training]


def test_of_an_unknown_release_the_block_computes_itself(monkeypatch):
    monkeypatch.setitem(runtimes.SEEN, keras.backend.backend(), ("0.0",))
    runtimes._operator.cache_clear()
    block, words, expected = block_and_words((1, 2, 16, 10))
    with inference_on("cpu"):
        with pytest.warns(UserWarning, match="not among the releases.*0.0"):
            result = fused.inner_transformer(block, words)
        again = fused.inner_transformer(block, words)  # and warns no more
    runtimes._operator.cache_clear()
    assert_equal([result, again], [expected, expected])


learns_in_cpp = pytest.mark.skipif(
    keras.backend.backend() not in runtimes.LEARNS, reason="this backend trains without C++"
)


def restart_seeds(layer):
    generators = [x.seed_generator for x in layer._flatten_layers() if hasattr(x, "seed_generator")]
    for i, generator in enumerate(generators):
        generator.state.assign([1, i])


def train(block, words):
    """What a block makes of words while it trains, and the gradients by words and weights."""
    restart_seeds(block)
    block.zero_grad()
    words = words.detach().requires_grad_()
    result = fused.inner_transformer(block, words, training=True)
    (result * keras.ops.convert_to_tensor(normal(result.shape, seed=1))).sum().backward()
    gradients = [words.grad, *(weight.value.grad for weight in block.trainable_weights)]
    return [keras.ops.convert_to_numpy(x) for x in (result.detach(), *gradients)]


@learns_in_cpp
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 16, 8), {"qkv_bias": True, "layer_scale": 0.5}),
        ((2, 3, 16, 8), {"norm_axis": (-2, -1)}),
        ((4, 7, 32, 12), {"qkv_bias": True, "stochastic_depth": 0.4}),
        ((5, 9, 16, 4), {"mlp_ratio": 3, "norm_axis": (-2, -1), "stochastic_depth": 0.4}),
    ],
)
def test_the_cpp_learns_what_the_block_learns(shape, options, monkeypatch):
    block, words, _ = block_and_words(shape, **options)
    monkeypatch.setattr(fused, "learns", lambda *_: False)
    expected = train(block, words)
    monkeypatch.undo()
    monkeypatch.setattr(block, "call", None)
    found = train(block, words)
    for actual, wanted in zip(found, expected, strict=True):
        assert np.max(np.abs(actual - wanted)) <= 1e-5 * np.max(np.abs(wanted))
    for first, second in zip(found, train(block, words), strict=True):
        np.testing.assert_array_equal(first, second)


@learns_in_cpp
def test_torch_may_compile_what_learns():
    import torch

    block, words, _ = block_and_words((2, 3, 16, 8))
    assert fused.operator_for(block, words.shape) is not None
    weights = [x.detach().requires_grad_() for x in fused.weights_of(block, words.shape)]
    keep = torch.ones(2, 2, 3)
    arguments = words.requires_grad_(), weights, keep, block.num_heads, 1e-5, False
    torch.library.opcheck(runtimes.torch_operation(), arguments)


@learns_in_cpp
@pytest.mark.parametrize("options", [{"dropout": 0.1}, {"attention_dropout": 0.1}])
def test_a_block_with_dropout_learns_by_itself(options, monkeypatch):
    monkeypatch.setattr(runtimes, "operator", lambda *_: pytest.fail("C++ was asked for"))
    block, words, _ = block_and_words((1, 2, 16, 8), **options)
    train(block, words)


@learns_in_cpp
def test_a_model_fits_alike_with_the_cpp_and_without(monkeypatch):
    sizes = {"outer_dim": 16, "inner_dim": 8, "outer_heads": 2, "inner_heads": 2, "depth": 2}
    model = keras_tnt.TNT(input_shape=(32, 32, 3), classes=3, stochastic_depth=0.2, **sizes)
    start, used = model.get_weights(), []
    inner = fused.operator_for
    monkeypatch.setattr(fused, "operator_for", lambda *a: used.append(inner(*a)) or used[-1])

    def fit():
        restart_seeds(model)
        model.set_weights(start)
        model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
        model.fit(normal((8, 32, 32, 3)), np.arange(8) % 3, batch_size=4, shuffle=False, verbose=0)
        return model.get_weights()

    found = fit()
    assert used and None not in used
    monkeypatch.setattr(fused, "learns", lambda *_: False)
    for actual, wanted in zip(found, fit(), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5)
