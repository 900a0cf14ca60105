"""PyramidTNT, Han et al. 2022, arXiv 2201.00978.

TNT in stages: a convolutional stem makes patches of 8x8 pixels, and between stages each 2x2 patches
become one, of twice the dimension. There is no class token; the class is read off the mean patch.
"""

from keras_tnt import model as parts
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
from keras_tnt.layers.pyramid import halve

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
EPSILON = 1e-5

SOURCE = "Table 2 of arXiv 2201.00978"
# image side, blocks by stage, dimensions and heads of stage 1
VARIANTS = {
    "pyramid_tnt_tiny": (192, (2, 6, 3, 2), 80, 5, 2, 1),
    "pyramid_tnt_small": (256, (2, 8, 4, 2), 128, 8, 4, 2),
    "pyramid_tnt_medium": (256, (2, 8, 6, 2), 192, 12, 4, 2),
    "pyramid_tnt_base": (256, (2, 10, 6, 2), 256, 16, 4, 2),
}


@parts.builder
def PyramidTNT(
    include_top=True,
    include_preprocessing=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=1000,
    classifier_activation="softmax",
    name="pyramid_tnt",
    *,
    depths=(2, 8, 4, 2),
    outer_dims=(128, 256, 512, 512),
    inner_dims=(8, 16, 32, 32),
    outer_heads=(4, 8, 16, 16),
    inner_heads=(2, 4, 8, 8),
    reductions=(4, 2, 1, 1),
    mlp_ratio=4.0,
    qkv_bias=False,
    dropout=0.0,
    attention_dropout=0.0,
    stochastic_depth=0.0,
):
    """Build a PyramidTNT of any architecture, as a functional `keras.Model`.

    Args:
        include_top, include_preprocessing, weights, input_tensor, classes, classifier_activation,
            name: as `keras_tnt.TNT` has them.
        input_shape: (height, width, channels), or channels first by Keras's setting; any multiples
            of 8, square or not. Multiples of 64 halve evenly at every stage; elsewhere odd numbers
            of patches are rounded up. Default: 256x256, RGB.
        pooling: without top. None: the feature map `(batch, height/64, width/64, outer dimension)`
            of four stages; `"avg"`, `"max"` over the patches: `(batch, outer dimension)`.
        depths: number of blocks by stage. The first of a stage has an inner transformer, and the
            second too where the stage has more than 6.
        outer_dims, inner_dims: dimensions of a patch and of a word by stage.
        outer_heads, inner_heads: heads of the two transformers by stage.
        reductions: by stage, the side of the squares of patches whose means are the keys and values
            of the outer attention.
        mlp_ratio: hidden over input dimension, in both transformers.
        qkv_bias: whether query, key and value have a bias.
        dropout: rate behind the position embedding and each projection, in [0, 1).
        attention_dropout: rate on the attention, in [0, 1).
        stochastic_depth: rate of the last block, in [0, 1); grows linearly from 0 over the blocks.

    Returns:
        A `keras.Model`. Its last layer is `predictions` (with top); `head` gives the logits.

    Raises:
        ValueError: for sizes that do not fit each other, and unknown values.

    Example:

    >>> model = keras_tnt.PyramidTNT(input_shape=(64, 64, 3), classes=10, depths=(1, 1, 1, 1))
    >>> model.predict(np.zeros((1, 64, 64, 3))).shape
    (1, 10)
    """
    parts.check_head(pooling, classes, classifier_activation, has_token=False)
    patch_size = PyramidStem.patch_size
    inputs, size = parts.image_input(input_tensor, input_shape, 256, patch_size)
    weights = parts.fetch_weights(weights, classes if include_top else None)
    grid = tuple(side // patch_size for side in size)
    grids = stage_grids(
        grid,
        reductions=reductions,
        depths=depths,
        outer_dims=outer_dims,
        inner_dims=inner_dims,
        outer_heads=outer_heads,
        inner_heads=inner_heads,
    )
    rates = iter(stochastic_depth * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))

    # === Stem ===
    x = parts.normalise(inputs, MEAN, STD) if include_preprocessing else inputs
    patches, words = PyramidStem(outer_dims[0], inner_dims[0], name="stem")(x)
    words = PositionEmbedding((4, 4), name="word_position")(words)
    patches = PositionEmbedding(grid, name="patch_position")(patches)
    patches = Dropout(dropout, name="position_drop")(patches)

    # === Stages ===
    for s, grid in enumerate(grids):
        if s > 0:
            merged = {"grid": grids[s - 1], "epsilon": EPSILON}
            words = MergeWords(inner_dims[s], name=f"merge_words_{s - 1}", **merged)(words)
            patches = MergePatches(outer_dims[s], name=f"merge_patches_{s - 1}", **merged)(patches)
        bias = RelativePosition(
            outer_heads[s], grid, reductions[s], name=f"stage_{s}_relative_position"
        )(patches)
        for i in range(depths[s]):
            block = {
                "grid": grid,
                "reduction": reductions[s],
                "mlp_ratio": mlp_ratio,
                "qkv_bias": qkv_bias,
                "dropout": dropout,
                "attention_dropout": attention_dropout,
                "stochastic_depth": next(rates),
                "epsilon": EPSILON,
                "name": f"stage_{s}_block_{i}",
            }
            if i == 0 or (i == 1 and depths[s] > 6):
                patches, words = PyramidTNTBlock(outer_heads[s], inner_heads[s], **block)(
                    patches, words, bias=bias
                )
            else:
                patches = ReducedBlock(outer_heads[s], **block)(patches, bias=bias)
    patches = LayerNormalization(epsilon=EPSILON, name="norm")(patches)

    # === Output ===
    if include_top:
        mean = parts.pool(patches, grid, 0, "avg")
        outputs = parts.classify([mean], classes, classifier_activation)
    else:
        outputs = parts.pool(patches, grid, 0, pooling)
    return parts.finish(inputs, outputs, name, weights)


def stage_grids(grid, **by_stage):
    """(rows, columns) of the patches of each stage, after a check of what is given by stage."""
    reductions = by_stage["reductions"]
    if not all(len(values) == len(reductions) > 0 for values in by_stage.values()):
        raise ValueError(
            "These must have one value for each stage. Received: "
            + ", ".join(f"{key}={tuple(values)}" for key, values in by_stage.items())
        )
    for key, values in by_stage.items():
        for value in values:
            parts.check_sizes(**{key: value})
    grids = [grid]
    while len(grids) < len(reductions):
        grids.append(tuple(map(halve, grids[-1])))
    for s, (size, reduction) in enumerate(zip(grids, reductions, strict=True)):
        if min(size) < reduction:
            raise ValueError(
                f"Stage {s + 1} has {size[0]}x{size[1]} patches, fewer than the {reduction}x"
                f"{reduction} that are pooled. Give a larger `input_shape` or smaller "
                f"`reductions`. Received: reductions={tuple(reductions)}"
            )
    return grids


def variant(name):
    size, depths, outer_dim, inner_dim, outer_heads, inner_heads = VARIANTS[name]
    return parts.variant(
        PyramidTNT,
        name,
        SOURCE,
        size,
        depths=depths,
        outer_dims=scaled(outer_dim),
        inner_dims=scaled(inner_dim),
        outer_heads=scaled(outer_heads),
        inner_heads=scaled(inner_heads),
    )


def scaled(value):
    """A dimension or number of heads of stage 1 as it grows over the stages."""
    return tuple(value * factor for factor in (1, 2, 4, 4))


PyramidTNTTiny = variant("pyramid_tnt_tiny")
PyramidTNTSmall = variant("pyramid_tnt_small")
PyramidTNTMedium = variant("pyramid_tnt_medium")
PyramidTNTBase = variant("pyramid_tnt_base")


def preprocess_input(x, data_format=None):
    """Normalise pixels in [0, 255] to [-1, 1], for models built with `include_preprocessing=False`.

    Args:
        x: array or tensor of images.
        data_format: where the channels stand; makes no difference to PyramidTNT.

    Returns:
        Array or tensor of the same shape, in floating point.
    """
    return parts.standardise(x, MEAN, STD, data_format)
