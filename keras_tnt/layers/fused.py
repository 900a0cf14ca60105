"""What is computed in C++, when, and with which weights.

A transformer block among the words of patches is wherever a CPU computes, to train or to predict;
one among the patches, and what words become patches by, where a CPU trains, or predicts with
products in bfloat16 that its own instructions compute. In either case the block has to be nothing
but norms, self-attention, MLP and residuals, all but the products in float32, without dropout; and
words have to fill the processor's vectors.
"""

import keras
from keras import ops

from keras_tnt import native
from keras_tnt.layers.attention import SelfAttention
from keras_tnt.layers.base import inference_device, link_observer
from keras_tnt.layers.sharding import batch_axes
from keras_tnt.native import runtimes


def transformed(block, x, training=False):
    """What a block makes of words or tokens, in C++.

    Args:
        block: a built `TransformerBlock`.
        x: `(batch, patches, words, dim)` or `(batch, tokens, dim)`.
        training: whether the block trains.

    Returns:
        The same shape; None where there is no C++ for it, so that the block computes itself.
    """
    if not is_plain(block) or training and (block.dropout or block.attention_dropout):
        return None
    attention, mlp = block.attention, block.mlp
    dtype = dtype_of(attention.qkv, attention.projection, mlp.fc1, mlp.fc2)
    if not runs_here(x, training, dtype):
        return None
    sizes = sizes_of(block, x.shape, half=dtype == "bfloat16")
    operator = sizes and runtimes.operator(keras.backend.backend(), sizes)
    if operator is None:
        return None
    weights = weights_of(block, x.shape)
    if not in_float32(x, *weights):
        return None
    keep = keep_of(block, x) if training and block.stochastic_depth else None
    return operator(x, weights, block.epsilon, keep)


def projected(layer, x, training=False):
    """What a layer makes of words, in C++.

    Args:
        layer: a built `WordsToPatches`.
        x: `(batch, patches, inputs)`, the words of each patch side by side.
        training: whether the layer trains.

    Returns:
        `(batch, patches, dim)`; None where there is no C++ for it.
    """
    if layer.compute_dtype != "float32":
        return None
    dtype = dtype_of(layer.projection)
    if not runs_here(x, training, dtype):
        return None
    sizes = patch_sizes_of(layer, x.shape[-1], half=dtype == "bfloat16")
    operator = sizes and runtimes.operator(keras.backend.backend(), sizes)
    if operator is None:
        return None
    weights = native.PatchWeights(
        *norm_weights(layer.norm_words, x.shape),
        *dense_weights(layer.projection),
        *norm_weights(layer.norm_patches, x.shape),
    )
    return operator(x, weights, layer.epsilon) if in_float32(x, *weights) else None


def in_float32(*tensors):
    return all(keras.backend.standardize_dtype(x.dtype) == "float32" for x in tensors)


def runs_here(x, training, dtype):
    """Whether something is to be computed on a CPU of this process, unobserved, and best in C++.

    Args:
        x: words or tokens.
        training: whether it is for training.
        dtype: in which it multiplies.
    """
    among_words = len(x.shape) == 4
    if link_observer() is not None or dtype not in ("float32", "bfloat16"):
        return False
    if batch_axes(x) is not None:
        return False
    if dtype == "float32" and not (training or among_words) or dtype == "bfloat16" and training:
        return False
    if inference_device() is not None:
        return inference_device() == "cpu" and not training
    return runtimes.runs_here(keras.backend.backend(), x, training)


def keep_of(block, x):
    """What stochastic depth multiplies the branches by, `(2, batch, patches)` or `(2, batch)`."""
    ones = ops.ones_like(x[..., :1, :1])
    drops = block.drop_attention, block.drop_mlp
    return ops.stack([drop(ones, training=True)[..., 0, 0] for drop in drops])


def sizes_of(block, shape, half):
    """The `native.Sizes` of a block for words or tokens of a shape.

    Args:
        block: a built `TransformerBlock`.
        shape: of the words or tokens.
        half: whether it is to multiply in bfloat16, not float32.

    Returns:
        None where there is no C++ for it.
    """
    rank = len(shape)
    if not is_plain(block) or block.stochastic_depth and block.sample_axes > rank - 2:
        return None
    axes = sorted(axis % rank for axis in block.norm_attention.axis)
    across_words = axes == [2, 3]
    if not across_words and axes != [rank - 1]:
        return None
    heads, hidden = block.num_heads, block.mlp.fc1.units
    if half and not native.takes_half(shape[-1] // heads, hidden):
        return None
    if rank == 3:
        return native.OuterSizes(heads, hidden, half)
    if rank == 4 and shape[2] % native.LANES == 0:
        sizes = native.InnerSizes(*shape[2:], heads, hidden, across_words, half)
        return sizes if sizes.fits_stack() else None
    return None


def patch_sizes_of(layer, inputs, half):
    """The `native.PatchSizes` of a `WordsToPatches` for so many numbers a patch, as `sizes_of`."""
    return None if half and not native.takes_half(inputs) else native.PatchSizes(layer.dim, half)


def is_plain(block):
    """Whether a block is nothing but norms, self-attention, MLP and residuals in float32."""
    if block.compute_dtype != "float32" or block.squeeze_excite:
        return False
    return type(block.attention) is SelfAttention


def dtype_of(*dense):
    """In which type dense layers multiply; None where they differ, or are quantized."""
    dtypes = {layer.compute_dtype for layer in dense}
    quantized = any(layer.quantization_mode is not None for layer in dense)
    return dtypes.pop() if len(dtypes) == 1 and not quantized else None


def weights_of(block, shape):
    """A block's weights as `native.Weights`, for words or tokens of a shape."""
    qkv, projection = block.attention.qkv, block.attention.projection
    scale_attention = scale_mlp = None
    if block.layer_scale is not None:
        scale_attention, scale_mlp = block.scale_attention.gamma, block.scale_mlp.gamma
    return native.Weights(
        *norm_weights(block.norm_attention, shape),
        *dense_weights(qkv),
        *dense_weights(projection, scale_attention),
        *norm_weights(block.norm_mlp, shape),
        *dense_weights(block.mlp.fc1),
        *dense_weights(block.mlp.fc2, scale_mlp),
    )


def norm_weights(norm, shape):
    """Scale and offset of a norm, each `(dim, words)`, or `(dim,)` for tokens."""
    for weight in (norm.gamma, norm.beta):  # (dim,) or (words, dim)
        if len(shape) == 3:
            yield ops.convert_to_tensor(weight)
            continue
        words, dim = shape[2:]
        columns = ops.transpose(ops.reshape(weight, (-1, dim)))  # (dim, 1 or words)
        yield ops.broadcast_to(columns, (dim, words))


def dense_weights(layer, scale=None):
    """Kernel and bias of a dense layer, with the LayerScale that follows it."""
    bias = ops.zeros(layer.units) if layer.bias is None else layer.bias
    for weight in (layer.kernel, bias):
        weight = ops.convert_to_tensor(weight)
        yield weight if scale is None else weight * scale
