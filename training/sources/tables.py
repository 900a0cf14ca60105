"""Image files listed in a table: CSV or Parquet."""

import csv
from pathlib import Path

from training.sources.kinds import clean_label, held_out_mask, of_files, sorted_labels

LAYOUT = (
    "--data_dir=<file>.csv or .parquet with columns path (from the table's folder), label and, "
    "unless --validation_share=0.1 is given, split (train; val, validation, valid, dev, else test)"
)


def table(config, held_out):
    """Returns a split of the files that a table lists.

    Labels are stripped, and their sorted distinct values (`kinds.sorted_labels`) are the classes.

    Args:
        config: A `training.configuration.Config`.
        held_out: Whether to return the held-out split, else the training split.

    Raises:
        ValueError: If a column, a label or a file is missing.
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
    return of_files(paths, [labels[i] for i in chosen], names, classes_from_images=True)


def read_rows(file):
    """Returns the rows of a table as dicts of strings: path, label, split ("" if there is none).

    Args:
        file: A `Path`.

    Raises:
        ValueError: If the file is not a table, or lacks a column or a value.
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
    for number, row in enumerate(rows, 1):
        place = f"{file}: row {number}"
        path = row.get("path")
        if path is None or path != path or not str(path):
            raise ValueError(f"{place} has no path")
        split = row.get("split")
        row["path"] = str(path)
        row["label"] = clean_label(row.get("label"), place)
        row["split"] = "" if split is None or split != split else str(split).strip()
    return rows


def read_csv(file):
    """Returns (column names, rows as dicts) of a CSV file."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            return reader.fieldnames or (), list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no table of comma-separated values: {error}") from error


def read_parquet(file):
    """Returns (column names, rows as dicts) of a Parquet file."""
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


def split_name(config, rows, file, held_out):
    """Returns the value of the column `split` of the requested split, and prints it.

    Args:
        config: A `training.configuration.Config`.
        rows: Rows from `read_rows`.
        file: Path of the table, for messages.
        held_out: Whether to return the held-out split, else the training split.

    Raises:
        ValueError: If the table has no such split.
    """
    found = sorted({row["split"] for row in rows})
    if found == [""]:
        raise ValueError(
            f"{file} has no column split. Give --validation_share=0.1 to hold out a tenth of each "
            "class"
        )
    from keras_tnt.images.folders import (
        HELD_OUT_NAMES,
        describe_fallback,
        match_held_out,
        match_name,
    )

    wanted = config.eval_split if held_out else config.train_split
    if wanted or not held_out:
        name = match_name(wanted or "train", found)
    else:
        name = match_held_out(found)
    if name is not None:
        note = describe_fallback(name) if held_out and not wanted else ""
        count = sum(row["split"] == name for row in rows)
        kind = "held-out" if held_out else "training"
        print(f"{kind} split {name!r} of {file}: {count:,} images{note}", flush=True)
        return name
    default = HELD_OUT_NAMES if held_out else ("train",)
    option = "--eval_split" if held_out else "--train_split"
    raise ValueError(
        f"{file} has no rows of split {wanted or ' or '.join(default)}; it has "
        f"{', '.join(map(repr, found))}. {option} names another"
    )
