"""Images in Parquet files, in the layout of the Hugging Face hub.

A Parquet file is read by row groups, so these are streamed: an epoch shuffles the row groups, and
then rows within a buffer, in an order that is a function of the seed.
"""

import json

import numpy as np

from training.sources import columns
from training.sources.kinds import Streamed, clean_label, sorted_labels
from training.sources.splits import check_labels, split_files

# Maximum uncompressed size of a row group, and number of groups read in parallel.
MAX_GROUP_BYTES = 2**31
READERS = 2
LAYOUT = (
    "files *.parquet whose names have the split as a part (train-00000-of-00002.parquet), or in "
    "folders train and val, with a column of encoded images (binary, or struct of bytes and path) "
    "and a column label; --classes if neither the labels nor the files name the classes"
)


def parquet(config, held_out):
    """Returns a split of Parquet files.

    Args:
        config: A `training.configuration.Config`.
        held_out: Whether to return the held-out split, else the training split.

    Raises:
        ImportError: If pyarrow is missing.
        ValueError: If there are no files, or one lacks a column or has invalid labels.
    """
    import_parquet()
    files = split_files(config, held_out, ".parquet", LAYOUT)
    image, label, names = find_columns(files[0])
    groups = [group for file in files for group in list_groups(file, image, label)]
    if not groups:
        raise ValueError(f"{files[0]} has no rows")
    values = [value for file in files for value in read_column(file, label)]
    labels, names = number_labels(values, names, config, held_out, files, label)
    classes = len(names) if names else config.classes
    stretches, position = [], {}
    for file, _, rows in groups:
        start = position.get(file, 0)
        position[file] = start + rows
        stretches.append((file, start, start + rows))
    return Streamed(
        len(labels),
        classes,
        lambda seed, worker, workers: stream(groups, labels, image, seed, worker, workers),
        label_names=tuple(names) if names else None,
        labels=labels,
        stretches=stretches,
        in_process=True,
    )


def stream(groups, labels, image, seed, worker, workers):
    """Returns a dataset of (name, bytes, label) of a worker's rows.

    For training the rows, in the order of the shuffled row groups, are divided into contiguous
    ranges, so that a worker reads only its own groups. For evaluation rows are distributed
    round-robin.

    Args:
        groups: List of (file, row group, number of rows).
        labels: int64 (n,).
        image: Column of the images.
        seed: Seed of the order, `None` for evaluation.
        worker: Index of this worker.
        workers: Number of workers.
    """
    import tensorflow as tf

    starts = np.cumsum([0, *(rows for _, _, rows in groups)])
    order = np.arange(len(groups))
    total = int(starts[-1])
    if seed is not None:
        order = np.random.default_rng(seed).permutation(order)
    begin, end = (0, total) if seed is None else (total * (worker + i) // workers for i in (0, 1))
    pieces, position = [], 0
    for number in order:
        rows = groups[number][2]
        first, last = max(begin - position, 0), min(end - position, rows)
        if first < last:
            pieces.append((number, first, last))
        position += rows

    def read(number, first, last):
        file, group, _ = groups[number]
        data = read_group(file, group, image, first, last)
        base = int(starts[number])
        start = base - int(starts[next(i for i, g in enumerate(groups) if g[0] == file)])
        names = [f"{file} row {start + row + 1}".encode() for row in range(first, last)]
        return np.array(names, object), np.array(data, object), labels[base + first : base + last]

    def rows(piece):
        kinds = (tf.string, tf.string, tf.int64)
        found = tf.numpy_function(lambda p: read(*p), [piece], kinds, stateful=False)
        return tuple(tf.ensure_shape(each, [None]) for each in found)

    dataset = tf.data.Dataset.from_tensor_slices(np.array(pieces, "int64").reshape(-1, 3))
    dataset = dataset.map(rows, num_parallel_calls=READERS, deterministic=True).unbatch()
    return dataset.shard(workers, worker) if seed is None else dataset


def read_group(file, group, image, first, last):
    """Returns the encoded images of a range of rows of a row group, a list of bytes.

    Unreadable images are b"", which are counted as unreadable when they are decoded.

    Args:
        file: Path of the file.
        group: Index of the row group.
        image: Column of the images.
        first: First row.
        last: End row, exclusive.
    """
    import pyarrow

    try:
        with import_parquet().ParquetFile(file) as opened:
            column = opened.read_row_group(group, columns=[image]).column(image)
    except (pyarrow.ArrowException, OSError):
        return [b""] * (last - first)
    values = column.slice(first, last - first).to_pylist()
    values = [value.get("bytes") if isinstance(value, dict) else value for value in values]
    return [value or b"" for value in values]


def import_parquet():
    """Returns the module `pyarrow.parquet`.

    Raises:
        ImportError: If pyarrow is not installed; the message names the extra.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError('Parquet files need pyarrow: pip install "keras-tnt[parquet]"') from error
    return parquet


def open_file(file):
    """Opens a Parquet file.

    Raises:
        ValueError: If it is not a Parquet file, or truncated.
    """
    import pyarrow

    try:
        return import_parquet().ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is no whole Parquet file: {error}") from error


def list_groups(file, image, label):
    """Lists the non-empty row groups of a file: (file, row group, number of rows).

    Args:
        file: Path of the file.
        image: Column of the images.
        label: Column of the labels.

    Raises:
        ValueError: If a row group is too large to be read at once, or a column is missing.
    """
    with open_file(file) as opened:
        missing = {image, label} - set(opened.schema_arrow.names)
        if missing:
            raise ValueError(f"{file} has no column {min(missing)!r}, which other files have")
        groups = []
        for number in range(opened.num_row_groups):
            group = opened.metadata.row_group(number)
            if group.total_byte_size > MAX_GROUP_BYTES:
                raise ValueError(
                    f"{file}: row group {number} has {group.total_byte_size:,} bytes, more than "
                    f"the {MAX_GROUP_BYTES:,} that are read at once. Write the file again with "
                    "row_group_size=1000"
                )
            if group.num_rows:
                groups.append((file, number, group.num_rows))
    return groups


def find_columns(file):
    """Finds the columns of the image and the label, and the class names.

    Returns:
        (image column, label column, class names or `None`).

    Raises:
        ValueError: If there is no such column, or several to choose from.
    """
    import pyarrow

    with open_file(file) as opened:
        schema = opened.schema_arrow

    def is_image(kind):
        if pyarrow.types.is_struct(kind):
            return "bytes" in [kind.field(i).name for i in range(kind.num_fields)]
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    class_names = read_class_names(schema)
    image, label = columns.choose_columns(
        file,
        {field.name: str(field.type) for field in schema},
        [field.name for field in schema if is_image(field.type)],
        list(class_names),
        f". It must be one of {LAYOUT}",
    )
    return image, label, class_names.get(label)


def read_class_names(schema):
    """Returns a dict from column to class names, which `datasets` stores in a file's metadata.

    Args:
        schema: A `pyarrow.Schema`.
    """
    try:
        information = json.loads((schema.metadata or {})[b"huggingface"])
        features = information["info"]["features"].items()
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return {}
    names = {
        column: feature["names"]
        for column, feature in features
        if column in schema.names and isinstance(feature, dict) and "names" in feature
    }
    return {
        column: each
        for column, each in names.items()
        if isinstance(each, list) and all(isinstance(name, str) for name in each)
    }


def read_column(file, label):
    """Returns the values of the label column, a list."""
    with open_file(file) as opened:
        return opened.read(columns=[label]).column(label).to_pylist()


def number_labels(values, names, config, held_out, files, label):
    """Returns the labels as class indices, and the class names or `None`.

    Text labels are sorted by `kinds.sorted_labels`; the training split defines the classes of both.

    Args:
        values: Labels of all rows.
        names: Class names, or `None`.
        config: A `training.configuration.Config`.
        held_out: Whether the rows are the held-out split.
        files: Paths of the files.
        label: Column of the labels.

    Raises:
        ValueError: If a label is invalid, or not in the training split.
    """

    def place(number):
        return f"{files[0]} and the files after it: row {number + 1}"

    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        numbers = np.array(values, "int64")
        if names is None:
            return check_labels(numbers, config, place), None
        outside = (numbers < 0) | (numbers >= len(names))
        if outside.any():
            number = int(outside.argmax())
            raise ValueError(
                f"{place(number)} has the label {numbers[number]}, and the files name "
                f"{len(names)} classes"
            )
        return numbers, names
    texts = [clean_label(value, place(i)) for i, value in enumerate(values)]
    known = texts
    if held_out:
        training = split_files(config, False, ".parquet", LAYOUT)
        known = [
            clean_label(value, f"{file}: row {i + 1}")
            for file in training
            for i, value in enumerate(read_column(file, label))
        ]
    names = sorted_labels(known)
    unknown = sorted(set(texts) - set(names))
    if unknown:
        raise ValueError(
            f"{files[0]} has held-out classes that the training split has not: {unknown[0]!r}"
        )
    classes = {name: number for number, name in enumerate(names)}
    return np.array([classes[text] for text in texts], "int64"), names
