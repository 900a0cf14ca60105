"""CaiT, class attention in image transformers, Touvron et al. 2021, arXiv 2103.17239.

Deep: LayerScale keeps many blocks trainable. The patches attend among themselves, with talking
heads and without a class token, which reads them in a few class-attention blocks at the end.
"""

from keras_tnt import model as parts
from keras_tnt.layers import (
    ClassAttentionBlock,
    ClassToken,
    Dropout,
    PatchEmbedding,
    PositionEmbedding,
    TalkingHeadBlock,
)
from keras_tnt.layers.base import LayerNormalization

MEAN, STD = parts.IMAGENET_MEAN, parts.IMAGENET_STD
EPSILON = 1e-6

SOURCE = "Table 5 of arXiv 2103.17239"
VARIANTS = {
    "cait_xxs24": {"embed_dim": 192, "depth": 24, "num_heads": 4, "layer_scale": 1e-5},
    "cait_xxs36": {"embed_dim": 192, "depth": 36, "num_heads": 4, "layer_scale": 1e-5},
    "cait_xs24": {"embed_dim": 288, "depth": 24, "num_heads": 6, "layer_scale": 1e-5},
    "cait_s24": {"embed_dim": 384, "depth": 24, "num_heads": 8, "layer_scale": 1e-5},
    "cait_s36": {"embed_dim": 384, "depth": 36, "num_heads": 8, "layer_scale": 1e-6},
    "cait_m36": {"embed_dim": 768, "depth": 36, "num_heads": 16, "layer_scale": 1e-6},
    "cait_m48": {"embed_dim": 768, "depth": 48, "num_heads": 16, "layer_scale": 1e-6},
}
SIZES = {"cait_xs24": 384, "cait_s36": 384, "cait_m36": 384, "cait_m48": 448}


@parts.builder
def CaiT(
    include_top=True,
    include_preprocessing=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=1000,
    classifier_activation="softmax",
    name="cait",
    *,
    patch_size=16,
    embed_dim=192,
    depth=24,
    num_heads=4,
    class_attention_depth=2,
    mlp_ratio=4.0,
    qkv_bias=True,
    dropout=0.0,
    attention_dropout=0.0,
    stochastic_depth=0.0,
    layer_scale=1e-5,
):
    """Build a CaiT of any architecture, as a functional `keras.Model`.

    Args:
        include_top, include_preprocessing, weights, input_tensor, input_shape, pooling, classes,
            classifier_activation, name: as `keras_tnt.TNT` has them.
        patch_size: side of a patch, in pixels.
        embed_dim: dimension of a patch.
        depth: number of blocks over the patches.
        num_heads: number of heads; divides `embed_dim`.
        class_attention_depth: number of class-attention blocks, at least 1.
        mlp_ratio: hidden over input dimension.
        qkv_bias: whether query, key and value have a bias.
        dropout: rate behind the position embedding and each projection, in [0, 1).
        attention_dropout: rate on the attention, in [0, 1).
        stochastic_depth: rate of every block over the patches, in [0, 1).
        layer_scale: initial value of the LayerScale on every residual branch; None: none.

    Returns:
        A `keras.Model`. Its last layer is `predictions` (with top); `head` gives the logits.

    Raises:
        ValueError: for sizes that do not fit each other, and unknown values.

    Example:

    >>> model = keras_tnt.CaiT(input_shape=(64, 64, 3), classes=10, depth=2)
    >>> model.predict(np.zeros((1, 64, 64, 3))).shape
    (1, 10)
    """
    parts.check_head(pooling, classes, classifier_activation)
    parts.check_sizes(patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
    if class_attention_depth < 1:
        raise ValueError(
            "`class_attention_depth` must be at least 1: nothing else fills CaiT's class token. "
            f"Received: {class_attention_depth}. A transformer without is `keras_tnt.DeiT`."
        )
    inputs, (height, width) = parts.image_input(input_tensor, input_shape, 224, patch_size)
    weights = parts.fetch_weights(weights, classes if include_top else None)
    grid = (height // patch_size, width // patch_size)
    transformer = {
        "mlp_ratio": mlp_ratio,
        "qkv_bias": qkv_bias,
        "dropout": dropout,
        "attention_dropout": attention_dropout,
        "layer_scale": layer_scale,
        "epsilon": EPSILON,
    }

    # === Patches among themselves ===
    x = parts.normalise(inputs, MEAN, STD) if include_preprocessing else inputs
    tokens = PatchEmbedding(patch_size, embed_dim, name="patch_embedding")(x)
    tokens = PositionEmbedding(grid, name="patch_position")(tokens)
    tokens = Dropout(dropout, name="position_drop")(tokens)
    for i in range(depth):
        tokens = TalkingHeadBlock(
            num_heads, stochastic_depth=stochastic_depth, name=f"block_{i}", **transformer
        )(tokens)

    # === Class attention ===
    tokens = ClassToken(name="class_token")(tokens)
    for i in range(class_attention_depth):
        tokens = ClassAttentionBlock(num_heads, name=f"class_block_{i}", **transformer)(tokens)
    tokens = LayerNormalization(epsilon=EPSILON, name="norm")(tokens)

    # === Output ===
    if include_top:
        outputs = parts.classify([tokens[:, 0]], classes, classifier_activation)
    else:
        outputs = parts.pool(tokens, grid, 1, pooling)
    return parts.finish(inputs, outputs, name, weights)


def variant(name):
    size = SIZES.get(name, 224)
    return parts.variant(CaiT, name, SOURCE, size, weights="imagenet", **VARIANTS[name])


CaiTXXS24 = variant("cait_xxs24")
CaiTXXS36 = variant("cait_xxs36")
CaiTXS24 = variant("cait_xs24")
CaiTS24 = variant("cait_s24")
CaiTS36 = variant("cait_s36")
CaiTM36 = variant("cait_m36")
CaiTM48 = variant("cait_m48")


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
