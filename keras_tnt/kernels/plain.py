"""Reference implementation in `keras.ops`, which defines the expected results of the C++ kernels.

It is also the fallback of programs that contain a kernel wherever the kernel is not available: on
another device, in an exported program, under `vmap`, and for higher-order derivatives.
"""

from keras import ops

from keras_tnt.kernels import PatchWeights, Weights


def compute(x, weights, keep, sizes, epsilon):
    """Runs `transformer` or, for `native.PatchSizes`, `patches`, which has no `keep`."""
    if sizes.weights is PatchWeights:
        return patches(x, weights, epsilon)
    return transformer(x, weights, keep, sizes, epsilon)


def patches(x, weights, epsilon):
    """Computes the word-to-patch projection, norm-dense-norm (TNT, equations 5 and 6).

    Args:
        x: concatenated words of each patch, `(batch, patches, inputs)`.
        weights: `native.PatchWeights`.
        epsilon: epsilon of the layer norms.

    Returns:
        `(batch, patches, dim)`.
    """
    w = PatchWeights(*weights)
    normed = normalize(x, w.words_gamma, w.words_beta, -1, epsilon)
    projected = dense(normed, w.kernel, w.bias)
    return normalize(projected, w.patches_gamma, w.patches_beta, -1, epsilon)


def transformer(x, weights, keep, sizes, epsilon):
    """Computes an inner (word) or outer (patch) transformer block (TNT, equations 2 to 8).

    Args:
        x: words `(batch, patches, words, dim)` or tokens `(batch, tokens, dim)`.
        weights: `native.Weights`.
        keep: drop-path multipliers of the attention and MLP branches, `(2, batch, patches)` or
            `(2, batch)`. If `None`, all ones.
        sizes: `native.InnerSizes` or `native.OuterSizes`.
        epsilon: epsilon of the layer norms.

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
    """Applies layer norm over `axes`; gamma and beta are `(dim, words)` or `(dim,)`."""
    x = x - ops.mean(x, axis=axes, keepdims=True)
    variance = ops.mean(ops.square(x), axis=axes, keepdims=True)
    return x * ops.rsqrt(variance + epsilon) * as_rows(gamma) + as_rows(beta)


def as_rows(weight):
    """Transposes a norm's weight `(dim, words)` to `(words, dim)`; `(dim,)` stays as it is."""
    return weight if len(weight.shape) == 1 else ops.transpose(weight)


def dense(x, kernel, bias):
    """Returns `x @ kernel + bias`, `(..., inputs)` to `(..., outputs)`."""
    return ops.matmul(x, kernel) + bias


def attend(qkv, heads):
    """Computes multi-head attention, qkv `(..., tokens, 3 * dim)` to `(..., tokens, dim)`."""
    *lead, dim = ops.shape(qkv)
    head_dim = dim // (3 * heads)
    qkv = ops.reshape(qkv, (*lead, 3, heads, head_dim))
    qkv = ops.moveaxis(qkv, (-3, -2), (0, -3))  # (3, ..., heads, tokens, head_dim)
    scores = ops.matmul(qkv[0], ops.swapaxes(qkv[1], -2, -1)) * head_dim**-0.5
    mixed = ops.matmul(ops.softmax(scores, axis=-1), qkv[2])  # (..., heads, tokens, head_dim)
    return ops.reshape(ops.swapaxes(mixed, -3, -2), (*lead, heads * head_dim))
