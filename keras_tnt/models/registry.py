"""Registry of model families, their variants and public checkpoints.

Each family is one record, defined next to its builder. No other module refers to a family by name.
"""

import dataclasses
import difflib
import fnmatch
import importlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras

PLUGINS = "KERAS_TNT_PLUGINS"


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Evaluation preprocessing of a family's images, as in its published results.

    Attributes:
        mean: mean of pixels in [0, 1], one value per channel.
        std: standard deviation of pixels in [0, 1], one value per channel.
        crop: fraction of the resized image's side that the center crop shows. Defaults to 0.9.
        crops: crop fractions of larger images, as {minimum side in pixels: fraction}. Defaults to
            none.
        interpolation: interpolation method for resizing images. Defaults to "bicubic".
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: float = 0.9
    crops: Mapping[int, float] = dataclasses.field(default_factory=dict)
    interpolation: str = "bicubic"

    def crop_at(self, height: int, width: int) -> float:
        """Returns the crop fraction of an image of this size."""
        reached = [side for side in self.crops if side <= min(height, width)]
        return self.crops[max(reached)] if reached else self.crop


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a variant with 1,000 classes, at its default image size.

    Attributes:
        parameters: number of parameters.
        multiply_accumulates: number per image, as counted by
            `keras_tnt.inspection.multiply_accumulates`.
        blocks: number of blocks, including class-attention blocks.
    """

    parameters: int
    multiply_accumulates: int
    blocks: int


@dataclasses.dataclass(frozen=True)
class Variant:
    """Published size of a family's models.

    Attributes:
        architecture: keyword arguments of the family's builder.
        image_size: default side of the images in pixels. Defaults to 224.
        cost: its `Cost`. If `None`, it is unknown until a model is built.
    """

    architecture: Mapping[str, Any]
    image_size: int = 224
    cost: Cost | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Public checkpoint.

    Attributes:
        name: value for `weights=`, and name on the Hub.
        model: name of the variant's function, such as "TNTSmall".
        arguments: extra keyword arguments for the variant's builder.
        parameters: number of parameters, with 1000 classes.
        top1: published top-1 accuracy on ImageNet's validation images, in percent.
        top5: published top-5 accuracy on ImageNet's validation images, in percent.
        source: source of the published accuracy.
        repository: repository on the Hub. Defaults to `timm/<name>`, timm's convention.
        file: weight file in the repository. Defaults to "model.safetensors".
        license: license of the weights. Defaults to "Apache-2.0".
        sha256: checksum of the file. If `None`, the Hub's ETag of the file is used, which is its
            sha256.
    """

    name: str
    model: str
    arguments: Mapping[str, Any]
    parameters: int
    top1: float
    top5: float
    source: str
    repository: str | None = None
    file: str = "model.safetensors"
    license: str = "Apache-2.0"
    sha256: str | None = None

    def __post_init__(self):
        """Sets the default of `repository`."""
        if self.repository is None:
            object.__setattr__(self, "repository", f"timm/{self.name}")

    @property
    def size(self) -> int:
        """Returns the side of the training images in pixels, the last part of timm's name."""
        return int(self.architecture.rpartition("_")[-1])

    @property
    def architecture(self) -> str:
        """Returns the name of the architecture in timm."""
        return self.name.partition(".")[0]

    @property
    def call(self) -> str:
        """Returns a Python expression that builds this variant, without the package's name."""
        return call_repr(self.model, self.arguments)


def call_repr(model: str, arguments: Mapping[str, Any]) -> str:
    """Returns a call as a Python expression, "TNTSmall(legacy=True)", or the bare name."""
    listed = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"{model}({listed})" if listed else model


@dataclasses.dataclass(frozen=True)
class Family:
    """Record of a model family.

    Attributes:
        name: name such as "tnt"; its variants' names begin with it.
        builder: function that builds a model of any architecture.
        variants: `Variant`s by name. A row added to this dictionary is a variant.
        image: the `ImageTransform` of its images.
        tensor_names: rows of (path of a variable, name in timm's checkpoints, name in the original
            release), as documented in `keras_tnt.weights.names`.
        checkpoints: the public `Checkpoint`s.
        marker_tensors: rows of (pattern of a tensor's name, argument of the builder, description
            of the tensor): a checkpoint contains such tensors if and only if the argument is true.
        source: publication of the variants, for their docstrings.
        make_variant: function from the family and a variant's name to the variant's function.
    """

    name: str
    builder: Callable
    variants: Mapping[str, Variant]
    image: ImageTransform
    tensor_names: tuple[tuple[str, ...], ...] = ()
    checkpoints: tuple[Checkpoint, ...] = ()
    marker_tensors: tuple[tuple[str, str, str], ...] = ()
    source: str = ""
    make_variant: Callable | None = None

    def function_name(self, variant: str) -> str:
        """Returns a variant's function name: TNTSmall for tnt_small, CaiTXXS24 for cait_xxs24."""
        words = variant.removeprefix(self.name).strip("_").split("_")
        return self.builder.__name__ + "".join(
            word.upper() if re.search(r"\d", word) else word.capitalize() for word in words
        )


_families: dict[str, Family] = {}
# Variant functions by (family, variant), each with the row that it was created from.
_functions: dict[tuple[str, str], tuple[Variant, Callable]] = {}


def add(family: Family) -> None:
    """Adds a family to the registry; users call `keras_tnt.register_family`.

    Raises:
        ValueError: if the name, or one of a variant, is taken or is not an identifier.
    """
    for name in (family.name, *family.variants):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(
                f"A model's name is lower case, such as 'tnt_small'. Received: {name!r}"
            )
    for name in family.variants:
        if not name.startswith(family.name + "_"):
            raise ValueError(
                f"A variant's name begins with its family's, '{family.name}_'. Received: {name!r}"
            )
    for other in _families.values():
        if other.name == family.name:
            # A reloaded module registers the same family again.
            if other.builder.__qualname__ != family.builder.__qualname__:
                raise ValueError(f"There is a family '{family.name}' already.")
        elif taken := {family.name, *family.variants} & {other.name, *other.variants}:
            raise ValueError(f"Family '{other.name}' has the name {taken.pop()!r} already.")
    _families[family.name] = family
    for key in [key for key in _functions if key[0] == family.name]:
        del _functions[key]


def families() -> tuple[Family, ...]:
    """Returns all families in the order of their registration."""
    return tuple(_families.values())


def family(name: str) -> Family:
    """Returns the family of a name.

    Raises:
        ValueError: if there is no such family; the message lists the families.
    """
    if name not in _families:
        raise ValueError(
            f"There is no family {name!r}. There are: {', '.join(_families)}. A family of your own "
            "is registered by importing the module that calls keras_tnt.register_family."
        )
    return _families[name]


def checkpoints() -> tuple[Checkpoint, ...]:
    """Returns the public checkpoints of all families."""
    return tuple(row for each in families() for row in each.checkpoints)


# === Models by name ===


def list_models(pattern: str | None = None) -> list[str]:
    """Returns the names of the models of published sizes.

    Args:
        pattern: shell pattern such as `"*tnt*"`, of a name in either spelling. Defaults to all
            models.

    Returns:
        A list of names that `create_model` accepts.

    Example:
        >>> keras_tnt.list_models("deit*")
        ['deit_tiny', 'deit_small', 'deit_base']
    """
    return [
        name
        for each in families()
        for name in each.variants
        if pattern is None
        or fnmatch.fnmatchcase(name, pattern)
        or fnmatch.fnmatchcase(each.function_name(name), pattern)
    ]


def create_model(name: str, **arguments) -> "keras.Model":
    """Builds a model by its name.

    Args:
        name: name of a variant, `"tnt_small"` or `"TNTSmall"`, or of a family, `"tnt"` or `"TNT"`.
        **arguments: arguments of the function of that name, such as `keras_tnt.TNTSmall`.

    Returns:
        A `keras.Model`.

    Raises:
        ValueError: if there is no such model; the message lists the nearest names.

    Example:
        >>> model = keras_tnt.create_model("tnt_small", weights=None, classes=10)
    """
    return find_model(name, arguments.get("weights", "imagenet"))(**arguments)


def find_model(name: str, weights: Any = "imagenet") -> Callable:
    """Returns the function that builds the model of a name in either spelling.

    Args:
        name: name of a variant or family.
        weights: value of `weights=` in the call that the error suggests for the name of public
            weights. Defaults to "imagenet", which suggests these weights.

    Raises:
        ValueError: if there is no such model; the message lists the nearest names.
    """
    names = _names()
    if name not in names:
        load_plugins(os.environ.get(PLUGINS, ""))
        names = _names()
    if name not in names:
        raise ValueError(
            weights_advice(name, weights)
            or f"There is no model {name!r}. {nearest(name, list_models())}"
        )
    return _function(*names[name])


def find_checkpoint(name: str) -> tuple[Family, str, Checkpoint] | None:
    """Returns the (family, variant, checkpoint) of the name of public weights.

    Args:
        name: name such as "tnt_s_patch16_224" or "deit_tiny_patch16_224.fb_in1k", with or without
            its tag, optionally with the prefix "timm/", "hf_hub:timm/" or "hf://timm/" and a
            revision, "@main".

    Returns:
        A tuple, or `None` if there are no such weights.
    """
    wanted = re.sub(r"^(hf_hub:|hf-hub:|hf://)?(timm/)?|@[^@]*$", "", name)
    for each in families():
        for row in each.checkpoints:
            if wanted in (row.name, row.architecture):
                variant = next(v for v in each.variants if each.function_name(v) == row.model)
                return each, variant, row
    return None


def weights_advice(name: str, weights: Any = "imagenet") -> str | None:
    """Returns what to type for the name of public weights, with or without its tag.

    Args:
        name: name, as for `find_checkpoint`.
        weights: value of `weights=` in the suggested call. Defaults to "imagenet", which suggests
            the weights of that name.

    Returns:
        A sentence, or `None` if there are no such weights.
    """
    found = find_checkpoint(name)
    if found is None:
        return None
    _, variant, row = found
    wanted = row.name if weights == "imagenet" else weights
    listed = "".join(f", {key}={value!r}" for key, value in row.arguments.items())
    return (
        f"{name!r} is the weights name of {row.call}. Type "
        f"keras_tnt.create_model('{variant}', weights={wanted!r}{listed})"
    )


def _names() -> dict[str, tuple[Family, str | None]]:
    """Returns (family, variant or `None` for the builder) by every accepted name."""
    names = {}
    for each in families():
        names |= dict.fromkeys((each.name, each.builder.__name__), (each, None))
        for variant in each.variants:
            names |= dict.fromkeys((variant, each.function_name(variant)), (each, variant))
    return names


def _function(each: Family, variant: str | None) -> Callable:
    if variant is None:
        return each.builder
    key, row = (each.name, variant), each.variants[variant]
    assert each.make_variant is not None, f"family '{each.name}' builds no variants"
    if key not in _functions or _functions[key][0] is not row:
        _functions[key] = row, each.make_variant(each, variant)
    return _functions[key][1]


def functions() -> dict[str, Callable]:
    """Returns every builder and variant function by its name, such as "TNTSmall"."""
    return {
        name: _function(*found)
        for name, found in _names().items()
        if name == (found[0].function_name(found[1]) if found[1] else found[0].builder.__name__)
    }


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns a sentence that suggests the names most similar to an unknown one, or lists all."""
    names = list(names)
    lowered = {other.lower(): other for other in names}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), lowered, n=3)
    if found:
        return f"Did you mean {' or '.join(lowered[other] for other in found)}?"
    return f"There are: {', '.join(names)}."


def load_plugins(modules: str | Iterable[str] | None) -> None:
    """Imports modules that register families, data sets or optimizers.

    Args:
        modules: names of modules, a list or comma-separated.

    Raises:
        ValueError: if there is no such module.
    """
    if isinstance(modules, str):
        modules = map(str.strip, modules.split(","))
    for module in filter(None, modules or ()):
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", module):
            raise ValueError(
                f"{module!r} is no name of a module. A file plugins/mine.py is the module "
                "plugins.mine, found on Python's path."
            )
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and not (module + ".").startswith(error.name + "."):
                raise
            raise ValueError(
                f"There is no module {module!r} to import. It must lie on Python's path: install "
                "it, or set PYTHONPATH."
            ) from error
