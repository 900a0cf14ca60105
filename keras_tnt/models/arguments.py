"""Checks of the arguments that all model builders share, and suggestions for unknown ones."""

import collections
import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from keras_tnt.models import registry
from keras_tnt.text import is_encodable, is_line

POOLINGS = (None, "avg", "max", "token")


# Arguments that do not affect the weights.
ARGUMENTS_WITHOUT_WEIGHTS = (
    "dropout",
    "attention_dropout",
    "stochastic_depth",
    "dtype",
    "class_names",
)


# Our names by timm's name of an argument. The first that the builder accepts is suggested.
TIMM_ARGUMENTS = {
    "num_classes": ("classes",),
    "n_classes": ("classes",),
    "in_chans": ("input_shape",),
    "in_channels": ("input_shape",),
    "img_size": ("input_shape",),
    "image_size": ("input_shape",),
    "input_size": ("input_shape",),
    "drop_path_rate": ("stochastic_depth",),
    "drop_path": ("stochastic_depth",),
    "drop_rate": ("dropout",),
    "drop": ("dropout",),
    "proj_drop_rate": ("dropout",),
    "attn_drop_rate": ("attention_dropout",),
    "global_pool": ("pooling",),
    "checkpoint_path": ("weights",),
    "pretrained_cfg": ("weights",),
    "act_layer": ("activation",),
    "init_values": ("layer_scale",),
    "depth_token_only": ("class_attention_depth",),
    "first_stride": ("inner_stride",),
    "embed_dim": ("outer_dim",),
    "outer_dim": ("embed_dim",),
    "hidden_dim": ("embed_dim", "outer_dim"),
    "num_layers": ("depth",),
    "num_heads": ("outer_heads",),
    "num_heads_outer": ("outer_heads",),
    "num_heads_inner": ("inner_heads",),
    "label_names": ("class_names",),
}


# Notes that complete a suggestion.
TIMM_NOTES = {
    "input_shape": ", (height, width, channels)",
    "classes": ", or `class_names`",
    "pooling": ": None, 'avg', 'max' or 'token', with include_top=False",
}


def check_sizes(**sizes) -> None:
    """Raises a `ValueError` that names the first of `sizes` that is not a positive integer."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"`{name}` must be a positive integer. Received: {size!r}")


def check_pooling(pooling, allowed=POOLINGS) -> None:
    """Raises a `ValueError` on an unknown pooling, as `keras.applications` does."""
    if pooling not in allowed:
        raise ValueError(
            f"`pooling` must be one of {', '.join(map(repr, allowed))}. Received: {pooling!r}"
        )


def check_class_names(class_names) -> list[str] | None:
    """Returns the names of classes as a list, or `None` if they are `None`.

    Raises:
        ValueError: if they are not a list of distinct names, each one line of text.
    """
    if class_names is None:
        return None
    if isinstance(class_names, str) or not hasattr(class_names, "__iter__"):
        raise ValueError(f"`class_names` must be a list of names. Received: {class_names!r}")
    names = list(class_names)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"Each of `class_names` must be a string. Received: {wrong[0]!r}")
    wrong = [name for name in names if not is_line(name)]
    if wrong:
        raise ValueError(f"A class name must be one line that is not blank. Received: {wrong[0]!r}")
    wrong = [name for name in names if not is_encodable(name)]
    if wrong:
        raise ValueError(f"Class names must be valid UTF-8. Received: {wrong[0]!r}")
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"`class_names` must differ from each other. Received twice: {twice[0]!r}")
    if not names:
        raise ValueError("`class_names` must name at least one class. Received: []")
    return names


def resolve_classes(classes, class_names, given: bool) -> int:
    """Returns the number of classes given by number, by names, or by both.

    Args:
        classes: number of classes.
        class_names: names of the classes, or `None`.
        given: whether `classes` was passed explicitly, and so has to agree with `class_names`.

    Raises:
        ValueError: if both are given and differ.
    """
    if class_names is None:
        return classes
    if given and classes != len(class_names):
        raise ValueError(
            f"`class_names` must name each class. Received: {len(class_names)} names for "
            f"classes={classes}. Leave `classes` out."
        )
    return len(class_names)


def bind(name: str, signature: inspect.Signature, args, kwargs) -> inspect.BoundArguments:
    """Returns the arguments of a call by name.

    Args:
        name: name of the function, for error messages.
        signature: signature of the function.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Raises:
        TypeError: if the function does not accept them; the message suggests what to pass instead.
    """
    unknown = [key for key in kwargs if key not in signature.parameters]
    if unknown:
        raise TypeError(
            f"{name}() got an unexpected keyword argument '{unknown[0]}'. "
            f"{suggest_argument(name, unknown[0], kwargs[unknown[0]], signature.parameters)}"
        )
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}() {error}") from None


def suggest_argument(function: str, argument: str, value, known) -> str:
    """Returns a sentence that suggests one of our arguments for an unknown one.

    Args:
        function: name of the builder or variant.
        argument: name of the unknown argument, such as one of timm's.
        value: its value.
        known: names of the existing arguments.
    """
    if argument == "pretrained":
        return pretrained_advice(function) if value else "Pass weights=None for random weights."
    names = [name for name in TIMM_ARGUMENTS.get(argument, ()) if name in known]
    if names:
        return f"Pass `{names[0]}`{TIMM_NOTES.get(names[0], '')}."
    found = difflib.get_close_matches(argument, list(known), n=3)
    if found:
        return f"Did you mean {' or '.join(f'`{name}`' for name in found)}?"
    return f"There are: {', '.join(known)}."


def pretrained_advice(function: str) -> str:
    """Returns a sentence that replaces `pretrained=True` of a builder or variant."""
    if any(row.model == function for row in registry.checkpoints()):
        return "Pass weights='imagenet': 'imagenet' for public weights, None for random ones."
    for family in registry.families():
        names = [family.builder.__name__, *map(family.function_name, family.variants)]
        if function in names and family.checkpoints:
            return (
                f"{function} has no public weights: call a variant that has some, "
                f"keras_tnt.{family.checkpoints[0].model}(weights='imagenet'), or pass "
                "weights=None for random weights or weights='<path>' for a file."
            )
    return (
        f"There are no public weights of {function}: pass weights=None for random weights or "
        "weights='<path>' for a file."
    )


def non_default_arguments(signature: inspect.Signature, arguments: Mapping[str, Any]) -> dict:
    """Returns non-default arguments that affect the weights, as JSON-serializable values.

    Args:
        signature: signature of a family's builder.
        arguments: its arguments, or some of them.
    """
    changed = {
        p.name: arguments[p.name]
        for p in signature.parameters.values()
        if p.kind is p.KEYWORD_ONLY
        and p.name not in ARGUMENTS_WITHOUT_WEIGHTS
        and arguments.get(p.name, p.default) != p.default
    }
    return {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}
