"""Image files that a table lists."""

import csv
from pathlib import Path

from training.sources.kinds import held_out_mask, of_files

LAYOUT = (
    "--data_dir=<file>.csv or .parquet with columns path (from the table's folder), label and, "
    "unless --validation_share=0.1 is given, split (train; val, validation or test)"
)
HELD_OUT_SPLITS = ("val", "validation", "test")


def table(config, held_out):
    """A split of the files that a table lists; its classes are the labels, sorted.

    Labels that are all whole numbers are sorted by size, others by the alphabet.

    Raises:
        ValueError: if a column, a label or a file is missing.
    """
    file = Path(config.data_dir)
    rows = read_rows(file)
    names = sorted_labels({row["label"] for row in rows})
    numbers = {name: number for number, name in enumerate(names)}
    labels = [numbers[row["label"]] for row in rows]
    if config.validation_share:
        if any(row["split"] for row in rows):
            raise ValueError(f"{file} has a column split: leave --validation_share out")
        mask = held_out_mask(labels, names, config.validation_share, config.seed)
        chosen = [i for i, out in enumerate(mask) if out == held_out]
    else:
        split = split_name(config, rows, file, held_out)
        chosen = [i for i, row in enumerate(rows) if row["split"] == split]
    paths = [str(file.parent / rows[i]["path"]) for i in chosen]
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise ValueError(
            f"{file}: {len(missing)} of {len(paths)} files are missing, the first of them "
            f"{missing[0]}"
        )
    return of_files(paths, [labels[i] for i in chosen], names)


def read_rows(file):
    """Rows of a table as dicts of strings: path, label, split ("" where there is none).

    Raises:
        ValueError: for a file that is no table, or lacks a column or a value.
    """
    if not file.is_file():
        raise ValueError(f"--data_dir={file} is no file. It must be {LAYOUT}")
    if file.suffix == ".parquet":
        columns, rows = read_parquet(file)
    elif file.suffix == ".csv":
        columns, rows = read_csv(file)
    else:
        raise ValueError(f"--data_dir={file} must end in .csv or .parquet: {LAYOUT}")
    for column in ("path", "label"):
        if column not in columns:
            raise ValueError(
                f"{file} has no column {column!r}; it has {', '.join(map(str, columns))}. It must "
                f"be {LAYOUT}"
            )
    if not rows:
        raise ValueError(f"{file} has no rows")
    rows = [
        {key: "" if row.get(key) is None else str(row[key]) for key in ("path", "label", "split")}
        for row in rows
    ]
    for number, row in enumerate(rows, 1):
        for column in ("path", "label"):
            if not row[column]:
                raise ValueError(f"{file}: row {number} has no {column}")
    return rows


def read_csv(file):
    """(names of the columns, rows as dicts) of a file of comma-separated values."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            return reader.fieldnames or (), list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no table of comma-separated values: {error}") from error


def read_parquet(file):
    """(names of the columns, rows as dicts) of a Parquet file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            'A .parquet table needs pyarrow: pip install "keras-tnt[train]"'
        ) from error
    try:
        read = parquet.ParquetFile(file).read()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} is no Parquet file: {error}") from error
    wanted = [name for name in ("path", "label", "split") if name in read.column_names]
    return read.column_names, read.select(wanted).to_pylist()


def sorted_labels(labels):
    """Labels in the order of their classes."""
    try:
        return sorted(labels, key=int)
    except ValueError:
        return sorted(labels)


def split_name(config, rows, file, held_out):
    """What the column `split` says of the wanted rows."""
    found = sorted({row["split"] for row in rows})
    if found == [""]:
        raise ValueError(
            f"{file} has no column split. Give --validation_share=0.1 to hold out a tenth of each "
            "class"
        )
    wanted = config.eval_split if held_out else config.train_split
    default = HELD_OUT_SPLITS if held_out else ("train",)
    for name in (wanted,) if wanted else default:
        if name in found:
            return name
    option = "--eval_split" if held_out else "--train_split"
    raise ValueError(
        f"{file} has no rows of split {wanted or ' or '.join(default)}; it has "
        f"{', '.join(map(repr, found))}. {option} names another"
    )
