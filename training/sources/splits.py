"""Splits of data sets that consist of several files in a directory."""

import re
from pathlib import Path


def split_files(config, held_out, suffix, layout):
    """Returns the files of a split, and prints which split was chosen.

    They are in a folder named after the split, or have its name as a part of theirs
    (`train-00000-of-00002.parquet`, `imagenet1k-train-0000.tar`), in `--data_dir` or its folder
    `data`.

    Args:
        config: A `training.configuration.Config`.
        held_out: Whether to return the held-out split, else the training split.
        suffix: Suffix of the files.
        layout: Layout of the data set, for messages.

    Returns:
        List of paths; those in the directory before those in the split's folder, both sorted.

    Raises:
        ValueError: If there are none.
    """
    from keras_tnt.images.folders import HELD_OUT_NAMES, describe_fallback

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
    """Returns the files in a directory whose names, or whose folder's name, contain a split.

    Args:
        directory: A `Path`.
        name: Name of the split, case-folded.
        suffix: Suffix of the files.
    """
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
        labels: Integers (n,).
        config: A `training.configuration.Config` with `classes`, and `label_offset`, the first
            label.
        place: Function from an image's index to its location, for messages.

    Raises:
        ValueError: If a label is out of range, or `--classes` is missing.
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
