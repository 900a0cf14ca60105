"""When the inner transformer is computed in C++, and with which of its weights.

It is wherever words are transformed on a CPU, to train or to predict, if the block is nothing but
norms, self-attention, MLP and residuals in float32, without dropout, among words that fill the
processor's vectors.
"""

import keras
from keras import ops

from keras_tnt import native
from keras_tnt.layers.attention import SelfAttention
from keras_tnt.layers.base import inference_device, link_observer
from keras_tnt.native import runtimes


def inner_transformer(block, words, training=False):
    """`block(words, training=training)`, in C++ where that is possible.

    Args:
        block: a built `TransformerBlock`.
        words: `(batch, patches, words, dim)`.
        training: whether the block trains.

    Returns:
        Words of the same shape.
    """
    operator = operator_for(block, words.shape) if runs_here(block, words, training) else None
    if operator is None:
        return block(words, training=training)
    keep = keep_of(block, words) if training and block.stochastic_depth else None
    return operator(words, weights_of(block, words.shape), block.epsilon, keep)


def runs_here(block, words, training):
    """Whether the block is to be computed on a CPU of this process, unobserved, without dropout."""
    if link_observer() is not None or training and (block.dropout or block.attention_dropout):
        return False
    if inference_device() is not None:
        return inference_device() == "cpu" and not training
    return runtimes.runs_here(keras.backend.backend(), words, training)


def keep_of(block, words):
    """What stochastic depth multiplies the two branches by, `(2, batch, patches)`."""
    ones = ops.ones_like(words[..., :1, :1])
    drops = block.drop_attention, block.drop_mlp
    return ops.stack([drop(ones, training=True)[..., 0, 0] for drop in drops])


def operator_for(block, words_shape):
    """What `runtimes.operator` gives for a block; None where there is no C++ for it."""
    if len(words_shape) != 4 or words_shape[2] % native.LANES or not is_plain(block):
        return None
    sizes = native.Sizes(
        *words_shape[2:],
        heads=block.num_heads,
        hidden=block.mlp.fc1.units,
        across_words=len(block.norm_attention.axis) > 1,
    )
    return runtimes.operator(keras.backend.backend(), sizes)


def is_plain(block):
    """Whether a block is nothing but norms, self-attention, MLP and residuals in float32."""
    if block.squeeze_excite or type(block.attention) is not SelfAttention:
        return False
    dense = block.attention.qkv, block.attention.projection, block.mlp.fc1, block.mlp.fc2
    return all(
        layer.compute_dtype == "float32" and layer.quantization_mode is None for layer in dense
    )


def weights_of(block, words_shape):
    """A block's weights as `native.Weights`."""
    qkv, projection = block.attention.qkv, block.attention.projection
    scale_attention = scale_mlp = None
    if block.layer_scale is not None:
        scale_attention, scale_mlp = block.scale_attention.gamma, block.scale_mlp.gamma
    return native.Weights(
        *norm_weights(block.norm_attention, words_shape),
        *dense_weights(qkv),
        *dense_weights(projection, scale_attention),
        *norm_weights(block.norm_mlp, words_shape),
        *dense_weights(block.mlp.fc1),
        *dense_weights(block.mlp.fc2, scale_mlp),
    )


def norm_weights(norm, words_shape):
    """Scale and offset of a norm, each `(dim, words)`."""
    words, dim = words_shape[2:]
    for weight in (norm.gamma, norm.beta):  # (dim,) or (words, dim)
        columns = ops.transpose(ops.reshape(weight, (-1, dim)))  # (dim, 1 or words)
        yield ops.broadcast_to(columns, (dim, words))


def dense_weights(layer, scale=None):
    """Kernel and bias of a dense layer, with the LayerScale that follows it."""
    bias = ops.zeros(layer.units) if layer.bias is None else layer.bias
    for weight in (layer.kernel, bias):
        weight = ops.convert_to_tensor(weight)
        yield weight if scale is None else weight * scale
