"""One block, one layer: the transformer block, the TNT block, the class-attention block."""

import keras
from keras import ops

from keras_tnt.layers import fused
from keras_tnt.layers.attention import ClassAttention, SelfAttention, TalkingHeadAttention
from keras_tnt.layers.base import (
    CompositeLayer,
    LayerNormalization,
    gelu,
    projection,
    take_first,
    take_first_spec,
)
from keras_tnt.layers.embedding import LegacyWordsToPatches, WordsToPatches
from keras_tnt.layers.regularization import Dropout, LayerScale, StochasticDepth


@keras.saving.register_keras_serializable(package="keras_tnt")
class MLP(CompositeLayer):
    """Dense, exact GELU, Dense back to the input's dimension.

    Args:
        ratio: hidden dimension over input dimension.
        dropout: dropout rate after each Dense, in [0, 1).
    """

    def __init__(self, ratio: float = 4.0, dropout: float = 0.0, **kwargs):
        super().__init__(**kwargs)
        self.ratio = ratio
        self.dropout = dropout

    def build(self, input_shape):
        dim = input_shape[-1]
        hidden = int(dim * self.ratio)
        policy = self.dtype_policy
        self.fc1 = projection(hidden, dtype=policy, name="fc1")
        self.drop1 = Dropout(self.dropout, dtype=policy, name="drop1")
        self.fc2 = projection(dim, dtype=policy, name="fc2")
        self.drop2 = Dropout(self.dropout, dtype=policy, name="drop2")
        self.fc1.build(input_shape)
        self.fc2.build((*input_shape[:-1], hidden))

    def call(self, x, training=False):
        x = self.drop1(gelu(self.fc1(x)), training=training)
        return self.drop2(self.fc2(x), training=training)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "ratio": self.ratio, "dropout": self.dropout}


@keras.saving.register_keras_serializable(package="keras_tnt")
class SqueezeExcite(CompositeLayer):
    """Adds to each channel a learned share of itself, read off the mean token (TNT's SE option).

    x becomes x + x * tanh(W2 relu(W1 LN(mean over tokens of x))).

    Args:
        reduction: input dimension over hidden dimension.
        epsilon: of the norm.

    Call arguments:
        x: `(batch, tokens, dim)`.
    """

    def __init__(self, reduction: int = 4, epsilon: float = 1e-5, **kwargs):
        super().__init__(**kwargs)
        self.reduction = reduction
        self.epsilon = epsilon

    def build(self, input_shape):
        dim = input_shape[-1]
        hidden = dim // self.reduction
        policy = self.dtype_policy
        self.norm = LayerNormalization(epsilon=self.epsilon, dtype=policy, name="norm")
        self.fc1 = projection(hidden, dtype=policy, name="fc1")
        self.fc2 = projection(dim, dtype=policy, name="fc2")
        self.norm.build((None, 1, dim))
        self.fc1.build((None, 1, dim))
        self.fc2.build((None, 1, hidden))

    def call(self, x):
        mean = self.norm(ops.mean(x, axis=1, keepdims=True))  # (b, 1, dim)
        return x + x * ops.tanh(self.fc2(ops.relu(self.fc1(mean))))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "reduction": self.reduction, "epsilon": self.epsilon}


def unchanged(x):
    """What stands in the place of a layer that a block is made without."""
    return x


class ResidualBlock(CompositeLayer):
    """Attention and MLP, each with a norm before it and its scale and drop behind it."""

    # Axes: of the norms' statistics and weights, and how many leading ones count samples.
    norm_axis = -1
    sample_axes = 1

    def __init__(
        self,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        dropout: float,
        attention_dropout: float,
        stochastic_depth: float,
        layer_scale: float | None,
        epsilon: float,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.qkv_bias = qkv_bias
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.stochastic_depth = stochastic_depth
        self.layer_scale = layer_scale
        self.epsilon = epsilon

    def attention_arguments(self):
        return {
            "num_heads": self.num_heads,
            "qkv_bias": self.qkv_bias,
            "attention_dropout": self.attention_dropout,
            "dropout": self.dropout,
            "dtype": self.dtype_policy,
            "name": "attention",
        }

    def make_attention(self):
        raise NotImplementedError

    def make_norm(self, name, input_shape):
        norm = LayerNormalization(
            self.norm_axis, epsilon=self.epsilon, dtype=self.dtype_policy, name=name
        )
        norm.build(input_shape)
        return norm

    def make_scale(self, name, input_shape):
        if self.layer_scale is None:
            return unchanged
        scale = LayerScale(self.layer_scale, dtype=self.dtype_policy, name=name)
        scale.build(input_shape)
        return scale

    def make_drop(self, name):
        return StochasticDepth(
            self.stochastic_depth, self.sample_axes, dtype=self.dtype_policy, name=name
        )

    def build(self, input_shape):
        self.norm_attention = self.make_norm("norm_attention", input_shape)
        self.scale_attention = self.make_scale("scale_attention", input_shape)
        self.drop_attention = self.make_drop("drop_attention")
        self.attention = self.make_attention()
        self.attention.build(input_shape)
        self.norm_mlp = self.make_norm("norm_mlp", input_shape)
        self.scale_mlp = self.make_scale("scale_mlp", input_shape)
        self.drop_mlp = self.make_drop("drop_mlp")
        self.mlp = MLP(self.mlp_ratio, self.dropout, dtype=self.dtype_policy, name="mlp")
        self.mlp.build(input_shape)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "qkv_bias": self.qkv_bias,
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "stochastic_depth": self.stochastic_depth,
            "layer_scale": self.layer_scale,
            "epsilon": self.epsilon,
        }


@keras.saving.register_keras_serializable(package="keras_tnt")
class TransformerBlock(ResidualBlock):
    """x += attention(LN(x)); x += MLP(LN(x)): TNT's inner and outer transformer, DeiT's block.

    Args:
        num_heads: number of heads; divides the input's last dimension.
        mlp_ratio: hidden dimension of the MLP over the input's.
        qkv_bias: whether query, key and value have a bias.
        dropout: dropout rate behind each projection, in [0, 1).
        attention_dropout: dropout rate on the attention, in [0, 1).
        stochastic_depth: rate at which samples skip a branch, in [0, 1).
        layer_scale: initial value of the LayerScale on each branch; None: no LayerScale.
        squeeze_excite: whether the MLP's output passes through `SqueezeExcite`.
        sample_axes: leading axes that count samples for stochastic depth: 2 for words.
        norm_axis: axis or axes of the norms' statistics and weights.
        epsilon: of the norms.

    Call arguments:
        x: `(batch, tokens, dim)`, or `(batch, patches, words, dim)`.
        bias: if given, added to the attention's scores.
        grid: if given, what an attention that must know the grid of the patches is called with.
        first_tokens: if given, only the first so many tokens are computed; the result is exact.

    Returns:
        `(batch, ..., first_tokens or tokens, dim)`.

    Example:

    >>> keras_tnt.layers.TransformerBlock(num_heads=4)(np.ones((2, 17, 32))).shape
    """

    part = "block"

    def __init__(
        self,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        layer_scale: float | None = None,
        squeeze_excite: bool = False,
        sample_axes: int = 1,
        norm_axis: int | tuple[int, ...] = -1,
        epsilon: float = 1e-5,
        **kwargs,
    ):
        super().__init__(
            num_heads,
            mlp_ratio,
            qkv_bias,
            dropout,
            attention_dropout,
            stochastic_depth,
            layer_scale,
            epsilon,
            **kwargs,
        )
        self.squeeze_excite = squeeze_excite
        self.sample_axes = sample_axes
        self.norm_axis = norm_axis

    def make_attention(self):
        return SelfAttention(**self.attention_arguments())

    def build(self, input_shape):
        super().build(input_shape)
        self.excite = unchanged
        if self.squeeze_excite:
            self.excite = SqueezeExcite(
                epsilon=self.epsilon, dtype=self.dtype_policy, name="excite"
            )
            self.excite.build(input_shape)

    def call(self, x, bias=None, grid=None, first_tokens=None, training=False):
        if bias is None and grid is None and first_tokens is None:
            found = fused.transformed(self, x, training=training)
            if found is not None:
                return found
        return self.transform(x, bias, grid, first_tokens, training)

    def transform(self, x, bias=None, grid=None, first_tokens=None, training=False):
        """What `call` gives, in operations of Keras."""
        at = {} if grid is None else {"grid": grid}
        # Squeeze-and-excitation reads every token: then all are computed and the rest cut off.
        computed = None if self.squeeze_excite else first_tokens
        branch = self.attention(
            self.norm_attention(x), bias=bias, first_tokens=computed, training=training, **at
        )
        branch = self.drop_attention(self.scale_attention(branch), training=training)
        x = take_first(x, computed) + branch
        branch = self.excite(self.mlp(self.norm_mlp(x), training=training))
        x = x + self.drop_mlp(self.scale_mlp(branch), training=training)
        return take_first(x, first_tokens)

    def compute_output_spec(self, x, bias=None, grid=None, first_tokens=None, training=False):
        return take_first_spec(x, first_tokens, self.compute_dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "squeeze_excite": self.squeeze_excite,
            "sample_axes": self.sample_axes,
            "norm_axis": self.norm_axis,
        }


@keras.saving.register_keras_serializable(package="keras_tnt")
class TalkingHeadBlock(TransformerBlock):
    """CaiT's block over the patches: `TransformerBlock` with `TalkingHeadAttention`."""

    def make_attention(self):
        return TalkingHeadAttention(**self.attention_arguments())


@keras.saving.register_keras_serializable(package="keras_tnt")
class TNTBlock(CompositeLayer):
    """The transformer in transformer block (TNT, equations 2 to 8).

    The inner transformer attends among the words of each patch, `WordsToPatches` adds its result to
    the patches, and the outer transformer attends among the tokens.

    Args:
        outer_heads, inner_heads: heads of the two transformers; divide their dimensions.
        mlp_ratio: hidden dimension of the MLPs over their inputs'.
        qkv_bias: whether query, key and value have a bias.
        dropout: dropout rate behind each projection, in [0, 1).
        attention_dropout: dropout rate on the attention, in [0, 1).
        stochastic_depth: rate at which a branch is skipped, in [0, 1): by a sample in the outer
            transformer, by a patch in the inner one.
        layer_scale: initial value of the LayerScale on each branch; None: no LayerScale.
        squeeze_excite: on the outer transformer's MLP.
        legacy: the words-to-patch projection of timm's first port.
        prefix_tokens: how many tokens stand before the patches; None: as the shapes tell.
        epsilon: of the norms.

    Call arguments:
        tokens: `(batch, prefix + patches, outer_dim)`, class and distillation token in front.
        words: `(batch, patches, words, inner_dim)`.
        bias: if given, added to the scores of the outer attention.
        grid: if given, what an outer attention that must know the grid is called with.
        first_tokens: if given, only the first so many tokens are computed; the result is exact.

    Returns:
        `(tokens, words)` of the same shapes, but for `first_tokens`.
    """

    part = "block"

    def __init__(
        self,
        outer_heads: int,
        inner_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        layer_scale: float | None = None,
        squeeze_excite: bool = False,
        legacy: bool = False,
        prefix_tokens: int | None = None,
        epsilon: float = 1e-5,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.outer_heads = outer_heads
        self.inner_heads = inner_heads
        self.mlp_ratio = mlp_ratio
        self.qkv_bias = qkv_bias
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.stochastic_depth = stochastic_depth
        self.layer_scale = layer_scale
        self.squeeze_excite = squeeze_excite
        self.legacy = legacy
        self.prefix_tokens = prefix_tokens
        self.epsilon = epsilon

    def transformer_arguments(self):
        """What the inner and the outer transformer have in common."""
        return {
            "mlp_ratio": self.mlp_ratio,
            "qkv_bias": self.qkv_bias,
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "stochastic_depth": self.stochastic_depth,
            "layer_scale": self.layer_scale,
            "epsilon": self.epsilon,
            "dtype": self.dtype_policy,
        }

    def make_inner(self):
        return TransformerBlock(
            self.inner_heads, sample_axes=2, name="inner", **self.transformer_arguments()
        )

    def make_outer(self):
        return TransformerBlock(
            self.outer_heads,
            squeeze_excite=self.squeeze_excite,
            name="outer",
            **self.transformer_arguments(),
        )

    def build(self, tokens_shape, words_shape):
        self.inner = self.make_inner()
        self.outer = self.make_outer()
        self.tokens_before = self.prefix_tokens
        if self.tokens_before is None:
            self.tokens_before = tokens_shape[1] - words_shape[1]
        project = LegacyWordsToPatches if self.legacy else WordsToPatches
        self.words_to_patches = project(
            tokens_shape[-1],
            use_bias=self.legacy,
            epsilon=self.epsilon,
            dtype=self.dtype_policy,
            name="words_to_patches",
        )
        self.inner.build(words_shape)
        self.words_to_patches.build(words_shape)
        self.outer.build(tokens_shape)

    def call(self, tokens, words, bias=None, grid=None, first_tokens=None, training=False):
        words = self.inner(words, training=training)
        patches = self.words_to_patches(words, training=training)  # (b, patches, outer_dim)
        tokens = tokens + ops.pad(patches, [[0, 0], [self.tokens_before, 0], [0, 0]])
        tokens = self.outer(
            tokens, bias=bias, grid=grid, first_tokens=first_tokens, training=training
        )
        return tokens, words

    def compute_output_shape(self, tokens_shape, words_shape):
        return tokens_shape, words_shape

    def compute_output_spec(
        self, tokens, words, bias=None, grid=None, first_tokens=None, training=False
    ):
        dtype = self.compute_dtype
        return take_first_spec(tokens, first_tokens, dtype), take_first_spec(words, None, dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "outer_heads": self.outer_heads,
            "inner_heads": self.inner_heads,
            "mlp_ratio": self.mlp_ratio,
            "qkv_bias": self.qkv_bias,
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "stochastic_depth": self.stochastic_depth,
            "layer_scale": self.layer_scale,
            "squeeze_excite": self.squeeze_excite,
            "legacy": self.legacy,
            "prefix_tokens": self.prefix_tokens,
            "epsilon": self.epsilon,
        }


@keras.saving.register_keras_serializable(package="keras_tnt")
class ClassAttentionBlock(ResidualBlock):
    """The class token reads the patches, which stay as they are (CaiT, section 3).

    Args:
        num_heads: number of heads; divides the input's last dimension.
        class_tokens: how many tokens in front read: 1, or 2 with a distillation token.
        mlp_ratio: hidden dimension of the MLP over the input's.
        qkv_bias: whether query, key and value have a bias.
        dropout: dropout rate behind each projection, in [0, 1).
        attention_dropout: dropout rate on the attention, in [0, 1).
        stochastic_depth: rate at which samples skip a branch, in [0, 1).
        layer_scale: initial value of the LayerScale on each branch; None: no LayerScale.
        epsilon: of the norms.

    Call arguments:
        x: `(batch, class_tokens + patches, dim)`.

    Returns:
        The same shape: the class tokens renewed, the patches unchanged.
    """

    part = "class_block"

    def __init__(
        self,
        num_heads: int,
        class_tokens: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        layer_scale: float | None = None,
        epsilon: float = 1e-5,
        **kwargs,
    ):
        super().__init__(
            num_heads,
            mlp_ratio,
            qkv_bias,
            dropout,
            attention_dropout,
            stochastic_depth,
            layer_scale,
            epsilon,
            **kwargs,
        )
        self.class_tokens = class_tokens

    def make_attention(self):
        return ClassAttention(class_tokens=self.class_tokens, **self.attention_arguments())

    def call(self, x, training=False):
        tokens, patches = x[:, : self.class_tokens], x[:, self.class_tokens :]
        branch = self.attention(self.norm_attention(x), training=training)
        tokens = tokens + self.drop_attention(self.scale_attention(branch), training=training)
        branch = self.mlp(self.norm_mlp(tokens), training=training)
        tokens = tokens + self.drop_mlp(self.scale_mlp(branch), training=training)
        return ops.concatenate([tokens, patches], axis=1)

    def get_config(self):
        return {**super().get_config(), "class_tokens": self.class_tokens}
