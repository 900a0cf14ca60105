"""Attention layers: self-attention of words or patches, talking-heads and class attention.

Heads are a separate axis before the tokens, `(batch, heads, tokens, head_dim)` for patches and
`(batch, patches, heads, words, head_dim)` for the words inside them, so that every matrix product
is one batched GEMM over the last two axes, for any number of leading axes.
"""

import contextlib

import keras
from keras import ops

from keras_tnt.layers.base import (
    CompositeLayer,
    ConfiguredLayer,
    TruncatedNormal,
    at_least_float32,
    attention_interceptor,
    intercept_attention,
    projection,
    slice_tokens,
    slice_tokens_spec,
)
from keras_tnt.layers.grid import shape_of
from keras_tnt.layers.regularization import Dropout
from keras_tnt.layers.sharding import reshape


@contextlib.contextmanager
def record_attention():
    """Context manager that records the attention maps of all attention layers called inside it.

    Yields:
        A dict from a layer's path to its attention weights after the softmax,
        `(batch, ..., heads, queries, keys)`, filled while models are called eagerly.
    """
    recorded = {}

    def record(layer, weights):
        if isinstance(layer, Attention):
            recorded[layer.path] = weights
        return weights

    with intercept_attention(record):
        yield recorded


def split_heads(x, num_heads):
    """Reshapes `(batch, ..., tokens, dim)` to `(batch, ..., heads, tokens, dim / heads)`."""
    *lead, dim = shape_of(x)[1:]
    x = reshape(x, (-1, *lead, num_heads, dim // num_heads))  # (b, ..., t, h, d)
    return ops.swapaxes(x, -3, -2)  # (b, ..., h, t, d)


def merge_heads(x):
    """Reshapes `(batch, ..., heads, tokens, dim / heads)` to `(batch, ..., tokens, dim)`."""
    *lead, heads, tokens, head_dim = shape_of(x)[1:]
    x = ops.swapaxes(x, -3, -2)  # (b, ..., t, h, d)
    return reshape(x, (-1, *lead, tokens, heads * head_dim))  # (b, ..., t, dim)


def softmax(scores, deferred: bool):
    """Returns the softmax over the last axis, possibly with its division deferred.

    Deferred softmax normalization, as in FlashAttention: the division by the sums follows the
    matrix product with the values, whose output is smaller than the scores. XLA is faster that way;
    the other backends have a softmax kernel.

    Args:
        scores: `(..., queries, keys)`.
        deferred: whether the division may be deferred, which happens on JAX.

    Returns:
        A tuple `(weights, total)`: the softmax is `weights / total`, or `weights` if `total` is
        `None`.
    """
    if deferred and keras.backend.backend() == "jax":
        scores -= ops.stop_gradient(ops.max(scores, axis=-1, keepdims=True))
        exponentials = ops.exp(scores)
        return exponentials, ops.sum(exponentials, axis=-1, keepdims=True)
    if scores.shape[-1] == 1:  # Keras's softmax warns about an axis of size 1.
        return ops.ones_like(scores), None
    return ops.softmax(scores, axis=-1), None


class Attention(CompositeLayer):
    """Base class of the attention layers: scaled dot-product attention and output projection.

    Subclasses compute query, key and value in `project`. `mix_scores` and `mix_weights` are hooks
    before and after the softmax.
    """

    # Whether the softmax may be divided after the product with the values; see `softmax`.
    # `mix_weights` must be the identity then.
    deferred_softmax = True

    def __init__(
        self,
        num_heads: int,
        qkv_bias: bool = False,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        **kwargs,
    ):
        """Initializes the arguments that all attention layers share; subclasses document them."""
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.qkv_bias = qkv_bias
        self.attention_dropout = attention_dropout
        self.dropout = dropout

    def build_output(self, dim: int):
        """Builds the attention dropout, the output projection and its dropout.

        Args:
            dim: dimension of a token.

        Raises:
            ValueError: if `num_heads` does not divide `dim`.
        """
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

    def project(self, x, grid=None):
        """Returns query, key and value, `(batch, ..., heads, tokens, head_dim)` each."""
        raise NotImplementedError

    def mix_scores(self, scores):
        """Returns the scores unchanged; talking-heads attention overrides this hook."""
        return scores

    def mix_weights(self, weights):
        """Returns the attention weights unchanged; talking-heads attention overrides this hook."""
        return weights

    def call(self, x, bias=None, grid=None, first_tokens=None, training=False):
        """Maps `(batch, ..., tokens, dim)` to `(batch, ..., first_tokens or tokens, dim)`."""
        query, key, value = self.project(x, grid)  # (b, ..., h, tokens, head_dim)
        observer = attention_interceptor()
        if observer is None:  # An observer receives the weights of all tokens.
            query, bias = slice_tokens(query, first_tokens), slice_tokens(bias, first_tokens)
        scores = self.mix_scores(ops.matmul(query * self.scale, ops.swapaxes(key, -1, -2)))
        scores = ops.cast(scores, at_least_float32(scores.dtype))  # (b, ..., h, queries, keys)
        if bias is not None:
            scores = scores + ops.cast(bias, scores.dtype)
        weights, total = softmax(scores, self.deferred_softmax and observer is None)
        if observer is not None:
            weights = slice_tokens(observer(self, weights), first_tokens)
        weights = ops.cast(self.mix_weights(weights), value.dtype)
        x = ops.matmul(self.attention_drop(weights, training=training), value)
        if total is not None:
            x /= ops.cast(total, x.dtype)
        return self.drop(self.projection(merge_heads(x)), training=training)

    def compute_output_shape(self, input_shape):
        """Returns `input_shape`, the output shape without `first_tokens`."""
        return input_shape

    def compute_output_spec(self, x, bias=None, grid=None, first_tokens=None, training=False):
        """Returns the symbolic output, which has `first_tokens` tokens if that is given."""
        return slice_tokens_spec(x, first_tokens, self.compute_dtype)


@keras.saving.register_keras_serializable(package="keras_tnt")
class SelfAttention(Attention):
    """Multi-head self-attention with one fused projection for query, key and value.

    Args:
        num_heads: number of heads; divides the input's last dimension.
        qkv_bias: whether query, key and value have a bias. Defaults to `False`.
        attention_dropout: dropout rate on the attention weights, in [0, 1). Defaults to 0.
        dropout: dropout rate after the output projection, in [0, 1). Defaults to 0.

    Call arguments:
        x: `(batch, tokens, dim)`, or `(batch, patches, words, dim)` for words within patches.
        bias: if given, added to the scores; broadcasts to `(batch, ..., num_heads, tokens,
            tokens)`.
        first_tokens: number N of leading query tokens. If given, only the first N output tokens are
            computed, with the same values as a slice of the full result.

    Returns:
        `(batch, ..., first_tokens or tokens, dim)`.

    Example:
        >>> keras_tnt.layers.SelfAttention(num_heads=4)(np.ones((2, 17, 32))).shape
    """

    def build(self, input_shape):
        """Builds the fused query, key and value projection and the output projection."""
        dim = input_shape[-1]
        self.qkv = projection(3 * dim, self.qkv_bias, dtype=self.dtype_policy, name="qkv")
        self.build_output(dim)
        self.qkv.build(input_shape)

    def project(self, x, grid=None):
        """Returns query, key and value of all tokens; `grid` is unused."""
        return tuple(
            split_heads(part, self.num_heads) for part in ops.split(self.qkv(x), 3, axis=-1)
        )


@keras.saving.register_keras_serializable(package="keras_tnt")
class HeadMixing(ConfiguredLayer):
    """Learned linear map over the heads of `(batch, ..., heads, queries, keys)`."""

    def build(self, input_shape):
        """Creates a `(heads, heads)` kernel and a `(heads,)` bias."""
        heads = input_shape[-3]
        self.kernel = self.add_weight(
            name="kernel",
            shape=(heads, heads),
            initializer=TruncatedNormal(stddev=0.02),
        )
        self.bias = self.add_weight(name="bias", shape=(heads,), initializer="zeros")

    def call(self, x):
        """Mixes the heads axis of `(batch, ..., heads, queries, keys)`; preserves the shape."""
        *lead, heads, queries, keys = shape_of(x)[1:]
        x = reshape(x, (-1, *lead, heads, queries * keys))  # (b, ..., h, queries*keys)
        x = ops.matmul(ops.transpose(self.kernel), x) + ops.expand_dims(self.bias, -1)
        return reshape(x, (-1, *lead, heads, queries, keys))  # (b, ..., h, queries, keys)

    def compute_output_shape(self, input_shape):
        """Returns `input_shape`."""
        return input_shape


@keras.saving.register_keras_serializable(package="keras_tnt")
class TalkingHeadAttention(SelfAttention):
    """Self-attention that mixes the heads before and after the softmax (arXiv 2003.02436).

    Args:
        num_heads: number of heads; divides the input's last dimension.
        qkv_bias: whether query, key and value have a bias. Defaults to `False`.
        attention_dropout: dropout rate on the mixed attention weights, in [0, 1). Defaults to 0.
        dropout: dropout rate after the output projection, in [0, 1). Defaults to 0.

    Call arguments:
        x: `(batch, tokens, dim)`.
        bias: if given, added to the mixed scores.
        first_tokens: number N of leading query tokens. If given, only the first N output tokens are
            computed, with the same values as a slice of the full result.

    Returns:
        `(batch, first_tokens or tokens, dim)`.
    """

    deferred_softmax = False

    def build(self, input_shape):
        """Builds the self-attention and its two head mixings."""
        super().build(input_shape)
        tokens = input_shape[-2]
        scores_shape = (*input_shape[:-2], self.num_heads, tokens, tokens)
        self.mix_before = HeadMixing(dtype=self.dtype_policy, name="mix_before")
        self.mix_before.build(scores_shape)
        self.mix_after = HeadMixing(dtype=self.dtype_policy, name="mix_after")
        self.mix_after.build(scores_shape)

    def mix_scores(self, scores):
        """Returns the scores with their heads mixed, before the softmax."""
        return self.mix_before(scores)

    def mix_weights(self, weights):
        """Returns the attention weights with their heads mixed, after the softmax."""
        return self.mix_after(weights)


@keras.saving.register_keras_serializable(package="keras_tnt")
class ClassAttention(Attention):
    """Attention of the class tokens to all tokens (CaiT, section 3, equations 5 to 8).

    Args:
        num_heads: number of heads; divides the input's last dimension.
        class_tokens: number of leading query (class) tokens: 1, or 2 with a distillation token.
            Defaults to 1.
        qkv_bias: whether query, key and value have a bias. Defaults to `False`.
        attention_dropout: dropout rate on the attention weights, in [0, 1). Defaults to 0.
        dropout: dropout rate after the output projection, in [0, 1). Defaults to 0.

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
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(num_heads, qkv_bias, attention_dropout, dropout, **kwargs)
        self.class_tokens = class_tokens

    def build(self, input_shape):
        """Builds a query projection for the class tokens and a fused key and value projection."""
        dim = input_shape[-1]
        self.query = projection(dim, self.qkv_bias, dtype=self.dtype_policy, name="query")
        self.kv = projection(2 * dim, self.qkv_bias, dtype=self.dtype_policy, name="kv")
        self.build_output(dim)
        self.query.build(input_shape)
        self.kv.build(input_shape)

    def project(self, x, grid=None):
        """Returns the query of the class tokens, and key and value of all tokens."""
        query = self.query(x[:, : self.class_tokens])
        key, value = ops.split(self.kv(x), 2, axis=-1)
        return tuple(split_heads(part, self.num_heads) for part in (query, key, value))

    def compute_output_shape(self, input_shape):
        """Returns `(batch, class_tokens, dim)`."""
        return (input_shape[0], self.class_tokens, input_shape[-1])

    def compute_output_spec(self, x, bias=None, grid=None, first_tokens=None, training=False):
        """Returns the symbolic output `(batch, class_tokens, dim)`."""
        return slice_tokens_spec(x, self.class_tokens, self.compute_dtype)
