"""DeiT, data-efficient image transformers, Touvron et al. 2020, arXiv 2012.12877.

A vision transformer (ViT) with an optional distillation token, which learns from a teacher through
a separate head.
"""

from keras_tnt.layers import (
    ClassToken,
    Dropout,
    PatchEmbedding,
    PositionEmbedding,
    TransformerBlock,
)
from keras_tnt.layers.base import LayerNormalization
from keras_tnt.models import builders
from keras_tnt.models.published import accuracy_row
from keras_tnt.models.registry import IMAGENET_MEAN, IMAGENET_STD, Cost, ImageTransform, Variant

# The published results at 384 pixels were measured without cropping.
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


@builders.builder
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
    """Builds a DeiT of any architecture as a functional `keras.Model`.

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
            or `"token"` for the class token, which is averaged with the distillation token if there
            is one. Pooled features are `(batch, embed_dim)`.
        classes: number of classes. Defaults to 1000.
        classifier_activation: activation of layer `predictions`. If `None`, the outputs are logits.
            Defaults to "softmax".
        name: name of the model. Defaults to "deit".
        dtype: dtype or `keras.DTypePolicy` of all layers, such as `"mixed_bfloat16"`. Defaults to
            Keras's global policy. Predictions are in float32 or float64.
        class_names: names of the classes, which set `classes`. They are preserved when the model is
            saved, cloned or quantized, and `keras_tnt.class_names` returns them.
        patch_size: side of a patch in pixels. Defaults to 16.
        embed_dim: dimension of a patch. Defaults to 384.
        depth: number of blocks. Defaults to 12.
        num_heads: number of heads; divides `embed_dim`. Defaults to 6.
        mlp_ratio: hidden dimension of the MLP divided by the input's. Defaults to 4.
        qkv_bias: whether query, key and value have a bias. Defaults to `True`.
        dropout: dropout rate after the position embedding and each projection, in [0, 1). Defaults
            to 0.
        attention_dropout: dropout rate on the attention weights, in [0, 1). Defaults to 0.
        stochastic_depth: drop-path rate of the last block, in [0, 1); rates increase linearly from
            0 over the blocks. Defaults to 0.
        distilled: whether to add the distillation token and its head (section 4). Defaults to
            `False`.

    Returns:
        A `keras.Model`. With its top, the last layer is `predictions`; `head`, and
        `head_distillation` if distilled, return the logits of each head.

    Raises:
        ValueError: for inconsistent sizes and unknown values.

    Example:
        >>> model = keras_tnt.DeiT(input_shape=(64, 64, 3), classes=10, depth=2, distilled=True)
        >>> model.predict(np.zeros((1, 64, 64, 3))).shape
        (1, 10)
    """
    builders.check_sizes(
        patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads
    )
    inputs, size = builders.image_input(input_tensor, input_shape, 224, patch_size, any_size=True)
    prefix_tokens = 2 if distilled else 1

    # === Tokens ===
    x = builders.normalize(inputs, "deit", IMAGE, include_preprocessing, dtype)
    grid, grid_kwargs = builders.patch_grid(x, size, patch_size, dtype)
    tokens = PatchEmbedding(patch_size, embed_dim, dtype=dtype, name="patch_embedding")(x)
    if distilled:
        tokens = ClassToken(dtype=dtype, name="distillation_token")(tokens)
    tokens = ClassToken(dtype=dtype, name="class_token")(tokens)
    position = PositionEmbedding(grid, prefix_tokens, dtype=dtype, name="patch_position")
    tokens = position(tokens, **grid_kwargs)
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
        vectors = builders.read_tokens(tokens, prefix_tokens, dtype)
        outputs = builders.classify(vectors, classes, classifier_activation, class_names, dtype)
    else:
        outputs = builders.pool(tokens, grid, prefix_tokens, pooling, dtype, grid_kwargs)
    return inputs, outputs


preprocess_input = builders.preprocessor(IMAGE)


# === Public checkpoints ===

DIST = {"distilled": True}

# Columns: name on the Hub, variant, its arguments, parameters, accuracy.
CHECKPOINTS = builders.checkpoints_from_rows(
    (
        (
            "deit_tiny_patch16_224.fb_in1k",
            "DeiTTiny",
            {},
            5_717_416,
            *accuracy_row("deit_tiny", 224),
        ),
        (
            "deit_tiny_distilled_patch16_224.fb_in1k",
            "DeiTTiny",
            DIST,
            5_910_800,
            *accuracy_row("deit_tiny_distilled", 224),
        ),
        (
            "deit_small_patch16_224.fb_in1k",
            "DeiTSmall",
            {},
            22_050_664,
            *accuracy_row("deit_small", 224),
        ),
        (
            "deit_small_distilled_patch16_224.fb_in1k",
            "DeiTSmall",
            DIST,
            22_436_432,
            *accuracy_row("deit_small_distilled", 224),
        ),
        (
            "deit_base_patch16_224.fb_in1k",
            "DeiTBase",
            {},
            86_567_656,
            *accuracy_row("deit_base", 224),
        ),
        (
            "deit_base_distilled_patch16_224.fb_in1k",
            "DeiTBase",
            DIST,
            87_338_192,
            *accuracy_row("deit_base_distilled", 224),
        ),
        (
            "deit_base_patch16_384.fb_in1k",
            "DeiTBase",
            {},
            86_859_496,
            *accuracy_row("deit_base", 384),
        ),
        (
            "deit_base_distilled_patch16_384.fb_in1k",
            "DeiTBase",
            DIST,
            87_630_032,
            *accuracy_row("deit_base_distilled", 384),
        ),
    )
)

# Columns: path of a variable or layer, name in timm and in the original release.
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

builders.register_family(
    "deit",
    DeiT,
    variants=VARIANTS,
    image=IMAGE,
    tensor_names=TENSOR_NAMES,
    checkpoints=CHECKPOINTS,
    marker_tensors=(builders.DISTILLATION_TENSORS,),
    source="Table 1 of arXiv 2012.12877",
)
