"""`keras-tnt rename`: renames the classes of a model, whose weights do not change."""

import json
import os
import shutil
import zipfile

from keras_tnt.files import check_destination
from keras_tnt.text import printable

HELP = "give the classes of a model other names; its weights stay as they are"
MAX_BYTES = 1 << 26  # of a file of class names


def add_arguments(parser):
    """Adds the subcommand's arguments to a parser."""
    parser.add_argument(
        "model", help="a .keras file, the directory of a run, or one of save_pretrained"
    )
    parser.add_argument(
        "--classes",
        required=True,
        metavar="FILE",
        help="UTF-8 text with one name per line, in the order of the model's outputs",
    )
    parser.add_argument("--out", help="where to write the renamed model; else it is replaced")


def run(options):
    """Writes the renamed model, prints its path and returns exit status 0."""
    model = os.path.expanduser(options.model)
    out = options.out and os.path.expanduser(options.out)
    final = os.path.join(model, "final.keras")
    is_bundle = os.path.isfile(os.path.join(model, "config.json")) and not os.path.isfile(final)
    if out:
        if not is_bundle and not out.endswith(".keras"):
            raise ValueError(f"--out must end in .keras. Received: {out}")
        check_destination(out, "--out", is_folder=is_bundle)
    names = read_names(os.path.expanduser(options.classes))
    if is_bundle:
        written = rename_bundle(model, names, out or model)
    elif os.path.isdir(model):
        if not os.path.isfile(final):
            raise ValueError(
                f"Folder '{model}' holds no model: no final.keras of a run, and no config.json of "
                "save_pretrained."
            )
        written = rename_keras_file(final, names, out or final)
    elif model.endswith(".keras"):
        written = rename_keras_file(model, names, out or model)
    elif os.path.exists(model):
        raise ValueError(
            f"'{model}' is no .keras file, no run and no folder of save_pretrained. An exported "
            "model is exported again from the renamed one."
        )
    else:
        raise FileNotFoundError(f"There is no model '{model}'.")
    print(written)
    return 0


def read_names(path):
    """Returns the class names in a text file, one per line.

    Args:
        path: path of the file.

    Raises:
        OSError, ValueError: if it cannot be read, or a line is not a valid name.
    """
    from keras_tnt.models.arguments import check_class_names
    from keras_tnt.weights.files import check_readable

    try:
        check_readable(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"--classes: there is no file '{path}'.") from None
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"--classes={path} is larger than {MAX_BYTES:,} bytes.")
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
        while lines and not lines[-1]:
            lines.pop()
        return check_class_names(lines)
    except UnicodeDecodeError as error:
        raise ValueError(f"--classes={path} is no UTF-8 text.") from error
    except ValueError as error:
        raise ValueError(f"--classes={path}: {error}") from error


def check_count(names, classes, model):
    """Raises a `ValueError` unless the number of names is the number of classes."""
    if len(names) != classes:
        raise ValueError(
            f"--classes must name each class. Received: {len(names)} names for the {classes} "
            f"classes of '{printable(model)}'."
        )


def rename_keras_file(path, names, out):
    """Writes a `.keras` file with new class names; all else, even the optimizer, is copied."""
    import keras

    import keras_tnt
    from keras_tnt.files import replacing
    from keras_tnt.weights import load_keras_model

    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file '{path}'.")
    model = load_keras_model(path)
    heads = keras_tnt.anatomy(model).heads
    if heads:
        check_count(names, heads[0].units, path)
    keras_tnt.set_class_names(model, names)
    with zipfile.ZipFile(path) as old, replacing(out) as unfinished:
        config = json.loads(old.read("config.json"))
        config["config"] = keras.saving.serialize_keras_object(model)["config"]
        with zipfile.ZipFile(unfinished, "w") as new:
            for entry in old.infolist():
                if entry.filename == "config.json":
                    new.writestr(entry, json.dumps(config))
                    continue
                with old.open(entry) as source, new.open(entry, "w", force_zip64=True) as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    return out


def rename_bundle(folder, names, out):
    """Writes a directory of `save_pretrained` with new class names in its config.json."""
    from keras_tnt.files import replacing, write_atomically
    from keras_tnt.images.class_names import imagenet_classes
    from keras_tnt.weights.hub_config import LARGEST_FILE, parse_config, parse_json

    path = os.path.join(folder, "config.json")
    with open(path, "rb") as file:
        data = file.read(LARGEST_FILE + 1)
    classes = parse_config(data, path).classes
    if not classes:
        raise ValueError(f"The model in '{folder}' has no classifier whose classes could be named.")
    check_count(names, classes, folder)
    config = parse_json(data)
    for part in (config, config.get("pretrained_cfg") or {}):
        for key in ("label_names", "label_descriptions"):
            part.pop(key, None)
    if names != [name for _, name in imagenet_classes()]:
        config["label_names"] = names
    if os.path.abspath(out) != os.path.abspath(folder):
        os.makedirs(out, exist_ok=True)
        for name in ("model.safetensors", "pytorch_model.bin"):
            if os.path.isfile(os.path.join(folder, name)):
                with replacing(os.path.join(out, name)) as unfinished:
                    shutil.copyfile(os.path.join(folder, name), unfinished)
    write_atomically(os.path.join(out, "config.json"), json.dumps(config, indent=1) + "\n")
    return out
