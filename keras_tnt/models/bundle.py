"""Shareable model directories: weights in timm's naming, and a config.json in timm's format."""

import inspect
import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import keras

import keras_tnt
from keras_tnt.files import expand, read_regular, write_atomically
from keras_tnt.images.class_names import imagenet_classes
from keras_tnt.models import registry
from keras_tnt.models.anatomy import Anatomy, anatomy, class_names
from keras_tnt.models.arguments import non_default_arguments
from keras_tnt.models.pretrained import save_checkpoint
from keras_tnt.models.registry import Checkpoint
from keras_tnt.text import printable
from keras_tnt.weights import hub
from keras_tnt.weights.files import open_tensors
from keras_tnt.weights.hub_config import (
    LARGEST_FILE,
    LARGEST_SIDE,
    as_number,
    as_object,
    as_text,
    as_whole,
    parse_json,
)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Section of the config.json that only this package reads.
OWN = "keras_tnt"
# Builder arguments that are not stored with the others.
EXCLUDED_ARGUMENTS = {"weights", "input_tensor", "input_shape", "name", "class_names"}
# Arguments up to this are accepted for any tensor sizes: ratios, rates, patch sizes.
MAX_SETTING = 256


def save_pretrained(model: keras.Model, directory: str | os.PathLike) -> str:
    """Writes a model's weights and description to a directory that can be shared.

    `model.safetensors` has timm's tensor names and `config.json` timm's format, with the class
    names and the preprocessing. `weights=` accepts the directory, as a path or, once uploaded to
    the hub, as `"hf://owner/repository"`. timm loads it as
    `timm.create_model("local-dir:<folder>")` if it has the architecture.

    Args:
        model: a model of this package, or one with such a model inside, followed by a layer
            `Dense(classes, name="head")`.
        directory: path of the directory, created if missing. Its two files are replaced.

    Returns:
        The absolute path of the directory.

    Raises:
        ValueError: for a quantized model, or layers without a checkpoint name.

    Example:
        >>> keras_tnt.save_pretrained(model, "tnt_small_flowers")
        >>> model = keras_tnt.TNTSmall(weights="tnt_small_flowers")
    """
    directory = os.path.abspath(expand(directory))
    os.makedirs(directory, exist_ok=True)
    config = build_config(model)
    save_checkpoint(model, os.path.join(directory, WEIGHTS))
    write_atomically(os.path.join(directory, CONFIG), json.dumps(config, indent=1) + "\n")
    return directory


def load_pretrained(
    directory: str | os.PathLike, input_shape: tuple[int | None, ...] | None = None
) -> keras.Model:
    """Loads a model that `save_pretrained` wrote, of any architecture.

    Args:
        directory: path of the directory.
        input_shape: shape of the input images, as for the builders; position tables are resampled.
            If `None`, that of the saved model.

    Returns:
        A `keras.Model`.

    Raises:
        ValueError: if the directory has no such model, or the model does not support the shape.

    Example:
        >>> model = keras_tnt.load_pretrained("tnt_small_flowers", input_shape=(384, 384, 3))
    """
    directory = expand(directory)
    if input_shape is not None:
        input_shape = tuple(input_shape)
    try:
        config = parse_json(read_regular(os.path.join(directory, CONFIG), LARGEST_FILE))
        own = as_object(OWN, config[OWN])
        family = registry.family(as_text("family", own["family"]))
        arguments = as_arguments(own, family, open_tensors(os.path.join(directory, WEIGHTS)))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"Folder '{directory}' holds no model of keras_tnt.save_pretrained ({error!r}). A "
            "model of timm's is loaded by its variant: keras_tnt.TNTSmall(weights='<folder>')."
        ) from error
    if input_shape is not None:
        check_channels(arguments["input_shape"], input_shape)
        arguments["input_shape"] = input_shape
    try:
        return family.builder(weights=directory, **arguments)
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise ValueError(
            f"The model in folder '{directory}' cannot be built and filled: {error}"
        ) from error


def check_channels(saved, wanted):
    """Raises a `ValueError` unless a shape has three sizes and the saved model's channels."""
    axis = 0 if keras.config.image_data_format() == "channels_first" else -1
    if len(wanted) != 3 or wanted[axis] != saved[axis]:
        raise ValueError(
            f"`input_shape` must be three sizes, with {saved[axis]} channels as the saved model "
            f"has them in {tuple(saved)}. Received: {wanted}"
        )


def as_arguments(own, family, file):
    """Returns the builder's arguments from a directory, validated before anything is allocated.

    Args:
        own: this package's section of the config.json.
        family: the `registry.Family`.
        file: the directory's tensors, whose largest size bounds every size of the model.

    Raises:
        ValueError: if an argument has the wrong type or is out of bounds.
    """
    arguments = as_object("arguments", own["arguments"])
    known = inspect.signature(family.builder).parameters.keys() - EXCLUDED_ARGUMENTS
    if unknown := sorted(arguments.keys() - known):
        raise ValueError(f"`arguments` has {printable(unknown[0])}, which no {family.name} takes.")
    largest = max(MAX_SETTING, len(file.shapes), *map(max, filter(None, file.shapes.values())))
    for name, value in arguments.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int | float) and not isinstance(each, bool):
                as_number(name, each, -largest, largest)
            elif each not in (None, True, False):
                as_text(name, each)
    sides = own["input_shape"]
    if not isinstance(sides, list) or len(sides) != 3:
        raise ValueError(f"`input_shape` must be three sides. It is {printable(sides)}.")
    sides = tuple(
        side if side is None else as_whole("input_shape", side, 1, LARGEST_SIDE) for side in sides
    )
    return {**arguments, "input_shape": sides}


def push_to_hub(
    model: keras.Model, repository: str, *, private: bool = False, token: str | None = None
) -> str:
    """Uploads a model to a repository of the Hugging Face hub, which is created if missing.

    Args:
        model: as for `save_pretrained`.
        repository: "owner/name".
        private: whether a new repository is private. Defaults to `False`.
        token: token of the hub. If `None`, that of `hf auth login` or of the variable HF_TOKEN.

    Returns:
        The value for `weights=`: "hf://owner/name".

    Raises:
        ValueError: as for `save_pretrained`, or for an invalid repository name.
        OSError: if the hub is unreachable, or rejects the upload.

    Example:
        >>> keras_tnt.push_to_hub(model, "someone/tnt_small_flowers")
    """
    from huggingface_hub import HfApi

    if repository.count("/") != 1:
        raise ValueError(
            f"Expected a repository id of the form 'owner/name'. Received: {repository!r}"
        )
    hub.check_names(repository, CONFIG, "main")
    api = HfApi(endpoint=hub.endpoint(), token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=f"{model.name} of keras_tnt {keras_tnt.__version__}",
            )
        except Exception as error:
            if not type(error).__module__.startswith(("http", "huggingface_hub")):
                raise
            reason = printable(str(error), longest=300)
            raise ConnectionError(
                f"'{repository}' cannot be written at {hub.endpoint()}: {reason}. Log in (`hf auth "
                "login`, or HF_TOKEN), and check the network."
            ) from error
    return f"hf://{repository}"


def build_config(model: keras.Model) -> dict:
    """Returns the config.json of a model, as a dict."""
    parts = anatomy(model)
    image, names = parts.image, class_names(model)
    size = list(image.native_size)
    classes = parts.heads[0].units if parts.heads else 0
    pooling = pooling_of(parts)
    check_heads(model, parts, pooling)
    row = find_nearest_checkpoint(parts)
    config: dict[str, Any] = {
        "architecture": row.architecture if row else find_variant_name(parts) or parts.family,
        "num_classes": classes,
        "num_features": parts.norm.gamma.shape[-1] if parts.norm else None,
        "global_pool": "token" if parts.class_tokens else "avg",
        "pretrained_cfg": {
            "tag": model.name,
            "custom_load": False,
            "input_size": [image.channels, *size],
            "fixed_input_size": image.multiple_of is None,
            "interpolation": image.interpolation,
            "crop_pct": image.crop,
            "crop_mode": "center",
            "mean": list(image.mean),
            "std": list(image.std),
            "num_classes": classes,
            "classifier": ["head", "head_dist"] if len(parts.heads) == 2 else "head",
        },
        OWN: {
            "version": keras_tnt.__version__,
            "family": parts.family,
            "input_shape": list(parts.model.input_shape[1:]),
            "arguments": {
                **parts.input_normalization.architecture,
                "include_preprocessing": image.normalizes,
                **(top_arguments(parts) if classes else {"include_top": False, "pooling": pooling}),
            },
        },
    }
    model_args: dict[str, Any] = {"in_chans": image.channels} if image.channels != 3 else {}
    if row and size != [row.size, row.size]:
        model_args["img_size"] = size
    if model_args:
        config["model_args"] = model_args
    if names and names != [name for _, name in imagenet_classes()]:
        config["label_names"] = names
    return config


def top_arguments(parts: Anatomy) -> dict:
    """Returns the builder's `classes` and `classifier_activation` for a model with a head."""
    activation = getattr(parts.predictions or parts.heads[0], "activation", "softmax")
    return {
        "classes": parts.heads[0].units,
        "classifier_activation": keras.activations.serialize(activation),
    }


def pooling_of(parts: Anatomy) -> str | None:
    """Returns the `pooling` argument of a model that was built without its top."""
    names = {"token": "token", "avg_pool": "avg", "max_pool": "max"}
    last = parts.model.layers[-1].name.removeprefix(parts.layer_prefix)
    return names.get(last)


def check_heads(model, parts, pooling):
    """Checks that a classifier around a model pools as the family's own classifier does.

    Args:
        model: the model with the classifier.
        parts: its `Anatomy`.
        pooling: the `pooling` argument of the model inside.

    Raises:
        ValueError: if it does not.
    """
    if not parts.heads or parts.heads[0] in parts.model.layers:
        return
    wanted = "token" if parts.class_tokens else "avg"
    if pooling != wanted or parts.class_tokens > 1:
        raise ValueError(
            f"The classifier of model '{model.name}' reads pooling={pooling!r}; in a checkpoint of "
            f"this family it reads pooling={wanted!r}, one token alone. Build the model with its "
            "own head: classes=."
        )


def find_nearest_checkpoint(parts: Anatomy) -> Checkpoint | None:
    """Returns the public checkpoint of a model's architecture, nearest in size; or `None`."""
    family = registry.family(parts.family)
    functions = {family.function_name(name): row for name, row in family.variants.items()}
    found = [
        row
        for row in family.checkpoints
        if has_architecture(parts, {**functions[row.model].architecture, **row.arguments})
    ]
    side = parts.image.native_size[0]
    return min(found, key=lambda row: abs(row.size - side), default=None)


def find_variant_name(parts: Anatomy) -> str | None:
    """Returns the name of the variant with a model's architecture; `None` if there is none."""
    variants = registry.family(parts.family).variants
    return next(
        (name for name, row in variants.items() if has_architecture(parts, row.architecture)), None
    )


def has_architecture(parts: Anatomy, architecture: Mapping[str, Any]) -> bool:
    """Returns whether a model has an architecture, given without the builder's defaults."""
    signature = inspect.signature(registry.family(parts.family).builder)
    return non_default_arguments(signature, architecture) == parts.input_normalization.architecture
