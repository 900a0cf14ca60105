"""Transformer in Transformer (TNT), Han et al. 2021, arXiv 2103.00112.

An image is a sequence of patches ("visual sentences"), a patch a sequence of 4x4-pixel "visual
words". In every block an inner transformer attends among the words of each patch, what it finds is
added to the patch, and an outer transformer attends among the patches.
"""

from keras_tnt import model as parts
from keras_tnt.layers import (
    ClassAttentionBlock,
    ClassToken,
    Dropout,
    LegacyWordEmbedding,
    PositionEmbedding,
    TNTBlock,
    TransformerBlock,
    WordEmbedding,
    WordsToPatches,
)
from keras_tnt.layers.base import LayerNormalization

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
EPSILON = 1e-5

SOURCE = "Table 1 of arXiv 2103.00112"
VARIANTS = {
    "tnt_tiny": {"outer_dim": 192, "inner_dim": 12, "outer_heads": 3, "inner_heads": 2},
    "tnt_small": {"outer_dim": 384, "inner_dim": 24, "outer_heads": 6, "inner_heads": 4},
    "tnt_base": {"outer_dim": 640, "inner_dim": 40, "outer_heads": 10, "inner_heads": 4},
}


@parts.builder
def TNT(
    include_top=True,
    include_preprocessing=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=1000,
    classifier_activation="softmax",
    name="tnt",
    *,
    patch_size=16,
    inner_stride=4,
    depth=12,
    outer_dim=384,
    inner_dim=24,
    outer_heads=6,
    inner_heads=4,
    mlp_ratio=4.0,
    qkv_bias=False,
    dropout=0.0,
    attention_dropout=0.0,
    stochastic_depth=0.0,
    squeeze_excite=False,
    inner_blocks=None,
    legacy=False,
    distilled=False,
    layer_scale=None,
    class_attention_depth=0,
):
    """Build a TNT of any architecture, as a functional `keras.Model`.

    Args:
        include_top: whether the model ends in the classifier.
        include_preprocessing: whether the model takes pixels in [0, 255] and normalises them
            itself; if not, `preprocess_input` does it outside.
        weights: None (random), a name of `keras_tnt.list_weights()`, `"hf://owner/repository"`, or
            the path of a file.
        input_tensor: Keras tensor to build upon.
        input_shape: (height, width, channels), or channels first by Keras's setting; any multiples
            of `patch_size`, square or not. Default: 224x224, RGB.
        pooling: without top. None: the feature map `(batch, height/patch_size, width/patch_size,
            outer_dim)`; `"avg"`, `"max"` over the patches, `"token"` the class token (distilled:
            the mean of the two): `(batch, outer_dim)`.
        classes: number of classes.
        classifier_activation: activation of layer `predictions`; None: logits.
        name: the model's name.
        patch_size: side of a patch, in pixels.
        inner_stride: side of a word, in pixels; divides `patch_size`.
        depth: number of blocks.
        outer_dim, inner_dim: dimensions of a patch and of a word.
        outer_heads, inner_heads: heads of the two transformers; divide their dimensions.
        mlp_ratio: hidden over input dimension, in both transformers.
        qkv_bias: whether query, key and value have a bias.
        dropout: rate behind the position embedding and each projection, in [0, 1).
        attention_dropout: rate on the attention, in [0, 1).
        stochastic_depth: rate of the last block, in [0, 1); grows linearly from 0 over the blocks.
        squeeze_excite: the authors' SE option, on the outer transformers.
        inner_blocks: indices, from 0, of the blocks that keep their inner transformer; None: all.
            `(0, 5, 11)` is the paper's TNT-S-2.
        legacy: the architecture of timm's first port (checkpoint `tnt_s_legacy`).
        distilled: adds DeiT's distillation token and head.
        layer_scale: initial value of CaiT's LayerScale on every residual branch; None: none.
        class_attention_depth: number of CaiT's class-attention blocks. With any, the patches pass
            the TNT blocks alone, and the class token (and distillation token) reads them there.

    Returns:
        A `keras.Model`. Its last layer is `predictions` (with top); `head`, and `head_distillation`
        where distilled, give each head's logits.

    Raises:
        ValueError: for sizes that do not fit each other, and unknown values.

    Example:

    >>> model = keras_tnt.TNT(input_shape=(64, 64, 3), classes=10, depth=2)
    >>> model.predict(np.zeros((1, 64, 64, 3))).shape
    (1, 10)
    """
    parts.check_head(pooling, classes, classifier_activation)
    parts.check_sizes(
        patch_size=patch_size,
        inner_stride=inner_stride,
        depth=depth,
        outer_dim=outer_dim,
        inner_dim=inner_dim,
        outer_heads=outer_heads,
        inner_heads=inner_heads,
    )
    inner_blocks = check_inner_blocks(inner_blocks, depth)
    inputs, (height, width) = parts.image_input(input_tensor, input_shape, 224, patch_size)
    weights = parts.fetch_weights(weights, classes if include_top else None)
    grid = (height // patch_size, width // patch_size)
    side = patch_size // inner_stride
    prefix_tokens = 2 if distilled else 1
    transformer = {
        "mlp_ratio": mlp_ratio,
        "qkv_bias": qkv_bias,
        "dropout": dropout,
        "attention_dropout": attention_dropout,
        "layer_scale": layer_scale,
        "epsilon": EPSILON,
    }

    # === Words and patches ===
    x = parts.normalise(inputs, MEAN, STD) if include_preprocessing else inputs
    stem = LegacyWordEmbedding if legacy else WordEmbedding
    words = stem(inner_dim, patch_size, inner_stride, name="word_embedding")(x)
    words = PositionEmbedding((side, side), name="word_position")(words)
    tokens = WordsToPatches(outer_dim, epsilon=EPSILON, name="patch_embedding")(words)

    def add_class_tokens(tokens):
        if distilled:
            tokens = ClassToken(name="distillation_token")(tokens)
        return ClassToken(name="class_token")(tokens)

    tokens_in_blocks = 0 if class_attention_depth else prefix_tokens
    if tokens_in_blocks:
        tokens = add_class_tokens(tokens)
    tokens = PositionEmbedding(grid, tokens_in_blocks, name="patch_position")(tokens)
    tokens = Dropout(dropout, name="position_drop")(tokens)

    # === Blocks ===
    reads_tokens_only = tokens_in_blocks and (include_top or pooling == "token")
    for i in range(depth):
        common = {**transformer, "stochastic_depth": stochastic_depth * i / max(depth - 1, 1)}
        first_tokens = prefix_tokens if reads_tokens_only and i == depth - 1 else None
        if i in inner_blocks:
            tokens, words = TNTBlock(
                outer_heads,
                inner_heads,
                legacy=legacy,
                squeeze_excite=squeeze_excite,
                name=f"block_{i}",
                **common,
            )(tokens, words, first_tokens=first_tokens)
        else:
            tokens = TransformerBlock(
                outer_heads, squeeze_excite=squeeze_excite, name=f"block_{i}", **common
            )(tokens, first_tokens=first_tokens)

    # === Class attention ===
    if class_attention_depth:
        tokens = add_class_tokens(tokens)
    for i in range(class_attention_depth):
        tokens = ClassAttentionBlock(
            outer_heads, prefix_tokens, name=f"class_block_{i}", **transformer
        )(tokens)
    tokens = LayerNormalization(epsilon=EPSILON, name="norm")(tokens)

    # === Output ===
    if include_top:
        vectors = [tokens[:, i] for i in range(prefix_tokens)]
        outputs = parts.classify(vectors, classes, classifier_activation)
    else:
        outputs = parts.pool(tokens, grid, prefix_tokens, pooling)
    return parts.finish(inputs, outputs, name, weights)


def check_inner_blocks(inner_blocks, depth):
    """The indices of the blocks with an inner transformer, checked."""
    if inner_blocks is None:
        return range(depth)
    unknown = [i for i in inner_blocks if i not in range(depth)]
    if unknown:
        raise ValueError(
            f"`inner_blocks` are indices from 0 to {depth - 1}. Received: {tuple(inner_blocks)}"
        )
    return tuple(inner_blocks)


TNTTiny = parts.variant(TNT, "tnt_tiny", SOURCE, **VARIANTS["tnt_tiny"])
TNTSmall = parts.variant(TNT, "tnt_small", SOURCE, weights="imagenet", **VARIANTS["tnt_small"])
TNTBase = parts.variant(TNT, "tnt_base", SOURCE, weights="imagenet", **VARIANTS["tnt_base"])


def preprocess_input(x, data_format=None):
    """Normalise pixels in [0, 255] to [-1, 1], for models built with `include_preprocessing=False`.

    Args:
        x: array or tensor of images.
        data_format: where the channels stand; makes no difference to TNT.

    Returns:
        Array or tensor of the same shape, in floating point.
    """
    return parts.standardise(x, MEAN, STD, data_format)
