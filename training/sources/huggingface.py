"""Data sets of the package `datasets`, from disk: `save_to_disk` or Parquet files."""

from pathlib import Path

import numpy as np

from training.sources import columns
from training.sources.kinds import Indexed, clean_label, read_in_python, sorted_labels
from training.sources.splits import check_labels, split_files

LAYOUT = (
    "the directory of DatasetDict.save_to_disk (or of files train-*.parquet, which are copied to "
    "the cache of datasets) with a column of images or their encoded bytes, and a label; needs the "
    "package datasets"
)


def huggingface(config, held_out):
    """Returns a split of a data set of the package `datasets`.

    Rows have random access, so the order is an exact permutation.

    Args:
        config: A `training.configuration.Config`.
        held_out: Whether to return the held-out split, else the training split.

    Raises:
        ImportError: If the package is missing.
        ValueError: If the directory holds no such data set, or it has no image or label.
    """
    import tensorflow as tf

    table = open_table(config, held_out)
    image, label = find_columns(table, config)
    labels, names = number_labels(table, label, config, held_out)
    place = f"{config.data_dir} {'held-out' if held_out else 'training'} row"
    datasets = import_datasets(config)
    encoded = table.select_columns([image]).with_format(None)
    if isinstance(table.features[image], datasets.Image):
        encoded = encoded.cast_column(image, datasets.Image(decode=False))
    fingerprint = table._fingerprint if hasattr(table, "_fingerprint") else place

    def read(index):
        value = encoded[index][image]
        if isinstance(value, bytes):
            return value
        if value.get("bytes") is not None:
            return value["bytes"]
        return Path(value["path"]).read_bytes()

    classes = tf.constant(labels)

    def item(index):
        index = tf.cast(index, tf.int64)
        name = tf.strings.join([place, tf.strings.as_string(index + 1)], " ")
        return name, index, tf.gather(classes, index)

    return Indexed(
        len(table),
        len(names) if names else config.classes,
        item,
        read_in_python(read),
        label_names=names,
        labels=labels,
        paths=[f"{fingerprint}:{row}" for row in range(len(table))],
        in_process=True,
    )


def import_datasets(config):
    """Returns the package `datasets`.

    Raises:
        ImportError: If it is not installed; the message names the extra.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"--dataset={config.dataset} needs the package datasets: "
            'pip install "keras-tnt[huggingface]"'
        ) from error
    return datasets


def open_table(config, held_out):
    """Returns a split as a `datasets.Dataset`.

    Args:
        config: A `training.configuration.Config`.
        held_out: Whether to return the held-out split, else the training split.

    Raises:
        ValueError: If the directory holds no data set, or it has no such split.
    """
    from keras_tnt.images.folders import describe_fallback, match_held_out, match_name

    datasets = import_datasets(config)
    root = Path(config.data_dir)
    if not root.is_dir():
        raise ValueError(f"--data_dir={root} is no directory. It must be {LAYOUT}")
    if not any((root / name).is_file() for name in ("dataset_dict.json", "state.json")):
        files = split_files(config, held_out, ".parquet", LAYOUT)
        return datasets.load_dataset("parquet", data_files=files, split="train")
    try:
        found = datasets.load_from_disk(str(root))
    except Exception as error:  # damaged files raise errors of many types
        raise ValueError(f"--data_dir={root} cannot be read by datasets: {error}") from error
    if isinstance(found, datasets.Dataset):
        raise ValueError(
            f"--data_dir={root} has no splits. Save a DatasetDict with train and validation: "
            "dataset.train_test_split(0.1).save_to_disk(path)"
        )
    wanted = config.eval_split if held_out else config.train_split
    names = list(found)
    if wanted or not held_out:
        name = match_name(wanted or "train", names)
    else:
        name = match_held_out(names)
    option = "--eval_split" if held_out else "--train_split"
    if name is None:
        raise ValueError(
            f"--data_dir={root} has no split {wanted or ('validation' if held_out else 'train')}; "
            f"it has {', '.join(names)}. {option} names another"
        )
    note = describe_fallback(name) if held_out and not wanted else ""
    kind = "held-out" if held_out else "training"
    print(f"{kind} split {name!r} of {root}: {len(found[name]):,} images{note}", flush=True)
    return found[name]


def find_columns(table, config):
    """Returns (image column, label column).

    An image is a column of images, of bytes, or of structs with bytes; Parquet files that were not
    written by `datasets` have no columns of images.

    Args:
        table: A `datasets.Dataset`.
        config: A `training.configuration.Config`, for messages.

    Raises:
        ValueError: If there is no such column, or several to choose from.
    """
    datasets = import_datasets(config)
    features = table.features

    def is_binary(feature):
        if isinstance(feature, dict):
            feature = feature.get("bytes")
        return getattr(feature, "dtype", None) in ("binary", "large_binary")

    images = [name for name, each in features.items() if isinstance(each, datasets.Image)]
    binary = [name for name, each in features.items() if is_binary(each)]
    usual = [name for name in binary if name in columns.IMAGES]
    return columns.choose_columns(
        f"--dataset={config.dataset}: {config.data_dir}",
        {name: str(feature) for name, feature in features.items()},
        [*images, *usual] or binary,
        [name for name, each in features.items() if isinstance(each, datasets.ClassLabel)],
        f". It must be {LAYOUT}",
    )


def number_labels(table, label, config, held_out):
    """Returns the labels as class indices, and the class names or `None`.

    Args:
        table: A `datasets.Dataset`.
        label: Column of the labels.
        config: A `training.configuration.Config`.
        held_out: Whether the rows are the held-out split.

    Raises:
        ValueError: If a label is missing or invalid, or not in the training split.
    """
    values = list(table.with_format(None)[label])

    def place(number):
        return f"{config.data_dir}: row {number + 1}"

    names = getattr(table.features[label], "names", None)
    if names is None and not all(isinstance(value, int) for value in values):
        texts = [clean_label(value, place(i)) for i, value in enumerate(values)]
        known = texts
        if held_out:
            training = open_table(config, False).with_format(None)[label]
            known = [clean_label(value, place(i)) for i, value in enumerate(training)]
        names = sorted_labels(known)
        unknown = sorted(set(texts) - set(names))
        if unknown:
            raise ValueError(
                f"{config.data_dir} has held-out classes that the training split has not: "
                f"{unknown[0]!r}"
            )
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([numbers[text] for text in texts], "int64"), tuple(names)
    if any(value is None or value < 0 for value in values):
        number = next(i for i, value in enumerate(values) if value is None or value < 0)
        raise ValueError(f"{place(number)} has no label")
    labels = np.array(values, "int64")
    if names is None:
        return check_labels(labels, config, place), None
    return labels, tuple(names)
