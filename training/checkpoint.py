"""All that a run needs to go on, in one file that is whole or not there.

A file holds the tensors by name and, in its header, the step, what the loop has to remember, and a
checksum over all of it. One that cannot be read is set aside, and the one before counts.
"""

import contextlib
import json
import os
import re
import zlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from keras_tnt.files import check_space, read_regular, write_atomically

MAX_METRICS_BYTES = 2**30
NAME = "step_{:09d}.safetensors"
PATTERN = re.compile(r"step_(\d+)\.safetensors")


class CorruptCheckpoint(ValueError):
    """A checkpoint file that cannot be read whole."""


class NoneReadable(ValueError):
    """All checkpoints of a run are damaged."""


def step_of(path):
    return int(PATTERN.fullmatch(path.name).group(1))


def checksum(tensors, notes):
    total = zlib.crc32(notes.encode())
    for name in sorted(tensors):
        total = zlib.crc32(np.ascontiguousarray(tensors[name]).reshape(-1).view("uint8"), total)
    return str(total)


class Checkpoints:
    """A run's checkpoints.

    Args:
        directory: where they lie.
        variables: dict from name to `tf.Variable`: the state.
        keep: how many of the last to keep.
    """

    def __init__(self, directory, variables, keep):
        self.directory = Path(directory)
        self.variables = variables
        self.keep = keep

    def paths(self):
        """The files, newest first."""
        found = [p for p in self.directory.glob("step_*.safetensors") if PATTERN.fullmatch(p.name)]
        return sorted(found, key=step_of, reverse=True)

    def step(self):
        """The newest file's step; -1 without any."""
        return max(map(step_of, self.paths()), default=-1)

    def save(self, step, notes, best=False):
        """Write the state after `step` updates.

        Args:
            step: integer.
            notes: what else to remember, for JSON; `healthy` is the last step with a good loss.
            best: whether to keep a copy as `best.safetensors`.
        """
        tensors = {name: np.array(v.numpy()) for name, v in self.variables.items()}
        told = json.dumps({"step": step, **notes})
        header = {"notes": told, "checksum": checksum(tensors, told)}
        data = save(tensors, metadata=header)
        check_space(self.directory, len(data) * (1 + best), f"The checkpoint of step {step}")
        if best:
            write_atomically(self.directory / "best.safetensors", data)
        write_atomically(self.directory / NAME.format(step), data)
        # After a step that was left out the weights may be bad since an earlier one: all are kept.
        if notes["healthy"] >= step - 1:
            for old in self.paths()[self.keep :]:
                old.unlink()

    def restore(self, chief=True):
        """Fill the variables from the newest checkpoint that can be read.

        Args:
            chief: whether this process sets aside what cannot be read.

        Returns:
            The notes, with `step`; None where no checkpoint was ever written.

        Raises:
            NoneReadable: if there are files, and all of them are damaged.
            ValueError: if a file is whole and does not hold this model's state.
        """
        damaged = {}
        for path in self.paths():
            try:
                tensors, notes = read(path)
            except CorruptCheckpoint as error:
                damaged[path] = error
                continue
            self.fill(tensors, path)
            for other, error in damaged.items():
                print(f"{error}. It is set aside; the checkpoint before it is used.", flush=True)
                if chief:
                    os.replace(other, other.with_suffix(".corrupt"))
            return notes
        left = sorted(path.name for path in self.directory.glob("*.*") if path.is_file())
        if left:
            raise NoneReadable(self.told(left))
        return None

    def fill(self, tensors, path):
        """Assign a file's tensors to the variables."""
        different = [
            name
            for name, variable in self.variables.items()
            if name not in tensors or tensors[name].shape != tuple(variable.shape)
        ]
        if different:
            raise ValueError(
                f"{path} does not hold the state of this model: {len(different)} of "
                f"{len(self.variables)} tensors are missing or of another shape, first "
                f"{different[0]!r}"
            )
        for name, variable in self.variables.items():
            variable.assign(tensors[name])

    def told(self, names):
        """What there is when no checkpoint can be read, and what can be done."""
        best = self.directory / "best.safetensors"
        ways = ["--start_afresh to begin at step 0"]
        with contextlib.suppress(CorruptCheckpoint):
            step = read(best)[1]["step"]
            ways.append(
                f"cp {best} {self.directory / NAME.format(step)} to go on from the best weights, "
                f"of step {step}"
            )
        return (
            f"no checkpoint in {self.directory} can be read. There are: {', '.join(names)}. "
            f"Give {', or '.join(ways)}"
        )

    def set_aside(self, after=None):
        """Move the checkpoints after a step into a directory beside theirs; None: all, and best."""
        number = 1
        while (aside := self.directory.with_name(f"checkpoints_set_aside_{number}")).exists():
            number += 1
        if after is None:
            os.replace(self.directory, aside)
            return
        for path in self.paths():
            if step_of(path) > after:
                aside.mkdir(exist_ok=True)
                os.replace(path, aside / path.name)


def read(path):
    """(tensors by name, notes) of a checkpoint file.

    Raises:
        CorruptCheckpoint: if it is not whole.
    """
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        whole = header["checksum"] == checksum(tensors, header["notes"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CorruptCheckpoint(f"Checkpoint {path} cannot be read ({error!r})") from error
    if not whole:
        raise CorruptCheckpoint(f"Checkpoint {path} has a wrong checksum")
    return tensors, json.loads(header["notes"])


def load_best(model, run):
    """Give a model the weights of its run's best evaluation.

    Args:
        model: `keras.Model`, filled in place once all of the file is checked.
        run: the run's directory.

    Raises:
        ValueError: if there is no such file, or it is damaged, or holds no weights of this model.
    """
    path = Path(run) / "checkpoints" / "best.safetensors"
    if not path.is_file():
        raise ValueError(f"{run} holds no checkpoints/best.safetensors")
    variables = {f"model/{v.path}": v for v in model.weights}
    Checkpoints(path.parent, variables, keep=1).fill(read(path)[0], path)


def read_metrics(path):
    """The reports of a `metrics.jsonl`, dicts with a `step`.

    Raises:
        ValueError: if the file is damaged.
    """
    reports = []
    data = read_regular(path, MAX_METRICS_BYTES)
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            report = json.loads(line)
            whole = isinstance(report, dict) and isinstance(report.get("step"), int)
        except (ValueError, RecursionError):
            whole = False
        if not whole:
            raise ValueError(f"{path} is damaged: line {number} is no report. Mend or remove it")
        reports.append(report)
    return reports
