"""Feature maps of the patches after some of a model's blocks."""

from collections.abc import Iterable

import keras

from keras_tnt.layers import PatchGrid, PatchMap, SelectTokens
from keras_tnt.models.anatomy import Anatomy, Block, anatomy


def feature_maps(model: keras.Model, blocks: Iterable[int] | None = None) -> keras.Model:
    """Returns a model that outputs the patches after some blocks as maps, for dense prediction.

    Layers and weights are shared with the given model: training one trains both. If the last block
    of a classifier computes only its class token, the returned model has it compute the patches
    too.

    Args:
        model: a model of this package.
        blocks: numbers of completed blocks, from 1: `(3, 6, 9, 12)` are the maps after a quarter,
            half, three quarters and all of 12 blocks. PyramidTNT: its stages, from 1. If `None`,
            after each quarter of the blocks, or all stages.

    Returns:
        A `keras.Model` from the model's input to a list of maps `(batch, height/p, width/p, dim)`
        (to a map, if there is one block), always channels last, without class tokens and before the
        final norm; p is the patch size, and 8, 16, 32 and 64 in PyramidTNT's stages.

    Raises:
        ValueError: if the model has no such block, or wraps one that has.

    Example:
        >>> backbone = keras_tnt.inspection.feature_maps(keras_tnt.TNTSmall(weights=None))
        >>> [tuple(m.shape) for m in backbone(np.zeros((1, 224, 224, 3)))]
        [(1, 14, 14, 384), (1, 14, 14, 384), (1, 14, 14, 384), (1, 14, 14, 384)]
    """
    found = anatomy(model)
    if found.model is not model:
        raise ValueError(
            f"Model '{model.name}' has no blocks of its own. Pass its layer '{found.model.name}' "
            "instead."
        )
    in_stages = len(found.stages) > 1
    ends = [stage[-1] for stage in found.stages] if in_stages else list(found.blocks)
    if blocks is None:
        parts = len(ends) if in_stages else min(4, len(ends))
        blocks = [len(ends) * (i + 1) // parts for i in range(parts)]
    blocks = list(blocks)
    if not blocks or not set(blocks) <= set(range(1, len(ends) + 1)):
        kind = "stages" if in_stages else "blocks"
        raise ValueError(
            f"`blocks` of model '{model.name}' are {kind} from 1 to {len(ends)}. "
            f"Received: {tuple(blocks)}"
        )
    maps = [patch_map(found, ends[number - 1], number) for number in blocks]
    return keras.Model(model.inputs[0], maps, name=f"{model.name}_features")


def patch_map(found: Anatomy, block: Block, suffix: int | str):
    """Returns the symbolic map (batch, rows, columns, dim) of the patches after a block.

    Args:
        found: the model's `Anatomy`.
        block: one of its blocks.
        suffix: suffix of the names of the layers that make the map.
    """
    dtype = block.layer.dtype_policy
    inputs = keras.tree.flatten(block.layer.input)
    tokens = keras.tree.flatten(block.layer.output)[0]
    if tokens.shape[1] != inputs[0].shape[1]:  # only the query tokens
        tokens = keras.tree.flatten(block.layer(*inputs))[0]
    if block.prefix_tokens:
        select = SelectTokens(block.prefix_tokens, dtype=dtype, name=f"patches_{suffix}")
        tokens = select(tokens)
    if block.grid is None:
        assert found.patch_size is not None, "the stem declares no patch size"
        patch_size = found.patch_size * 2**block.stage
        grid = PatchGrid(patch_size, found.image.data_format, dtype=dtype, name=f"grid_{suffix}")(
            found.input_normalization.output
        )
        return PatchMap(dtype=dtype, name=f"map_{suffix}")(tokens, grid)
    shape = (*block.grid, tokens.shape[-1])
    return keras.layers.Reshape(shape, dtype=dtype, name=f"map_{suffix}")(tokens)
