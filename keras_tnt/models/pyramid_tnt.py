"""PyramidTNT, Han et al. 2022, arXiv 2201.00978.

TNT in stages: a convolutional stem embeds patches of 8x8 pixels, and between stages each 2x2
patches are merged into one, of up to twice the dimension. There is no class token; the head
classifies the mean patch.
"""

from keras_tnt.layers import (
    Dropout,
    MergePatches,
    MergeWords,
    PositionEmbedding,
    PyramidStem,
    PyramidTNTBlock,
    ReducedBlock,
    RelativePosition,
)
from keras_tnt.layers.base import LayerNormalization
from keras_tnt.layers.pyramid import halve_side
from keras_tnt.models import builders
from keras_tnt.models.registry import Cost, ImageTransform, Variant

IMAGE = ImageTransform(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=0.9)
EPSILON = 1e-5


def stages(depths, **first):
    """Returns the architecture of four stages from the dimensions and heads of the first.

    Args:
        depths: number of blocks per stage.
        **first: dimensions and heads of the first stage; those of the next stages are 2, 4 and 4
            times as large.
    """
    scaled = {key: tuple(value * factor for factor in (1, 2, 4, 4)) for key, value in first.items()}
    return {"depths": depths, **scaled}


VARIANTS = {
    "pyramid_tnt_tiny": Variant(
        stages((2, 6, 3, 2), outer_dims=80, inner_dims=5, outer_heads=2, inner_heads=1),
        192,
        cost=Cost(10_578_839, 586_434_560, 13),
    ),
    "pyramid_tnt_small": Variant(
        stages((2, 8, 4, 2), outer_dims=128, inner_dims=8, outer_heads=4, inner_heads=2),
        256,
        cost=Cost(31_953_696, 3_283_341_312, 16),
    ),
    "pyramid_tnt_medium": Variant(
        stages((2, 8, 6, 2), outer_dims=192, inner_dims=12, outer_heads=4, inner_heads=2),
        256,
        cost=Cost(84_944_316, 8_204_630_016, 18),
    ),
    "pyramid_tnt_base": Variant(
        stages((2, 10, 6, 2), outer_dims=256, inner_dims=16, outer_heads=4, inner_heads=2),
        256,
        cost=Cost(156_991_064, 15_966_642_176, 20),
    ),
}


@builders.builder
def PyramidTNT(
    include_top: bool = True,
    include_preprocessing: bool = True,
    weights: str | None = None,
    input_tensor=None,
    input_shape: tuple[int | None, int | None, int] | None = None,
    pooling: str | None = None,
    classes: int = 1000,
    classifier_activation="softmax",
    name: str = "pyramid_tnt",
    *,
    dtype=None,
    class_names: list[str] | None = None,
    depths: tuple[int, ...] = (2, 8, 4, 2),
    outer_dims: tuple[int, ...] = (128, 256, 512, 512),
    inner_dims: tuple[int, ...] = (8, 16, 32, 32),
    outer_heads: tuple[int, ...] = (4, 8, 16, 16),
    inner_heads: tuple[int, ...] = (2, 4, 8, 8),
    reductions: tuple[int, ...] = (4, 2, 1, 1),
    mlp_ratio: float = 4.0,
    qkv_bias: bool = False,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    stochastic_depth: float = 0.0,
):
    """Builds a PyramidTNT of any architecture as a functional `keras.Model`.

    Args:
        include_top: whether the model ends in the classifier. Defaults to `True`.
        include_preprocessing: whether the model takes pixels in [0, 255] and normalizes them. If
            `False`, pass images through `preprocess_input` first. Defaults to `True`.
        weights: a name of `keras_tnt.list_weights()`, `"hf://owner/repository"`, or the path of a
            file. If `None`, the weights are random.
        input_tensor: Keras tensor to use as the input. If `None`, a new input is created.
        input_shape: (height, width, channels), or channels first if that is Keras's image data
            format. Height and width are multiples of 8 and may differ; unless they are multiples of
            64, odd numbers of patches are rounded up between stages. If they are `None`, each call
            accepts images of any such size, and the position tables, created for 256x256 or the
            size of the weights, are resampled to it. Defaults to 256x256 RGB.
        pooling: feature pooling if `include_top` is `False`: `None` for the feature map, `(batch,
            height/64, width/64, outer dimension)` with four stages, or `"avg"` or `"max"` over the
            patches, `(batch, outer dimension)`.
        classes: number of classes. Defaults to 1000.
        classifier_activation: activation of layer `predictions`. If `None`, the outputs are logits.
            Defaults to "softmax".
        name: name of the model. Defaults to "pyramid_tnt".
        dtype: dtype or `keras.DTypePolicy` of all layers, such as `"mixed_bfloat16"`. Defaults to
            Keras's global policy. Predictions are in float32 or float64.
        class_names: names of the classes, which set `classes`. They are preserved when the model is
            saved, cloned or quantized, and `keras_tnt.class_names` returns them.
        depths: number of blocks per stage. The first block of a stage has an inner transformer, and
            so has the second in stages of more than 6 blocks. Defaults to `(2, 8, 4, 2)`.
        outer_dims: dimension of a patch, per stage. Defaults to `(128, 256, 512, 512)`.
        inner_dims: dimension of a word, per stage. Defaults to `(8, 16, 32, 32)`.
        outer_heads: number of heads of the outer transformers, per stage. Defaults to `(4, 8, 16,
            16)`.
        inner_heads: number of heads of the inner transformers, per stage. Defaults to `(2, 4, 8,
            8)`.
        reductions: side of the squares of patches that are averaged for the keys and values of the
            outer attention, per stage. Defaults to `(4, 2, 1, 1)`.
        mlp_ratio: hidden dimension of the MLPs divided by their input dimension. Defaults to 4.
        qkv_bias: whether query, key and value have a bias. Defaults to `False`.
        dropout: dropout rate after the position embedding and each projection, in [0, 1). Defaults
            to 0.
        attention_dropout: dropout rate on the attention weights, in [0, 1). Defaults to 0.
        stochastic_depth: drop-path rate of the last block, in [0, 1); rates increase linearly from
            0 over the blocks. Defaults to 0.

    Returns:
        A `keras.Model`. With its top, the last layer is `predictions`, and `head` returns the
        logits.

    Raises:
        ValueError: for inconsistent sizes and unknown values.

    Example:
        >>> model = keras_tnt.PyramidTNT(input_shape=(64, 64, 3), classes=10, depths=(1, 1, 1, 1))
        >>> model.predict(np.zeros((1, 64, 64, 3))).shape
        (1, 10)
    """
    builders.check_pooling(pooling, (None, "avg", "max"))
    patch_size = PyramidStem.patch_size
    inputs, size = builders.image_input(input_tensor, input_shape, 256, patch_size, any_size=True)
    check_stages(
        tuple(side // patch_size for side in size),
        reductions=reductions,
        depths=depths,
        outer_dims=outer_dims,
        inner_dims=inner_dims,
        outer_heads=outer_heads,
        inner_heads=inner_heads,
    )
    rates = iter(stochastic_depth * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))

    # === Stem ===
    x = builders.normalize(inputs, "pyramid_tnt", IMAGE, include_preprocessing, dtype)
    patches, words = PyramidStem(outer_dims[0], inner_dims[0], dtype=dtype, name="stem")(x)
    words = PositionEmbedding((4, 4), dtype=dtype, name="word_position")(words)
    grids = [
        builders.patch_grid(x, size, patch_size * 2**s, dtype, f"stage_{s}_grid")
        for s in range(len(depths))
    ]
    grid, grid_kwargs = grids[0]
    patches = PositionEmbedding(grid, dtype=dtype, name="patch_position")(patches, **grid_kwargs)
    patches = Dropout(dropout, dtype=dtype, name="position_drop")(patches)

    # === Stages ===
    for s, (grid, grid_kwargs) in enumerate(grids):
        if s > 0:
            previous_grid, previous_kwargs = grids[s - 1]
            merged = {
                "grid": None if previous_kwargs else previous_grid,
                "epsilon": EPSILON,
                "dtype": dtype,
            }
            merge_words = MergeWords(inner_dims[s], name=f"merge_words_{s - 1}", **merged)
            merge_patches = MergePatches(outer_dims[s], name=f"merge_patches_{s - 1}", **merged)
            words = merge_words(words, **previous_kwargs)
            patches = merge_patches(patches, **previous_kwargs)
        bias = RelativePosition(
            outer_heads[s], grid, reductions[s], dtype=dtype, name=f"stage_{s}_relative_position"
        )(patches, **grid_kwargs)
        for i in range(depths[s]):
            block = {
                "grid": None if grid_kwargs else grid,
                "reduction": reductions[s],
                "mlp_ratio": mlp_ratio,
                "qkv_bias": qkv_bias,
                "dropout": dropout,
                "attention_dropout": attention_dropout,
                "stochastic_depth": next(rates),
                "epsilon": EPSILON,
                "dtype": dtype,
                "name": f"stage_{s}_block_{i}",
            }
            if i == 0 or (i == 1 and depths[s] > 6):
                patches, words = PyramidTNTBlock(outer_heads[s], inner_heads[s], **block)(
                    patches, words, bias=bias, **grid_kwargs
                )
            else:
                patches = ReducedBlock(outer_heads[s], **block)(patches, bias=bias, **grid_kwargs)
    patches = LayerNormalization(epsilon=EPSILON, dtype=dtype, name="norm")(patches)

    # === Output ===
    if include_top:
        mean = builders.pool(patches, grid, 0, "avg", dtype, grid_kwargs)
        outputs = builders.classify([mean], classes, classifier_activation, class_names, dtype)
    else:
        outputs = builders.pool(patches, grid, 0, pooling, dtype, grid_kwargs)
    return inputs, outputs


def check_stages(grid, **by_stage):
    """Checks the arguments given per stage, and that each stage has enough patches to pool.

    Args:
        grid: (rows, columns) of the first stage's patches.
        **by_stage: sequences of one value per stage, `reductions` among them.

    Raises:
        ValueError: if their lengths differ, a value is not a positive integer, or a stage has fewer
            patches than its reduction needs.
    """
    reductions = by_stage["reductions"]
    if not all(len(values) == len(reductions) > 0 for values in by_stage.values()):
        raise ValueError(
            "These must have one value for each stage. Received: "
            + ", ".join(f"{key}={tuple(values)}" for key, values in by_stage.items())
        )
    for key, values in by_stage.items():
        for value in values:
            builders.check_sizes(**{key: value})
    grids = [grid]
    while len(grids) < len(reductions):
        grids.append(tuple(map(halve_side, grids[-1])))
    for s, (size, reduction) in enumerate(zip(grids, reductions, strict=True)):
        if min(size) < reduction:
            raise ValueError(
                f"Stage {s + 1} has {size[0]}x{size[1]} patches, fewer than the {reduction}x"
                f"{reduction} that are pooled. Give a larger `input_shape` or smaller "
                f"`reductions`. Received: reductions={tuple(reductions)}"
            )


preprocess_input = builders.preprocessor(IMAGE)


# === Released checkpoints ===

# Columns: path within a block, name in the original release. timm has no PyramidTNT.
BLOCK_NAMES = tuple(
    (f"stage_{{}}_block_{{}}/{path}", f"stages.{{}}.blocks.{{}}.{name}")
    for path, name in (
        ("inner/norm_attention", "inner_norm1"),
        ("inner/attention/qkv", "inner_attn.q|kv"),
        ("inner/attention/projection", "inner_attn.proj"),
        ("inner/norm_mlp", "inner_norm2"),
        ("inner/mlp/fc1", "inner_mlp.fc1"),
        ("inner/mlp/fc2", "inner_mlp.fc2"),
        ("words_to_patches/norm_words", "proj_norm1"),
        ("words_to_patches/projection", "proj"),
        ("words_to_patches/norm_patches", "proj_norm2"),
        ("outer/norm_attention", "outer_norm1"),
        ("outer/attention/query", "outer_attn.q"),
        ("outer/attention/reduce", "outer_attn.linear"),
        ("outer/attention/norm", "outer_attn.norm"),
        ("outer/attention/kv", "outer_attn.kv"),
        ("outer/attention/projection", "outer_attn.proj"),
        ("outer/norm_mlp", "outer_norm2"),
        ("outer/mlp/fc1", "outer_mlp.fc1"),
        ("outer/mlp/fc2", "outer_mlp.fc2"),
    )
)

TENSOR_NAMES = (
    ("stem/common/convolution", "patch_embed.common_conv.0"),
    ("stem/common/norm", "patch_embed.common_conv.1"),
    ("stem/words/convolution", "patch_embed.inner_convs.0"),
    ("stem/words/norm", "patch_embed.inner_convs.1"),
    ("stem/patches1/convolution", "patch_embed.outer_convs.0"),
    ("stem/patches1/norm", "patch_embed.outer_convs.1"),
    ("stem/patches2/convolution", "patch_embed.outer_convs.3"),
    ("stem/patches2/norm", "patch_embed.outer_convs.4"),
    ("stem/patches3/convolution", "patch_embed.outer_convs.6"),
    ("stem/patches3/norm", "patch_embed.outer_convs.7"),
    ("word_position/table", "inner_pos"),
    ("patch_position/table", "outer_pos"),
    ("stage_{}_relative_position/table", "stages.{}.relative_pos"),
    *BLOCK_NAMES,
    ("merge_words_{}/norm", "word_merges.{}.norm"),
    ("merge_words_{}/convolution", "word_merges.{}.conv.0"),
    ("merge_patches_{}/norm", "sentence_merges.{}.norm"),
    ("merge_patches_{}/convolution", "sentence_merges.{}.conv.0"),
)

builders.register_family(
    "pyramid_tnt",
    PyramidTNT,
    variants=VARIANTS,
    image=IMAGE,
    tensor_names=TENSOR_NAMES,
    source="Table 2 of arXiv 2201.00978",
)
