"""CaiT, class attention in image transformers, Touvron et al. 2021, arXiv 2103.17239.

Deep: LayerScale keeps many blocks trainable. The patches attend among themselves, with talking
heads and without a class token, which reads them in a few class-attention blocks at the end.
"""

from keras_tnt import building
from keras_tnt.layers import (
    ClassAttentionBlock,
    ClassToken,
    Dropout,
    PatchEmbedding,
    PositionEmbedding,
    TalkingHeadBlock,
)
from keras_tnt.layers.base import LayerNormalization
from keras_tnt.published import of_checkpoint
from keras_tnt.registry import IMAGENET_MEAN, IMAGENET_STD, Cost, ImageTransform, Variant
from keras_tnt.weights.names import CLASS_ATTENTION_NAMES

IMAGE = ImageTransform(IMAGENET_MEAN, IMAGENET_STD, crop=1.0)
EPSILON = 1e-6

XXS = {"embed_dim": 192, "num_heads": 4, "layer_scale": 1e-5}
S = {"embed_dim": 384, "num_heads": 8}
M = {"embed_dim": 768, "num_heads": 16, "layer_scale": 1e-6}
VARIANTS = {
    "cait_xxs24": Variant({**XXS, "depth": 24}, cost=Cost(11_956_264, 2_523_475_200, 26)),
    "cait_xxs36": Variant({**XXS, "depth": 36}, cost=Cost(17_299_720, 3_755_697_408, 38)),
    "cait_xs24": Variant(
        {"embed_dim": 288, "num_heads": 6, "layer_scale": 1e-5, "depth": 24},
        384,
        cost=Cost(26_670_088, 19_240_642_944, 26),
    ),
    "cait_s24": Variant(
        {**S, "layer_scale": 1e-5, "depth": 24}, cost=Cost(46_916_200, 9_327_327_744, 26)
    ),
    "cait_s36": Variant(
        {**S, "layer_scale": 1e-6, "depth": 36}, 384, cost=Cost(68_366_632, 47_907_955_200, 38)
    ),
    "cait_m36": Variant({**M, "depth": 36}, 384, cost=Cost(271_221_352, 172_943_655_936, 38)),
    "cait_m48": Variant({**M, "depth": 48}, 448, cost=Cost(356_460_520, 329_107_670_016, 50)),
}


@building.builder
def CaiT(
    include_top: bool = True,
    include_preprocessing: bool = True,
    weights: str | None = None,
    input_tensor=None,
    input_shape: tuple[int | None, int | None, int] | None = None,
    pooling: str | None = None,
    classes: int = 1000,
    classifier_activation="softmax",
    name: str = "cait",
    *,
    dtype=None,
    class_names: list[str] | None = None,
    patch_size: int = 16,
    embed_dim: int = 192,
    depth: int = 24,
    num_heads: int = 4,
    class_attention_depth: int = 2,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    layer_scale: float | None = 1e-5,
):
    """Build a CaiT of any architecture, as a functional `keras.Model`.

    Args:
        include_top: whether the model ends in the classifier.
        include_preprocessing: whether the model takes pixels in [0, 255] and normalises them
            itself; if not, `preprocess_input` does it outside.
        weights: None (random), a name of `keras_tnt.list_weights()`, `"hf://owner/repository"`, or
            the path of a file.
        input_tensor: Keras tensor to build upon.
        input_shape: (height, width, channels), or channels first by Keras's setting; any multiples
            of `patch_size`, square or not; height and width None: each call takes images of its
            own size, and the position tables, made for 224x224 or the size that `weights` have, are
            resampled for it. Default: 224x224, RGB.
        pooling: without top. None: the feature map `(batch, height/patch_size, width/patch_size,
            embed_dim)`; `"avg"`, `"max"` over the patches, `"token"` the class token:
            `(batch, embed_dim)`.
        classes: number of classes.
        classifier_activation: activation of layer `predictions`; None: logits.
        name: the model's name.
        dtype: dtype or `keras.DTypePolicy` of all layers, such as `"mixed_bfloat16"`; None: Keras's
            setting. Predictions are float32 or better.
        class_names: names of the classes, which sets `classes`; they stay with the model when it is
            saved, cloned or quantized, and `keras_tnt.class_names` gives them.
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
    building.check_sizes(
        patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads
    )
    if class_attention_depth < 1:
        raise ValueError(
            "`class_attention_depth` must be at least 1: nothing else fills CaiT's class token. "
            f"Received: {class_attention_depth}. A transformer without is `keras_tnt.DeiT`."
        )
    inputs, size = building.image_input(input_tensor, input_shape, 224, patch_size, any_size=True)
    transformer = {
        "mlp_ratio": mlp_ratio,
        "qkv_bias": qkv_bias,
        "dropout": dropout,
        "attention_dropout": attention_dropout,
        "layer_scale": layer_scale,
        "epsilon": EPSILON,
        "dtype": dtype,
    }

    # === Patches among themselves ===
    x = building.normalise(inputs, "cait", IMAGE, include_preprocessing, dtype)
    grid, at = building.patch_grid(x, size, patch_size, dtype)
    tokens = PatchEmbedding(patch_size, embed_dim, dtype=dtype, name="patch_embedding")(x)
    tokens = PositionEmbedding(grid, dtype=dtype, name="patch_position")(tokens, **at)
    tokens = Dropout(dropout, dtype=dtype, name="position_drop")(tokens)
    for i in range(depth):
        tokens = TalkingHeadBlock(
            num_heads, stochastic_depth=stochastic_depth, name=f"block_{i}", **transformer
        )(tokens)

    # === Class attention ===
    tokens = ClassToken(dtype=dtype, name="class_token")(tokens)
    for i in range(class_attention_depth):
        tokens = ClassAttentionBlock(num_heads, name=f"class_block_{i}", **transformer)(tokens)
    tokens = LayerNormalization(epsilon=EPSILON, dtype=dtype, name="norm")(tokens)

    # === Output ===
    if include_top:
        vectors = building.read_tokens(tokens, 1, dtype)
        outputs = building.classify(vectors, classes, classifier_activation, class_names, dtype)
    else:
        outputs = building.pool(tokens, grid, 1, pooling, dtype, at)
    return inputs, outputs


preprocess_input = building.preprocessor(IMAGE)


# === What public checkpoints hold ===

# Name on the hub, variant, its arguments, parameters, accuracy.
CHECKPOINTS = building.weights_of(
    (
        (
            "cait_xxs24_224.fb_dist_in1k",
            "CaiTXXS24",
            {},
            11_956_264,
            *of_checkpoint("cait_xxs24", 224),
        ),
        (
            "cait_xxs24_384.fb_dist_in1k",
            "CaiTXXS24",
            {},
            12_029_224,
            *of_checkpoint("cait_xxs24", 384),
        ),
        (
            "cait_xxs36_224.fb_dist_in1k",
            "CaiTXXS36",
            {},
            17_299_720,
            *of_checkpoint("cait_xxs36", 224),
        ),
        (
            "cait_xxs36_384.fb_dist_in1k",
            "CaiTXXS36",
            {},
            17_372_680,
            *of_checkpoint("cait_xxs36", 384),
        ),
        (
            "cait_xs24_384.fb_dist_in1k",
            "CaiTXS24",
            {},
            26_670_088,
            *of_checkpoint("cait_xs24", 384),
        ),
        ("cait_s24_224.fb_dist_in1k", "CaiTS24", {}, 46_916_200, *of_checkpoint("cait_s24", 224)),
        ("cait_s24_384.fb_dist_in1k", "CaiTS24", {}, 47_062_120, *of_checkpoint("cait_s24", 384)),
        ("cait_s36_384.fb_dist_in1k", "CaiTS36", {}, 68_366_632, *of_checkpoint("cait_s36", 384)),
        ("cait_m36_384.fb_dist_in1k", "CaiTM36", {}, 271_221_352, *of_checkpoint("cait_m36", 384)),
        ("cait_m48_448.fb_dist_in1k", "CaiTM48", {}, 356_460_520, *of_checkpoint("cait_m48", 448)),
    )
)

# Our variable's or layer's path, timm's name, which is the original release's too.
TENSOR_NAMES = (
    ("patch_embedding/projection", "patch_embed.proj:patches"),
    ("class_token/token", "cls_token"),
    ("patch_position/table", "pos_embed"),
    ("block_{}/norm_attention", "blocks.{}.norm1"),
    ("block_{}/attention/qkv", "blocks.{}.attn.qkv"),
    ("block_{}/attention/projection", "blocks.{}.attn.proj"),
    ("block_{}/norm_mlp", "blocks.{}.norm2"),
    ("block_{}/mlp/fc1", "blocks.{}.mlp.fc1"),
    ("block_{}/mlp/fc2", "blocks.{}.mlp.fc2"),
    ("block_{}/attention/mix_before", "blocks.{}.attn.proj_l"),
    ("block_{}/attention/mix_after", "blocks.{}.attn.proj_w"),
    ("block_{}/scale_attention/gamma", "blocks.{}.gamma_1"),
    ("block_{}/scale_mlp/gamma", "blocks.{}.gamma_2"),
    *CLASS_ATTENTION_NAMES,
)

building.register_family(
    "cait",
    CaiT,
    variants=VARIANTS,
    image=IMAGE,
    tensor_names=TENSOR_NAMES,
    checkpoints=CHECKPOINTS,
    source="Table 5 of arXiv 2103.17239",
)
