"""What `weights=` may be: found before a model is built, since it tells which model to build."""

import dataclasses
import os
import re

from keras_tnt.text import printable
from keras_tnt.weights import hub
from keras_tnt.weights.files import SAFETENSORS, TORCH
from keras_tnt.weights.hub_config import LARGEST_FILE, parse_config
from keras_tnt.weights.table import CHECKPOINTS, typed

KERAS = (".weights.h5", ".keras")
HUB = re.compile(r"hf://(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^@]+))?")
# Files that hold the weights of a repository, best first.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Source:
    """Where weights come from, and the model that they belong to as far as it is known.

    Attributes:
        given: what `weights=` was.
        path: of the file on this machine; None: yet to be downloaded.
        repository, revision, files: where on the hub the file lies, the first of `files` that is
            there.
        sha256: of the file, where it is known.
        model: the variant; None: not known.
        arguments: what the variant is told beside its own architecture.
        size: (height, width) of the images it was trained on; None: not known.
        classes: number of classes; None: not known.
        normalisation: (mean, std) of the images it was trained on; None: the family's own.
    """

    given: str
    path: str | None = None
    repository: str | None = None
    revision: str = "main"
    files: tuple = ()
    sha256: str | None = None
    model: str | None = None
    arguments: dict = dataclasses.field(default_factory=dict)
    size: tuple | None = None
    classes: int | None = None
    normalisation: tuple | None = None


def find(weights):
    """The source that `weights=` names, without downloading the weights themselves.

    Args:
        weights: None, a name of `list_weights()`, "hf://owner/repository", the path of a file, or
            what this function gave.

    Returns:
        A `Source`, or None.

    Raises:
        ValueError: if it is none of these.
    """
    if weights is None or isinstance(weights, Source):
        return weights
    given = os.fspath(weights)
    rows = {row.name: row for row in CHECKPOINTS}
    if given in rows:
        return from_row(rows[given], given)
    if given.startswith("hf://"):
        return from_hub(given)
    if given == "imagenet":
        raise ValueError(
            "weights='imagenet' belongs to the variants, such as keras_tnt.TNTSmall. A builder "
            "takes a name of keras_tnt.list_weights(), 'hf://owner/repository', or a file's path."
        )
    if not os.path.isfile(given):
        raise ValueError(
            "`weights` must be None, 'imagenet', a name of keras_tnt.list_weights(), "
            f"'hf://owner/repository', or the path of a file. Received: {given!r}, which is no "
            "file."
        )
    if not given.endswith(KERAS + SAFETENSORS + TORCH):
        raise ValueError(
            f"A file of weights ends in {', '.join(KERAS + SAFETENSORS + TORCH)}. "
            f"Received: {given!r}"
        )
    return Source(given, path=given)


def find_for(weights, model, arguments, defaults, size):
    """The source that `weights=` of a variant names.

    Args:
        weights: as `find` takes it, or "imagenet".
        model: the variant's name.
        arguments: what it is told of architecture.
        defaults: what its architecture is where it is told nothing.
        size: (height, width) of its images.

    Raises:
        ValueError: as `find`, and if the weights belong to another model.
    """
    if weights == "imagenet":
        told = {name: value for name, value in arguments.items() if value != defaults[name]}
        return from_row(choose_row(model, told, size), weights)
    source = find(weights)
    if source is None or source.model is None:
        return source
    if source.model != model:
        raise ValueError(
            f"The weights {source.given!r} belong to keras_tnt.{source.model}, not to {model}."
        )
    theirs = defaults | source.arguments
    differing = [name for name, value in arguments.items() if value != theirs[name]]
    if differing and not source.given.startswith("hf://"):
        raise ValueError(
            f"The weights {source.given!r} belong to {typed(model, source.arguments)}, not to "
            f"{typed(model, arguments)}: leave out {', '.join(differing)}, or say weights=None."
        )
    return source


def choose_row(model, arguments, size):
    """The public checkpoint of a variant that was trained on images nearest in size."""
    rows = [row for row in CHECKPOINTS if row.model == model]
    fitting = [row for row in rows if row.arguments == arguments]
    if not fitting:
        others = dict.fromkeys(row.call for row in rows)
        raise ValueError(
            f"There are no public weights of {typed(model, arguments)}"
            + (f", only of {', '.join(others)}" if others else "")
            + ". Say weights=None for random weights, or weights='<path>' for a file of your own, "
            "such as the original release's."
        )
    area = size[0] * size[1]
    return min(fitting, key=lambda row: max(row.size**2 / area, area / row.size**2))


def from_row(row, given):
    return Source(
        given,
        repository=row.repository,
        files=(row.file,),
        sha256=row.sha256,
        model=row.model,
        arguments=row.arguments,
        size=(row.size, row.size),
        classes=CLASSES,
    )


# === Anyone's checkpoint on the hub ===


def from_hub(given):
    """The source that "hf://owner/repository" or "hf://owner/repository@revision" names."""
    match = HUB.fullmatch(given)
    if not match:
        raise ValueError(
            "A repository of the hub is 'hf://owner/repository', or with '@revision' behind it. "
            f"Received: {given!r}"
        )
    repository, revision = match["repository"], match["revision"] or "main"
    source = Source(given, repository=repository, revision=revision, files=HUB_FILES)
    try:
        path = hub.fetch(repository, "config.json", revision, renew=True, largest=LARGEST_FILE)
    except hub.MissingFile:
        return source
    with open(path, "rb") as file:
        config = parse_config(file.read(), given)
    return dataclasses.replace(source, **told_by(config, given))


def told_by(config, given):
    """What a `HubConfig` tells of the model."""
    told = {"classes": config.classes}
    rows = {row.architecture: row for row in CHECKPOINTS}
    if config.architecture in rows:
        row = rows[config.architecture]
        told |= {"model": row.model, "arguments": row.arguments, "size": (row.size, row.size)}
    elif config.architecture:
        raise ValueError(
            f"{given!r} holds a '{printable(config.architecture)}'. keras_tnt reads these "
            f"architectures of timm: {', '.join(rows)}."
        )
    if config.size:
        told["size"] = config.size
    if config.mean and config.std:
        told["normalisation"] = (config.mean, config.std)
    return told


# === The file ===


def fetch(weights, classes=None):
    """`find`, and the file downloaded if it is not on this machine.

    Args:
        weights: as `find` takes it.
        classes: number of classes of the model to be filled; None: it has no head.

    Raises:
        ValueError: as `find`, and if the weights are known to have another number of classes.
        OSError: if the file cannot be downloaded or kept.
    """
    source = find(weights)
    if source is None:
        return None
    if None not in (classes, source.classes) and classes != source.classes:
        has = f"{source.classes} classes" if source.classes else "no classifier"
        say = f"classes={source.classes}, or " if source.classes else ""
        raise ValueError(
            f"The weights {source.given!r} have {has}, the model {classes}. Say {say}"
            "include_top=False and put a head of your own behind it."
        )
    if source.path:
        return source
    for file in source.files:
        try:
            path = hub.fetch(
                source.repository,
                file,
                source.revision,
                source.sha256,
                renew=source.given.startswith("hf://"),
            )
        except hub.MissingFile:
            continue
        return dataclasses.replace(source, path=path)
    raise ValueError(
        f"'{source.repository}' holds no weights that keras_tnt reads: none of "
        f"{', '.join(source.files)}."
    )
