"""The data sets by name, and what is checked of each before any long work."""

import dataclasses
import difflib
import os
from collections.abc import Callable

import numpy as np

# Options that only some data sets have; each row names its own.
OPTIONS = ("train_split", "eval_split", "validation_share", "label_offset")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A row of the registry.

    Args:
        open_split: function (config, held_out) to an `Indexed` or a `Streamed`: the training
            split, or the held-out one. It raises a ValueError for what is wrong with the data.
        layout: what it is and what must lie where, in one line, for help and errors.
        needs_data_dir: whether `--data_dir` must be given.
        options: which of `OPTIONS` it reads.
        evaluation_only: whether there is no training split.
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
    """Add a data set, for `--dataset=<name>` of every command.

    Args:
        name: with a colon at its end if more has to follow it, as in `--dataset=tfds:cifar10`;
            that is for `open_split` to read in `config.dataset`.
        open_split, layout, needs_data_dir, options, evaluation_only: as in `Dataset`.

    Raises:
        ValueError: if the name is taken or no name.

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
    """Every data set and its layout, one a line."""
    return "\n".join(
        f"{name}{'' if name[-1] == ':' else ': '}{row.layout}" for name, row in DATASETS.items()
    )


def find(dataset):
    """The row of `--dataset=`.

    Raises:
        ValueError: with the nearest names, if there is none.
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
    """Raise a ValueError if there is no such data set, or its directory is not told."""
    row = find(config.dataset)
    if row.needs_data_dir and not config.data_dir:
        raise ValueError(f"--dataset={config.dataset} needs --data_dir: {row.layout}")


def open_split(config, held_out):
    """One split of a configuration's data set.

    Args:
        config: a `training.configuration.Config`.
        held_out: whether the held-out split is wanted, or the one to train on.

    Returns:
        An `Indexed` or a `Streamed`.

    Raises:
        ValueError: if the data are not there, or their classes cannot be.
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
    """(training split, held-out split) of a configuration's data set.

    Raises:
        ValueError: if the data are not there, or the splits do not go together.
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
    check_classes(training, held_out)
    check_overlap(training, held_out)
    return training, held_out


def check_classes(training, held_out):
    """Raise a ValueError if a class is in one of two splits alone."""
    if training.classes != held_out.classes:
        raise ValueError(
            f"the training split has {training.classes} classes, the held-out one "
            f"{held_out.classes}"
        )
    splits = {"training": training, "held-out": held_out}
    known = {
        split: set(np.unique(source.labels).tolist())
        for split, source in splits.items()
        if source.labels is not None
    }
    if len(known) < 2:
        return
    for split, other in (("training", "held-out"), ("held-out", "training")):
        alone = sorted(known[split] - known[other])
        if alone:
            name = training.label_names[alone[0]] if training.label_names else alone[0]
            raise ValueError(
                f"{len(alone)} of {training.classes} classes are in the {split} split alone, the "
                f"first of them {name!r}"
            )


def check_label_names(source, recorded):
    """Raise a ValueError if a data set's classes are not the recorded ones of a run."""
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
    """Raise a ValueError if images that are held out are trained on."""
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
