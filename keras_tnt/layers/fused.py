"""Dispatch of layers to the C++ kernels.

Inner (word) blocks use the kernels on CPUs for training and inference. Outer (patch) blocks and the
word-to-patch projection use them only for training, and for bfloat16 inference on CPUs with
AVX512-BF16. Blocks must be pre-norm self-attention and MLP without squeeze-and-excitation, without
dropout while training, and in float32 outside matrix products. The number of words must be
divisible by the SIMD width.
"""

import keras
from keras import ops

from keras_tnt import kernels
from keras_tnt.kernels import runtimes
from keras_tnt.layers.attention import SelfAttention
from keras_tnt.layers.base import attention_interceptor, inference_device
from keras_tnt.layers.sharding import batch_axes


def transformed(block, x, training=False):
    """Runs a transformer block in C++.

    Args:
        block: a built `TransformerBlock`.
        x: `(batch, patches, words, dim)` or `(batch, tokens, dim)`.
        training: whether the call is for training. Defaults to `False`.

    Returns:
        A tensor of the same shape, or `None` if the kernel does not support the block.
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
    """Runs a word-to-patch projection in C++.

    Args:
        layer: a built `WordsToPatches`.
        x: `(batch, patches, words * inner_dim)`, the concatenated words of each patch.
        training: whether the call is for training. Defaults to `False`.

    Returns:
        `(batch, patches, dim)`, or `None` if the kernel does not support the layer.
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
    weights = kernels.PatchWeights(
        *norm_weights(layer.norm_words, x.shape),
        *dense_weights(layer.projection),
        *norm_weights(layer.norm_patches, x.shape),
    )
    return operator(x, weights, layer.epsilon) if in_float32(x, *weights) else None


def in_float32(*tensors):
    """Returns whether all tensors are in float32."""
    return all(keras.backend.standardize_dtype(x.dtype) == "float32" for x in tensors)


def runs_here(x, training, dtype):
    """Returns whether to use the C++ kernel for this call.

    The call must be eager or traced for a CPU of this process, without an attention observer and
    without an explicit JAX mesh. float32 outside of word blocks is supported for training alone,
    bfloat16 for inference alone.

    Args:
        x: words `(batch, patches, words, dim)`, or a tensor of rank 3.
        training: whether the call is for training.
        dtype: dtype of the matrix products, as `dtype_of` returns it.
    """
    among_words = len(x.shape) == 4
    if attention_interceptor() is not None or dtype not in ("float32", "bfloat16"):
        return False
    if batch_axes(x) is not None:
        return False
    if dtype == "float32" and not (training or among_words) or dtype == "bfloat16" and training:
        return False
    if inference_device() is not None:
        return inference_device() == "cpu" and not training
    return runtimes.runs_here(keras.backend.backend(), x, training)


def keep_of(block, x):
    """Returns the drop-path masks of both branches, `(2, batch, patches)` or `(2, batch)`."""
    ones = ops.ones_like(x[..., :1, :1])
    drops = block.drop_attention, block.drop_mlp
    return ops.stack([drop(ones, training=True)[..., 0, 0] for drop in drops])


def sizes_of(block, shape, half):
    """Returns the native sizes of a block for inputs of a shape.

    Args:
        block: a built `TransformerBlock`.
        shape: shape of the words or tokens.
        half: whether matrix products are in bfloat16 instead of float32.

    Returns:
        `kernels.InnerSizes` for words, `kernels.OuterSizes` for tokens, or `None` if the kernel
        does not support the block.
    """
    rank = len(shape)
    if not is_plain(block) or block.stochastic_depth and block.sample_axes > rank - 2:
        return None
    axes = sorted(axis % rank for axis in block.norm_attention.axis)
    across_words = axes == [2, 3]
    if not across_words and axes != [rank - 1]:
        return None
    heads, hidden = block.num_heads, block.mlp.fc1.units
    if half and not kernels.takes_half(shape[-1] // heads, hidden):
        return None
    if rank == 3:
        return kernels.OuterSizes(heads, hidden, half)
    if rank == 4 and shape[2] % kernels.LANES == 0:
        sizes = kernels.InnerSizes(*shape[2:], heads, hidden, across_words, half)
        return sizes if sizes.fits_stack() else None
    return None


def patch_sizes_of(layer, inputs, half):
    """Returns the native sizes of a word-to-patch projection.

    Args:
        layer: a built `WordsToPatches`.
        inputs: `words * inner_dim`, the number of inputs per patch.
        half: whether the matrix product is in bfloat16 instead of float32.

    Returns:
        `kernels.PatchSizes`, or `None` if the kernel does not support the layer.
    """
    return None if half and not kernels.takes_half(inputs) else kernels.PatchSizes(layer.dim, half)


def is_plain(block):
    """Returns whether a block is in float32, has `SelfAttention` and no `SqueezeExcite`."""
    if block.compute_dtype != "float32" or block.squeeze_excite:
        return False
    return type(block.attention) is SelfAttention


def dtype_of(*dense):
    """Returns the common matmul dtype of dense layers; `None` if they differ or are quantized."""
    dtypes = {layer.compute_dtype for layer in dense}
    quantized = any(layer.quantization_mode is not None for layer in dense)
    return dtypes.pop() if len(dtypes) == 1 and not quantized else None


def weights_of(block, shape):
    """Returns a block's weights as `kernels.Weights`, for words or tokens of a shape."""
    qkv, projection = block.attention.qkv, block.attention.projection
    scale_attention = scale_mlp = None
    if block.layer_scale is not None:
        scale_attention, scale_mlp = block.scale_attention.gamma, block.scale_mlp.gamma
    return kernels.Weights(
        *norm_weights(block.norm_attention, shape),
        *dense_weights(qkv),
        *dense_weights(projection, scale_attention),
        *norm_weights(block.norm_mlp, shape),
        *dense_weights(block.mlp.fc1),
        *dense_weights(block.mlp.fc2, scale_mlp),
    )


def norm_weights(norm, shape):
    """Yields scale and offset of a layer norm, each `(dim, words)`, or `(dim,)` for tokens."""
    for weight in (norm.gamma, norm.beta):  # (dim,) or (words, dim)
        if len(shape) == 3:
            yield ops.convert_to_tensor(weight)
            continue
        words, dim = shape[2:]
        columns = ops.transpose(ops.reshape(weight, (-1, dim)))  # (dim, 1 or words)
        yield ops.broadcast_to(columns, (dim, words))


def dense_weights(layer, scale=None):
    """Yields kernel and bias of a dense layer, multiplied by the LayerScale that follows it."""
    bias = ops.zeros(layer.units) if layer.bias is None else layer.bias
    for weight in (layer.kernel, bias):
        weight = ops.convert_to_tensor(weight)
        yield weight if scale is None else weight * scale
