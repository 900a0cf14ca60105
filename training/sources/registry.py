"""Registry of data sets, and checks of their splits before any expensive work."""

import dataclasses
import difflib
import os
import sys
from collections.abc import Callable

import numpy as np

# Options that only some data sets support; each row lists its own.
OPTIONS = ("train_split", "eval_split", "validation_share", "label_offset")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Row of the registry.

    Args:
        open_split: Function from (config, held_out) to an `Indexed` or a `Streamed`: the training
            split, or the held-out one. It raises a ValueError if the data are invalid.
        layout: Description and required files in one line, for help and errors. Defaults to "".
        needs_data_dir: Whether `--data_dir` is required. Defaults to `False`.
        options: Which of `OPTIONS` it reads. Defaults to none.
        evaluation_only: Whether there is no training split. Defaults to `False`.
    """

    open_split: Callable
    layout: str = ""
    needs_data_dir: bool = False
    options: tuple[str, ...] = ()
    evaluation_only: bool = False


DATASETS = {}


def register_dataset(
    name, open_split, layout="", needs_data_dir=False, options=(), evaluation_only=False
):
    """Adds a data set, for `--dataset=<name>` of every command.

    Args:
        name: Name of the data set. A trailing colon means that more text follows it, as in
            `--dataset=tfds:cifar10`; `open_split` reads that text from `config.dataset`.
        open_split: Function from (config, held_out) to an `Indexed` or a `Streamed`.
        layout: Description in one line. Defaults to "".
        needs_data_dir: Whether `--data_dir` is required. Defaults to `False`.
        options: Which of `OPTIONS` it reads. Defaults to none.
        evaluation_only: Whether there is no training split. Defaults to `False`.

    Raises:
        ValueError: If the name is taken or invalid.

    Example:
        >>> def stripes(config, held_out):
        ...     images = np.zeros((64, 32, 32, 3), "uint8")
        ...     images[::2, ::4] = 255
        ...     return in_memory(images, np.arange(64) % 2, 2, "stripes", ("some", "none"))
        >>> register_dataset("stripes", stripes)
    """
    if name in DATASETS or not name or ":" in name[:-1]:
        raise ValueError(
            f"no data set can be called {name!r}: the name is taken, empty, or has a colon inside"
        )
    DATASETS[name] = Dataset(open_split, layout, needs_data_dir, tuple(options), evaluation_only)


def describe():
    """Returns all data sets and their layouts, one per line."""
    return "\n".join(
        f"{name}{'' if name[-1] == ':' else ': '}{row.layout}" for name, row in DATASETS.items()
    )


def find(dataset):
    """Returns the row of a value of `--dataset`.

    Raises:
        ValueError: If there is none; the message suggests the nearest names.
    """
    before, colon, _ = dataset.partition(":")
    name = before + colon
    if name in DATASETS:
        return DATASETS[name]
    near = difflib.get_close_matches(name, DATASETS)
    raise ValueError(
        f"--dataset: there is no {name!r}. "
        + (f"Did you mean {' or '.join(near)}? " if near else "")
        + f"There are: {', '.join(DATASETS)}; more by register_dataset in a module of --plugins"
    )


def check(config):
    """Raises a ValueError if the data set does not exist, or lacks its `--data_dir`."""
    row = find(config.dataset)
    if row.needs_data_dir and not config.data_dir:
        raise ValueError(f"--dataset={config.dataset} needs --data_dir: {row.layout}")


def open_split(config, held_out):
    """Opens one split of the configured data set.

    Args:
        config: A `training.configuration.Config`.
        held_out: Whether to open the held-out split, else the training split.

    Returns:
        An `Indexed` or a `Streamed`.

    Raises:
        ValueError: If the data do not exist, or have less than two or more than `--classes`
            classes.
    """
    check(config)
    row = find(config.dataset)
    if row.evaluation_only and not held_out:
        raise ValueError(
            f"--dataset={config.dataset} is for evaluation alone: it goes with evaluate.py"
        )
    source = row.open_split(config, held_out)
    if source.classes < 2:
        raise ValueError(
            f"--dataset={config.dataset} has a single class"
            + (f", {source.label_names[0]!r}" if source.label_names else "")
            + ": there is nothing to tell apart"
        )
    if config.classes and config.classes < source.classes:
        raise ValueError(
            f"--classes={config.classes} is less than the {source.classes} classes of "
            f"--dataset={config.dataset}"
        )
    return source


def open_sources(config):
    """Opens the training and the held-out split of the configured data set.

    Args:
        config: A `training.configuration.Config`.

    Returns:
        (training source, held-out source).

    Raises:
        ValueError: If the data do not exist, the splits overlap, or their classes do not fit.
    """
    row = find(config.dataset)
    for option in OPTIONS:
        if getattr(config, option) and option not in row.options:
            raise ValueError(f"--dataset={config.dataset} takes no --{option}")
    training, held_out = (open_split(config, held_out) for held_out in (False, True))
    if training.several_labels:
        raise ValueError(
            f"--dataset={config.dataset} has several labels an image: it is for evaluation alone"
        )
    if config.data_service and training.in_process:
        raise ValueError(
            f"--dataset={config.dataset} is read by Python in the trainer's process, which a "
            "tf.data service cannot do: leave --data_service out, or use --dataset=folder, table, "
            "tfrecord or tfds:"
        )
    check_classes(training, held_out, config.dataset)
    check_overlap(training, held_out)
    return training, held_out


def check_classes(training, held_out, dataset):
    """Checks that the held-out images belong to classes with training images.

    Classes without a held-out image raise an error if the images alone define the classes, as
    folders do: files may be missing. Otherwise they cause a warning.

    Args:
        training: The training source.
        held_out: The held-out source.
        dataset: Value of `--dataset`, for messages.

    Raises:
        ValueError: If the numbers of classes differ, a held-out class has no training image, or a
            class defined by its images has no held-out one.
    """
    if training.classes != held_out.classes:
        raise ValueError(
            f"the training split has {training.classes} classes, the held-out one "
            f"{held_out.classes}"
        )
    if training.labels is None or held_out.labels is None:
        return
    known, measured = (set(np.unique(each.labels).tolist()) for each in (training, held_out))
    for split, other, alone in (
        ("held-out", "training", sorted(measured - known)),
        ("training", "held-out", sorted(known - measured)),
    ):
        if not alone:
            continue
        name = training.label_names[alone[0]] if training.label_names else alone[0]
        if split == "held-out" or training.classes_from_images:
            raise ValueError(
                f"{len(alone)} of {training.classes} classes are in the {split} split alone, the "
                f"first of them {name!r}. Each of them needs {other} images, or none at all"
            )
        print(
            f"warning: --dataset={dataset}: {len(alone)} of {training.classes} classes have no "
            f"held-out image, the first of them {name!r}. The accuracy is that of the others",
            file=sys.stderr,
            flush=True,
        )


def check_label_names(source, recorded):
    """Raises a ValueError if a source's class names differ from a run's recorded ones."""
    names, recorded = list(source.label_names or ()), list(recorded or ())
    if not names or not recorded or names == recorded:
        return
    if len(names) != len(recorded):
        raise ValueError(
            f"the run was trained on {len(recorded)} classes, and this data set has {len(names)}"
        )
    number = next(i for i, name in enumerate(names) if name != recorded[i])
    raise ValueError(
        f"class {number} is {names[number]!r} here, and was {recorded[number]!r} when the run was "
        "trained"
    )


def check_overlap(training, held_out):
    """Raises a ValueError if the splits share images."""
    shared = sorted(set(training.paths) & set(held_out.paths))
    if shared:
        raise ValueError(
            f"the splits overlap: {len(shared)} files are in both, the first of them {shared[0]}"
        )
    shared = [
        (file, min(end, other_end) - max(first, other_first))
        for file, first, end in training.stretches
        for other_file, other_first, other_end in held_out.stretches
        if file == other_file and max(first, other_first) < min(end, other_end)
    ]
    if shared:
        raise ValueError(
            f"the splits overlap: {sum(count for _, count in shared)} images are in both, the "
            f"first of them in {os.path.basename(shared[0][0])}"
        )
