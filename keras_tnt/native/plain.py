"""The inner transformer in the operations of Keras's backend, on the weights that the C++ takes.

It is what the C++ is the same as. Programs that hold the C++ fall back on it where there is none:
on another device, in a file that leaves the process, for derivatives of derivatives.
"""

from keras import ops

from keras_tnt.native import Sizes, Weights


def inner_transformer(words, weights, keep, sizes, epsilon):
    """The transformer among the words of each patch (TNT, equations 2 and 3).

    Args:
        words: `(batch, patches, words, dim)`.
        weights: `native.Weights`.
        keep: `(2, batch, patches)`, what the branches of attention and MLP are multiplied by; None:
            all ones.
        sizes: `native.Sizes`.
        epsilon: of the norms.

    Returns:
        Words of the same shape.
    """
    w = Weights(*weights)
    keep = (1, 1) if keep is None else ops.expand_dims(keep, (-2, -1))  # (2, b, p, 1, 1)
    x = normalize(words, w.attention_gamma, w.attention_beta, sizes, epsilon)
    mixed = attend(dense(x, w.qkv_kernel, w.qkv_bias), sizes)
    words = words + keep[0] * dense(mixed, w.projection_kernel, w.projection_bias)
    x = normalize(words, w.mlp_gamma, w.mlp_beta, sizes, epsilon)
    x = ops.gelu(dense(x, w.fc1_kernel, w.fc1_bias), approximate=False)
    return words + keep[1] * dense(x, w.fc2_kernel, w.fc2_bias)


def normalize(x, gamma, beta, sizes, epsilon):
    axes = (-2, -1) if sizes.across_words else -1
    x = x - ops.mean(x, axis=axes, keepdims=True)
    variance = ops.mean(ops.square(x), axis=axes, keepdims=True)
    return x * ops.rsqrt(variance + epsilon) * ops.transpose(gamma) + ops.transpose(beta)


def dense(x, kernel, bias):
    return ops.matmul(x, kernel) + bias


def attend(qkv, sizes: Sizes):
    """Query, key and value `(batch, patches, words, 3 * dim)` to `(batch, patches, words, dim)`."""
    head_dim = sizes.dim // sizes.heads
    lead = tuple(ops.shape(qkv)[:2])
    qkv = ops.reshape(qkv, (*lead, sizes.words, 3, sizes.heads, head_dim))
    qkv = ops.transpose(qkv, (3, 0, 1, 4, 2, 5))  # (3, b, p, heads, words, head_dim)
    scores = ops.matmul(qkv[0], ops.swapaxes(qkv[1], -2, -1)) * head_dim**-0.5
    mixed = ops.matmul(ops.softmax(scores, axis=-1), qkv[2])  # (b, p, heads, words, head_dim)
    return ops.reshape(ops.swapaxes(mixed, -3, -2), (*lead, sizes.words, sizes.dim))
