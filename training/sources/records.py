"""Images in TFRecord files."""

import os
import struct
from pathlib import Path

import numpy as np

from training.sources.kinds import Streamed

# Number of TFRecord files read in parallel.
READERS = 16
# Number of labels checked before the run begins.
LABELS_CHECKED = 2048
HELD_OUT_PREFIXES = ("val", "dev", "test")
LAYOUT = (
    "TFRecord files <data_dir>/train* and <data_dir>/val* of tf.train.Examples with image/encoded "
    "and image/class/label; needs --classes, and --label_offset=1 if labels start at 1"
)


def tfrecord(config, held_out):
    """Returns a split of TFRecord files.

    They hold `tf.train.Example`s with `image/encoded`, `image/class/label` and, optionally,
    `image/filename`.

    Args:
        config: A `training.configuration.Config`.
        held_out: Whether to return the held-out split, else the training split.

    Raises:
        ValueError: If there are no files, one is damaged, or a label is out of range.
    """
    import tensorflow as tf

    root = Path(config.data_dir)
    wanted = config.eval_split if held_out else config.train_split
    default = HELD_OUT_PREFIXES if held_out else ("train",)
    for prefix in (wanted,) if wanted else default:
        files = sorted(str(path) for path in root.glob(f"{prefix}*") if path.is_file())
        if files:
            break
    else:
        raise ValueError(f"--data_dir={root} holds no files {wanted or default[0]}*: {LAYOUT}")
    if held_out and not wanted:
        from keras_tnt.images.folders import describe_fallback

        print(f"held-out split {prefix}* of {root}{describe_fallback(prefix)}", flush=True)
    if not config.classes:
        raise ValueError("--dataset=tfrecord needs --classes: the files do not say how many")
    sizes = [count_records(path) for path in files]
    check_labels(files, config)
    features = {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "image/class/label": tf.io.FixedLenFeature([], tf.int64),
        "image/filename": tf.io.FixedLenFeature([], tf.string, default_value=""),
    }

    def parse(path, number, record):
        parsed = tf.io.parse_single_example(record, features)
        place = tf.strings.join([path, " record ", tf.strings.as_string(number)])
        name = tf.strings.join([place, " ", parsed["image/filename"]])
        label = parsed["image/class/label"]
        number = tf.strings.as_string(label)
        told = tf.strings.join([place, " has the label ", number, ", ", outside_of(config)])
        inside = (label >= config.label_offset) & (label < config.label_offset + config.classes)
        with tf.control_dependencies([tf.debugging.Assert(inside, [told])]):
            return name, parsed["image/encoded"], label - config.label_offset

    def records(path):
        numbered = tf.data.TFRecordDataset(path).enumerate()
        return numbered.map(lambda number, record: parse(path, number, record))

    def stream(seed, worker, workers):
        paths, by_file = np.array(files), divides_files(seed, len(files), workers)
        if seed is not None:
            paths = np.random.default_rng(seed).permutation(paths)
        if by_file:
            paths = paths[worker::workers]
        dataset = tf.data.Dataset.from_tensor_slices(paths).interleave(
            records, cycle_length=min(READERS, len(paths)), num_parallel_calls=tf.data.AUTOTUNE
        )
        return dataset if by_file else dataset.shard(workers, worker)

    stretches = [(path, 0, size) for path, size in zip(files, sizes, strict=True)]
    return Streamed(sum(sizes), config.classes, stream, stretches=stretches)


def divides_files(seed, files, workers):
    """Returns whether workers divide the files among them, else the records.

    Training divides the files if there are enough; evaluation needs parts of equal size.

    Args:
        seed: Seed of the order, `None` for evaluation.
        files: Number of files.
        workers: Number of workers.
    """
    return seed is not None and files >= workers


def count_records(path):
    """Returns the number of records in a TFRecord file, by reading their lengths only.

    Raises:
        ValueError: If the file is truncated.
    """
    # A record is preceded by its length (8 bytes) and a checksum (4), and followed by another (4).
    count, place, size = 0, 0, os.path.getsize(path)
    with open(path, "rb") as file:
        while place < size:
            header = file.read(12)
            place += len(header) + 4
            if len(header) == 12:
                place += struct.unpack("<Q", header[:8])[0]
            if len(header) < 12 or place > size:
                raise ValueError(f"{path} is damaged: it breaks off in record {count}")
            file.seek(place)
            count += 1
    return count


def is_damaged(path):
    """Returns whether a TFRecord file has a record with a wrong checksum; reads all of it."""
    import tensorflow as tf

    try:
        for _ in tf.data.TFRecordDataset(path).batch(64):
            pass
    except tf.errors.DataLossError:
        return True
    return False


def check_labels(files, config):
    """Checks the first labels of each file, `LABELS_CHECKED` in all.

    Args:
        files: Paths of the files.
        config: A `training.configuration.Config`.

    Raises:
        ValueError: If a label is out of range; the message names the first such record.
    """
    import tensorflow as tf

    features = {"image/class/label": tf.io.FixedLenFeature([], tf.int64)}
    each = max(1, LABELS_CHECKED // len(files))
    labels, places = [], []
    for path in files:
        try:
            for number, record in enumerate(tf.data.TFRecordDataset(path).take(each)):
                labels.append(
                    int(tf.io.parse_single_example(record, features)["image/class/label"])
                )
                places.append(f"{path} record {number}")
        except tf.errors.DataLossError as error:
            raise ValueError(f"{path} is damaged near record {number + 1}") from error
        except tf.errors.InvalidArgumentError as error:
            raise ValueError(f"{path} holds an Example without image/class/label") from error
    labels = np.array(labels)
    outside = np.flatnonzero(
        (labels < config.label_offset) | (labels >= config.label_offset + config.classes)
    )
    if not len(outside):
        return
    first, offset = outside[0], int(labels.min())
    hint = "give --classes as many as there are"
    if offset != config.label_offset and labels.max() - offset < config.classes:
        hint = f"labels that start at {offset} need --label_offset={offset}"
    raise ValueError(f"{places[first]} has the label {labels[first]}, {outside_of(config)}: {hint}")


def outside_of(config):
    """Returns the valid range of labels as text for messages."""
    return (
        f"outside of {config.label_offset} to {config.label_offset + config.classes - 1} by "
        f"--classes={config.classes} and --label_offset={config.label_offset}"
    )
