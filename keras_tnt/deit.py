"""DeiT, data-efficient image transformers, Touvron et al. 2020, arXiv 2012.12877.

A plain vision transformer, and beside its class token a distillation token that learns from a
teacher through a head of its own.
"""

from keras_tnt import model as parts
from keras_tnt.layers import (
    ClassToken,
    Dropout,
    PatchEmbedding,
    PositionEmbedding,
    TransformerBlock,
)
from keras_tnt.layers.base import LayerNormalization

MEAN, STD = parts.IMAGENET_MEAN, parts.IMAGENET_STD
EPSILON = 1e-6

SOURCE = "Table 1 of arXiv 2012.12877"
VARIANTS = {
    "deit_tiny": {"embed_dim": 192, "num_heads": 3},
    "deit_small": {"embed_dim": 384, "num_heads": 6},
    "deit_base": {"embed_dim": 768, "num_heads": 12},
}


@parts.builder
def DeiT(
    include_top=True,
    include_preprocessing=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=1000,
    classifier_activation="softmax",
    name="deit",
    *,
    patch_size=16,
    embed_dim=384,
    depth=12,
    num_heads=6,
    mlp_ratio=4.0,
    qkv_bias=True,
    dropout=0.0,
    attention_dropout=0.0,
    stochastic_depth=0.0,
    distilled=False,
):
    """Build a DeiT of any architecture, as a functional `keras.Model`.

    Args:
        include_top, include_preprocessing, weights, input_tensor, input_shape, pooling, classes,
            classifier_activation, name: as `keras_tnt.TNT` has them.
        patch_size: side of a patch, in pixels.
        embed_dim: dimension of a patch.
        depth: number of blocks.
        num_heads: number of heads; divides `embed_dim`.
        mlp_ratio: hidden over input dimension.
        qkv_bias: whether query, key and value have a bias.
        dropout: rate behind the position embedding and each projection, in [0, 1).
        attention_dropout: rate on the attention, in [0, 1).
        stochastic_depth: rate of the last block, in [0, 1); grows linearly from 0 over the blocks.
        distilled: adds the distillation token and its head (section 4).

    Returns:
        A `keras.Model`. Its last layer is `predictions` (with top); `head`, and `head_distillation`
        where distilled, give each head's logits.

    Raises:
        ValueError: for sizes that do not fit each other, and unknown values.

    Example:

    >>> model = keras_tnt.DeiT(input_shape=(64, 64, 3), classes=10, depth=2, distilled=True)
    >>> model.predict(np.zeros((1, 64, 64, 3))).shape
    (1, 10)
    """
    parts.check_head(pooling, classes, classifier_activation)
    parts.check_sizes(patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
    inputs, (height, width) = parts.image_input(input_tensor, input_shape, 224, patch_size)
    weights = parts.fetch_weights(weights, classes if include_top else None)
    grid = (height // patch_size, width // patch_size)
    prefix_tokens = 2 if distilled else 1

    # === Tokens ===
    x = parts.normalise(inputs, MEAN, STD) if include_preprocessing else inputs
    tokens = PatchEmbedding(patch_size, embed_dim, name="patch_embedding")(x)
    if distilled:
        tokens = ClassToken(name="distillation_token")(tokens)
    tokens = ClassToken(name="class_token")(tokens)
    tokens = PositionEmbedding(grid, prefix_tokens, name="patch_position")(tokens)
    tokens = Dropout(dropout, name="position_drop")(tokens)

    # === Blocks ===
    reads_tokens_only = include_top or pooling == "token"
    for i in range(depth):
        tokens = TransformerBlock(
            num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            dropout=dropout,
            attention_dropout=attention_dropout,
            stochastic_depth=stochastic_depth * i / max(depth - 1, 1),
            epsilon=EPSILON,
            name=f"block_{i}",
        )(tokens, first_tokens=prefix_tokens if reads_tokens_only and i == depth - 1 else None)
    tokens = LayerNormalization(epsilon=EPSILON, name="norm")(tokens)

    # === Output ===
    if include_top:
        vectors = [tokens[:, i] for i in range(prefix_tokens)]
        outputs = parts.classify(vectors, classes, classifier_activation)
    else:
        outputs = parts.pool(tokens, grid, prefix_tokens, pooling)
    return parts.finish(inputs, outputs, name, weights)


DeiTTiny = parts.variant(DeiT, "deit_tiny", SOURCE, weights="imagenet", **VARIANTS["deit_tiny"])
DeiTSmall = parts.variant(DeiT, "deit_small", SOURCE, weights="imagenet", **VARIANTS["deit_small"])
DeiTBase = parts.variant(DeiT, "deit_base", SOURCE, weights="imagenet", **VARIANTS["deit_base"])


def preprocess_input(x, data_format=None):
    """Normalise pixels in [0, 255] by ImageNet's mean and deviation, for models built with
    `include_preprocessing=False`.

    Args:
        x: array or tensor of images.
        data_format: `"channels_last"` or `"channels_first"`; None: Keras's setting.

    Returns:
        Array or tensor of the same shape, in floating point.
    """
    return parts.standardise(x, MEAN, STD, data_format)
