"""Tables of results that grow row by row and survive the process that writes them.

Rows go to a journal next to the table (`keras_tnt.command.rows`). When all are there the table is
made of them and takes its place whole. A third file describes the command that they belong to, and
a fourth is locked from before these are read until after the table is made.
"""

import contextlib
import csv
import json
import os
import re

from keras_tnt import files
from keras_tnt.command import rows
from keras_tnt.files import replacing, write_atomically

FORMATS = (".csv", ".jsonl", ".parquet")
GROUP = 1024  # rows that are written to a parquet file at once
STATE = 2  # version of the state of a table that is being made


@contextlib.contextmanager
def held(path):
    """Holds a table, so that no other process makes it, until the block ends.

    Args:
        path: Path of the table; its directory is made if it does not exist.

    Yields:
        `None`, or why the file system cannot lock.

    Raises:
        ValueError: If another process holds it, or no table can be written there.
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
    """A table and the rows of it that are there, for a process that holds it.

    Args:
        path: Path of the table; its ending decides the format.
        command: A dict of what the rows depend on.

    Raises:
        ValueError: If a table of another command is there, or none can be written.
    """

    def __init__(self, path, command):
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
        self.command = command
        write_command(self.path, command)

    @property
    def finished(self):
        return files.kind_of(self.path) == "file"

    @contextlib.contextmanager
    def rows(self, width, count, batch):
        """Adds the rows that are missing; at the end of the block the table is made of them all.

        Args:
            width: Number of predictions or features of a row.
            count: Number of rows.
            batch: Rows are made this many at a time.

        Yields:
            A `keras_tnt.command.rows.Rows`.
        """
        with rows.Rows(self.rows_path, count, batch) as journal:
            self.record(self.command | {"width": width})
            yield journal
            with replacing(self.path) as aside, open_writer(aside, self.command) as write:
                for row in journal:
                    write(row)
            journal.remove()


def command_path(path):
    return f"{path}.command.json"


def write_command(path, command):
    text = json.dumps({**command, "state": STATE}, indent=1)
    write_atomically(command_path(path), text)


def read_command(path):
    """Returns what a table, begun or finished, was made by; `None` if there is none.

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
    """Raises a `ValueError` if something else than a file stands where a table is written."""
    kind = files.kind_of(path)
    if kind not in (None, "file"):
        raise ValueError(f"'{path}' is {kind}, where a table has to be. Say another --out.")


def check_path(path):
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
    """The names of a table's columns behind "file" and "error", and their types."""
    count = command["width"]
    if command["features"]:
        return {f"feature_{i}": float for i in range(1, count + 1)}
    kinds = {"class": int, "name": str, "score": float}
    return {f"{name}_{i}": kind for i in range(1, count + 1) for name, kind in kinds.items()}


def flat(row):
    """The values of a row behind "file" and "error", in the order of `columns`."""
    if "features" in row:
        return row["features"]
    return [p.get(name) for p in row.get("predictions", ()) for name in ("class", "name", "score")]


@contextlib.contextmanager
def open_writer(path, command):
    """A function that writes a row to a new file of the format that the path tells."""
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
    """Where a shard's part of a table lies: predictions-00003-of-00016.csv."""
    stem, suffix = os.path.splitext(path)
    return f"{stem}-{shard:05d}-of-{count:05d}{suffix}"


def shard_paths(path):
    """{shard: path of its part} and their count, of the parts that lie beside a table.

    Raises:
        ValueError: if there is none, or if they are parts of several counts.
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
