"""Weights by `weights=`: names of public checkpoints, the hub, files; and how they fill a model."""

import dataclasses
import fnmatch
import math
import os
import re
import sys
from pathlib import Path

from keras_tnt import files, registry
from keras_tnt.anatomy import anatomy
from keras_tnt.registry import typed
from keras_tnt.text import printable
from keras_tnt.weights import KERAS, checkpoint, hub, load_keras_file
from keras_tnt.weights.files import SAFETENSORS, TORCH, open_tensors
from keras_tnt.weights.hub_config import LARGEST_FILE, parse_config
from keras_tnt.weights.keras_files import read_grid, read_shapes

HUB = re.compile(r"hf://(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^@]+))?")
# Files that hold the weights of a repository, best first.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
CLASSES = 1000


def load_checkpoint(model, source: str | os.PathLike, ema: bool = False):
    """Fill a model from a checkpoint with timm's or the original release's tensor names.

    Every tensor of the model is filled and every tensor of the file used; positions of another
    grid are resampled. A model without its top leaves the file's heads alone, and layers of your
    own before or behind the model stay as they are.

    Args:
        model: a model built by this package, or one with such a model inside.
        source: path of a `.safetensors` file, of a `.pth`, `.pt`, `.pth.tar`, `.bin` or `.ckpt`
            file where torch is installed, of which only tensors are read, never code; or of a
            `.keras` or `.weights.h5` file that Keras wrote of such a model. Files of wrapped models
            load as they are: DataParallel, torch.compile, AveragedModel, FSDP, Lightning.
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
    source = files.expand(source)
    if source.endswith(KERAS) and not ema:
        load_keras_file(model, source)
    else:
        checkpoint.fill(model, open_tensors(source, ema), tensor_names(model))
    return model


def save_checkpoint(model, path: str | os.PathLike) -> None:
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
    checkpoint.write(model, path, tensor_names(model))


def tensor_names(model) -> checkpoint.Names:
    """What is known of the names of a model's tensors."""
    found = anatomy(model)
    family = registry.family(found.family)
    return checkpoint.Names(
        family.name, family.tensor_names, family.telling_tensors, found.layer_prefix
    )


# === Where weights come from ===


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
        class_names: list of the names of the classes; None: not known.
        images: attributes of the model's `ImageNormalization` as far as they are known.
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
    class_names: list | None = None
    images: dict = dataclasses.field(default_factory=dict)

    @property
    def of_anyone(self):
        """Whether a config.json tells of the model, and not a row of the table."""
        return self.given.startswith("hf://") or os.path.isdir(self.given)


def find(weights):
    """The source that `weights=` names, without downloading the weights themselves.

    Args:
        weights: None, a name of `list_weights()`, "hf://owner/repository", the path of a file or
            of a folder that `save_pretrained` wrote, or what this function gave.

    Returns:
        A `Source`, or None.

    Raises:
        ValueError: if it is none of these.
    """
    if weights is None or isinstance(weights, Source):
        return weights
    given = files.expand(weights)
    rows = {row.name: row for row in registry.checkpoints()}
    if given in rows:
        return from_row(rows[given], given)
    if given.startswith("hf://"):
        return from_hub(given)
    if given == "imagenet":
        raise ValueError(
            "weights='imagenet' belongs to the variants, such as keras_tnt.TNTSmall. A builder "
            "takes a name of keras_tnt.list_weights(), 'hf://owner/repository', or a file's path."
        )
    if os.path.isdir(given):
        return from_folder(given)
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
    if differing and not source.of_anyone:
        raise ValueError(
            f"The weights {source.given!r} belong to {typed(model, source.arguments)}, not to "
            f"{typed(model, arguments)}: leave out {', '.join(differing)}, or say weights=None."
        )
    return source


def choose_row(model, arguments, size):
    """The public checkpoint of a variant that was trained on images nearest in size."""
    rows = [row for row in registry.checkpoints() if row.model == model]
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
    config = parse_config(files.read_regular(path, LARGEST_FILE), given)
    return dataclasses.replace(source, **described(config, given))


def from_folder(folder):
    """The source that a folder with the files of such a repository is."""
    paths = {name: os.path.join(folder, name) for name in ("config.json", *HUB_FILES)}
    there = [name for name, path in paths.items() if os.path.isfile(path)]
    if len(there) < 2 or there[0] != "config.json":
        raise ValueError(
            f"Folder {folder!r} holds no model: a config.json and {' or '.join(HUB_FILES)} are "
            "looked for."
        )
    config = parse_config(files.read_regular(paths["config.json"], LARGEST_FILE), folder)
    return Source(folder, path=paths[there[1]], **described(config, folder))


def described(config, given):
    """What a `HubConfig` tells of the model, as attributes of a `Source`."""
    known = {"classes": config.classes}
    rows = {row.architecture: row for row in registry.checkpoints()}
    if config.architecture in rows:
        row = rows[config.architecture]
        known |= {"model": row.model, "arguments": row.arguments, "size": (row.size, row.size)}
    elif config.architecture in registry.list_models():
        known["model"] = registry.find_model(config.architecture).__name__
    elif config.architecture and config.architecture not in [f.name for f in registry.families()]:
        raise ValueError(
            f"{given!r} holds a '{printable(config.architecture)}'. keras_tnt reads these "
            f"architectures of timm: {', '.join(rows)}."
        )
    if config.size:
        known["size"] = config.size
    images = {"crop": config.crop, "interpolation": config.interpolation}
    if config.mean and config.std:
        images |= {"mean": config.mean, "std": config.std}
    known["images"] = {name: value for name, value in images.items() if value is not None}
    names = config.class_names
    if names and len(set(names)) == len(names):
        known["class_names"] = list(names)
    return known


# === The file ===


def check_classes(source, classes):
    """Refuse weights that are known to have another number of classes.

    Args:
        source: a `Source`.
        classes: number of classes of the model to be filled; None: it has no head.

    Raises:
        ValueError: if they differ.
    """
    if None in (classes, source.classes) or classes == source.classes:
        return
    has = f"{source.classes} classes" if source.classes else "no classifier"
    say = f"classes={source.classes}, or " if source.classes else ""
    raise ValueError(
        f"The weights {source.given!r} have {has}, the model {classes}. Say {say}"
        "include_top=False and put a head of your own behind it."
    )


def count_classes(source):
    """The number of classes that weights have, as far as it is told without building their model.

    Args:
        source: a `Source`; what lies on the hub is not downloaded.

    Returns:
        An integer, 0 for weights without a classifier; None where it is not known.
    """
    if source.classes is not None or source.path is None:
        return source.classes
    if source.path.endswith(KERAS):
        shape = read_shapes(source.path).get("layers/dense/vars/0")
        return shape[-1] if shape else 0
    shape = open_tensors(source.path).shapes.get("head.weight")
    return shape[0] if shape else None


def table_grid(source, tensor_names):
    """(rows, columns) of the patches that weights hold positions of; None if it is not told.

    Args:
        source: a `Source`, which is downloaded if it is not on this machine.
        tensor_names: the family's rows of names.

    Raises:
        As `load_checkpoint`, of a file that cannot be read.
    """
    path = fetch(source)
    if path.endswith(KERAS):
        return read_grid(path)
    names = {name for row in tensor_names if row[0] == "patch_position/table" for name in row[1:]}
    for name, shape in open_tensors(path).shapes.items():
        if name in names and len(shape) == 3:
            sides = [math.isqrt(shape[1] - prefix) for prefix in range(3) if shape[1] > prefix]
            found = [s for prefix, s in enumerate(sides) if s and s * s == shape[1] - prefix]
            return (found[0], found[0]) if found else None
    return None


def fetch(source):
    """The path of a source's file, which is downloaded if it is not on this machine.

    Raises:
        ValueError: if the repository holds no weights.
        OSError: if the file cannot be downloaded or kept.
    """
    if source.path:
        return source.path
    for file in source.files:
        try:
            return hub.fetch(
                source.repository, file, source.revision, source.sha256, renew=source.of_anyone
            )
        except hub.MissingFile:
            continue
    raise ValueError(
        f"'{source.repository}' holds no weights that keras_tnt reads: none of "
        f"{', '.join(source.files)}."
    )


def fill(model, source):
    """Fill a model that was just built with the weights of a `Source`.

    Raises:
        ValueError: if there are no such weights, or they do not fit the model.
        OSError: if they cannot be downloaded.
    """
    load_checkpoint(model, fetch(source))
    entrance = anatomy(model).entrance
    for name, value in source.images.items():
        setattr(entrance, name, value)


# === The table of public weights ===


class Rows(list):
    """A list of `Checkpoint` that shows as a table."""

    columns = ("weights", "model", "image", "parameters", "top-1", "top-5")

    def cells(self):
        for row in self:
            yield (
                row.name,
                row.call,
                f"{row.size}x{row.size}",
                f"{row.parameters / 1e6:.1f}M",
                f"{row.top1:.1f}",
                f"{row.top5:.1f}",
            )

    def __repr__(self):
        rows = [self.columns, *self.cells()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.columns))]
        lines = []
        for row in rows:
            left = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
            right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join(left + right))
        return "\n".join(lines)

    def markdown(self):
        """The table as it stands in the README."""
        rows = [self.columns, ("---", "---", "--:", "--:", "--:", "--:")]
        rows += [(f"`{name}`", f"`{model}`", *rest) for name, model, *rest in self.cells()]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def list_weights(pattern: str | None = None) -> Rows:
    """The public checkpoints that `weights=` takes by name.

    Args:
        pattern: shell pattern of a checkpoint's name or of its model's name in either spelling:
            `"deit*384*"`, `"TNTSmall"`, `"tnt_small"`; None: all.

    Returns:
        A list of rows, which shows as a table. A row has `name`, `model`, `arguments`, `size`,
        `parameters`, `top1`, `top5` (published, in percent), `source`, `repository`, `file`,
        `license` and `sha256`.

    Raises:
        ValueError: if there is no such checkpoint.

    Example:

    >>> keras_tnt.list_weights("tnt_base")
    weights                 model      image  parameters  top-1  top-5
    tnt_b_patch16_224.in1k  TNTBase  224x224       65.4M   82.9   96.3
    """
    found = Rows()
    for family in registry.families():
        spelt = {family.function_name(variant): variant for variant in family.variants}
        for row in family.checkpoints:
            names = row.name, row.architecture, row.model, spelt.get(row.model, row.model)
            if pattern is None or any(fnmatch.fnmatchcase(name, pattern) for name in names):
                found.append(row)
    if not found:
        known = ", ".join(dict.fromkeys(row.model for row in registry.checkpoints()))
        raise ValueError(f"There are no public weights of {pattern!r}. There are some of: {known}.")
    return found


BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"


def with_table(text):
    """A text with the table of public weights between its markers.

    Raises:
        ValueError: if the text does not have each marker once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"The text must have {BEGIN} and {END} once each.")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{list_weights().markdown()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":  # python -m keras_tnt.pretrained README.md writes its table anew
    import keras_tnt  # noqa: F401

    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
