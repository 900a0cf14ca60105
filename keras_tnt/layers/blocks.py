"""Transformer block, TNT block and class-attention block, with the MLP and SE layers they use."""

import keras
from keras import ops

from keras_tnt.layers import fused
from keras_tnt.layers.attention import ClassAttention, SelfAttention, TalkingHeadAttention
from keras_tnt.layers.base import (
    CompositeLayer,
    LayerNormalization,
    gelu,
    projection,
    slice_tokens,
    slice_tokens_spec,
)
from keras_tnt.layers.embedding import LegacyWordsToPatches, WordsToPatches
from keras_tnt.layers.regularization import Dropout, LayerScale, StochasticDepth


@keras.saving.register_keras_serializable(package="keras_tnt")
class MLP(CompositeLayer):
    """Dense, exact GELU, and Dense back to the input's dimension.

    Args:
        ratio: hidden dimension divided by input dimension. Defaults to 4.
        dropout: dropout rate after each Dense, in [0, 1). Defaults to 0.
    """

    def __init__(self, ratio: float = 4.0, dropout: float = 0.0, **kwargs):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(**kwargs)
        self.ratio = ratio
        self.dropout = dropout

    def build(self, input_shape):
        """Builds the two Dense layers; the hidden dimension is `int(dim * ratio)`."""
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
        """Maps `(batch, ..., dim)` to the same shape."""
        x = self.drop1(gelu(self.fc1(x)), training=training)
        return self.drop2(self.fc2(x), training=training)

    def compute_output_shape(self, input_shape):
        """Returns `input_shape`."""
        return input_shape


@keras.saving.register_keras_serializable(package="keras_tnt")
class SqueezeExcite(CompositeLayer):
    """Residual channel gate computed from the mean token (TNT's squeeze-and-excitation option).

    x becomes x + x * tanh(W2 relu(W1 LN(mean over tokens of x))).

    Args:
        reduction: input dimension divided by hidden dimension. Defaults to 4.
        epsilon: epsilon of the layer norm. Defaults to 1e-5.

    Call arguments:
        x: `(batch, tokens, dim)`.
    """

    def __init__(self, reduction: int = 4, epsilon: float = 1e-5, **kwargs):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(**kwargs)
        self.reduction = reduction
        self.epsilon = epsilon

    def build(self, input_shape):
        """Builds the layer norm and the two Dense layers."""
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
        """Maps `(batch, tokens, dim)` to the same shape."""
        mean = self.norm(ops.mean(x, axis=1, keepdims=True))  # (b, 1, dim)
        return x + x * ops.tanh(self.fc2(ops.relu(self.fc1(mean))))

    def compute_output_shape(self, input_shape):
        """Returns `input_shape`."""
        return input_shape


def identity(x):
    """Returns `x`; the identity that replaces a disabled sublayer."""
    return x


class ResidualBlock(CompositeLayer):
    """Base class of pre-norm blocks: attention and MLP with LayerScale and stochastic depth."""

    # `norm_axis` is the axis, or axes, that the layer norms normalize. `sample_axes` is the number
    # of leading axes that stochastic depth treats as batch axes.
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
        """Initializes the arguments that all blocks share; subclasses document them."""
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
        """Returns the keyword arguments of the attention layer."""
        return {
            "num_heads": self.num_heads,
            "qkv_bias": self.qkv_bias,
            "attention_dropout": self.attention_dropout,
            "dropout": self.dropout,
            "dtype": self.dtype_policy,
            "name": "attention",
        }

    def build_attention(self):
        """Returns a new attention layer; subclasses implement this method."""
        raise NotImplementedError

    def build_norm(self, name, input_shape):
        """Returns a built layer norm over `norm_axis`."""
        norm = LayerNormalization(
            self.norm_axis, epsilon=self.epsilon, dtype=self.dtype_policy, name=name
        )
        norm.build(input_shape)
        return norm

    def build_scale(self, name, input_shape):
        """Returns a built `LayerScale`, or the identity if `layer_scale` is `None`."""
        if self.layer_scale is None:
            return identity
        scale = LayerScale(self.layer_scale, dtype=self.dtype_policy, name=name)
        scale.build(input_shape)
        return scale

    def build_drop(self, name):
        """Returns the stochastic depth of one residual branch."""
        return StochasticDepth(
            self.stochastic_depth, self.sample_axes, dtype=self.dtype_policy, name=name
        )

    def build(self, input_shape):
        """Builds the attention branch and the MLP branch."""
        self.norm_attention = self.build_norm("norm_attention", input_shape)
        self.scale_attention = self.build_scale("scale_attention", input_shape)
        self.drop_attention = self.build_drop("drop_attention")
        self.attention = self.build_attention()
        self.attention.build(input_shape)
        self.norm_mlp = self.build_norm("norm_mlp", input_shape)
        self.scale_mlp = self.build_scale("scale_mlp", input_shape)
        self.drop_mlp = self.build_drop("drop_mlp")
        self.mlp = MLP(self.mlp_ratio, self.dropout, dtype=self.dtype_policy, name="mlp")
        self.mlp.build(input_shape)

    def compute_output_shape(self, input_shape):
        """Returns `input_shape`."""
        return input_shape


@keras.saving.register_keras_serializable(package="keras_tnt")
class TransformerBlock(ResidualBlock):
    """Pre-norm transformer block: TNT's inner and outer transformer, and DeiT's block.

    It computes x += attention(LN(x)), then x += MLP(LN(x)).

    Args:
        num_heads: number of heads; divides the input's last dimension.
        mlp_ratio: hidden dimension of the MLP divided by the input's. Defaults to 4.
        qkv_bias: whether query, key and value have a bias. Defaults to `False`.
        dropout: dropout rate after each projection, in [0, 1). Defaults to 0.
        attention_dropout: dropout rate on the attention weights, in [0, 1). Defaults to 0.
        stochastic_depth: probability of dropping a sample's residual branch, in [0, 1). Defaults to
            0.
        layer_scale: initial value of the LayerScale on each branch. If `None`, there is no
            LayerScale.
        squeeze_excite: whether `SqueezeExcite` follows the MLP. Defaults to `False`.
        sample_axes: number of leading axes that stochastic depth treats as batch axes; 2 for words.
            Defaults to 1.
        norm_axis: axis or axes that the layer norms normalize. Defaults to -1.
        epsilon: epsilon of the layer norms. Defaults to 1e-5.

    Call arguments:
        x: `(batch, tokens, dim)`, or `(batch, patches, words, dim)`.
        bias: if given, added to the attention scores.
        grid: if given, tensor `(batch, rows, columns)` whose shape is the patch grid; passed to
            attention layers that need it.
        first_tokens: number N of leading query tokens. If given, only the first N output tokens are
            computed, with the same values as a slice of the full result.

    Returns:
        `(batch, ..., first_tokens or tokens, dim)`.

    Example:
        >>> keras_tnt.layers.TransformerBlock(num_heads=4)(np.ones((2, 17, 32))).shape
    """

    role = "block"

    # Whether `call` uses the C++ kernels if `keras_tnt.layers.fused` supports the call. If `False`,
    # the block is computed with Keras operations.
    native_kernels = True

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
        """Initializes the layer; the class docstring lists the arguments."""
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

    def build_attention(self):
        """Returns a new `SelfAttention`."""
        return SelfAttention(**self.attention_arguments())

    def build(self, input_shape):
        """Builds both branches, and `SqueezeExcite` if requested."""
        super().build(input_shape)
        self.excite = identity
        if self.squeeze_excite:
            self.excite = SqueezeExcite(
                epsilon=self.epsilon, dtype=self.dtype_policy, name="excite"
            )
            self.excite.build(input_shape)

    def call(self, x, bias=None, grid=None, first_tokens=None, training=False):
        """Maps `(batch, ..., tokens, dim)` to `(batch, ..., first_tokens or tokens, dim)`."""
        is_simple = bias is None and grid is None and first_tokens is None
        if is_simple and self.native_kernels:
            y = fused.transformed(self, x, training=training)
            if y is not None:
                return y
        return self.transform(x, bias, grid, first_tokens, training)

    def transform(self, x, bias=None, grid=None, first_tokens=None, training=False):
        """Computes `call` with Keras operations, without the C++ kernel."""
        # Squeeze-and-excitation averages over all tokens: they are sliced after it.
        queries = None if self.squeeze_excite else first_tokens
        options = {"bias": bias, "grid": grid, "first_tokens": queries, "training": training}
        branch = self.scale_attention(self.attention(self.norm_attention(x), **options))
        x = slice_tokens(x, queries) + self.drop_attention(branch, training=training)
        branch = self.excite(self.mlp(self.norm_mlp(x), training=training))
        x = x + self.drop_mlp(self.scale_mlp(branch), training=training)
        return slice_tokens(x, first_tokens)

    def compute_output_spec(self, x, bias=None, grid=None, first_tokens=None, training=False):
        """Returns the symbolic output, which has `first_tokens` tokens if that is given."""
        return slice_tokens_spec(x, first_tokens, self.compute_dtype)


@keras.saving.register_keras_serializable(package="keras_tnt")
class TalkingHeadBlock(TransformerBlock):
    """CaiT's block over the patches: `TransformerBlock` with `TalkingHeadAttention`."""

    def build_attention(self):
        """Returns a new `TalkingHeadAttention`."""
        return TalkingHeadAttention(**self.attention_arguments())


@keras.saving.register_keras_serializable(package="keras_tnt")
class TNTBlock(CompositeLayer):
    """Transformer-in-transformer block (TNT, equations 2 to 8).

    The inner transformer attends among the words of each patch, `WordsToPatches` adds its result to
    the patches, and the outer transformer attends among the tokens.

    Args:
        outer_heads: number of heads of the outer transformer; divides the dimension of a token.
        inner_heads: number of heads of the inner transformer; divides the dimension of a word.
        mlp_ratio: hidden dimension of the MLPs divided by their input dimension. Defaults to 4.
        qkv_bias: whether query, key and value have a bias. Defaults to `False`.
        dropout: dropout rate after each projection, in [0, 1). Defaults to 0.
        attention_dropout: dropout rate on the attention weights, in [0, 1). Defaults to 0.
        stochastic_depth: probability of dropping a residual branch, in [0, 1): per sample in the
            outer transformer, per patch in the inner one. Defaults to 0.
        layer_scale: initial value of the LayerScale on each branch. If `None`, there is no
            LayerScale.
        squeeze_excite: whether `SqueezeExcite` follows the outer MLP. Defaults to `False`.
        legacy: whether to use the word-to-patch projection of timm's first port. Defaults to
            `False`.
        prefix_tokens: number of tokens before the patches. If `None`, it is inferred from the
            shapes.
        epsilon: epsilon of the layer norms. Defaults to 1e-5.

    Call arguments:
        tokens: `(batch, prefix + patches, outer_dim)`, class and distillation token first.
        words: `(batch, patches, words, inner_dim)`.
        bias: if given, added to the scores of the outer attention.
        grid: if given, tensor `(batch, rows, columns)` whose shape is the patch grid; passed to
            outer attention layers that need it.
        first_tokens: number N of leading query tokens. If given, only the first N output tokens are
            computed, with the same values as a slice of the full result.

    Returns:
        `(tokens, words)`: the input shapes, except that `tokens` has `first_tokens` tokens if
        given.
    """

    role = "block"

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
        """Initializes the layer; the class docstring lists the arguments."""
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
        """Returns the keyword arguments that the inner and the outer transformer share."""
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

    def build_inner(self):
        """Returns a new inner transformer, which drops branches per patch."""
        return TransformerBlock(
            self.inner_heads, sample_axes=2, name="inner", **self.transformer_arguments()
        )

    def build_outer(self):
        """Returns a new outer transformer."""
        return TransformerBlock(
            self.outer_heads,
            squeeze_excite=self.squeeze_excite,
            name="outer",
            **self.transformer_arguments(),
        )

    def build(self, tokens_shape, words_shape):
        """Builds both transformers and the word-to-patch projection."""
        self.inner = self.build_inner()
        self.outer = self.build_outer()
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
        """Maps tokens and words to the updated tokens and words, of the same shapes."""
        words = self.inner(words, training=training)
        patches = self.words_to_patches(words, training=training)  # (b, patches, outer_dim)
        tokens = tokens + ops.pad(patches, [[0, 0], [self.tokens_before, 0], [0, 0]])
        tokens = self.outer(
            tokens, bias=bias, grid=grid, first_tokens=first_tokens, training=training
        )
        return tokens, words

    def compute_output_shape(self, tokens_shape, words_shape):
        """Returns both input shapes, the output shapes without `first_tokens`."""
        return tokens_shape, words_shape

    def compute_output_spec(
        self, tokens, words, bias=None, grid=None, first_tokens=None, training=False
    ):
        """Returns the symbolic tokens, of which there are `first_tokens` if given, and words."""
        dtype = self.compute_dtype
        return slice_tokens_spec(tokens, first_tokens, dtype), slice_tokens_spec(words, None, dtype)


@keras.saving.register_keras_serializable(package="keras_tnt")
class ClassAttentionBlock(ResidualBlock):
    """CaiT's class-attention block, which updates only the class tokens (section 3).

    Args:
        num_heads: number of heads; divides the input's last dimension.
        class_tokens: number of leading query (class) tokens: 1, or 2 with a distillation token.
            Defaults to 1.
        mlp_ratio: hidden dimension of the MLP divided by the input's. Defaults to 4.
        qkv_bias: whether query, key and value have a bias. Defaults to `False`.
        dropout: dropout rate after each projection, in [0, 1). Defaults to 0.
        attention_dropout: dropout rate on the attention weights, in [0, 1). Defaults to 0.
        stochastic_depth: probability of dropping a sample's residual branch, in [0, 1). Defaults to
            0.
        layer_scale: initial value of the LayerScale on each branch. If `None`, there is no
            LayerScale.
        epsilon: epsilon of the layer norms. Defaults to 1e-5.

    Call arguments:
        x: `(batch, class_tokens + patches, dim)`.

    Returns:
        The same shape: the class tokens updated, the patches unchanged.
    """

    role = "class_block"

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
        """Initializes the layer; the class docstring lists the arguments."""
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

    def build_attention(self):
        """Returns a new `ClassAttention`."""
        return ClassAttention(class_tokens=self.class_tokens, **self.attention_arguments())

    def call(self, x, training=False):
        """Maps `(batch, class_tokens + patches, dim)` to the same shape."""
        tokens, patches = x[:, : self.class_tokens], x[:, self.class_tokens :]
        branch = self.attention(self.norm_attention(x), training=training)
        tokens = tokens + self.drop_attention(self.scale_attention(branch), training=training)
        branch = self.mlp(self.norm_mlp(tokens), training=training)
        tokens = tokens + self.drop_mlp(self.scale_mlp(branch), training=training)
        return ops.concatenate([tokens, patches], axis=1)
