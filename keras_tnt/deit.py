"""DeiT, data-efficient image transformers, Touvron et al. 2020, arXiv 2012.12877.

A plain vision transformer, and beside its class token a distillation token that learns from a
teacher through a head of its own.
"""

from keras_tnt import building
from keras_tnt.layers import (
    ClassToken,
    Dropout,
    PatchEmbedding,
    PositionEmbedding,
    TransformerBlock,
)
from keras_tnt.layers.base import LayerNormalization
from keras_tnt.published import of_checkpoint
from keras_tnt.registry import IMAGENET_MEAN, IMAGENET_STD, Cost, ImageTransform, Variant

# Larger images were evaluated without cropping.
IMAGE = ImageTransform(IMAGENET_MEAN, IMAGENET_STD, crop=0.9, crops={384: 1.0})
EPSILON = 1e-6

VARIANTS = {
    "deit_tiny": Variant(
        {"embed_dim": 192, "num_heads": 3}, cost=Cost(5_717_416, 1_173_828_096, 12)
    ),
    "deit_small": Variant(
        {"embed_dim": 384, "num_heads": 6}, cost=Cost(22_050_664, 4_309_115_904, 12)
    ),
    "deit_base": Variant(
        {"embed_dim": 768, "num_heads": 12}, cost=Cost(86_567_656, 16_464_070_656, 12)
    ),
}


@building.builder
def DeiT(
    include_top: bool = True,
    include_preprocessing: bool = True,
    weights: str | None = None,
    input_tensor=None,
    input_shape: tuple[int | None, int | None, int] | None = None,
    pooling: str | None = None,
    classes: int = 1000,
    classifier_activation="softmax",
    name: str = "deit",
    *,
    dtype=None,
    class_names: list[str] | None = None,
    patch_size: int = 16,
    embed_dim: int = 384,
    depth: int = 12,
    num_heads: int = 6,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    distilled: bool = False,
):
    """Build a DeiT of any architecture, as a functional `keras.Model`.

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
            embed_dim)`; `"avg"`, `"max"` over the patches, `"token"` the class token, of a
            distilled model the mean of the two tokens: `(batch, embed_dim)`.
        classes: number of classes.
        classifier_activation: activation of layer `predictions`; None: logits.
        name: the model's name.
        dtype: dtype or `keras.DTypePolicy` of all layers, such as `"mixed_bfloat16"`; None: Keras's
            setting. Predictions are float32 or better.
        class_names: names of the classes, which sets `classes`; they stay with the model when it is
            saved, cloned or quantized, and `keras_tnt.class_names` gives them.
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
    building.check_sizes(
        patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads
    )
    inputs, size = building.image_input(input_tensor, input_shape, 224, patch_size, any_size=True)
    prefix_tokens = 2 if distilled else 1

    # === Tokens ===
    x = building.normalise(inputs, "deit", IMAGE, include_preprocessing, dtype)
    grid, at = building.patch_grid(x, size, patch_size, dtype)
    tokens = PatchEmbedding(patch_size, embed_dim, dtype=dtype, name="patch_embedding")(x)
    if distilled:
        tokens = ClassToken(dtype=dtype, name="distillation_token")(tokens)
    tokens = ClassToken(dtype=dtype, name="class_token")(tokens)
    position = PositionEmbedding(grid, prefix_tokens, dtype=dtype, name="patch_position")
    tokens = position(tokens, **at)
    tokens = Dropout(dropout, dtype=dtype, name="position_drop")(tokens)

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
            dtype=dtype,
            name=f"block_{i}",
        )(tokens, first_tokens=prefix_tokens if reads_tokens_only and i == depth - 1 else None)
    tokens = LayerNormalization(epsilon=EPSILON, dtype=dtype, name="norm")(tokens)

    # === Output ===
    if include_top:
        vectors = building.read_tokens(tokens, prefix_tokens, dtype)
        outputs = building.classify(vectors, classes, classifier_activation, class_names, dtype)
    else:
        outputs = building.pool(tokens, grid, prefix_tokens, pooling, dtype, at)
    return inputs, outputs


preprocess_input = building.preprocessor(IMAGE)


# === What public checkpoints hold ===

DIST = {"distilled": True}

# Name on the hub, variant, its arguments, parameters, accuracy.
CHECKPOINTS = building.weights_of(
    (
        (
            "deit_tiny_patch16_224.fb_in1k",
            "DeiTTiny",
            {},
            5_717_416,
            *of_checkpoint("deit_tiny", 224),
        ),
        (
            "deit_tiny_distilled_patch16_224.fb_in1k",
            "DeiTTiny",
            DIST,
            5_910_800,
            *of_checkpoint("deit_tiny_distilled", 224),
        ),
        (
            "deit_small_patch16_224.fb_in1k",
            "DeiTSmall",
            {},
            22_050_664,
            *of_checkpoint("deit_small", 224),
        ),
        (
            "deit_small_distilled_patch16_224.fb_in1k",
            "DeiTSmall",
            DIST,
            22_436_432,
            *of_checkpoint("deit_small_distilled", 224),
        ),
        (
            "deit_base_patch16_224.fb_in1k",
            "DeiTBase",
            {},
            86_567_656,
            *of_checkpoint("deit_base", 224),
        ),
        (
            "deit_base_distilled_patch16_224.fb_in1k",
            "DeiTBase",
            DIST,
            87_338_192,
            *of_checkpoint("deit_base_distilled", 224),
        ),
        (
            "deit_base_patch16_384.fb_in1k",
            "DeiTBase",
            {},
            86_859_496,
            *of_checkpoint("deit_base", 384),
        ),
        (
            "deit_base_distilled_patch16_384.fb_in1k",
            "DeiTBase",
            DIST,
            87_630_032,
            *of_checkpoint("deit_base_distilled", 384),
        ),
    )
)

# Our variable's or layer's path, timm's name, which is the original release's too.
TENSOR_NAMES = (
    ("patch_embedding/projection", "patch_embed.proj:patches"),
    ("class_token/token", "cls_token"),
    ("distillation_token/token", "dist_token"),
    ("patch_position/table", "pos_embed"),
    ("block_{}/norm_attention", "blocks.{}.norm1"),
    ("block_{}/attention/qkv", "blocks.{}.attn.qkv"),
    ("block_{}/attention/projection", "blocks.{}.attn.proj"),
    ("block_{}/norm_mlp", "blocks.{}.norm2"),
    ("block_{}/mlp/fc1", "blocks.{}.mlp.fc1"),
    ("block_{}/mlp/fc2", "blocks.{}.mlp.fc2"),
)

building.register_family(
    "deit",
    DeiT,
    variants=VARIANTS,
    image=IMAGE,
    tensor_names=TENSOR_NAMES,
    checkpoints=CHECKPOINTS,
    telling_tensors=(building.DISTILLATION_TENSORS,),
    source="Table 1 of arXiv 2012.12877",
)
