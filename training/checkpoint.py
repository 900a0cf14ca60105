"""All that a run needs to go on, in one file that is whole or not there.

A file holds the tensors by name and, in its header, the step, what the loop has to remember, and a
checksum over all of it. One that cannot be read is set aside, and the one before counts. Anything
that has the name of a checkpoint and is no readable file (a directory, a FIFO, a link to an absent
disk) is a damaged checkpoint: it never counts as none.
"""

import contextlib
import json
import os
import re
import stat
import threading
import zlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from keras_tnt.files import check_space, write_atomically
from training import regular

MAX_METRICS_BYTES = 2**30
NAME = "step_{:09d}.safetensors"
PATTERN = re.compile(r"step_(\d+)\.safetensors")
BEST = "best.safetensors"
RANKED_NAME = "best_{:09d}.safetensors"
RANKED = re.compile(r"best_(\d+)\.safetensors")


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
    """A run's checkpoints, written by a thread while training continues.

    One write is in flight at a time. An error of a write is raised by the next `save` or `wait`.

    Args:
        directory: where they are stored.
        variables: dict from name to `tf.Variable`: the state.
        keep: number of checkpoints to keep.
        background: whether `save` returns before the file is written.
        keep_best: number of checkpoints of the best evaluations to keep in addition.
    """

    def __init__(self, directory, variables, keep, background=False, keep_best=0):
        self.directory = Path(directory)
        self.variables = variables
        self.keep = keep
        self.background = background
        self.keep_best = keep_best
        self._writer = None
        self._error = None

    def paths(self):
        """Returns all that is named like a checkpoint, newest first.

        Raises:
            NoneReadable: if the directory cannot be listed.
        """
        found = [self.directory / name for name in self.names() if PATTERN.fullmatch(name)]
        return sorted(found, key=step_of, reverse=True)

    def names(self):
        """Returns the names in the directory; none where there is no directory.

        Raises:
            NoneReadable: if there is something that cannot be listed.
        """
        try:
            return sorted(os.listdir(self.directory)) if regular.exists(self.directory) else []
        except OSError as error:
            raise NoneReadable(
                f"the checkpoints in {self.directory} cannot be listed ({error.strerror}): is it "
                "on a disk that is absent? Mount the disk, or give another --workdir"
            ) from error

    def step(self):
        """Returns the newest file's step; -1 without any."""
        return max(map(step_of, self.paths()), default=-1)

    def save(self, step, notes, best=False):
        """Writes the state after `step` updates.

        Only the copy to host memory is made before it returns, if `background` is set and no
        earlier write is in flight.

        Args:
            step: integer.
            notes: what else to remember, for JSON; `healthy` is the last step with a good loss,
                `ranked` are [accuracy, step] of the best evaluations.
            best: whether to keep a copy as `best.safetensors`.

        Raises:
            OSError: if this write fails, or, with `background`, the one before did.
        """
        self.wait()
        # `numpy` may be a view of a buffer that the next update overwrites.
        tensors = {name: np.array(v.numpy()) for name, v in self.variables.items()}
        told, healthy = json.dumps({"step": step, **notes}), notes["healthy"]
        ranked = [each for _, each in notes.get("ranked", [])] if self.keep_best else []
        if not self.background:
            self._write(step, tensors, told, healthy, best, ranked)
            return
        # Not a daemon: the interpreter waits for the write, however the run ends.
        self._writer = threading.Thread(
            target=self._write_in_background,
            args=(step, tensors, told, healthy, best, ranked),
            name="checkpoint",
        )
        self._writer.start()

    def wait(self):
        """Waits for the write in flight.

        Raises:
            OSError: or whatever the write raised.
        """
        writer, self._writer = self._writer, None
        if writer:
            writer.join()
        error, self._error = self._error, None
        if error:
            raise error

    def _write_in_background(self, *arguments):
        try:
            self._write(*arguments)
        except BaseException as error:
            self._error = error

    def _write(self, step, tensors, told, healthy, best, ranked):
        header = {"notes": told, "checksum": checksum(tensors, told)}
        data = save(tensors, metadata=header)
        check_space(
            self.directory,
            len(data) * (1 + best + (step in ranked)),
            f"The checkpoint of step {step}",
        )
        if best:
            self._replace(self.directory / BEST, data)
        if self.keep_best:
            self._write_ranked(step, data, ranked)
        self._replace(self.directory / NAME.format(step), data)
        # After a step that was left out the weights may be bad since an earlier one: all are kept.
        if healthy >= step - 1:
            for old in self.paths()[self.keep :]:
                if is_file_or_link(old):
                    old.unlink()

    def _write_ranked(self, step, data, ranked):
        """Writes the checkpoint of one of the best evaluations, and removes what no longer is."""
        if step in ranked:
            self._replace(self.directory / RANKED_NAME.format(step), data)
        for name in filter(RANKED.fullmatch, self.names()):
            old = self.directory / name
            if int(RANKED.fullmatch(name).group(1)) not in ranked and is_file_or_link(old):
                old.unlink()

    def _replace(self, path, data):
        """Writes a file in place of whatever has its name."""
        if regular.exists(path) and not is_file_or_link(path):
            regular.aside(path)
        write_atomically(path, data)

    def restore(self, chief=True):
        """Fills the variables from the newest checkpoint that can be read.

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
                    regular.aside(other)
            return notes
        left = [name for name in self.names() if "." in name[1:] and not name.startswith(".")]
        if left:
            raise NoneReadable(self.told(left))
        return None

    def restore_step(self, step):
        """Fills the variables from the checkpoint of a step; returns its notes.

        Raises:
            ValueError: if it cannot be read, or does not hold this model's state.
        """
        path = self.directory / NAME.format(step)
        tensors, notes = read(path)
        self.fill(tensors, path)
        return notes

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
        """Moves the checkpoints after a step to a directory next to theirs; None: all, and best."""
        self.wait()
        number = 1
        while os.path.lexists(aside := self.directory.with_name(f"checkpoints_set_aside_{number}")):
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
        regular.check_regular(path)
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
    if not regular.exists(path):
        raise ValueError(f"{run} holds no checkpoints/best.safetensors")
    variables = {f"model/{v.path}": v for v in model.weights}
    Checkpoints(path.parent, variables, keep=1).fill(read(path)[0], path)


def is_file_or_link(path):
    """Returns whether a name is that of a regular file, or of a link, which can be replaced."""
    mode = os.lstat(path).st_mode
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode)


def read_metrics(path):
    """Returns the reports of a `metrics.jsonl`, dicts with a `step`.

    A last line that was cut off while it was written is left out.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        content = regular.read_regular(path, MAX_METRICS_BYTES)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror or error}). Mend or remove it"
        ) from error
    lines, reports = content.split(b"\n"), []
    for number, line in enumerate(lines, start=1):
        try:
            report = json.loads(line)
            whole = isinstance(report, dict) and isinstance(report.get("step"), int)
        except (ValueError, RecursionError):
            whole = False
        if not whole and number == len(lines):
            break
        if not whole:
            raise ValueError(f"{path} is damaged: line {number} is no report. Mend or remove it")
        reports.append(report)
    return reports
