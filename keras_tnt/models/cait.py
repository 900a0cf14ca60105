"""CaiT, class attention in image transformers, Touvron et al. 2021, arXiv 2103.17239.

LayerScale makes the many blocks trainable. The patches attend to each other with talking heads, and
a class token, added after these blocks, reads them in a few class-attention blocks.
"""

from keras_tnt.layers import (
    ClassAttentionBlock,
    ClassToken,
    Dropout,
    PatchEmbedding,
    PositionEmbedding,
    TalkingHeadBlock,
)
from keras_tnt.layers.base import LayerNormalization
from keras_tnt.models import builders
from keras_tnt.models.published import accuracy_row
from keras_tnt.models.registry import IMAGENET_MEAN, IMAGENET_STD, Cost, ImageTransform, Variant
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


@builders.builder
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
    """Builds a CaiT of any architecture as a functional `keras.Model`.

    Args:
        include_top: whether the model ends in the classifier. Defaults to `True`.
        include_preprocessing: whether the model takes pixels in [0, 255] and normalizes them. If
            `False`, pass images through `preprocess_input` first. Defaults to `True`.
        weights: a name of `keras_tnt.list_weights()`, `"hf://owner/repository"`, or the path of a
            file. If `None`, the weights are random.
        input_tensor: Keras tensor to use as the input. If `None`, a new input is created.
        input_shape: (height, width, channels), or channels first if that is Keras's image data
            format. Height and width are multiples of `patch_size` and may differ. If they are
            `None`, each call accepts images of any such size, and the position tables, created for
            224x224 or the size of the weights, are resampled to it. Defaults to 224x224 RGB.
        pooling: feature pooling if `include_top` is `False`: `None` for the feature map `(batch,
            height/patch_size, width/patch_size, embed_dim)`, `"avg"` or `"max"` over the patches,
            or `"token"` for the class token. Pooled features are `(batch, embed_dim)`.
        classes: number of classes. Defaults to 1000.
        classifier_activation: activation of layer `predictions`. If `None`, the outputs are logits.
            Defaults to "softmax".
        name: name of the model. Defaults to "cait".
        dtype: dtype or `keras.DTypePolicy` of all layers, such as `"mixed_bfloat16"`. Defaults to
            Keras's global policy. Predictions are in float32 or float64.
        class_names: names of the classes, which set `classes`. They are preserved when the model is
            saved, cloned or quantized, and `keras_tnt.class_names` returns them.
        patch_size: side of a patch in pixels. Defaults to 16.
        embed_dim: dimension of a patch. Defaults to 192.
        depth: number of blocks over the patches. Defaults to 24.
        num_heads: number of heads; divides `embed_dim`. Defaults to 4.
        class_attention_depth: number of class-attention blocks, at least 1. Defaults to 2.
        mlp_ratio: hidden dimension of the MLP divided by the input's. Defaults to 4.
        qkv_bias: whether query, key and value have a bias. Defaults to `True`.
        dropout: dropout rate after the position embedding and each projection, in [0, 1). Defaults
            to 0.
        attention_dropout: dropout rate on the attention weights, in [0, 1). Defaults to 0.
        stochastic_depth: drop-path rate of every block over the patches, in [0, 1). Defaults to 0.
        layer_scale: initial value of the LayerScale on every residual branch. If `None`, there is
            no LayerScale. Defaults to 1e-5.

    Returns:
        A `keras.Model`. With its top, the last layer is `predictions`, and `head` returns the
        logits.

    Raises:
        ValueError: for inconsistent sizes and unknown values.

    Example:
        >>> model = keras_tnt.CaiT(input_shape=(64, 64, 3), classes=10, depth=2)
        >>> model.predict(np.zeros((1, 64, 64, 3))).shape
        (1, 10)
    """
    builders.check_sizes(
        patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads
    )
    if class_attention_depth < 1:
        raise ValueError(
            "`class_attention_depth` must be at least 1: nothing else fills CaiT's class token. "
            f"Received: {class_attention_depth}. A transformer without is `keras_tnt.DeiT`."
        )
    inputs, size = builders.image_input(input_tensor, input_shape, 224, patch_size, any_size=True)
    transformer = {
        "mlp_ratio": mlp_ratio,
        "qkv_bias": qkv_bias,
        "dropout": dropout,
        "attention_dropout": attention_dropout,
        "layer_scale": layer_scale,
        "epsilon": EPSILON,
        "dtype": dtype,
    }

    # === Self-attention of the patches ===
    x = builders.normalize(inputs, "cait", IMAGE, include_preprocessing, dtype)
    grid, grid_kwargs = builders.patch_grid(x, size, patch_size, dtype)
    tokens = PatchEmbedding(patch_size, embed_dim, dtype=dtype, name="patch_embedding")(x)
    tokens = PositionEmbedding(grid, dtype=dtype, name="patch_position")(tokens, **grid_kwargs)
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
        vectors = builders.read_tokens(tokens, 1, dtype)
        outputs = builders.classify(vectors, classes, classifier_activation, class_names, dtype)
    else:
        outputs = builders.pool(tokens, grid, 1, pooling, dtype, grid_kwargs)
    return inputs, outputs


preprocess_input = builders.preprocessor(IMAGE)


# === Public checkpoints ===

# Columns: name on the Hub, variant, its arguments, parameters, accuracy.
CHECKPOINTS = builders.checkpoints_from_rows(
    (
        (
            "cait_xxs24_224.fb_dist_in1k",
            "CaiTXXS24",
            {},
            11_956_264,
            *accuracy_row("cait_xxs24", 224),
        ),
        (
            "cait_xxs24_384.fb_dist_in1k",
            "CaiTXXS24",
            {},
            12_029_224,
            *accuracy_row("cait_xxs24", 384),
        ),
        (
            "cait_xxs36_224.fb_dist_in1k",
            "CaiTXXS36",
            {},
            17_299_720,
            *accuracy_row("cait_xxs36", 224),
        ),
        (
            "cait_xxs36_384.fb_dist_in1k",
            "CaiTXXS36",
            {},
            17_372_680,
            *accuracy_row("cait_xxs36", 384),
        ),
        (
            "cait_xs24_384.fb_dist_in1k",
            "CaiTXS24",
            {},
            26_670_088,
            *accuracy_row("cait_xs24", 384),
        ),
        ("cait_s24_224.fb_dist_in1k", "CaiTS24", {}, 46_916_200, *accuracy_row("cait_s24", 224)),
        ("cait_s24_384.fb_dist_in1k", "CaiTS24", {}, 47_062_120, *accuracy_row("cait_s24", 384)),
        ("cait_s36_384.fb_dist_in1k", "CaiTS36", {}, 68_366_632, *accuracy_row("cait_s36", 384)),
        ("cait_m36_384.fb_dist_in1k", "CaiTM36", {}, 271_221_352, *accuracy_row("cait_m36", 384)),
        ("cait_m48_448.fb_dist_in1k", "CaiTM48", {}, 356_460_520, *accuracy_row("cait_m48", 448)),
    )
)

# Columns: path of a variable or layer, name in timm and in the original release.
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

builders.register_family(
    "cait",
    CaiT,
    variants=VARIANTS,
    image=IMAGE,
    tensor_names=TENSOR_NAMES,
    checkpoints=CHECKPOINTS,
    source="Table 5 of arXiv 2103.17239",
)
