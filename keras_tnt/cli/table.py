"""Tables of results that are written row by row and survive the death of their process.

Rows go to a journal next to the table (`keras_tnt.cli.rows`). When it is complete, the table is
written from it atomically. A third file describes the command that produces the rows, and a fourth
is locked from before these are read until the table is written.
"""

import contextlib
import csv
import json
import os
import re

from keras_tnt import files
from keras_tnt.cli import rows
from keras_tnt.files import replacing, write_atomically

FORMATS = (".csv", ".jsonl", ".parquet")
GROUP = 1024  # rows in a row group of a parquet file
STATE = 2  # version of the state of an unfinished table


@contextlib.contextmanager
def held(path):
    """Locks a table against other processes until the block ends.

    Args:
        path: Path of the table; its directory is created if missing.

    Yields:
        `None`, or the reason that the file system cannot lock.

    Raises:
        ValueError: If another process has locked it, or no table can be written there.
    """
    check_place(path)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            reason = stack.enter_context(files.exclusive(f"{path}.lock", remove=True))
        except files.Held as error:
            raise ValueError(
                f"Another process is writing '{path}': {error}. Wait for it, or say another --out."
            ) from error
        yield reason


class Table:
    """Table and the state of its rows, for a process that has locked it.

    Args:
        path: Path of the table; its extension determines the format.
        command: A dict of everything that the rows depend on.

    Raises:
        ValueError: If there is a table of another command, or none can be written.
    """

    def __init__(self, path, command):
        """Reads the command of an existing table, or records `command` for a new one."""
        check_path(path)
        check_place(path)
        self.path, self.rows_path, self.command_path = path, f"{path}.rows", command_path(path)
        self.command = read_command(path)
        if self.command is None:
            for standing in (path, self.rows_path):
                if files.kind_of(standing):
                    raise ValueError(
                        f"'{standing}' exists and is not of this command. Say another --out, or "
                        "move it away."
                    )
            self.record(command)
        for key, value in command.items():
            if self.command.get(key) != value:
                raise ValueError(
                    f"'{path}' belongs to another command: its {key} was "
                    f"{self.command.get(key)!r} and is {value!r}. Say another --out, or remove it "
                    f"and '{self.command_path}'."
                )

    def record(self, command):
        """Stores the command, also on disk."""
        self.command = command
        write_command(self.path, command)

    @property
    def finished(self):
        """Returns whether the table is complete."""
        return files.kind_of(self.path) == "file"

    @contextlib.contextmanager
    def rows(self, width, count, batch):
        """Opens the journal for missing rows, and finally writes the table from it.

        Args:
            width: Number of predictions or features in a row.
            count: Number of rows.
            batch: Number of rows per batch.

        Yields:
            A `keras_tnt.cli.rows.Rows`.
        """
        with rows.Rows(self.rows_path, count, batch) as journal:
            self.record(self.command | {"width": width})
            yield journal
            with replacing(self.path) as aside, open_writer(aside, self.command) as write:
                for row in journal:
                    write(row)
            journal.remove()


def command_path(path):
    """Returns the path of the file that describes a table's command."""
    return f"{path}.command.json"


def write_command(path, command):
    """Writes the file that describes a table's command."""
    text = json.dumps({**command, "state": STATE}, indent=1)
    write_atomically(command_path(path), text)


def read_command(path):
    """Returns the command of a table, finished or not; `None` if there is none.

    Args:
        path: path of the table.

    Raises:
        ValueError: If the file is of another kind or version.
    """
    command = rows.read_command(command_path(path))
    if command is not None and command.pop("state", 1) not in (1, STATE):
        raise ValueError(
            f"'{command_path(path)}' was written by another version of keras-tnt: complete the "
            "table with that version, or say another --out."
        )
    return command


def check_place(path):
    """Raises a `ValueError` if the path of a table is that of something other than a file."""
    kind = files.kind_of(path)
    if kind not in (None, "file"):
        raise ValueError(f"'{path}' is {kind}, where a table has to be. Say another --out.")


def check_path(path):
    """Raises an error if a table's extension is unknown, or needs a package that is missing."""
    if not path.endswith(FORMATS):
        raise ValueError(f"--out must end in {', '.join(FORMATS)}. Received: {path!r}")
    if path.endswith(".parquet"):
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "A parquet file needs pyarrow: pip install 'keras-tnt[parquet]'."
            ) from error


# === Formats ===


def columns(command):
    """Returns the names of a table's columns after `file` and `error`, and their types."""
    count = command["width"]
    if command["features"]:
        return {f"feature_{i}": float for i in range(1, count + 1)}
    kinds = {"class": int, "name": str, "score": float}
    return {f"{name}_{i}": kind for i in range(1, count + 1) for name, kind in kinds.items()}


def flat(row):
    """Returns the values of a row after `file` and `error`, in the order of `columns`."""
    if "features" in row:
        return row["features"]
    return [p.get(name) for p in row.get("predictions", ()) for name in ("class", "name", "score")]


@contextlib.contextmanager
def open_writer(path, command):
    """Yields a function that writes a row to a new file, in the format of its extension."""
    names = columns(command)
    if path.endswith(".jsonl"):
        with open(path, "w", encoding="utf-8") as file:
            yield lambda row: file.write(json.dumps(row) + "\n")
    elif path.endswith(".csv"):
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["file", "error", *names])
            empty = [None] * len(names)
            yield lambda row: writer.writerow(
                [row["file"], row.get("error"), *(flat(row) or empty)]
            )
    else:
        with parquet_writer(path, names) as write:
            yield write


@contextlib.contextmanager
def parquet_writer(path, names):
    """Yields a function that writes a row to a new parquet file, in row groups."""
    import pyarrow
    from pyarrow import parquet

    types = {int: pyarrow.int64(), str: pyarrow.string(), float: pyarrow.float32()}
    schema = pyarrow.schema(
        [("file", pyarrow.string()), ("error", pyarrow.string())]
        + [(name, types[kind]) for name, kind in names.items()]
    )
    group = []

    def flush():
        columns = zip(*group, strict=True)
        arrays = [pyarrow.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
        writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
        group.clear()

    def write(row):
        group.append((row["file"], row.get("error"), *(flat(row) or [None] * len(names))))
        if len(group) == GROUP:
            flush()

    with parquet.ParquetWriter(path, schema) as writer:
        yield write
        if group:
            flush()


# === Shards ===


def shard_path(path, shard, count):
    """Returns the path of a shard's table, such as predictions-00003-of-00016.csv."""
    stem, suffix = os.path.splitext(path)
    return f"{stem}-{shard:05d}-of-{count:05d}{suffix}"


def shard_paths(path):
    """Returns a dict from shard to the path of its table next to `path`, and the number of shards.

    Args:
        path: path of the joined table.

    Raises:
        ValueError: if there are none, or shards of several counts.
    """
    folder, name = os.path.split(os.path.abspath(path))
    stem, suffix = os.path.splitext(name)
    pattern = re.compile(
        rf"({re.escape(stem)}-(\d{{5}})-of-(\d{{5}}){re.escape(suffix)})(\.command\.json)?"
    )
    found = [m for m in map(pattern.fullmatch, sorted(os.listdir(folder))) if m]
    counts = {int(m[3]) for m in found}
    if len(counts) != 1:
        raise ValueError(
            f"There are no parts of '{path}', such as '{shard_path(path, 1, 16)}'."
            if not counts
            else f"There are parts of '{path}' out of {' and '.join(map(str, sorted(counts)))}. "
            "Remove those that are not wanted."
        )
    return {int(m[2]): os.path.join(folder, m[1]) for m in found}, counts.pop()
