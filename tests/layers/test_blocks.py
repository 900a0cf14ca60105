"""Transformer blocks and their sublayers."""

import inspect

import keras
import numpy as np
import pytest
from keras import ops

from keras_tnt import layers
from keras_tnt.layers import (
    MLP,
    ClassAttentionBlock,
    PyramidTNTBlock,
    SqueezeExcite,
    TalkingHeadBlock,
    TNTBlock,
    TransformerBlock,
)
from tests.helpers.checks import assert_close, assert_equal, check_layer, compute, normal

RANDOM = {"dropout": 0.1, "attention_dropout": 0.1, "stochastic_depth": 0.1}
TOKENS, WORDS = (2, 5, 16), (2, 4, 9, 6)


def test_mlp_is_a_valid_keras_layer():
    layer = check_layer(MLP, (2, 3, 5, 8), ratio=2.5, dropout=0.1)
    assert layer.fc1.kernel.shape == (8, 20)


def test_squeeze_excite_is_a_valid_keras_layer():
    check_layer(SqueezeExcite, (2, 5, 16), reduction=2, epsilon=1e-6)


def test_squeeze_excite_matches_the_authors_equation():
    layer = SqueezeExcite()
    x = normal((3, 5, 16))
    layer.build(x.shape)
    layer.set_weights([normal(w.shape, seed=i) for i, w in enumerate(layer.get_weights())])
    gamma, beta, w1, b1, w2, b2 = layer.get_weights()
    mean = x.mean(axis=1, keepdims=True)
    mean = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-5)
    share = np.tanh(np.maximum((mean * gamma + beta) @ w1 + b1, 0) @ w2 + b2)
    assert_close(compute(layer, x), x + x * share, 1e-5)


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        (TOKENS, {"layer_scale": 0.1, "qkv_bias": True, "mlp_ratio": 2.0}),
        (TOKENS, {"squeeze_excite": True, "epsilon": 1e-6}),
        (WORDS, {"sample_axes": 2}),
    ],
)
def test_transformer_block_is_a_valid_keras_layer(shape, config):
    check_layer(TransformerBlock, shape, num_heads=2, **config, **RANDOM)


def test_talking_head_block_is_a_valid_keras_layer():
    check_layer(TalkingHeadBlock, TOKENS, num_heads=2, layer_scale=0.1, **RANDOM)


@pytest.mark.parametrize("squeeze_excite", [False, True])
def test_query_tokens_alone_have_the_same_outputs(squeeze_excite):
    layer = TransformerBlock(num_heads=2, squeeze_excite=squeeze_excite, layer_scale=0.5)
    x = normal(TOKENS)
    assert_equal(compute(layer, x, first_tokens=2), compute(layer, x)[:, :2])


@pytest.mark.parametrize(
    "config",
    [
        {"legacy": True},
        {"squeeze_excite": True, "qkv_bias": True},
        {"layer_scale": 0.1, "mlp_ratio": 2.0, "epsilon": 1e-6},
    ],
)
def test_tnt_block_is_a_valid_keras_layer(config):
    check_layer(TNTBlock, TOKENS, WORDS, outer_heads=4, inner_heads=2, **config, **RANDOM)


@pytest.mark.parametrize("prefix_tokens", [0, 1, 2])
def test_tnt_block_adds_words_to_patches_not_to_prefix_tokens(prefix_tokens):
    block = TNTBlock(outer_heads=2, inner_heads=2)
    tokens, words = normal((2, prefix_tokens + 4, 16)), normal(WORDS)
    block.build(tokens.shape, words.shape)
    block.outer.call = lambda x, **_: x
    added = compute(block, tokens, words)[0] - tokens
    assert np.all(added[:, :prefix_tokens] == 0)
    inner = compute(block.words_to_patches, compute(block.inner, words))
    assert_close(added[:, prefix_tokens:], inner, 1e-5)


def test_tnt_block_with_query_tokens_returns_all_words():
    block = TNTBlock(outer_heads=4, inner_heads=2)
    tokens, words = normal(TOKENS), normal(WORDS)
    first, first_words = compute(block, tokens, words, first_tokens=1)
    every, every_words = compute(block, tokens, words)
    assert_equal(first, every[:, :1])
    assert_equal(first_words, every_words)


@pytest.mark.parametrize("class_tokens", [1, 2])
def test_class_attention_block_is_a_valid_keras_layer(class_tokens):
    check_layer(
        ClassAttentionBlock,
        TOKENS,
        num_heads=2,
        class_tokens=class_tokens,
        layer_scale=0.1,
        **RANDOM,
    )


@pytest.mark.parametrize("class_tokens", [1, 2])
def test_class_attention_block_updates_only_class_tokens(class_tokens):
    x = normal(TOKENS)
    output = compute(ClassAttentionBlock(num_heads=2, class_tokens=class_tokens), x)
    assert np.array_equal(output[:, class_tokens:], x[:, class_tokens:])
    assert np.all(np.any(output[:, :class_tokens] != x[:, :class_tokens], axis=-1))


@pytest.mark.parametrize("training", [False, True])
def test_stochastic_depth_drops_branches_per_sample(training):
    block = TransformerBlock(num_heads=2, stochastic_depth=0.5)
    x = np.repeat(normal((1, 5, 16)), 64, axis=0)
    outputs = ops.convert_to_numpy(block(x, training=training))
    distinct = len(np.unique(outputs[:, 0, 0].round(5)))
    assert distinct == (4 if training else 1)  # each of attention and MLP is kept or dropped


LAYERS = [value for value in vars(layers).values() if inspect.isclass(value)]


@pytest.mark.one_backend
@pytest.mark.parametrize("layer_class", LAYERS, ids=lambda layer_class: layer_class.__name__)
def test_misspelled_argument_raises_in_the_constructor(layer_class):
    of_any_layer = inspect.signature(keras.layers.Layer).parameters
    signature = inspect.signature(layer_class).parameters
    own = {name: p for name, p in signature.items() if name not in of_any_layer}
    values = {"grid": (1, 1), "rate": 0.1, "mean": (0.5,), "std": (0.5,)}
    arguments = {name: values.get(name, 1) for name, p in own.items() if p.default is p.empty}
    config = layer_class(**arguments).get_config()
    assert set(own) <= set(config), "get_config leaves arguments out"
    with pytest.raises((TypeError, ValueError), match="droput"):
        layer_class(**arguments, droput=0.1)


@pytest.mark.parametrize("block", [TransformerBlock, TalkingHeadBlock, ClassAttentionBlock])
def test_mlp_ratio_defaults_to_four(block):
    made = block(2)
    made.build(TOKENS)
    assert made.mlp.fc1.units == 64


@pytest.mark.parametrize("block", [TNTBlock, PyramidTNTBlock])
def test_mlp_ratio_of_nested_blocks_defaults_to_four(block):
    assert block(2, 2).mlp_ratio == 4


def test_native_kernels_can_be_turned_off(monkeypatch):
    block = TransformerBlock(num_heads=2, sample_axes=2)
    words = ops.convert_to_tensor(normal((2, 3, 16, 8)))
    block.build(words.shape)
    block.native_kernels = False
    monkeypatch.setattr("keras_tnt.layers.blocks.fused", None)
    assert_equal(ops.convert_to_numpy(block(words)), ops.convert_to_numpy(block.transform(words)))
