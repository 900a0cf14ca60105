"""The parts of TNT's block in the operations of Keras's backend, on the weights of the C++.

It is what the C++ is the same as. Programs that hold the C++ fall back on it where there is none:
on another device, in a file that leaves the process, for derivatives of derivatives.
"""

from keras import ops

from keras_tnt.native import PatchWeights, Weights


def compute(x, weights, keep, sizes, epsilon):
    """What `native.Sizes` of any kind say: `transformer`, or `patches`, which takes no `keep`."""
    if sizes.weights is PatchWeights:
        return patches(x, weights, epsilon)
    return transformer(x, weights, keep, sizes, epsilon)


def patches(x, weights, epsilon):
    """All words of a patch, normalised, projected and normalised (TNT, equations 5 and 6).

    Args:
        x: `(batch, patches, inputs)`, the words of a patch side by side.
        weights: `native.PatchWeights`.
        epsilon: of the norms.

    Returns:
        `(batch, patches, dim)`.
    """
    w = PatchWeights(*weights)
    normed = normalize(x, w.words_gamma, w.words_beta, -1, epsilon)
    projected = dense(normed, w.kernel, w.bias)
    return normalize(projected, w.patches_gamma, w.patches_beta, -1, epsilon)


def transformer(x, weights, keep, sizes, epsilon):
    """The transformer among the words of each patch, or among the tokens (TNT, equations 2 to 8).

    Args:
        x: `(batch, patches, words, dim)` or `(batch, tokens, dim)`.
        weights: `native.Weights`.
        keep: `(2, batch, patches)` or `(2, batch)`, what the branches of attention and MLP are
            multiplied by; None: all ones.
        sizes: `native.InnerSizes` or `native.OuterSizes`.
        epsilon: of the norms.

    Returns:
        Words or tokens of the same shape.
    """
    w = Weights(*weights)
    axes = (-2, -1) if sizes.part == "inner" and sizes.across_words else -1
    keep = (1, 1) if keep is None else ops.expand_dims(keep, (-2, -1))  # (2, ..., 1, 1)
    normed = normalize(x, w.attention_gamma, w.attention_beta, axes, epsilon)
    mixed = attend(dense(normed, w.qkv_kernel, w.qkv_bias), sizes.heads)
    x = x + keep[0] * dense(mixed, w.projection_kernel, w.projection_bias)
    normed = normalize(x, w.mlp_gamma, w.mlp_beta, axes, epsilon)
    wide = ops.gelu(dense(normed, w.fc1_kernel, w.fc1_bias), approximate=False)
    return x + keep[1] * dense(wide, w.fc2_kernel, w.fc2_bias)


def normalize(x, gamma, beta, axes, epsilon):
    x = x - ops.mean(x, axis=axes, keepdims=True)
    variance = ops.mean(ops.square(x), axis=axes, keepdims=True)
    return x * ops.rsqrt(variance + epsilon) * as_rows(gamma) + as_rows(beta)


def as_rows(weight):
    """(dim, words) to (words, dim); (dim,) as it is."""
    return weight if len(weight.shape) == 1 else ops.transpose(weight)


def dense(x, kernel, bias):
    return ops.matmul(x, kernel) + bias


def attend(qkv, heads):
    """Query, key and value `(..., tokens, 3 * dim)` to `(..., tokens, dim)`."""
    *lead, dim = ops.shape(qkv)
    head_dim = dim // (3 * heads)
    qkv = ops.reshape(qkv, (*lead, 3, heads, head_dim))
    qkv = ops.moveaxis(qkv, (-3, -2), (0, -3))  # (3, ..., heads, tokens, head_dim)
    scores = ops.matmul(qkv[0], ops.swapaxes(qkv[1], -2, -1)) * head_dim**-0.5
    mixed = ops.matmul(ops.softmax(scores, axis=-1), qkv[2])  # (..., heads, tokens, head_dim)
    return ops.reshape(ops.swapaxes(mixed, -3, -2), (*lead, heads * head_dim))
