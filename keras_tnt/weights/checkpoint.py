"""Fill a model from a PyTorch-named checkpoint, and write one."""

import os
import re
import uuid

from keras_tnt.text import printable
from keras_tnt.weights.files import SAFETENSORS, open_tensors
from keras_tnt.weights.names import UNUSED, conventions, entries, family

LISTED = 10


def load_checkpoint(model, source, ema=False):
    """Fill a model from a checkpoint with timm's or the original release's tensor names.

    Every tensor of the model is filled and every tensor of the file used; positions of another
    grid are resampled. A model without its top leaves the file's heads alone, and layers of your
    own before or behind the model stay as they are.

    Args:
        model: a model built by this package, or one with such a model inside.
        source: path of a `.safetensors` file, or of a `.pth`, `.pt`, `.pth.tar` or `.bin` file
            where torch is installed; of these only tensors are read, never code.
        ema: whether to take the moving average (EMA) of the weights, which the files of some
            training runs hold beside the weights.

    Returns:
        The model.

    Raises:
        OSError: if there is no such file, or it may not be read.
        ImportError: if it takes torch to read the file, which is not installed.
        ValueError: if the file is damaged or would run code, or if its tensors do not fit the
            model or are no finite numbers. The model is unchanged then.

    Example:

    >>> model = keras_tnt.TNTSmall(weights=None)
    >>> keras_tnt.load_checkpoint(model, "tnt_s_patch16_224.safetensors")
    """
    file = open_tensors(source, ema)
    try:
        matched = match(model, file.shapes)
    except ValueError as error:
        raise ValueError(f"'{file.path}': {error}") from error
    # Everything is read once before anything is assigned, so that a bad tensor changes nothing.
    file.check(name for entry in matched for name in entry.names)
    for entry in matched:
        entry.assign(file.read(entry.names))
    return model


def save_checkpoint(model, path):
    """Write a model's weights as a checkpoint that timm reads.

    `load_checkpoint` gives the same weights back. PyramidTNT, which timm does not have, keeps the
    original release's names. The weights of LoRA are added to those that they adapt.

    Args:
        model: a model built by this package, or one with such a model inside and a layer
            `Dense(classes, name="head")` behind it.
        path: where to write; ends in `.safetensors`. A file there is replaced.

    Raises:
        ValueError: for another ending, a quantized model, and layers that no checkpoint has.

    Example:

    >>> keras_tnt.save_checkpoint(model, "tnt_small_flowers.safetensors")
    """
    path = os.fspath(path)
    if not path.endswith(SAFETENSORS):
        raise ValueError(f"`path` must end in .safetensors. Received: '{path}'")
    tensors = {}
    for entry in entries(model):
        tensors.update(zip(entry.names, entry.to_torch(entry.value), strict=True))
    from safetensors.numpy import save_file

    unfinished = f"{path}.{uuid.uuid4().hex[:8]}.unfinished"
    try:
        save_file(tensors, unfinished, metadata={"format": "pt"})
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


# === What fits, and what does not ===


def match(model, shapes):
    """The model's entries in the naming convention of a file that holds tensors of these shapes.

    Raises:
        ValueError: telling what does not fit, and the likely cause.
    """
    candidates = [
        entries(model, convention, skip_others=True) for convention in range(conventions(model))
    ]
    matched = max(candidates, key=lambda c: sum(name in shapes for e in c for name in e.names))
    wanted = {name: shape for e in matched for name, shape in zip(e.names, e.shapes, strict=True)}
    problems = differences(model, matched, wanted, shapes)
    if problems:
        listed = problems[:LISTED]
        if len(problems) > LISTED:
            listed.append(f"and {len(problems) - LISTED} more")
        raise ValueError(
            f"The checkpoint does not fit model '{model.name}'. Nothing was loaded.\n"
            + "\n".join([*causes(model, wanted, shapes), *(f"  {line}" for line in listed)])
        )
    return matched


def differences(model, matched, wanted, shapes):
    """What keeps a file's tensors from filling the model, a line each."""
    misshaped = [
        f"shape: {name} is {shapes[name]} in the file, {shape} in the model"
        for e in matched
        if all(name in shapes for name in e.names)
        and not e.fits(tuple(shapes[name] for name in e.names))
        for name, shape in zip(e.names, e.shapes, strict=True)
        if shapes[name] != shape
    ]
    missing = [f"missing: {name} {wanted[name]}" for name in wanted if name not in shapes]
    unused = [
        f"unused: {printable(name)} {shapes[name]}"
        for name in shapes
        if name not in wanted and not UNUSED.search(name) and not is_top(model, name)
    ]
    return misshaped + missing + unused


def is_top(model, name):
    """Whether a tensor belongs to the heads of a model that is built without them."""
    without_top = all(layer.name != "head" for layer in model.layers)
    return without_top and name.split(".")[0] in ("head", "head_dist")


def causes(model, wanted, shapes):
    """The common reasons that a file does not fit, as far as names and shapes tell them."""
    if not set(wanted) & set(shapes):
        kind = family(model)
        yield (
            f"No tensor of the file has a name that timm or the original release gives to a {kind} "
            "model: this is another kind of model, or another program's names."
        )
        return
    theirs, ours = size(shapes), size(wanted)
    if theirs != ours:
        yield f"The file holds {theirs}, the model is {ours}: another variant."
    theirs, ours = classes(shapes), classes(wanted)
    if ours and not theirs:
        yield "The file has no classifier: build the model with include_top=False."
    elif ours and theirs != ours:
        yield (
            f"The file has {theirs} classes, the model {ours}: build the model with "
            f"classes={theirs}, or with include_top=False for a head of your own."
        )
    theirs, ours = is_distilled(shapes), is_distilled(wanted)
    if theirs != ours:
        yield (
            f"The file {'has a' if theirs else 'has no'} distillation token: build the model with "
            f"distilled={theirs}."
        )
    theirs, ours = is_legacy(shapes), is_legacy(wanted)
    if theirs != ours:
        kind = "timm's first port" if theirs else "the original architecture"
        yield f"The file holds TNT as {kind} has it: build the model with legacy={theirs}."


def size(shapes):
    dim = (shapes.get("norm.weight") or ("?",))[-1]
    blocks = {block[0] for block in map(re.compile(r"blocks\.\d+\.").match, shapes) if block}
    return f"dimension {dim}" + (f" and {len(blocks)} blocks" if blocks else "")


def classes(shapes):
    return (shapes.get("head.weight") or (None,))[0]


def is_distilled(shapes):
    return any(name in shapes for name in ("dist_token", "head_dist.weight"))


def is_legacy(shapes):
    """Legacy TNT alone projects words to patches with a bias within blocks."""
    return any(re.fullmatch(r"blocks\.\d+\.proj\.bias", name) for name in shapes)
