"""Checkpoints: the full training state in one file, written atomically, with a checksum.

A file holds the tensors by name and, in its header, the step, the loop's notes (JSON) and a
checksum over all of it. An unreadable checkpoint is set aside, and the one before it is used.
Anything that has the name of a checkpoint but is not a readable file (a directory, a FIFO, a link
to an unmounted disk) counts as a damaged checkpoint, never as a missing one.
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
    """Raised when a checkpoint file is unreadable or incomplete."""


class NoneReadable(ValueError):
    """Raised when all checkpoints of a run are damaged."""


def step_of(path):
    """Returns the step in the name of a checkpoint file."""
    return int(PATTERN.fullmatch(path.name).group(1))


def checksum(tensors, notes):
    """Returns a CRC-32 of the notes and all tensors, as text."""
    total = zlib.crc32(notes.encode())
    for name in sorted(tensors):
        total = zlib.crc32(np.ascontiguousarray(tensors[name]).reshape(-1).view("uint8"), total)
    return str(total)


class Checkpoints:
    """Checkpoints of a run, written by a background thread while training continues.

    At most one write is in flight. Its error is raised by the next `save` or `wait`.

    Args:
        directory: Directory of the checkpoints.
        variables: Dict from name to `tf.Variable`: the state.
        keep: Number of last checkpoints to retain.
        background: Whether `save` returns before the file is written. Defaults to `False`.
        keep_best: Number of checkpoints of the best evaluations to retain in addition. Defaults to
            0.
        defaults: Dict from name to the value that a variable takes where a file has no tensor of
            that name. If `None`, every variable must be in the file.
    """

    def __init__(self, directory, variables, keep, background=False, keep_best=0, defaults=None):
        """Stores the arguments; the directory is created by the first write."""
        self.directory = Path(directory)
        self.variables = variables
        self.keep = keep
        self.background = background
        self.keep_best = keep_best
        self.defaults = defaults or {}
        self._writer = None
        self._error = None

    def paths(self):
        """Returns the paths of everything that is named like a checkpoint, newest first.

        Raises:
            NoneReadable: If the directory cannot be listed.
        """
        found = [self.directory / name for name in self.names() if PATTERN.fullmatch(name)]
        return sorted(found, key=step_of, reverse=True)

    def names(self):
        """Returns the names in the directory; an empty list if it does not exist.

        Raises:
            NoneReadable: If it exists and cannot be listed.
        """
        try:
            return sorted(os.listdir(self.directory)) if regular.exists(self.directory) else []
        except OSError as error:
            raise NoneReadable(
                f"the checkpoints in {self.directory} cannot be listed ({error.strerror}): is it "
                "on a disk that is absent? Mount the disk, or give another --workdir"
            ) from error

    def step(self):
        """Returns the step of the newest checkpoint, -1 if there is none."""
        return max(map(step_of, self.paths()), default=-1)

    def save(self, step, notes, best=False):
        """Saves the state after `step` updates.

        With `background`, it returns after the copy to host memory, once an earlier write has
        finished.

        Args:
            step: Updates made.
            notes: Dict of additional state, JSON-serializable; `healthy` is the last step with a
                good loss, `ranked` a list of [accuracy, step] of the best evaluations.
            best: Whether to save a copy as `best.safetensors`. Defaults to `False`.

        Raises:
            OSError: If this write fails or, with `background`, the previous one did.
        """
        self.wait()
        # Copied, because `numpy()` may return a view of a buffer that the next update overwrites.
        tensors = {name: np.array(v.numpy()) for name, v in self.variables.items()}
        told, healthy = json.dumps({"step": step, **notes}), notes["healthy"]
        ranked = [each for _, each in notes.get("ranked", [])] if self.keep_best else []
        if not self.background:
            self._write(step, tensors, told, healthy, best, ranked)
            return
        # Not a daemon thread, so that the interpreter waits for the write when it exits.
        self._writer = threading.Thread(
            target=self._write_in_background,
            args=(step, tensors, told, healthy, best, ranked),
            name="checkpoint",
        )
        self._writer.start()

    def wait(self):
        """Blocks until the write in flight has finished.

        Raises:
            OSError: Or any other exception of the write.
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
        # After a skipped step no loss confirms the weights, which may be bad since an earlier step:
        # nothing is deleted.
        if healthy >= step - 1:
            for old in self.paths()[self.keep :]:
                if is_file_or_link(old):
                    old.unlink()

    def _write_ranked(self, step, data, ranked):
        """Writes a best checkpoint, and deletes those that are no longer ranked."""
        if step in ranked:
            self._replace(self.directory / RANKED_NAME.format(step), data)
        for name in filter(RANKED.fullmatch, self.names()):
            old = self.directory / name
            if int(RANKED.fullmatch(name).group(1)) not in ranked and is_file_or_link(old):
                old.unlink()

    def _replace(self, path, data):
        """Writes a file atomically, replacing whatever has its name."""
        if regular.exists(path) and not is_file_or_link(path):
            regular.aside(path)
        write_atomically(path, data)

    def restore(self, chief=True):
        """Restores the variables from the newest readable checkpoint.

        Args:
            chief: Whether this process sets unreadable checkpoints aside. Defaults to `True`.

        Returns:
            The notes, with `step`; `None` if no checkpoint was ever written.

        Raises:
            NoneReadable: If there are checkpoints, and all of them are damaged.
            ValueError: If a file is intact but does not match this model's state.
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
        """Restores the variables from the checkpoint of a step; returns its notes.

        Raises:
            ValueError: If it is unreadable or does not match this model's state.
        """
        path = self.directory / NAME.format(step)
        tensors, notes = read(path)
        self.fill(tensors, path)
        return notes

    def fill(self, tensors, path):
        """Assigns a file's tensors to the variables, after checking all names and shapes.

        Args:
            tensors: Dict from name to array.
            path: Path of the file, for messages.

        Raises:
            ValueError: If a tensor without a default is missing, or one has another shape.
        """
        tensors = {
            **{name: np.float32(value) for name, value in self.defaults.items()},
            **tensors,
        }
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
        """Returns the message for a run without a readable checkpoint, with the remedies."""
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
        """Moves checkpoints to a new directory next to theirs.

        Args:
            after: Step after which checkpoints are moved. If `None`, the whole directory is moved,
                the best checkpoints included.
        """
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
    """Returns (tensors by name, notes) of a checkpoint file.

    Raises:
        CorruptCheckpoint: If it is unreadable or its checksum is wrong.
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
    """Loads the weights of a run's best evaluation into a model.

    Args:
        model: `keras.Model`; its weights are assigned after the whole file is checked.
        run: Directory of the run.

    Raises:
        ValueError: If the file does not exist, is damaged, or does not match the model.
    """
    path = Path(run) / "checkpoints" / "best.safetensors"
    if not regular.exists(path):
        raise ValueError(f"{run} holds no checkpoints/best.safetensors")
    variables = {f"model/{v.path}": v for v in model.weights}
    Checkpoints(path.parent, variables, keep=1).fill(read(path)[0], path)


def is_file_or_link(path):
    """Returns whether a path is a regular file or a link, which can be replaced."""
    mode = os.lstat(path).st_mode
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode)


def read_metrics(path):
    """Returns the reports in a `metrics.jsonl`, a list of dicts with `step`.

    A last line that was truncated while it was written is dropped.

    Raises:
        ValueError: If the file is damaged.
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
