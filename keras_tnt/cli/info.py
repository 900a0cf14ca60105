"""`keras-tnt info`: describes a model or the installation."""

import json
import os
import sys

from keras_tnt.cli import environment
from keras_tnt.text import first_line, printable

HELP = (
    "what a model is: family, classes, parameters, multiply-accumulates, weights; without a model, "
    "what this installation is"
)


def add_arguments(parser):
    """Adds the subcommand's arguments to a parser."""
    parser.add_argument(
        "model",
        nargs="?",
        help="a name that `keras-tnt list` gives, a .keras or .onnx file, the directory of a run, "
        "of save_pretrained or of a SavedModel, or the name of public weights",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options):
    """Prints the description and returns exit status 0."""
    found = about(options.model) if options.model else environment.describe()
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    names = found.pop("class_names", None)
    for name, value in found.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        if isinstance(value, list):
            shown = ", ".join(map(str, value))
        if isinstance(value, dict):
            shown = ", ".join(f"{key} {each}" for key, each in value.items())
        print(f"{name.replace('_', ' '):22}  {first_line(shown)}")
    if names:
        listed = printable(", ".join(names[:10]), longest=1000)
        print(f"{'class names':22}  {listed}{', ...' if len(names) > 10 else ''}")
    return 0


def about(name):
    """Returns the description of a model.

    Args:
        name: name or path of the model, as for `run`.

    Returns:
        A JSON-serializable dict.
    """
    from keras_tnt.cli import cards

    if name.endswith(".onnx"):
        return about_card(*cards.onnx_card(name))
    if folder := cards.saved_model_folder(name):
        return about_card(cards.saved_model_card(folder), None)
    return about_variant(name) or about_keras(name)


def about_card(card, parameters):
    """Returns the description of an exported model, from its card."""
    return {
        "name": card["name"],
        "image_size": "x".join(map(str, card["image_size"])),
        "input": card["input"],
        "classes": len(card["labels"] or ()),
        "class_names": card["labels"],
        **({"parameters": parameters} if parameters else {}),
        "weights": card["weights"] or "not said",
        "made_with": card["made_with"],
    }


def about_variant(name):
    """Returns the description of a published variant without building it; else `None`."""
    import keras

    from keras_tnt.cli.list import about
    from keras_tnt.images.class_names import imagenet_classes
    from keras_tnt.models import registry

    if os.path.exists(name) or name.endswith(".keras"):
        return None
    try:
        registry.find_model(name)
    except ValueError:
        if found := registry.find_checkpoint(name):
            return about_checkpoint(*found)
        raise
    for family in registry.families():
        for variant, row in family.variants.items():
            if name not in (variant, family.function_name(variant)) or row.cost is None:
                continue
            known = about(variant)
            classes = [label for _, label in imagenet_classes()]
            found = {
                "name": variant,
                "family": family.name,
                "image_size": f"{row.image_size}x{row.image_size}",
                "input": "pixels in [0, 255]",
                "blocks": row.cost.blocks,
                "distilled": "yes" if row.architecture.get("distilled") else "no",
                "classes": len(classes),
                "class_names": classes,
                "precision": keras.config.dtype_policy().name,
                "parameters": row.cost.parameters,
                "multiply_accumulates": row.cost.multiply_accumulates,
            }
            if known["weights"]:
                found["top1"] = known["top1"]
                found["public_weights"] = known["weights"]
            return found
    return None


def about_checkpoint(family, variant, row):
    """Returns the description of public weights, without downloading them."""
    return {
        "name": row.name,
        "model": variant,
        **{key: "yes" if value is True else value for key, value in row.arguments.items()},
        "family": family.name,
        "image_size": f"{row.size}x{row.size}",
        "parameters": row.parameters,
        "multiply_accumulates": cost_of(family, variant, row),
        "top1": row.top1,
        "top5": row.top5,
        "source": row.source,
        "repository": row.repository,
        "license": row.license,
    }


def cost_of(family, variant, row):
    """Returns the multiply-accumulates per image of a public checkpoint's model."""
    import keras

    from keras_tnt.inspection.cost import multiply_accumulates
    from keras_tnt.layers.base import skip_weight_init
    from keras_tnt.models.registry import create_model

    published = family.variants[variant]
    if published.cost and row.size == published.image_size and not row.arguments:
        return published.cost.multiply_accumulates
    print(f"building {printable(row.call)} ...", file=sys.stderr, flush=True)
    shape = (row.size, row.size, 3)
    if keras.config.image_data_format() == "channels_first":
        shape = (3, row.size, row.size)
    with skip_weight_init():
        model = create_model(variant, weights=None, input_shape=shape, **row.arguments)
    return multiply_accumulates(model)


def about_keras(name):
    """Returns the description of a model that is loaded or built for it."""
    import keras_tnt
    from keras_tnt.cli.runtime import load_model
    from keras_tnt.inspection.cost import multiply_accumulates
    from keras_tnt.models import registry

    print(f"loading {printable(name)} ...", file=sys.stderr, flush=True)
    model = load_model(name, None)
    parts = keras_tnt.anatomy(model)
    heads = parts.heads
    native_size = "x".join(map(str, parts.image.native_size))
    multiple = parts.image.multiple_of
    found = {
        "name": model.name,
        "family": parts.family,
        "image_size": f"{native_size}, or any of multiples of {multiple}"
        if multiple
        else native_size,
        "input": "pixels in [0, 255]" if parts.image.normalizes else "normalised",
        "blocks": len(parts.blocks) + len(parts.class_blocks),
        "distilled": "yes" if len(heads) == 2 else "no",
        "classes": heads[0].units if heads else 0,
        "class_names": keras_tnt.class_names(model),
        "precision": model.dtype_policy.name,
        "parameters": model.count_params(),
    }
    found["multiply_accumulates"] = multiply_accumulates(model)
    family = registry.family(parts.family)
    function = {name: family.function_name(name) for name in family.variants}.get(model.name)
    public = [row.name for row in family.checkpoints if row.model == function]
    if public:
        found["public_weights"] = public
    return found
