"""The inner transformer in C++ is the inner transformer, and stands in only where it may."""

import keras
import pytest

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
