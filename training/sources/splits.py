"""Finds the files of a split where a data set is several files in a directory."""

import re
from pathlib import Path


def split_files(config, held_out, suffix, layout):
    """Finds the files of a split, and prints which split it is.

    They are those of a folder that is named after the split, or those whose names have it as a
    part (`train-00000-of-00002.parquet`, `imagenet1k-train-0000.tar`), in `--data_dir` or the
    folder `data` in it.

    Args:
        config: a `training.configuration.Config`.
        held_out: whether the held-out split is wanted, or the one to train on.
        suffix: of the files.
        layout: of the data set, for messages.

    Returns:
        Paths, sorted.

    Raises:
        ValueError: if there are none.
    """
    from keras_tnt.image_folders import HELD_OUT_NAMES, describe_fallback

    root = Path(config.data_dir)
    if not root.is_dir():
        raise ValueError(f"--data_dir={root} is no directory. It must hold {layout}")
    wanted = config.eval_split if held_out else config.train_split
    default = HELD_OUT_NAMES if held_out else ("train",)
    for name in (wanted,) if wanted else default:
        for directory in (root, root / "data"):
            files = directory.is_dir() and files_of_split(directory, name.casefold(), suffix)
            if files:
                note = describe_fallback(name) if held_out and not wanted else ""
                kind = "held-out" if held_out else "training"
                print(f"{kind} split {name!r} of {root}: {len(files):,} files{note}", flush=True)
                return files
    raise ValueError(
        f"--data_dir={root} has no files *{suffix} of a split {wanted or ' or '.join(default)}. It "
        f"must hold {layout}"
    )


def files_of_split(directory, name, suffix):
    """Returns the files in a directory that a split's name names, or those of its folder."""
    entries = [path for path in sorted(directory.iterdir()) if path.name[0] != "."]
    folders = [path for path in entries if path.is_dir() and path.name.casefold() == name]
    inside = [path for folder in folders for path in sorted(folder.iterdir())]
    named = [
        path
        for path in entries
        if name in re.split("[-_.]", path.name.removesuffix(suffix).casefold())
    ]
    return [
        str(path)
        for path in [*named, *inside]
        if path.name.endswith(suffix) and path.name[0] != "." and path.is_file()
    ]


def check_labels(labels, config, place):
    """Returns labels counted from 0.

    Args:
        labels: integers.
        config: with `classes`, and `label_offset`, the first label.
        place: function from an image's number to where it is, for messages.

    Raises:
        ValueError: if a label lies outside of the classes, or `--classes` is missing.
    """
    low, high = int(labels.min()), int(labels.max())
    if not config.classes:
        raise ValueError(
            f"--dataset={config.dataset} needs --classes, since the files do not say how many "
            f"there are. The labels go from {low} to {high}: --classes={high - low + 1}"
            + (f" --label_offset={low}" if low else "")
        )
    first, last = config.label_offset, config.label_offset + config.classes - 1
    outside = (labels < first) | (labels > last)
    if outside.any():
        number = int(outside.argmax())
        raise ValueError(
            f"{place(number)} has the label {labels[number]}, outside of {first} to {last} by "
            f"--classes={config.classes} and --label_offset={first}; the labels go from {low} to "
            f"{high}"
        )
    return labels - first
