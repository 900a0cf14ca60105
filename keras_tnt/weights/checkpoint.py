"""Loads PyTorch-named checkpoints into models, and writes them."""

import collections
import dataclasses
import os
import re

from keras_tnt.files import check_space, expand, replacing, telling_of_a_full_disk
from keras_tnt.text import printable
from keras_tnt.weights.files import SAFETENSORS
from keras_tnt.weights.names import UNUSED, conventions, entries

LISTED = 10


@dataclasses.dataclass(frozen=True)
class Names:
    """Naming table of a model's tensors.

    Attributes:
        family: name of the family, for messages.
        table: the family's rows of tensor names, in the format of `keras_tnt.weights.names`.
        telling: rows of (regular expression of a tensor name, builder argument, description): a
            checkpoint contains such tensors if and only if the argument is true.
        prefix: common prefix of the names of the model's layers.
    """

    family: str
    table: tuple
    telling: tuple = ()
    prefix: str = ""


def fill(model, file, names):
    """Loads the tensors of an open file into a model.

    Args:
        model: a model built by this package, or one with such a model inside.
        file: a `TensorFile`, from `open_tensors`.
        names: the `Names` of the model's tensors.

    Raises:
        ValueError: if the tensors do not match the model, or contain NaN or Inf. The model is
            unchanged then.
    """
    try:
        candidates = [
            entries(model, names.table, names.prefix, convention, skip_others=True)
            for convention in range(conventions(names.table))
        ]
        if prefix := find_prefix(candidates, file.shapes):
            file.select(prefix)
        matched = match(model, candidates, file.shapes, names)
    except ValueError as error:
        raise ValueError(f"'{file.path}': {error}") from error
    # All tensors are read once before the first assignment, so that a bad one changes nothing.
    file.check(name for entry in matched for name in entry.names)
    for entry in matched:
        entry.assign(file.read(entry.names))


def write(model, path, names):
    """Writes a model's weights under timm's tensor names.

    Args:
        model: as for `fill`.
        path: path of the file, which must end in `.safetensors`. An existing file is replaced.
        names: the `Names` of the model's tensors.

    Raises:
        ValueError: for another extension, a quantized model, or layers without a checkpoint name.
        OSError: if the disk has too little space; no partial file is left.
    """
    path = expand(path)
    if not path.endswith(SAFETENSORS):
        raise ValueError(f"`path` must end in .safetensors. Received: '{path}'")
    tensors = {}
    for entry in entries(model, names.table, names.prefix):
        tensors.update(zip(entry.names, entry.to_torch(entry.value), strict=True))
    from safetensors.numpy import save_file

    folder, what = os.path.dirname(os.path.abspath(path)), "the checkpoint"
    check_space(folder, sum(tensor.nbytes for tensor in tensors.values()), what)
    with telling_of_a_full_disk(folder, what), replacing(path) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})


# === Matching ===


def find_prefix(candidates, shapes):
    """Returns the prefix under which a file has the tensors of a model, such as `student.`.

    A Lightning module saves its models under the names of its attributes, next to losses and
    metrics.

    Args:
        candidates: the model's entries in each naming convention.
        shapes: dict from tensor name to shape, of the file.

    Returns:
        The prefix, or `""` if the file has a tensor of the model under its plain name, or none.

    Raises:
        ValueError: if the file has several such models.
    """
    by_convention = [{name for entry in c for name in entry.names} for c in candidates]
    wanted = set().union(*by_convention)
    if wanted & set(shapes):
        return ""
    # Each name is split at each dot: "student.norm.weight" is "norm.weight" under "student.".
    found = collections.Counter(
        name[: dot.end()]
        for name in shapes
        for dot in re.finditer(r"\.", name)
        if name[dot.end() :] in wanted
    )
    # Other families share a few names.
    enough = min(map(len, by_convention)) / 2
    prefixes = sorted(prefix for prefix, count in found.items() if count > enough)
    if len(prefixes) > 1:
        listed = ", ".join(f"'{printable(prefix)}'" for prefix in prefixes)
        raise ValueError(
            f"The file has several models, under {listed}. Save the state dict of one of them to a "
            "file, and load that."
        )
    return prefixes[0] if prefixes else ""


def match(model, candidates, shapes, names):
    """Returns the model's entries in the naming convention that fits a file best.

    Args:
        model: the model to fill.
        candidates: its entries in each naming convention.
        shapes: dict from tensor name to shape, of the file.
        names: the `Names` of the model's tensors.

    Returns:
        A list of `keras_tnt.weights.names.Entry`.

    Raises:
        ValueError: if the tensors do not match; the message lists likely causes and differences.
    """
    matched = max(candidates, key=lambda c: sum(name in shapes for e in c for name in e.names))
    wanted = {name: shape for e in matched for name, shape in zip(e.names, e.shapes, strict=True)}
    problems = differences(model, matched, wanted, shapes)
    if problems:
        listed = problems[:LISTED]
        if len(problems) > LISTED:
            listed.append(f"and {len(problems) - LISTED} more")
        raise ValueError(
            f"The checkpoint does not fit model '{model.name}'. Nothing was loaded.\n"
            + "\n".join([*causes(names, wanted, shapes), *(f"  {line}" for line in listed)])
        )
    return matched


def differences(model, matched, wanted, shapes):
    """Returns one line per mismatch between a file's tensors and the model's."""
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
        if name not in wanted and not UNUSED.search(name) and not is_top(wanted, name)
    ]
    return misshaped + missing + unused


def is_top(wanted, name):
    """Returns whether a tensor belongs to heads that the model was built without."""
    return "head.weight" not in wanted and name.split(".")[0] in ("head", "head_dist")


def causes(names, wanted, shapes):
    """Yields likely reasons for a mismatch, inferred from tensor names and shapes."""
    if not set(wanted) & set(shapes):
        yield (
            "No tensor of the file has a name that timm or the original release gives to a "
            f"{names.family} model: this is another kind of model, or another program's names."
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
    for pattern, argument, what in names.telling:
        theirs, ours = (any(re.fullmatch(pattern, name) for name in x) for x in (shapes, wanted))
        if theirs != ours:
            yield (
                f"The file {'has' if theirs else 'does not have'} {what}: build the model with "
                f"{argument}={theirs}."
            )


def size(shapes):
    """Returns a model's size as text, such as `dimension 384 and 12 blocks`, from its shapes."""
    dim = (shapes.get("norm.weight") or ("?",))[-1]
    blocks = {block[0] for block in map(re.compile(r"blocks\.\d+\.").match, shapes) if block}
    return f"dimension {dim}" + (f" and {len(blocks)} blocks" if blocks else "")


def classes(shapes):
    """Returns the number of classes from the shape of `head.weight`; `None` without one."""
    return (shapes.get("head.weight") or (None,))[0]
