"""When the inner transformer is computed in C++, and with which of its weights.

It is where `keras_tnt.compile_inference` compiles for a CPU, and where torch trains on one, if the
block is nothing but norms, self-attention, MLP and residuals in float32, without dropout, among
words that fill the processor's vectors.
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
    operator = None
    if learns(block, words) if training else inference_device() == "cpu":
        operator = operator_for(block, words.shape)
    if operator is None:
        return block(words, training=training)
    weights = weights_of(block, words.shape)
    if not training:
        return operator(words, weights, block.epsilon)
    return operator(words, weights, block.epsilon, keep_of(block, words))


def learns(block, words):
    """Whether a block may train in C++ here."""
    return (
        keras.backend.backend() in runtimes.LEARNS
        and words.device.type == "cpu"
        and not (block.dropout or block.attention_dropout)
        and link_observer() is None
    )


def keep_of(block, words):
    """What stochastic depth multiplies the two branches by, `(2, batch, patches)`."""
    ones = ops.ones((*words.shape[:2], 1, 1))
    drops = block.drop_attention, block.drop_mlp
    return ops.stack([drop(ones, training=True)[..., 0, 0] for drop in drops])


def operator_for(block, words_shape):
    """What `runtimes.operator` gives for a block; None where there is no C++ for it."""
    if len(words_shape) != 4 or words_shape[2] % native.LANES or not is_plain(block):
        return None
    if None in words_shape:  # which a graph of TensorFlow's has yet to come
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
