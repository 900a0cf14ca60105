"""Tables of results that grow row by row and survive the process that writes them.

Rows go to a file beside the table, one line of JSON each, in the order of the images. When all are
there the table is made of them and takes its place whole. A third file says which command they
belong to.
"""

import contextlib
import csv
import json
import os
import re

from keras_tnt.files import replacing, write_atomically

FORMATS = (".csv", ".jsonl", ".parquet")
GROUP = 1024  # rows that are written to a parquet file at once


class Table:
    """A table and the rows of it that are there.

    Args:
        path: of the table; its ending tells the format.
        command: a dict of what the rows depend on.

    Raises:
        ValueError: if a table of another command is there, or none can be written.
    """

    def __init__(self, path, command):
        check_path(path)
        self.path, self.rows_path, self.command_path = path, f"{path}.rows", command_path(path)
        self.command = read_command(path)
        if self.command is None:
            if os.path.exists(path):
                raise ValueError(f"'{path}' exists and is not of this command. Say another --out.")
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.rows_path)
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
        return os.path.exists(self.path)

    @contextlib.contextmanager
    def rows(self, width, multiple):
        """Add the rows that are missing; at the end of the block the table is made of them all.

        Args:
            width: how many predictions or features a row has.
            multiple: rows come so many at a time; those cut off in the middle are dropped.

        Yields:
            (how many rows are there, function that adds a list of rows).
        """
        self.record(self.command | {"width": width})
        with open(self.rows_path, "a+b") as file:
            lock(file, self.path)
            file.seek(0)
            ends = [0]
            for line in file:
                if line.endswith(b"\n"):
                    ends.append(ends[-1] + len(line))
            there = (len(ends) - 1) // multiple * multiple
            file.truncate(ends[there])

            def add(rows):
                file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
                file.flush()  # so that they are there whatever becomes of this process

            yield there, add
        with replacing(self.path) as aside, open_writer(aside, self.command) as write:
            for row in read_rows(self.rows_path):
                write(row)
        os.remove(self.rows_path)


def lock(file, path):
    """Keep other processes from adding rows for as long as the file is open, where the system can.

    Raises:
        ValueError: if another process is doing so.
    """
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"Another process is writing '{path}'.") from error
    except OSError:  # of a file system that has no locks
        return


def command_path(path):
    return f"{path}.command.json"


def write_command(path, command):
    write_atomically(command_path(path), json.dumps(command, indent=1))


def read_command(path):
    """What a table, begun or finished, was made by; None if there is none."""
    try:
        with open(command_path(path), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None


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


def read_rows(path):
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


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
