"""Attention maps and attention rollout."""

import keras
import numpy as np

from keras_tnt.layers.attention import record_attention
from keras_tnt.models.anatomy import anatomy, sides_of


def attention_maps(model, images):
    """Returns the attention of a forward pass, by layer.

    Args:
        model: a model of this package, or one with such a model inside.
        images: `(batch, height, width, channels)` as the model takes them, or channels first.

    Returns:
        A dict of float32 arrays whose last axis, the keys, sums to one, in the order of the forward
        pass. CaiT's maps are those before its heads are mixed. Tokens are the class token, the
        distillation token if there is one, and the patches row by row:

        - `"block_3/outer"` (PyramidTNT: `"stage_0_block_1/outer"`), of every family's blocks:
          `(batch, heads, tokens, tokens)`; PyramidTNT: `(batch, heads, patches, pooled patches)`.
        - `"block_3/inner"`, of TNT's and PyramidTNT's blocks with an inner transformer:
          `(batch, patches, heads, words, words)`.
        - `"class_block_0"`, of class attention: `(batch, heads, class tokens, tokens)`.

    Raises:
        ValueError: if images do not match the model, or it has no attention layer of this package.

    Example:
        >>> maps = keras_tnt.inspection.attention_maps(keras_tnt.TNTSmall(weights=None), images)
        >>> maps["block_11/outer"].shape, maps["block_11/inner"].shape
        ((1, 6, 197, 197), (1, 196, 4, 16, 16))
    """
    check_images(model, images)
    with record_attention() as recorded:
        model(images, training=False)
    if not recorded:
        raise ValueError(f"Model '{model.name}' has no attention layer of keras_tnt.")
    names = attention_names(model)
    return {names.get(path, path): keras.ops.convert_to_numpy(x) for path, x in recorded.items()}


def check_images(model, images):
    """Raises a `ValueError` unless images are a batch that the model accepts."""
    shape = tuple(np.shape(images))
    image = anatomy(model).image
    expected = image.shape
    if len(shape) != 4 or any(e not in (None, s) for s, e in zip(shape[1:], expected, strict=True)):
        raise ValueError(
            f"Model '{model.name}' takes a batch of images {('batch', *expected)}. "
            f"Received: {shape}"
        )
    image.check_size(*sides_of(shape, image.data_format))


def attention_names(model):
    """Returns a dict from the path of each attention layer to its name in the maps."""
    names = {}
    found = anatomy(model)
    for block in found.blocks:
        for kind, transformer in (("inner", block.inner), ("outer", block.outer)):
            if transformer is not None:
                names[f"{transformer.path}/attention"] = f"{block.name}/{kind}"
    for layer in found.class_blocks:
        names[f"{layer.path}/attention"] = layer.name.removeprefix(found.layer_prefix)
    return names


def attention_rollout(model, images):
    """Computes attention rollout through all outer blocks (arXiv 2005.00928).

    Rollout (Abnar and Zuidema 2020) is the product over blocks of (mean attention of the heads +
    identity) / 2, and says how much of each input token reaches each output token. In class
    attention, patches have identity rows. In PyramidTNT, attention to a pooled patch is distributed
    evenly over its patches, and a merged patch is the mean of its 2x2.

    Args:
        model: as for `attention_maps`.
        images: as for `attention_maps`.

    Returns:
        Array `(batch, tokens, tokens)`, whose rows sum to one; row 0 is the class token's where
        there is one. PyramidTNT: `(batch, last patches, first patches)`.

    Example:
        >>> rollout = keras_tnt.inspection.attention_rollout(model, images)
        >>> heat = rollout[:, 0, 1:].reshape(-1, 14, 14)
    """
    found = anatomy(model)
    blocks = {f"{block.name}/outer": block for block in found.blocks}
    size = sides_of(np.shape(images), found.image.data_format)
    rollout, grid = None, None
    for key, value in attention_maps(model, images).items():
        if key.endswith("/inner"):
            continue
        step = value.mean(axis=1)  # (b, queries, keys)
        block = blocks.get(key)
        if block is not None and len(found.stages) > 1:
            new_grid = found.grid_of(block, size)
            if block.reduction > 1:
                pooled = tuple(side // block.reduction for side in new_grid)
                step = step @ means(new_grid, pooled, block.reduction)
            if grid not in (None, new_grid):
                rollout = means(grid, new_grid, 2) @ rollout
            grid = new_grid
        queries, keys = step.shape[1:]
        if queries < keys:  # class attention
            step = np.pad(step, [(0, 0), (0, keys - queries), (0, 0)])
            step[:, queries:] = np.eye(keys)[queries:]
        step = (step + np.eye(keys)) / 2
        if rollout is not None and rollout.shape[1] < keys:  # class tokens are added here
            rollout = with_tokens(rollout, keys - rollout.shape[1])
        rollout = step if rollout is None else step @ rollout
    return rollout.astype("float32")


def with_tokens(rollout, count):
    """Prepends `count` tokens to a rollout, which have attended only to themselves."""
    rollout = np.pad(rollout, [(0, 0), (count, 0), (count, 0)])
    rollout[:, :count, :count] = np.eye(count)
    return rollout


def means(grid, new_grid, size):
    """Returns the matrix (new patches, patches) that averages `size` x `size` patches of a grid.

    Patches outside the new grid's windows are excluded; windows are clipped to the grid.
    """
    return np.kron(*(side_means(*sides, size) for sides in zip(grid, new_grid, strict=True)))


def side_means(side, new_side, size):
    """Returns the matrix (new_side, side) that averages each `size` consecutive elements."""
    sums = np.repeat(np.eye(new_side), size, axis=1)
    sums = np.pad(sums, [(0, 0), (0, max(0, side - sums.shape[1]))])[:, :side]
    return sums / np.maximum(sums.sum(axis=1, keepdims=True), 1)
