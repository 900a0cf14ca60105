"""Attention layers, and the weights that they record for inspection."""

import numpy as np
import pytest
from keras import ops

from keras_tnt.layers import ClassAttention, SelfAttention, TalkingHeadAttention
from keras_tnt.layers.attention import HeadMixing, record_attention
from keras_tnt.layers.base import intercept_attention
from tests.helpers.checks import assert_close, assert_equal, check_layer, compute, normal

# No norm precedes attention here, so that large inputs give large logits.
ALONE = {"half_scale": 3.0}


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def attention_by_hand(query, key, value, num_heads):
    """Returns multi-head attention (tokens, dim) and its weights, one head at a time."""
    heads = [np.split(x, num_heads, axis=-1) for x in (query, key, value)]
    weights = [softmax(q @ k.T / q.shape[-1] ** 0.5) for q, k, _ in zip(*heads, strict=True)]
    result = [w @ v for w, v in zip(weights, heads[2], strict=True)]
    return np.concatenate(result, axis=-1), np.stack(weights)


def dense(layer, x):
    return x @ ops.convert_to_numpy(layer.kernel)


@pytest.mark.parametrize("shape", [(2, 5, 12), (2, 3, 5, 12)])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_self_attention_is_a_valid_keras_layer(shape, qkv_bias):
    check_layer(
        SelfAttention,
        shape,
        num_heads=3,
        qkv_bias=qkv_bias,
        attention_dropout=0.1,
        dropout=0.1,
        **ALONE,
    )


def test_self_attention_matches_the_paper():
    layer = SelfAttention(num_heads=3)
    x = 5 * normal((1, 7, 12))
    layer.build(x.shape)
    layer.set_weights([normal(w.shape, seed=i) / 3 for i, w in enumerate(layer.get_weights())])
    heads = np.split(dense(layer.qkv, x[0]), 3, axis=-1)
    with record_attention() as recorded:
        output_while_recorded = layer(x)
    mixed, weights = attention_by_hand(*heads, num_heads=3)
    expected = dense(layer.projection, mixed) + ops.convert_to_numpy(layer.projection.bias)
    assert_close(layer(x), expected[None], 1e-5)
    assert_close(output_while_recorded, expected[None], 1e-5)
    assert_close(recorded[layer.path], weights[None], 1e-5)


def test_words_attend_only_within_their_patch():
    layer = SelfAttention(num_heads=3)
    words = normal((2, 4, 5, 12))
    alone = np.stack([ops.convert_to_numpy(layer(words[:, i])) for i in range(4)], axis=1)
    assert_equal(layer(words), alone)


@pytest.mark.parametrize("first_tokens", [1, 2])
def test_query_tokens_alone_have_the_same_outputs(first_tokens):
    layer = SelfAttention(num_heads=3)
    x = normal((2, 5, 12))
    assert_equal(compute(layer, x, first_tokens=first_tokens), compute(layer, x)[:, :first_tokens])
    check_layer(
        SelfAttention, (2, 5, 12), num_heads=3, call={"first_tokens": first_tokens}, **ALONE
    )


@pytest.mark.parametrize("class_tokens", [1, 2])
def test_class_attention_is_a_valid_keras_layer(class_tokens):
    check_layer(
        ClassAttention, (2, 5, 12), num_heads=3, class_tokens=class_tokens, qkv_bias=True, **ALONE
    )


def test_class_attention_matches_the_paper():
    layer = ClassAttention(num_heads=3, class_tokens=2)
    x = 5 * normal((1, 7, 12))
    layer.build(x.shape)
    layer.set_weights([normal(w.shape, seed=i) / 3 for i, w in enumerate(layer.get_weights())])
    key, value = np.split(dense(layer.kv, x[0]), 2, axis=-1)
    mixed, _ = attention_by_hand(dense(layer.query, x[0, :2]), key, value, num_heads=3)
    expected = dense(layer.projection, mixed) + ops.convert_to_numpy(layer.projection.bias)
    assert_close(layer(x), expected[None], 1e-5)


@pytest.mark.parametrize("layer_class", [SelfAttention, ClassAttention])
def test_heads_must_divide_the_dimension(layer_class):
    with pytest.raises(ValueError, match="must divide the dimension.*5 heads for dimension 12"):
        layer_class(num_heads=5)(np.ones((1, 3, 12)))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("layer_class", [SelfAttention, ClassAttention])
def test_softmax_is_float32_under_mixed_precision(layer_class, policy):
    layer = layer_class(num_heads=2, dtype=policy)
    with record_attention() as recorded:
        layer(normal((2, 300, 8)))
    attention = ops.convert_to_numpy(recorded[layer.path])
    assert attention.dtype == "float32"
    np.testing.assert_allclose(attention.sum(axis=-1), 1.0, atol=1e-5)


def test_dropout_applies_to_attention_and_output_in_training():
    x = normal((2, 5, 12))
    for rates in ({"attention_dropout": 0.5}, {"dropout": 0.5}):
        layer = SelfAttention(num_heads=3, **rates)
        first, second = (ops.convert_to_numpy(layer(x, training=True)) for _ in range(2))
        assert np.any(first != second)
        assert_equal(layer(x), layer(x, training=False))


def test_attention_is_recorded_only_inside_the_context():
    layer = SelfAttention(num_heads=2)
    with record_attention() as recorded:
        layer(normal((2, 5, 8)))
    assert list(recorded) == [layer.path]
    recorded.clear()
    layer(normal((2, 5, 8)))
    assert not recorded


@pytest.mark.parametrize("layer_class", [SelfAttention, ClassAttention, TalkingHeadAttention])
def test_observer_return_value_replaces_the_attention(layer_class):
    layer, x = layer_class(num_heads=2), normal((2, 5, 8))
    with intercept_attention(lambda _, weights: 0 * weights):
        nothing = ops.convert_to_numpy(layer(x))
    assert not np.any(nothing) and np.any(ops.convert_to_numpy(layer(x)))


def test_head_mixing_is_a_valid_keras_layer():
    check_layer(HeadMixing, (2, 3, 4, 5), **ALONE)


@pytest.mark.parametrize("shape", [(2, 5, 12), (2, 3, 5, 12)])
def test_talking_head_attention_is_a_valid_keras_layer(shape):
    check_layer(TalkingHeadAttention, shape, num_heads=3, qkv_bias=True, **ALONE)


def test_talking_heads_are_mixed_before_and_after_softmax():
    layer = TalkingHeadAttention(num_heads=3)
    x = normal((1, 5, 12))
    layer.build(x.shape)
    layer.set_weights([normal(w.shape, seed=i) for i, w in enumerate(layer.get_weights())])
    query, key, value = (
        np.stack(np.split(part[0], 3, axis=-1)) for part in np.split(dense(layer.qkv, x), 3, -1)
    )
    scores = query @ np.swapaxes(key, -1, -2) / 4**0.5

    def mix(layer, x):
        kernel, bias = (ops.convert_to_numpy(v) for v in (layer.kernel, layer.bias))
        return np.einsum("hqk,hg->gqk", x, kernel) + bias[:, None, None]

    attention = mix(layer.mix_after, softmax(mix(layer.mix_before, scores)))
    heads = np.concatenate(list(attention @ value), axis=-1)
    expected = dense(layer.projection, heads) + ops.convert_to_numpy(layer.projection.bias)
    assert_close(compute(layer, x)[0], expected, 1e-5)
