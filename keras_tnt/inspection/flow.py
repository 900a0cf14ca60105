"""Propagation of relevance from the heads back to patches and words; see docs/relevance.md.

`links` is a dict from a layer's path to the weights by which it reads:
`(batch, ..., queries, keys)` of attention, averaged over heads, and `(batch, patches, words)` of
`WordsToPatches`. `keep` is the weight of the residual connection.
"""

import numpy as np

from keras_tnt.inspection.maps import means, side_means


def relevance_map(subject, links, keep, words):
    """Returns the relevance of first-stage patches, or of their words: (batch, rows, columns).

    The relevance that the heads read from a patch is distributed over its words by its composition
    at the moment it was read. So the words of a patch sum to the patch.
    """
    flows = patch_flows(subject, links, keep)
    if not words:
        return to_map(sum(flows), subject.grids[0])
    shares = list(compositions(subject, links, keep))
    shares.append(shares[-1])  # for what is read after the last block
    pairs = zip(flows, shares, strict=True)
    return to_map(sum(drawn[..., None] * share for drawn, share in pairs), subject.grids[0])


def patch_flows(subject, links, keep):
    """Returns the relevance that the heads read from each first-stage patch's own content.

    Returns:
        A list of arrays (batch, first-stage patches): one for what the outer attention of each
        block reads, then one for what is read after the last block.
    """
    found, grids = subject.found, subject.grids
    batch, patches = len(next(iter(links.values()))), np.prod(grids[-1])
    tokens = found.class_tokens
    read = np.full((batch, tokens or patches), 1 / (tokens or patches))  # what the heads read
    if tokens:
        read = np.pad(read, [(0, 0), (0, patches)])
    for layer in reversed(found.class_blocks):
        drawn = along(read[:, :tokens], links[layer.attention.path])
        read[:, :tokens] *= keep
        read = read + drawn

    prefix = found.blocks[-1].prefix_tokens
    read = read[:, len(read[0]) - patches - prefix :]
    stage, own = len(grids) - 1, keep ** len(found.blocks)
    flows = [own * read[:, prefix:]]
    for block in reversed(found.blocks):
        # Class tokens that precede this block's patches; tokens added later read nothing here.
        read, prefix = read[:, prefix - block.prefix_tokens :], block.prefix_tokens
        if block.stage < stage:
            merge = means(grids[stage - 1], grids[stage], 2)
            read, flows = read @ merge, [drawn @ merge for drawn in flows]
            stage = block.stage
        drawn = along(read, links[block.outer.attention.path])
        if block.reduction > 1:
            pooled = tuple(side // block.reduction for side in grids[stage])
            drawn = drawn @ means(grids[stage], pooled, block.reduction)
        read = keep * read + drawn
        own /= keep
        flows.append(own * drawn[:, prefix:])
    return flows[::-1]


def compositions(subject, links, keep):
    """Yields the word composition of each first-stage patch's own content, block by block.

    Yields:
        Arrays (batch, first-stage patches, words), which sum to one over the words: one for each
        block, at its outer attention.
    """
    grids, stage = subject.grids, 0
    steps = []  # operations on words so far: inner attention, or (grid, new grid) of a merge
    made = links[subject.patch_embedding.path] if subject.patch_embedding else None
    gathered = None
    for block in subject.found.blocks:
        if block.stage > stage:
            merge = grids[stage], grids[block.stage]
            gathered, stage = merge_words(gathered, *merge), block.stage
            steps.append(merge)
        if block.inner is not None:
            inner = links[block.inner.attention.path]
            steps.append(inner)
            read = links[block.layer.words_to_patches.path]
            gathered = np.ones_like(read) if gathered is None else gathered
            gathered = keep * gathered + np.einsum("...qk,...k->...q", inner, gathered)
            # Normalized, so that a word passes on what was read of it and no more.
            read = np.divide(read, gathered, out=np.zeros_like(read), where=gathered > 0)
            read = back_to_first_words(read, steps, keep)
            made = read if made is None else made + read
        total = made.sum(axis=-1, keepdims=True)
        even = np.full_like(made, 1 / made.shape[-1])
        yield np.divide(made, total, out=even, where=total > 0)


def back_to_first_words(words, steps, keep):
    """Returns the relevance of first-stage words, propagated back through `steps`."""
    for step in reversed(steps):
        if isinstance(step, tuple):
            words = split_words(words, *step)
        else:
            words = keep * words + along(words, step)
    return words


def along(rows, link):
    """Multiplies rows (batch, ..., queries) by a link (batch, ..., queries, keys)."""
    return np.einsum("...q,...qk->...k", rows, link)


def back_to_first_stage(subject, values, stage):
    """Returns a stage's values as a map (batch, rows, columns) of the first stage.

    `values` have the shape (batch, patches) or (batch, patches, words).
    """
    values = values if values.ndim == 3 else values[..., None]
    for after in range(stage, 0, -1):
        values = split_words(values, subject.grids[after - 1], subject.grids[after])
    return to_map(values, subject.grids[0])


# === Words as a map ===


def merge_words(words, grid, new_grid):
    """Returns the words of the new grid's patches: each is the mean of 2x2 words of the map."""
    rows, columns = word_means(words, grid, new_grid)
    return to_words(rows @ to_map(words, grid) @ columns.T, new_grid)


def split_words(words, grid, new_grid):
    """Distributes the new grid's words, in equal parts, over those that each averages."""
    rows, columns = word_means(words, grid, new_grid)
    return to_words(rows.T @ to_map(words, new_grid) @ columns, grid)


def word_means(words, grid, new_grid):
    """Returns the matrices that average the rows and the columns of a word map."""
    side = round(words.shape[-1] ** 0.5)
    return [side_means(side * a, side * b, 2) for a, b in zip(grid, new_grid, strict=True)]


def to_map(words, grid):
    """Reshapes (batch, patches[, words]) to (batch, rows * side, columns * side)."""
    side = round(words[0, 0].size ** 0.5)
    x = np.reshape(words, (-1, *grid, side, side)).swapaxes(2, 3)  # (b, r, s, q, s)
    return np.reshape(x, (-1, grid[0] * side, grid[1] * side))  # (b, r*s, q*s)


def to_words(x, grid):
    """Reshapes (batch, rows * side, columns * side) to (batch, patches, words)."""
    side = x.shape[1] // grid[0]
    x = np.reshape(x, (-1, grid[0], side, grid[1], side)).swapaxes(2, 3)  # (b, r, q, s, s)
    return np.reshape(x, (-1, grid[0] * grid[1], side * side))  # (b, r*q, w)
