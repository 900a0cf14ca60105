"""`keras-tnt merge`: joins the tables of shards into one."""

import contextlib
import itertools
import shutil

from keras_tnt.cli.predict import say
from keras_tnt.cli.table import (
    check_path,
    command_path,
    held,
    read_command,
    shard_path,
    shard_paths,
    write_command,
)
from keras_tnt.files import kind_of, open_regular, replacing

HELP = "join the tables of `predict --shard`, or say what is missing"


def add_arguments(parser):
    """Adds the subcommand's arguments to a parser."""
    parser.add_argument("table", help="what --out said: predictions.csv")


def run(options):
    """Joins the shards and returns exit status 0."""
    check_path(options.table)
    parts, count = shard_paths(options.table)
    paths = [parts.get(i, shard_path(options.table, i, count)) for i in range(1, count + 1)]
    with contextlib.ExitStack() as stack:
        for path in (options.table, *parts.values()):
            stack.enter_context(held(path))  # until the joined table is written
        merge(options.table, paths)
    say(f"'{options.table}' has the rows of {count} shards.")
    return 0


def merge(table, paths):
    """Joins the tables of shards that this process has locked.

    Args:
        table: path of the joined table.
        paths: paths of the shards' tables, in order.

    Raises:
        ValueError: if shards are missing or of different commands, or another file is at `table`.
    """
    missing = [i for i, path in enumerate(paths, 1) if kind_of(path) != "file"]
    if missing:
        count = len(paths)
        raise ValueError(
            f"{len(missing)} of {count} shards are missing: {spans(missing)}. Run `keras-tnt "
            f"predict --shard={missing[0]}/{count}` and so on, as the others were."
        )
    if kind_of(table) and read_command(table) is None:
        raise ValueError(
            f"'{table}' exists and was not made by keras-tnt: move it away, or merge under "
            "another name."
        )
    commands = []
    for path in paths:
        command = read_command(path)
        if command is None:
            raise ValueError(f"'{path}' is no shard: it has no '{command_path(path)}'.")
        commands.append({**command, "shard": None})
    for path, command in zip(paths, commands, strict=True):
        for key, value in commands[0].items():
            if command.get(key) != value:
                raise ValueError(
                    f"'{path}' and '{paths[0]}' belong to different commands: {key} is "
                    f"{command.get(key)!r} and {value!r}."
                )
    with replacing(table) as aside:
        join(paths, aside)
    write_command(table, commands[0] | {"shard": [1, 1]})


def join(paths, target):
    """Writes the joined tables to `target`, in the format of its extension."""
    if target.endswith(".parquet"):
        return join_parquet(paths, target)
    with open(target, "wb") as joined:
        for number, path in enumerate(paths):
            with open_regular(path) as part:
                if number and path.endswith(".csv"):
                    part.readline()  # the header
                shutil.copyfileobj(part, joined)


def join_parquet(paths, target):
    """Writes joined parquet tables to `target`, one row group at a time."""
    from pyarrow import parquet

    with parquet.ParquetWriter(target, parquet.read_schema(paths[0])) as writer:
        for path in paths:
            part = parquet.ParquetFile(path)
            for group in range(part.num_row_groups):
                writer.write_table(part.read_row_group(group))


def spans(numbers):
    """Returns sorted numbers as text: `3, 5 to 7` for [3, 5, 6, 7]."""
    groups = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
