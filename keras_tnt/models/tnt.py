"""Transformer in Transformer (TNT), Han et al. 2021, arXiv 2103.00112.

An image is a sequence of patches ("visual sentences"), and a patch is a sequence of 4x4-pixel
"visual words". In every block, an inner transformer attends among the words of each patch, its
output is added to the patch, and an outer transformer attends among the patches.
"""

from collections.abc import Sequence

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
from keras_tnt.models import builders
from keras_tnt.models.published import accuracy_row
from keras_tnt.models.registry import Cost, ImageTransform, Variant
from keras_tnt.weights.names import CLASS_ATTENTION_NAMES

IMAGE = ImageTransform(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=0.9)
EPSILON = 1e-5

VARIANTS = {
    "tnt_tiny": Variant(
        {"outer_dim": 192, "inner_dim": 12, "outer_heads": 3, "inner_heads": 2},
        cost=Cost(6_076_408, 1_347_236_352, 12),
    ),
    "tnt_small": Variant(
        {"outer_dim": 384, "inner_dim": 24, "outer_heads": 6, "inner_heads": 4},
        cost=Cost(23_768_584, 4_973_847_552, 12),
    ),
    "tnt_base": Variant(
        {"outer_dim": 640, "inner_dim": 40, "outer_heads": 10, "inner_heads": 4},
        cost=Cost(65_428_680, 13_355_023_360, 12),
    ),
}


@builders.builder
def TNT(
    include_top: bool = True,
    include_preprocessing: bool = True,
    weights: str | None = None,
    input_tensor=None,
    input_shape: tuple[int | None, int | None, int] | None = None,
    pooling: str | None = None,
    classes: int = 1000,
    classifier_activation="softmax",
    name: str = "tnt",
    *,
    dtype=None,
    class_names: list[str] | None = None,
    patch_size: int = 16,
    inner_stride: int = 4,
    depth: int = 12,
    outer_dim: int = 384,
    inner_dim: int = 24,
    outer_heads: int = 6,
    inner_heads: int = 4,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = False,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    squeeze_excite: bool = False,
    inner_blocks: tuple[int, ...] | None = None,
    legacy: bool = False,
    distilled: bool = False,
    layer_scale: float | None = None,
    class_attention_depth: int = 0,
):
    """Builds a TNT of any architecture as a functional `keras.Model`.

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
            height/patch_size, width/patch_size, outer_dim)`, `"avg"` or `"max"` over the patches,
            or `"token"` for the class token, which is averaged with the distillation token if there
            is one. Pooled features are `(batch, outer_dim)`.
        classes: number of classes. Defaults to 1000.
        classifier_activation: activation of layer `predictions`. If `None`, the outputs are logits.
            Defaults to "softmax".
        name: name of the model. Defaults to "tnt".
        dtype: dtype or `keras.DTypePolicy` of all layers, such as `"mixed_bfloat16"`. Defaults to
            Keras's global policy. Predictions are in float32 or float64.
        class_names: names of the classes, which set `classes`. They are preserved when the model is
            saved, cloned or quantized, and `keras_tnt.class_names` returns them.
        patch_size: side of a patch in pixels. Defaults to 16.
        inner_stride: side of a word in pixels; divides `patch_size`. Defaults to 4.
        depth: number of blocks. Defaults to 12.
        outer_dim: dimension of a patch. Defaults to 384.
        inner_dim: dimension of a word. Defaults to 24.
        outer_heads: number of heads of the outer transformers; divides `outer_dim`. Defaults to 6.
        inner_heads: number of heads of the inner transformers; divides `inner_dim`. Defaults to 4.
        mlp_ratio: hidden dimension of the MLPs divided by their input dimension. Defaults to 4.
        qkv_bias: whether query, key and value have a bias. Defaults to `False`.
        dropout: dropout rate after the position embedding and each projection, in [0, 1). Defaults
            to 0.
        attention_dropout: dropout rate on the attention weights, in [0, 1). Defaults to 0.
        stochastic_depth: drop-path rate of the last block, in [0, 1); rates increase linearly from
            0 over the blocks. Defaults to 0.
        squeeze_excite: whether the outer transformers have squeeze-and-excitation, an option of the
            authors' code. Defaults to `False`.
        inner_blocks: indices, from 0, of the blocks with an inner transformer; `(0, 5, 11)` is the
            paper's TNT-S-2. Defaults to all blocks.
        legacy: whether to build the architecture of timm's first port (checkpoint `tnt_s_legacy`).
            Defaults to `False`.
        distilled: whether to add DeiT's distillation token and head. Defaults to `False`.
        layer_scale: initial value of CaiT's LayerScale on every residual branch. If `None`, there
            is no LayerScale.
        class_attention_depth: number of CaiT's class-attention blocks. If positive, the TNT blocks
            process the patches alone, and class token and distillation token are added after them.
            Defaults to 0.

    Returns:
        A `keras.Model`. With its top, the last layer is `predictions`; `head`, and
        `head_distillation` if distilled, return the logits of each head.

    Raises:
        ValueError: for inconsistent sizes and unknown values.

    Example:
        >>> model = keras_tnt.TNT(input_shape=(64, 64, 3), classes=10, depth=2)
        >>> model.predict(np.zeros((1, 64, 64, 3))).shape
        (1, 10)
    """
    builders.check_sizes(
        patch_size=patch_size,
        inner_stride=inner_stride,
        depth=depth,
        outer_dim=outer_dim,
        inner_dim=inner_dim,
        outer_heads=outer_heads,
        inner_heads=inner_heads,
    )
    blocks_with_words = check_inner_blocks(inner_blocks, depth)
    inputs, size = builders.image_input(input_tensor, input_shape, 224, patch_size, any_size=True)
    side = patch_size // inner_stride
    prefix_tokens = 2 if distilled else 1
    transformer = {
        "mlp_ratio": mlp_ratio,
        "qkv_bias": qkv_bias,
        "dropout": dropout,
        "attention_dropout": attention_dropout,
        "layer_scale": layer_scale,
        "epsilon": EPSILON,
        "dtype": dtype,
    }

    # === Word and patch embedding ===
    x = builders.normalize(inputs, "tnt", IMAGE, include_preprocessing, dtype)
    grid, grid_kwargs = builders.patch_grid(x, size, patch_size, dtype)
    stem = LegacyWordEmbedding if legacy else WordEmbedding
    words = stem(inner_dim, patch_size, inner_stride, dtype=dtype, name="word_embedding")(x)
    words = PositionEmbedding((side, side), dtype=dtype, name="word_position")(words)
    tokens = WordsToPatches(outer_dim, epsilon=EPSILON, dtype=dtype, name="patch_embedding")(words)

    def add_class_tokens(tokens):
        if distilled:
            tokens = ClassToken(dtype=dtype, name="distillation_token")(tokens)
        return ClassToken(dtype=dtype, name="class_token")(tokens)

    tokens_in_blocks = 0 if class_attention_depth else prefix_tokens
    if tokens_in_blocks:
        tokens = add_class_tokens(tokens)
    position = PositionEmbedding(grid, tokens_in_blocks, dtype=dtype, name="patch_position")
    tokens = position(tokens, **grid_kwargs)
    tokens = Dropout(dropout, dtype=dtype, name="position_drop")(tokens)

    # === Blocks ===
    reads_tokens_only = tokens_in_blocks and (include_top or pooling == "token")
    for i in range(depth):
        common = {**transformer, "stochastic_depth": stochastic_depth * i / max(depth - 1, 1)}
        first_tokens = prefix_tokens if reads_tokens_only and i == depth - 1 else None
        if i in blocks_with_words:
            tokens, words = TNTBlock(
                outer_heads,
                inner_heads,
                legacy=legacy,
                squeeze_excite=squeeze_excite,
                prefix_tokens=tokens_in_blocks,
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
    tokens = LayerNormalization(epsilon=EPSILON, dtype=dtype, name="norm")(tokens)

    # === Output ===
    if include_top:
        vectors = builders.read_tokens(tokens, prefix_tokens, dtype)
        outputs = builders.classify(vectors, classes, classifier_activation, class_names, dtype)
    else:
        outputs = builders.pool(tokens, grid, prefix_tokens, pooling, dtype, grid_kwargs)
    return inputs, outputs


def check_inner_blocks(inner_blocks: Sequence[int] | None, depth: int) -> Sequence[int]:
    """Returns the indices of the blocks with an inner transformer, after checking their range."""
    if inner_blocks is None:
        return range(depth)
    unknown = [i for i in inner_blocks if i not in range(depth)]
    if unknown:
        raise ValueError(
            f"`inner_blocks` are indices from 0 to {depth - 1}. Received: {tuple(inner_blocks)}"
        )
    return tuple(inner_blocks)


preprocess_input = builders.preprocessor(IMAGE)


# === Public checkpoints ===

# Columns: name on the Hub, variant, its arguments, parameters, accuracy.
CHECKPOINTS = builders.checkpoints_from_rows(
    (
        (
            "tnt_s_patch16_224.in1k",
            "TNTSmall",
            {},
            23_768_584,
            *accuracy_row("tnt_small", 224, "authors"),
        ),
        (
            "tnt_s_legacy_patch16_224.in1k",
            "TNTSmall",
            {"legacy": True},
            23_755_336,
            *accuracy_row("tnt_small_legacy", 224),
        ),
        (
            "tnt_b_patch16_224.in1k",
            "TNTBase",
            {},
            65_428_680,
            *accuracy_row("tnt_base", 224, "authors"),
        ),
    )
)

# Columns: path of a variable or layer, name in timm, name in the original release.
TENSOR_NAMES = (
    ("word_embedding", "pixel_embed.proj", "patch_embed.proj"),
    ("word_position/table", "pixel_pos:map", "inner_pos"),
    ("patch_embedding/norm_words", "norm1_proj", "proj_norm1"),
    ("patch_embedding/projection", "proj", "proj"),
    ("patch_embedding/norm_patches", "norm2_proj", "proj_norm2"),
    ("class_token/token", "cls_token", "cls_token"),
    ("distillation_token/token", "dist_token", "dist_token"),
    ("patch_position/table", "patch_pos", "outer_pos"),
    ("block_{}/inner/norm_attention", "blocks.{}.norm_in", "blocks.{}.inner_norm1"),
    ("block_{}/inner/attention/qkv", "blocks.{}.attn_in.qk|v", "blocks.{}.inner_attn.qk|v"),
    (
        "block_{}/inner/attention/projection",
        "blocks.{}.attn_in.proj",
        "blocks.{}.inner_attn.proj",
    ),
    ("block_{}/inner/scale_attention/gamma", "blocks.{}.gamma_1_in", "blocks.{}.inner_gamma_1"),
    ("block_{}/inner/norm_mlp", "blocks.{}.norm_mlp_in", "blocks.{}.inner_norm2"),
    ("block_{}/inner/mlp/fc1", "blocks.{}.mlp_in.fc1", "blocks.{}.inner_mlp.fc1"),
    ("block_{}/inner/mlp/fc2", "blocks.{}.mlp_in.fc2", "blocks.{}.inner_mlp.fc2"),
    ("block_{}/inner/scale_mlp/gamma", "blocks.{}.gamma_2_in", "blocks.{}.inner_gamma_2"),
    ("block_{}/words_to_patches/norm_words", "blocks.{}.norm1_proj", "blocks.{}.proj_norm1"),
    ("block_{}/words_to_patches/projection", "blocks.{}.proj", "blocks.{}.proj"),
    ("block_{}/words_to_patches/norm_patches", "blocks.{}.norm2_proj", "blocks.{}.proj_norm2"),
    ("block_{}/outer/norm_attention", "blocks.{}.norm_out", "blocks.{}.outer_norm1"),
    ("block_{}/outer/attention/qkv", "blocks.{}.attn_out.qk|v", "blocks.{}.outer_attn.qk|v"),
    (
        "block_{}/outer/attention/projection",
        "blocks.{}.attn_out.proj",
        "blocks.{}.outer_attn.proj",
    ),
    ("block_{}/outer/scale_attention/gamma", "blocks.{}.gamma_1", "blocks.{}.outer_gamma_1"),
    ("block_{}/outer/norm_mlp", "blocks.{}.norm_mlp", "blocks.{}.outer_norm2"),
    ("block_{}/outer/mlp/fc1", "blocks.{}.mlp.fc1", "blocks.{}.outer_mlp.fc1"),
    ("block_{}/outer/mlp/fc2", "blocks.{}.mlp.fc2", "blocks.{}.outer_mlp.fc2"),
    ("block_{}/outer/scale_mlp/gamma", "blocks.{}.gamma_2", "blocks.{}.outer_gamma_2"),
    ("block_{}/outer/excite/norm", "blocks.{}.se_layer.fc.0", "blocks.{}.se_layer.fc.0"),
    ("block_{}/outer/excite/fc1", "blocks.{}.se_layer.fc.1", "blocks.{}.se_layer.fc.1"),
    ("block_{}/outer/excite/fc2", "blocks.{}.se_layer.fc.3", "blocks.{}.se_layer.fc.3"),
    *CLASS_ATTENTION_NAMES,
)

MARKER_TENSORS = (
    builders.DISTILLATION_TENSORS,
    (r"blocks\.\d+\.proj\.bias", "legacy", "the biased projections of timm's first port"),
)

builders.register_family(
    "tnt",
    TNT,
    variants=VARIANTS,
    image=IMAGE,
    tensor_names=TENSOR_NAMES,
    checkpoints=CHECKPOINTS,
    marker_tensors=MARKER_TENSORS,
    source="Table 1 of arXiv 2103.00112",
)
