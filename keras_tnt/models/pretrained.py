"""Resolution of `weights=` arguments: public checkpoints, Hub repositories and files."""

import dataclasses
import math
import os
import re

from keras_tnt import files
from keras_tnt.models import registry
from keras_tnt.models.anatomy import anatomy
from keras_tnt.models.registry import call_repr
from keras_tnt.text import printable
from keras_tnt.weights import KERAS, checkpoint, hub, load_keras_file
from keras_tnt.weights.files import SAFETENSORS, TORCH, open_tensors
from keras_tnt.weights.hub_config import LARGEST_FILE, parse_config
from keras_tnt.weights.keras_files import read_grid, read_shapes

HUB = re.compile(r"hf://(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^@]+))?")
# Weight files of a repository, in order of preference.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
CLASSES = 1000


def load_checkpoint(model, source: str | os.PathLike, ema: bool = False):
    """Loads a checkpoint with timm's or the original release's tensor names into a model.

    Every tensor of the model is loaded and every tensor of the file is used; position tables of
    another grid are resampled. A model without its top ignores the heads in the file, and your
    layers before or after the model are left unchanged.

    Args:
        model: a model built by this package, or one with such a model inside.
        source: path of a `.safetensors` file; of a `.pth`, `.pt`, `.pth.tar`, `.bin` or `.ckpt`
            file, which requires torch and from which only tensors are read, never code; or of a
            `.keras` or `.weights.h5` file that Keras wrote for such a model. Files of models
            wrapped in DataParallel, torch.compile, AveragedModel, FSDP or Lightning load without
            conversion.
        ema: whether to load the exponential moving average (EMA) of the weights, which some
            training runs store in addition to the weights. Defaults to `False`.

    Returns:
        The model.

    Raises:
        OSError: if the file does not exist or cannot be read.
        ImportError: if the file requires torch, which is not installed.
        ValueError: if the file is damaged or would run code, or if its tensors do not match the
            model, or contain NaN/Inf. The model is unchanged then.

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
    """Writes a model's weights as a checkpoint that timm loads.

    `load_checkpoint` restores the same weights. PyramidTNT, which timm does not have, uses the
    tensor names of the original release. LoRA weights are merged into the weights that they adapt.

    Args:
        model: a model built by this package, or one with such a model inside, followed by a layer
            `Dense(classes, name="head")`.
        path: path of the file, which ends in `.safetensors`. An existing file is replaced.

    Raises:
        ValueError: for another extension, a quantized model, and layers without a tensor name.

    Example:
        >>> keras_tnt.save_checkpoint(model, "tnt_small_flowers.safetensors")
    """
    checkpoint.write(model, path, tensor_names(model))


def tensor_names(model) -> checkpoint.Names:
    """Returns the naming scheme of a model's tensors in checkpoints."""
    found = anatomy(model)
    family = registry.family(found.family)
    return checkpoint.Names(
        family.name, family.tensor_names, family.marker_tensors, found.layer_prefix
    )


# === Sources of weights ===


@dataclasses.dataclass(frozen=True)
class Source:
    """Source of weights, with the known attributes of the model that they belong to.

    Attributes:
        given: the value of `weights=`.
        path: local path of the file. If `None`, the file has to be downloaded.
        repository: repository on the Hub, or `None`.
        revision: revision of the repository.
        files: candidate file names in the repository, of which the first that exists is used.
        sha256: checksum of the file, or `None` if unknown.
        model: name of the variant's function, or `None` if unknown.
        arguments: extra keyword arguments for the variant's builder.
        size: (height, width) of the training images, or `None` if unknown.
        classes: number of classes, or `None` if unknown.
        class_names: list of the names of the classes, or `None` if unknown.
        images: known attributes of the model's `ImageNormalization`.
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
    def is_user_repository(self):
        """Returns whether a user's config.json describes the model, not the built-in table."""
        return self.given.startswith("hf://") or os.path.isdir(self.given)


def find_source(weights):
    """Returns the source that `weights=` names, without downloading the weights.

    Args:
        weights: `None`, a name of `list_weights()`, "hf://owner/repository", the path of a file or
            of a directory written by `save_pretrained`, or a `Source`.

    Returns:
        A `Source`, or `None`.

    Raises:
        ValueError: if it is none of these.
    """
    if weights is None or isinstance(weights, Source):
        return weights
    given = files.expand(weights)
    rows = {row.name: row for row in registry.checkpoints()}
    if given in rows:
        return from_checkpoint(rows[given], given)
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


def find_variant_source(weights, model, arguments, defaults, size):
    """Returns the source that `weights=` of a variant names.

    Args:
        weights: as for `find`, or "imagenet".
        model: name of the variant's function.
        arguments: architecture arguments passed to the variant.
        defaults: default architecture arguments of the variant.
        size: (height, width) of its images.

    Returns:
        A `Source`, or `None`.

    Raises:
        ValueError: as `find`, and if the weights belong to another model.
    """
    if weights == "imagenet":
        changed = {name: value for name, value in arguments.items() if value != defaults[name]}
        return from_checkpoint(choose_row(model, changed, size), weights)
    source = find_source(weights)
    if source is None or source.model is None:
        return source
    if source.model != model:
        raise ValueError(
            f"The weights {source.given!r} belong to keras_tnt.{source.model}, not to {model}."
        )
    theirs = defaults | source.arguments
    differing = [name for name, value in arguments.items() if value != theirs[name]]
    if differing and not source.is_user_repository:
        raise ValueError(
            f"The weights {source.given!r} belong to {call_repr(model, source.arguments)}, not to "
            f"{call_repr(model, arguments)}: leave out {', '.join(differing)}, or use weights=None."
        )
    return source


def choose_row(model, arguments, size):
    """Returns the public checkpoint of a variant that was trained on images of the closest area.

    Args:
        model: name of the variant's function.
        arguments: architecture arguments that differ from the variant's.
        size: (height, width) of the images.

    Raises:
        ValueError: if the variant has no public weights for these arguments.
    """
    rows = [row for row in registry.checkpoints() if row.model == model]
    fitting = [row for row in rows if row.arguments == arguments]
    if not fitting:
        others = dict.fromkeys(row.call for row in rows)
        raise ValueError(
            f"There are no public weights of {call_repr(model, arguments)}"
            + (f", only of {', '.join(others)}" if others else "")
            + ". Use weights=None for random initialization, or weights='<path>' for a file, "
            "such as the original release's."
        )
    area = size[0] * size[1]
    return min(fitting, key=lambda row: max(row.size**2 / area, area / row.size**2))


def from_checkpoint(row, given):
    """Returns the `Source` of a public checkpoint, a row of the table of weights."""
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


# === Repositories of users ===


def from_hub(given):
    """Returns the `Source` of "hf://owner/repository" or "hf://owner/repository@revision"."""
    match = HUB.fullmatch(given)
    if not match:
        raise ValueError(
            "Expected 'hf://owner/repository' or 'hf://owner/repository@revision'. "
            f"Received: {given!r}"
        )
    repository, revision = match["repository"], match["revision"] or "main"
    source = Source(given, repository=repository, revision=revision, files=HUB_FILES)
    try:
        path = hub.fetch(repository, "config.json", revision, renew=True, largest=LARGEST_FILE)
    except hub.MissingFile:
        return source
    config = parse_config(files.read_regular(path, LARGEST_FILE), given)
    return dataclasses.replace(source, **source_attributes(config, given))


def from_folder(folder):
    """Returns the `Source` for a local copy of a Hub repository."""
    paths = {name: os.path.join(folder, name) for name in ("config.json", *HUB_FILES)}
    there = [name for name, path in paths.items() if os.path.isfile(path)]
    if len(there) < 2 or there[0] != "config.json":
        raise ValueError(
            f"Folder {folder!r} holds no model: a config.json and {' or '.join(HUB_FILES)} are "
            "looked for."
        )
    config = parse_config(files.read_regular(paths["config.json"], LARGEST_FILE), folder)
    return Source(folder, path=paths[there[1]], **source_attributes(config, folder))


def source_attributes(config, given):
    """Returns the attributes of a `Source` that a `HubConfig` determines."""
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
    """Raises an error for weights that are known to have another number of classes.

    Args:
        source: a `Source`.
        classes: number of classes of the model to be loaded, or `None` if it has no head.

    Raises:
        ValueError: if the numbers differ.
    """
    if None in (classes, source.classes) or classes == source.classes:
        return
    has = f"{source.classes} classes" if source.classes else "no classifier"
    say = f"classes={source.classes}, or " if source.classes else ""
    raise ValueError(
        f"The weights {source.given!r} have {has}, the model {classes}. Say {say}"
        "include_top=False and put a head of your own behind it."
    )


def count_weight_classes(source):
    """Returns the number of classes of weights, as far as it is known without building the model.

    Args:
        source: a `Source`; files on the Hub are not downloaded.

    Returns:
        An integer, 0 for weights without a classifier, or `None` if it is unknown.
    """
    if source.classes is not None or source.path is None:
        return source.classes
    if source.path.endswith(KERAS):
        shape = read_shapes(source.path).get("layers/dense/vars/0")
        return shape[-1] if shape else 0
    shape = open_tensors(source.path).shapes.get("head.weight")
    return shape[0] if shape else None


def table_grid(source, tensor_names):
    """Returns the patch grid of the position table in weights.

    Args:
        source: a `Source`, which is downloaded if there is no local file.
        tensor_names: the family's rows of names.

    Returns:
        (rows, columns), or `None` if it is unknown.

    Raises:
        As `load_checkpoint`, for a file that cannot be read.
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
    """Returns the local path of a source's file, after downloading it if needed.

    Raises:
        ValueError: if the repository contains no weights.
        OSError: if the file cannot be downloaded or stored.
    """
    if source.path:
        return source.path
    for file in source.files:
        try:
            return hub.fetch(
                source.repository,
                file,
                source.revision,
                source.sha256,
                renew=source.is_user_repository,
            )
        except hub.MissingFile:
            continue
    raise ValueError(
        f"'{source.repository}' holds no weights that keras_tnt reads: none of "
        f"{', '.join(source.files)}."
    )


def load_source(model, source):
    """Loads the weights of a `Source` into a new model.

    Raises:
        ValueError: if the weights do not exist or do not match the model.
        OSError: if they cannot be downloaded.
    """
    load_checkpoint(model, fetch(source))
    input_normalization = anatomy(model).input_normalization
    for name, value in source.images.items():
        setattr(input_normalization, name, value)
