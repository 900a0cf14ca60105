"""One block, one layer: the transformer block, the TNT block, the class-attention block."""

import keras
from keras import ops

from keras_tnt.layers.attention import ClassAttention, SelfAttention, TalkingHeadAttention
from keras_tnt.layers.base import (
    CompositeLayer,
    LayerNormalization,
    gelu,
    program_device,
    projection,
    take_first,
    take_first_spec,
)
from keras_tnt.layers.embedding import LegacyWordsToPatches, WordsToPatches
from keras_tnt.layers.fused import inner_transformer
from keras_tnt.layers.regularization import Dropout, LayerScale, StochasticDepth


@keras.saving.register_keras_serializable(package="keras_tnt")
class MLP(CompositeLayer):
    """Dense, exact GELU, Dense back to the input's dimension.

    Args:
        ratio: hidden dimension over input dimension.
        dropout: dropout rate after each Dense, in [0, 1).
    """

    def __init__(self, ratio=4.0, dropout=0.0, **kwargs):
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

    def __init__(self, reduction=4, epsilon=1e-5, **kwargs):
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


class ResidualBlock(CompositeLayer):
    """What the blocks share: pre-norm branches, each scaled, dropped and added to its residual."""

    def __init__(
        self,
        num_heads,
        mlp_ratio=4.0,
        qkv_bias=False,
        dropout=0.0,
        attention_dropout=0.0,
        stochastic_depth=0.0,
        layer_scale=None,
        epsilon=1e-5,
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

    def build_branch(self, name, input_shape, sample_axes=1, norm_axis=-1):
        """The norm before branch `name` and the scale and drop behind it."""
        policy = self.dtype_policy
        norm = LayerNormalization(
            norm_axis, epsilon=self.epsilon, dtype=policy, name=f"norm_{name}"
        )
        norm.build(input_shape)
        setattr(self, f"norm_{name}", norm)
        if self.layer_scale is not None:
            scale = LayerScale(self.layer_scale, dtype=policy, name=f"scale_{name}")
            scale.build(input_shape)
            setattr(self, f"scale_{name}", scale)
        drop = StochasticDepth(
            self.stochastic_depth, sample_axes, dtype=policy, name=f"drop_{name}"
        )
        setattr(self, f"drop_{name}", drop)

    def add_branch(self, name, residual, branch, training):
        if self.layer_scale is not None:
            branch = getattr(self, f"scale_{name}")(branch)
        return residual + getattr(self, f"drop_{name}")(branch, training=training)

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
        first_tokens: if given, only the first so many tokens are computed; the result is exact.

    Returns:
        `(batch, ..., first_tokens or tokens, dim)`.

    Example:

    >>> keras_tnt.layers.TransformerBlock(num_heads=4)(np.ones((2, 17, 32))).shape
    """

    part = "block"

    def __init__(self, num_heads, squeeze_excite=False, sample_axes=1, norm_axis=-1, **kwargs):
        super().__init__(num_heads, **kwargs)
        self.squeeze_excite = squeeze_excite
        self.sample_axes = sample_axes
        self.norm_axis = norm_axis

    def make_attention(self):
        return SelfAttention(**self.attention_arguments())

    def build(self, input_shape):
        self.build_branch("attention", input_shape, self.sample_axes, self.norm_axis)
        self.attention = self.make_attention()
        self.attention.build(input_shape)
        self.build_branch("mlp", input_shape, self.sample_axes, self.norm_axis)
        self.mlp = MLP(self.mlp_ratio, self.dropout, dtype=self.dtype_policy, name="mlp")
        self.mlp.build(input_shape)
        if self.squeeze_excite:
            self.excite = SqueezeExcite(
                epsilon=self.epsilon, dtype=self.dtype_policy, name="excite"
            )
            self.excite.build(input_shape)

    def call(self, x, bias=None, first_tokens=None, training=False):
        fused = None
        if program_device.get() == "cpu" and self.is_plain(bias, first_tokens, training):
            fused = self.fused(x)
        if fused is not None:
            return fused(x, self.fused_weights(x.shape), self.epsilon)
        # Squeeze-and-excitation reads every token: then all are computed and the rest cut off.
        computed = None if self.squeeze_excite else first_tokens
        attended = self.attention(
            self.norm_attention(x), bias=bias, first_tokens=computed, training=training
        )
        x = self.add_branch("attention", take_first(x, computed), attended, training)
        hidden = self.mlp(self.norm_mlp(x), training=training)
        if self.squeeze_excite:
            hidden = self.excite(hidden)
        return take_first(self.add_branch("mlp", x, hidden, training), first_tokens)

    def is_plain(self, bias, first_tokens, training):
        """Whether this call is nothing but norms, self-attention, MLP and residuals in float32."""
        plain = bias is None and first_tokens is None and not training and not self.squeeze_excite
        if not plain or type(self.attention) is not SelfAttention:
            return False
        dense = self.attention.qkv, self.attention.projection, self.mlp.fc1, self.mlp.fc2
        return all(
            layer.compute_dtype == "float32" and layer.quantization_mode is None for layer in dense
        )

    def fused(self, x):
        """This block in C++; None where there is none."""
        return inner_transformer(
            x,
            heads=self.num_heads,
            hidden=self.mlp.fc1.units,
            across_words=len(self.norm_attention.axis) > 1,
        )

    def fused_weights(self, input_shape):
        """The weights as the C++ takes them: of norms (dim, words), of the rest with LayerScale."""
        shape = input_shape[-1:-3:-1]  # (dim, words)
        weights = []
        for name, layers in (
            ("attention", (self.attention.qkv, self.attention.projection)),
            ("mlp", (self.mlp.fc1, self.mlp.fc2)),
        ):
            norm = getattr(self, f"norm_{name}")
            for weight in (norm.gamma, norm.beta):  # (dim,) or (words, dim)
                columns = ops.transpose(ops.reshape(weight, (-1, shape[0])))
                weights.append(ops.broadcast_to(columns, shape))
            for layer in layers:
                bias = ops.zeros(layer.units) if layer.bias is None else layer.bias
                weights += [ops.convert_to_tensor(layer.kernel), ops.convert_to_tensor(bias)]
            if self.layer_scale is not None:
                scale = ops.convert_to_tensor(getattr(self, f"scale_{name}").gamma)
                weights[-2:] = weights[-2] * scale, weights[-1] * scale
        return weights

    def compute_output_shape(self, input_shape):
        return input_shape

    def compute_output_spec(self, x, bias=None, first_tokens=None, training=False):
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
        outer_heads, inner_heads: heads of the two transformers.
        legacy: the words-to-patch projection of timm's first port.
        squeeze_excite: on the outer transformer's MLP.
        mlp_ratio, qkv_bias, dropout, attention_dropout, stochastic_depth, layer_scale, epsilon:
            of both transformers, as `TransformerBlock` has them.

    Call arguments:
        tokens: `(batch, prefix + patches, outer_dim)`, class and distillation token in front.
        words: `(batch, patches, words, inner_dim)`.
        bias: if given, added to the scores of the outer attention.
        first_tokens: if given, only the first so many tokens are computed; the result is exact.

    Returns:
        `(tokens, words)` of the same shapes.
    """

    part = "block"

    def __init__(
        self, outer_heads, inner_heads, legacy=False, squeeze_excite=False, epsilon=1e-5, **kwargs
    ):
        layer = {key: kwargs.pop(key) for key in ("name", "dtype", "trainable") if key in kwargs}
        super().__init__(**layer)
        self.outer_heads = outer_heads
        self.inner_heads = inner_heads
        self.legacy = legacy
        self.squeeze_excite = squeeze_excite
        self.epsilon = epsilon
        self.transformer = kwargs

    def make_inner(self, **common):
        return TransformerBlock(self.inner_heads, sample_axes=2, **common)

    def make_outer(self, **common):
        return TransformerBlock(self.outer_heads, squeeze_excite=self.squeeze_excite, **common)

    def build(self, tokens_shape, words_shape):
        common = {**self.transformer, "epsilon": self.epsilon, "dtype": self.dtype_policy}
        self.inner = self.make_inner(name="inner", **common)
        self.outer = self.make_outer(name="outer", **common)
        self.prefix_tokens = tokens_shape[1] - words_shape[1]
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

    def call(self, tokens, words, bias=None, first_tokens=None, training=False):
        words = self.inner(words, training=training)
        patches = self.words_to_patches(words)  # (b, patches, outer_dim)
        tokens = tokens + ops.pad(patches, [[0, 0], [self.prefix_tokens, 0], [0, 0]])
        return self.outer(tokens, bias=bias, first_tokens=first_tokens, training=training), words

    def compute_output_shape(self, tokens_shape, words_shape):
        return tokens_shape, words_shape

    def compute_output_spec(self, tokens, words, bias=None, first_tokens=None, training=False):
        dtype = self.compute_dtype
        return take_first_spec(tokens, first_tokens, dtype), take_first_spec(words, None, dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "outer_heads": self.outer_heads,
            "inner_heads": self.inner_heads,
            "legacy": self.legacy,
            "squeeze_excite": self.squeeze_excite,
            "epsilon": self.epsilon,
            **self.transformer,
        }


@keras.saving.register_keras_serializable(package="keras_tnt")
class ClassAttentionBlock(ResidualBlock):
    """The class token reads the patches, which stay as they are (CaiT, section 3).

    Args:
        class_tokens: how many class tokens read: 1, or 2 with a distillation token.
        num_heads, mlp_ratio, qkv_bias, dropout, attention_dropout, stochastic_depth, layer_scale,
            epsilon: as `TransformerBlock` has them.

    Call arguments:
        x: `(batch, class_tokens + patches, dim)`.

    Returns:
        The same shape: the class tokens renewed, the patches unchanged.
    """

    part = "class_block"

    def __init__(self, num_heads, class_tokens=1, **kwargs):
        super().__init__(num_heads, **kwargs)
        self.class_tokens = class_tokens

    def build(self, input_shape):
        self.build_branch("attention", input_shape)
        self.attention = ClassAttention(
            class_tokens=self.class_tokens, **self.attention_arguments()
        )
        self.attention.build(input_shape)
        self.build_branch("mlp", input_shape)
        self.mlp = MLP(self.mlp_ratio, self.dropout, dtype=self.dtype_policy, name="mlp")
        self.mlp.build(input_shape)

    def call(self, x, training=False):
        token, patches = x[:, : self.class_tokens], x[:, self.class_tokens :]
        attended = self.attention(self.norm_attention(x), training=training)
        token = self.add_branch("attention", token, attended, training)
        hidden = self.mlp(self.norm_mlp(token), training=training)
        token = self.add_branch("mlp", token, hidden, training)
        return ops.concatenate([token, patches], axis=1)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "class_tokens": self.class_tokens}
