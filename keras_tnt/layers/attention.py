"""Attention as the papers use it: over words or patches, and of class tokens to patches.

Heads are an axis of their own, before the tokens, so that every product is one batched matrix
product over the two last axes, whatever stands in front: `(batch, heads, tokens, head_dim)` for
patches, `(batch, patches, heads, words, head_dim)` for the words inside them.
"""

import contextlib

import keras
from keras import ops

from keras_tnt.layers.base import (
    CompositeLayer,
    TruncatedNormal,
    at_least_float32,
    link_observer,
    observing_links,
    projection,
    take_first,
    take_first_spec,
)
from keras_tnt.layers.grid import shape_of
from keras_tnt.layers.regularization import Dropout
from keras_tnt.layers.sharding import reshape


@contextlib.contextmanager
def record_attention():
    """Within the context, every attention layer that is called leaves its attention here.

    Yields:
        A dict from a layer's path to its softmax, `(batch, ..., heads, queries, keys)`, filled
        while models are called eagerly.
    """
    recorded = {}

    def record(layer, weights):
        if isinstance(layer, Attention):
            recorded[layer.path] = weights
        return weights

    with observing_links(record):
        yield recorded


def split_heads(x, num_heads):
    """(batch, ..., tokens, dim) to (batch, ..., heads, tokens, dim / heads)."""
    *lead, dim = shape_of(x)[1:]
    x = reshape(x, (-1, *lead, num_heads, dim // num_heads))  # (b, ..., t, h, d)
    return ops.swapaxes(x, -3, -2)  # (b, ..., h, t, d)


def merge_heads(x):
    """(batch, ..., heads, tokens, dim / heads) to (batch, ..., tokens, dim)."""
    *lead, heads, tokens, head_dim = shape_of(x)[1:]
    x = ops.swapaxes(x, -3, -2)  # (b, ..., t, h, d)
    return reshape(x, (-1, *lead, tokens, heads * head_dim))  # (b, ..., t, dim)


class Attention(CompositeLayer):
    """What the attention layers share: the core, the output projection, the configuration."""

    # Whether the softmax's division by its sums may wait until after the product with the values,
    # which is smaller. XLA is faster so; the other backends have softmax as one kernel.
    divides_late = True

    def __init__(
        self,
        num_heads: int,
        qkv_bias: bool = False,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.qkv_bias = qkv_bias
        self.attention_dropout = attention_dropout
        self.dropout = dropout

    def build_output(self, dim):
        if dim % self.num_heads:
            raise ValueError(
                f"The number of heads must divide the dimension. Received: {self.num_heads} heads "
                f"for dimension {dim} (layer '{self.path}')."
            )
        policy = self.dtype_policy
        self.scale = (dim // self.num_heads) ** -0.5
        self.attention_drop = Dropout(self.attention_dropout, dtype=policy, name="attention_drop")
        self.projection = projection(dim, dtype=policy, name="projection")
        self.projection.build((None, None, dim))
        self.drop = Dropout(self.dropout, dtype=policy, name="drop")

    def scores(self, query, key, bias=None):
        """query key^T / sqrt(head_dim) + bias, in float32 or better."""
        scores = self.mix_scores(ops.matmul(query * self.scale, ops.swapaxes(key, -1, -2)))
        scores = ops.cast(scores, at_least_float32(scores.dtype))
        return scores if bias is None else scores + ops.cast(bias, scores.dtype)

    def attention(self, query, key, bias=None):
        """The softmax of the scores, (batch, ..., heads, queries, keys)."""
        scores = self.scores(query, key, bias)
        if scores.shape[-1] == 1:  # of which Keras's softmax warns
            return ops.ones_like(scores)
        return ops.softmax(scores, axis=-1)

    def undivided_attention(self, query, key, bias=None):
        """`attention` before its division: the exponentials, and their sums over the keys."""
        scores = self.scores(query, key, bias)
        scores -= ops.stop_gradient(ops.max(scores, axis=-1, keepdims=True))
        exponentials = ops.exp(scores)
        return exponentials, ops.sum(exponentials, axis=-1, keepdims=True)

    def attention_of_first(self, query, key, bias, first_tokens):
        """The attention of the first tokens alone if told so.

        Whoever looks on by `observing_links` sees that of all tokens, and what it returns is used.

        Returns:
            (attention, sums that it is to be divided by), the second None where that is done.
        """
        look = link_observer()
        if look is not None:
            attention = look(self, self.attention(query, key, bias))
            return self.mix_attention(take_first(attention, first_tokens)), None
        query = take_first(query, first_tokens)
        bias = None if bias is None else take_first(bias, first_tokens)
        if self.divides_late and keras.backend.backend() == "jax":
            return self.undivided_attention(query, key, bias)
        return self.mix_attention(self.attention(query, key, bias)), None

    def attend(self, query, key, value, bias=None, first_tokens=None, training=False):
        """Attend, of the first tokens alone if told so, and project."""
        attention, total = self.attention_of_first(query, key, bias, first_tokens)
        attention = self.attention_drop(ops.cast(attention, value.dtype), training=training)
        x = ops.matmul(attention, value)
        if total is not None:
            x /= ops.cast(total, x.dtype)
        x = merge_heads(x)  # (b, ..., tokens, dim)
        return self.drop(self.projection(x), training=training)

    def mix_scores(self, scores):
        return scores

    def mix_attention(self, attention):
        return attention

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "qkv_bias": self.qkv_bias,
            "attention_dropout": self.attention_dropout,
            "dropout": self.dropout,
        }


@keras.saving.register_keras_serializable(package="keras_tnt")
class SelfAttention(Attention):
    """Multi-head self-attention with query, key and value in one product.

    Args:
        num_heads: number of heads; divides the input's last dimension.
        qkv_bias: whether query, key and value have a bias.
        attention_dropout: dropout rate on the attention, in [0, 1).
        dropout: dropout rate after the output projection, in [0, 1).

    Call arguments:
        x: `(batch, tokens, dim)`, or `(batch, patches, words, dim)` for words within patches.
        bias: if given, added to the scores; of a shape that fits `(batch, ..., num_heads, tokens,
            tokens)`.
        first_tokens: if given, only the first so many tokens are computed; the result is exact.

    Returns:
        `(batch, ..., first_tokens or tokens, dim)`.

    Example:

    >>> keras_tnt.layers.SelfAttention(num_heads=4)(np.ones((2, 17, 32))).shape
    """

    def build(self, input_shape):
        dim = input_shape[-1]
        self.qkv = projection(3 * dim, self.qkv_bias, dtype=self.dtype_policy, name="qkv")
        self.build_output(dim)
        self.qkv.build(input_shape)

    def call(self, x, bias=None, first_tokens=None, training=False):
        query, key, value = (
            split_heads(part, self.num_heads) for part in ops.split(self.qkv(x), 3, axis=-1)
        )
        return self.attend(
            query, key, value, bias=bias, first_tokens=first_tokens, training=training
        )

    def compute_output_shape(self, input_shape):
        return input_shape

    def compute_output_spec(self, x, bias=None, first_tokens=None, training=False):
        return take_first_spec(x, first_tokens, self.compute_dtype)


@keras.saving.register_keras_serializable(package="keras_tnt")
class HeadMixing(keras.layers.Layer):
    """A learned linear map over the heads of `(batch, ..., heads, queries, keys)`."""

    def build(self, input_shape):
        heads = input_shape[-3]
        self.kernel = self.add_weight(
            name="kernel",
            shape=(heads, heads),
            initializer=TruncatedNormal(stddev=0.02),
        )
        self.bias = self.add_weight(name="bias", shape=(heads,), initializer="zeros")

    def call(self, x):
        *lead, heads, queries, keys = shape_of(x)[1:]
        x = reshape(x, (-1, *lead, heads, queries * keys))  # (b, ..., h, queries*keys)
        x = ops.matmul(ops.transpose(self.kernel), x) + ops.expand_dims(self.bias, -1)
        return reshape(x, (-1, *lead, heads, queries, keys))  # (b, ..., h, queries, keys)

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable(package="keras_tnt")
class TalkingHeadAttention(SelfAttention):
    """Self-attention whose heads are mixed before the softmax and after it (arXiv 2003.02436).

    Args:
        num_heads: number of heads; divides the input's last dimension.
        qkv_bias: whether query, key and value have a bias.
        attention_dropout: dropout rate on the mixed attention, in [0, 1).
        dropout: dropout rate after the output projection, in [0, 1).

    Call arguments:
        x: `(batch, tokens, dim)`.
        bias: if given, added to the mixed scores.
        first_tokens: if given, only the first so many tokens are computed; the result is exact.

    Returns:
        `(batch, first_tokens or tokens, dim)`.
    """

    divides_late = False

    def build(self, input_shape):
        super().build(input_shape)
        tokens = input_shape[-2]
        scores_shape = (*input_shape[:-2], self.num_heads, tokens, tokens)
        self.mix_before = HeadMixing(dtype=self.dtype_policy, name="mix_before")
        self.mix_before.build(scores_shape)
        self.mix_after = HeadMixing(dtype=self.dtype_policy, name="mix_after")
        self.mix_after.build(scores_shape)

    def mix_scores(self, scores):
        return self.mix_before(scores)

    def mix_attention(self, attention):
        return self.mix_after(attention)


@keras.saving.register_keras_serializable(package="keras_tnt")
class ClassAttention(Attention):
    """Attention of the first tokens to all tokens (CaiT, section 3, equations 5 to 8).

    Args:
        num_heads: number of heads; divides the input's last dimension.
        class_tokens: how many tokens in front ask: 1, or 2 with a distillation token.
        qkv_bias: whether query, key and value have a bias.
        attention_dropout: dropout rate on the attention, in [0, 1).
        dropout: dropout rate after the output projection, in [0, 1).

    Call arguments:
        x: `(batch, tokens, dim)`, class tokens first.

    Returns:
        `(batch, class_tokens, dim)`.
    """

    def __init__(
        self,
        num_heads: int,
        class_tokens: int = 1,
        qkv_bias: bool = False,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        **kwargs,
    ):
        super().__init__(num_heads, qkv_bias, attention_dropout, dropout, **kwargs)
        self.class_tokens = class_tokens

    def build(self, input_shape):
        dim = input_shape[-1]
        self.query = projection(dim, self.qkv_bias, dtype=self.dtype_policy, name="query")
        self.kv = projection(2 * dim, self.qkv_bias, dtype=self.dtype_policy, name="kv")
        self.build_output(dim)
        self.query.build(input_shape)
        self.kv.build(input_shape)

    def call(self, x, training=False):
        query = split_heads(self.query(x[:, : self.class_tokens]), self.num_heads)
        key, value = (
            split_heads(part, self.num_heads) for part in ops.split(self.kv(x), 2, axis=-1)
        )
        return self.attend(query, key, value, training=training)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.class_tokens, input_shape[-1])

    def get_config(self):
        return {**super().get_config(), "class_tokens": self.class_tokens}
