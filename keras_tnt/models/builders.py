"""Public model builders: the decorator of family functions, registration, and variants.

A family defines a function from arguments to (inputs, outputs). The decorator `builder` turns it
into the public function, which checks the arguments that all families share, builds the
`keras.Model` and loads its weights. `register_family` registers a family and the functions of its
variants. The helpers that family functions call are importable from here.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras

from keras_tnt.layers.base import context_value, skip_weight_init
from keras_tnt.models import endpoints, pretrained, registry
from keras_tnt.models.arguments import (
    ARGUMENTS_WITHOUT_WEIGHTS,
    bind,
    check_class_names,
    check_pooling,
    check_sizes,
    non_default_arguments,
    resolve_classes,
)
from keras_tnt.models.endpoints import (
    classify,
    image_input,
    normalise,  # codespell:ignore normalise
    normalize,
    patch_grid,
    pool,
    preprocessor,
    read_tokens,
    table_size,
)
from keras_tnt.models.model_factory import find_input_normalization, make_model
from keras_tnt.models.registry import Checkpoint, Family, ImageTransform, Variant

__all__ = [
    "DISTILLATION_TENSORS",
    "builder",
    "check_pooling",
    "check_sizes",
    "checkpoints_from_rows",
    "classify",
    "image_input",
    "normalise",  # codespell:ignore normalise
    "normalize",
    "patch_grid",
    "pool",
    "preprocessor",
    "read_tokens",
    "register_family",
]

# Tensors that mark a distilled checkpoint, for `register_family`.
DISTILLATION_TENSORS = (
    r"dist_token|head_dist\.weight",
    "distilled",
    "a distillation token",
)


def builder(function: Callable) -> Callable:
    """Decorator that turns a function from arguments to (inputs, outputs) into a public builder.

    All arguments are forwarded to the function, but `weights` and `name` are handled by the
    builder. The function skips the random initialization if weights are loaded afterwards.
    """
    signature = inspect.signature(function)

    def build(*args, **kwargs):
        given = bind(function.__name__, signature, args, kwargs)
        class_names = check_class_names(given.arguments.get("class_names"))
        is_given = "classes" in given.arguments
        given.apply_defaults()
        arguments = given.arguments
        arguments["class_names"] = class_names
        classes = resolve_classes(arguments["classes"], class_names, is_given)
        check_sizes(classes=classes)
        arguments["classes"] = classes
        check_pooling(arguments["pooling"])
        keras.activations.get(arguments["classifier_activation"])
        source = pretrained.find_source(arguments["weights"])
        if source is not None:
            pretrained.check_classes(source, classes if arguments["include_top"] else None)
            arguments["class_names"] = class_names or source.class_names
        with contextlib.ExitStack() as settings:
            if source is not None:
                settings.enter_context(skip_weight_init())
                if is_of_any_size(arguments["input_tensor"], arguments["input_shape"]):
                    settings.enter_context(weights_table_size(source, build))
            inputs, outputs = function(*given.args, **given.kwargs)
        model = make_model(inputs, outputs, arguments["name"])
        find_input_normalization(model).architecture = non_default_arguments(signature, arguments)
        if source is not None:
            pretrained.load_source(model, source)
        return model

    functools.update_wrapper(build, function)
    build.__signature__ = signature.replace(return_annotation=keras.Model)
    return build


def is_of_any_size(input_tensor, input_shape) -> bool:
    """Returns whether a model accepts images of any height or width."""
    shape = input_shape if input_tensor is None else input_tensor.shape[1:]
    return shape is not None and None in tuple(shape)


def weights_table_size(source, builder: Callable) -> contextlib.AbstractContextManager:
    """Context manager that creates position tables for the grid of the weights."""
    if source.size is not None:
        return table_size(source.size)
    names = [family.tensor_names for family in registry.families() if family.builder is builder]
    grid = pretrained.table_grid(source, names[0] if names else ())
    return contextlib.nullcontext() if grid is None else context_value(endpoints._table_grid, grid)


def register_family(
    name: str,
    builder: Callable,
    variants: Mapping[str, Variant],
    image: ImageTransform,
    tensor_names: tuple[tuple[str, ...], ...] = (),
    checkpoints: tuple[Checkpoint, ...] = (),
    marker_tensors: tuple[tuple[str, str, str], ...] = (),
    source: str = "",
    telling_tensors: tuple[tuple[str, str, str], ...] = (),
) -> Family:
    """Registers a model family, like the families of this package.

    Its models are then listed by `list_models`, built by `create_model` and `keras_tnt.<Function>`,
    and supported by every function and command of this package.

    Args:
        name: name such as "tnt"; the names of its variants begin with it and an underscore.
        builder: the family's function, decorated with `keras_tnt.models.builders.builder`.
        variants: dict from a name to a `keras_tnt.registry.Variant`: its architecture (keyword
            arguments of the builder) and the side of its images.
        image: `keras_tnt.registry.ImageTransform`: mean, standard deviation, crop.
        tensor_names: rows of (path of a variable or layer, name of the tensor in timm's
            checkpoints, name in the original release), as documented in `keras_tnt.weights.names`.
            Defaults to none.
        checkpoints: the public checkpoints, each a `keras_tnt.registry.Checkpoint`. Variants with
            one default to `weights="imagenet"`, others to `None`.
        marker_tensors: rows of (pattern of a tensor's name, argument of the builder, description
            of the tensor): a checkpoint contains such tensors if and only if the argument is true.
            Defaults to none.
        source: publication of the variants, for their docstrings. Defaults to none.
        telling_tensors: `marker_tensors` by its name in release 0.1.

    Returns:
        The `keras_tnt.registry.Family`.

    Raises:
        ValueError: if a name is taken or is not a lower-case identifier.

    Example:
        >>> keras_tnt.register_family(
        ...     "toynet",
        ...     ToyNet,
        ...     variants={"toynet_tiny": Variant({"depth": 2}, image_size=64)},
        ...     image=ImageTransform(mean=(0.5,) * 3, std=(0.5,) * 3),
        ... )
        >>> keras_tnt.create_model("toynet_tiny")
    """
    family = Family(
        name=name,
        builder=builder,
        variants=variants,
        image=image,
        tensor_names=tuple(tensor_names),
        checkpoints=tuple(checkpoints),
        marker_tensors=(*marker_tensors, *telling_tensors),
        source=source,
        make_variant=variant_function,
    )
    registry.add(family)
    return family


def variant_function(family: Family, variant: str) -> Callable:
    """Returns the function of a variant, in the style of `keras.applications`."""
    row, function_name = family.variants[variant], family.function_name(variant)
    parameters = inspect.signature(family.builder).parameters
    unknown = set(row.architecture) - set(parameters)
    if unknown:
        raise ValueError(
            f"Variant '{variant}' has the argument {unknown.pop()!r}, which "
            f"{family.builder.__name__} has not."
        )
    public = any(checkpoint.model == function_name for checkpoint in family.checkpoints)
    own = {**row.architecture, "name": variant, "weights": "imagenet" if public else None}
    signature = inspect.Signature(
        [p.replace(default=own.get(p.name, p.default)) for p in parameters.values()],
        return_annotation=keras.Model,
    )
    common = [p.name for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    architecture = {
        p.name: p.default for p in signature.parameters.values() if p.name not in common
    }

    def build(*args, **kwargs):
        given = bind(function_name, signature, args, kwargs).arguments
        requested = {
            k: v
            for k, v in given.items()
            if k in architecture and k not in ARGUMENTS_WITHOUT_WEIGHTS
        }
        shape, tensor = given.get("input_shape"), given.get("input_tensor")
        size = (row.image_size, row.image_size)
        found = pretrained.find_variant_source(
            given.get("weights", own["weights"]),
            function_name,
            requested,
            architecture,
            image_sides(tensor, shape) or size,
        )
        arguments = {**row.architecture, "name": variant, **given, "weights": found}
        if found is not None:
            size = found.size or size
            arguments = {**found.arguments, **arguments}
            if found.classes and "classes" not in given and given.get("class_names") is None:
                if given.get("include_top", True):
                    arguments["classes"] = found.classes
        if shape is None and tensor is None:
            channels_first = keras.config.image_data_format() == "channels_first"
            arguments["input_shape"] = (3, *size) if channels_first else (*size, 3)
        with table_size(size):
            return family.builder(**arguments)

    build.__name__ = build.__qualname__ = function_name
    build.__module__ = family.builder.__module__
    build.__signature__ = signature
    build.__doc__ = variant_docstring(family, row)
    return build


def variant_docstring(family: Family, row: Variant) -> str:
    """Returns the docstring of a variant's function."""
    name = family.builder.__name__
    listed = ", ".join(f"{key}={value!r}" for key, value in row.architecture.items())
    source = f" {family.source}." if family.source else ""
    return f"""Builds `keras_tnt.{name}` with {listed}.

    The image size is {row.image_size}x{row.image_size} by default.{source}

    Args:
        weights: `"imagenet"` for the public weights that match the arguments and the image size; a
            name of `keras_tnt.list_weights()`; `"hf://owner/repository"` for a timm checkpoint on
            the Hugging Face Hub, which also sets the defaults of `classes`, `class_names` and the
            image size; a directory in the same format, such as one that
            `keras_tnt.save_pretrained` writes; or the path of a file (`.safetensors`, `.pth`,
            `.weights.h5`, `.keras`). If `None`, the weights are random.

    All other arguments are documented in `keras_tnt.{name}`.

    Returns:
        A `keras.Model`.

    Raises:
        ValueError: for inconsistent sizes, unknown values, and weights of another model.
        OSError: if weights cannot be downloaded.
    """


def image_sides(input_tensor, input_shape) -> tuple[int, int] | None:
    """Returns the (height, width) in a variant's arguments; `None` if they do not determine it."""
    shape = input_shape if input_tensor is None else input_tensor.shape[1:]
    if shape is None or len(shape) != 3 or not all(isinstance(side, int) for side in shape):
        return None
    channels_first = keras.config.image_data_format() == "channels_first"
    return tuple(shape[1:]) if channels_first else tuple(shape[:2])


def checkpoints_from_rows(rows: tuple[tuple[Any, ...], ...]) -> tuple[Checkpoint, ...]:
    """Returns `Checkpoint`s from rows of their leading attributes."""
    return tuple(Checkpoint(*row) for row in rows)
