"""Where images come from: each data set as names, files' bytes or pixels, and labels.

A source of which any image can be had by its index is `Indexed`; one that has to be read in order,
as TFRecord files have, is `Streamed`.
"""

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from training import augmentation

DIGITS_SPLIT_SEED = 0
IMAGENET_IMAGES = 1_281_167
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
# How many TFRecord files are read at once.
READERS = 16


@dataclasses.dataclass(frozen=True)
class Indexed:
    """A split whose images are had by index.

    Args:
        size, classes: numbers of images and classes.
        item: function from an index tensor to (name, image, label): a string, uint8
            (height, width, 3) or the path of a file, and an integer.
        read: function from such an image to pixels or bytes; None: it is the pixels.
    """

    size: int
    classes: int
    item: Callable
    read: Callable | None = None


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A split that is read in order.

    Args:
        size, classes: numbers of images and classes.
        stream: function (seed, worker, workers) to a `tf.data.Dataset` of (name, bytes, label),
            that worker's share of the images, in an order that is a function of the seed; None:
            as they lie.
    """

    size: int
    classes: int
    stream: Callable

    read = staticmethod(lambda data: data)


def open_sources(config):
    """(training split, held-out split) of a configuration's data set.

    Raises:
        ValueError: if the data are not there.
    """
    if config.dataset == "digits":
        return tuple(in_memory(images, labels, 10, "digit") for images, labels in digits())
    return tuple(open_split(config, held_out) for held_out in (False, True))


def open_split(config, held_out):
    """One split of any data set."""
    if config.dataset == "digits":
        return open_sources(config)[held_out]
    if config.dataset == "synthetic":
        return synthetic(config, held_out)
    return {"folder": folder, "tfrecord": tfrecord, "imagenet2012": imagenet2012}[config.dataset](
        config, held_out
    )


# === Made here ===


def digits():
    """scikit-learn's 1,797 handwritten digits, resized to 32x32x3, 20% held out.

    Returns:
        `(train_images, train_labels), (test_images, test_labels)`: uint8 (n, 32, 32, 3) in [0, 255]
        and int64 (n,). The split is fixed and stratified.

    Example:

    >>> (train_images, train_labels), (test_images, test_labels) = digits()
    >>> test_images.shape
    (360, 32, 32, 3)
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError('The digits need scikit-learn: pip install "keras-tnt[train]"') from error
    small, labels = load_digits(return_X_y=True)
    small = np.reshape(small, (-1, 8, 8, 1)) * (255 / 16)
    images = np.repeat(augmentation.resize(small, (32, 32)).numpy(), 3, axis=-1)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=DIGITS_SPLIT_SEED
    )
    return (train_images, train_labels), (test_images, test_labels)


def in_memory(images, labels, classes, name):
    """A source of arrays."""
    images, labels = tf.constant(images), tf.constant(labels, tf.int64)

    def item(index):
        named = tf.strings.join([name, tf.strings.as_string(index)], " ")
        return named, tf.gather(images, index), tf.gather(labels, index)

    return Indexed(len(images), classes, item)


def synthetic(config, held_out):
    """Black images: the training step makes noise of them on the device."""
    side = config.image_size or 32
    classes = config.classes or 1000

    def item(index):
        return "synthetic", tf.zeros([side, side, 3], tf.uint8), tf.cast(index % classes, tf.int64)

    return Indexed(config.batch_size if held_out else IMAGENET_IMAGES, classes, item)


# === Folders of classes ===


def folder(config, held_out):
    """`data_dir/train/<class>/<image>` and `data_dir/val/...` (or validation, test).

    Classes are the folders of the training split, in alphabetical order.
    """
    root = Path(config.data_dir)
    train = existing(root, ("train",))
    names = sorted(path.name for path in train.iterdir() if path.is_dir())
    split = existing(root, ("val", "validation", "test")) if held_out else train
    numbers = {name: i for i, name in enumerate(names)}
    unknown = sorted(p.name for p in split.iterdir() if p.is_dir() and p.name not in numbers)
    if unknown:
        raise ValueError(f"{split} has classes that {train} has not: {', '.join(unknown)}")
    found = sorted(
        (str(path), numbers[name])
        for name in names
        for path in (split / name).rglob("*")
        if path.suffix.lower() in SUFFIXES
    )
    if not found:
        raise ValueError(f"{split} holds no images ({', '.join(SUFFIXES)}) in folders of classes")
    paths = tf.constant([path for path, _ in found])
    labels = tf.constant([label for _, label in found], tf.int64)

    def item(index):
        path = tf.gather(paths, index)
        return path, path, tf.gather(labels, index)

    return Indexed(len(found), len(names), item, tf.io.read_file)


def existing(root, names):
    """The first of some directories that exists."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise ValueError(
        f"--data_dir={root} must hold a directory {' or '.join(names)} of class folders"
    )


# === TFRecord files ===


def tfrecord(config, held_out):
    """Files `train*` and `val*` of `tf.train.Example`s: `image/encoded`, `image/class/label`."""
    pattern = "val*" if held_out else "train*"
    files = sorted(str(path) for path in Path(config.data_dir).glob(pattern) if path.is_file())
    if not files:
        raise ValueError(f"--data_dir={config.data_dir} holds no files {pattern}")
    if not config.classes:
        raise ValueError("--dataset=tfrecord needs --classes: the files do not say how many")
    features = {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "image/class/label": tf.io.FixedLenFeature([], tf.int64),
        "image/filename": tf.io.FixedLenFeature([], tf.string, default_value=""),
    }

    def parse(path, number, record):
        parsed = tf.io.parse_single_example(record, features)
        place = tf.strings.join([path, " record ", tf.strings.as_string(number)])
        name = tf.strings.join([place, " ", parsed["image/filename"]])
        label = parsed["image/class/label"] - config.label_offset
        return name, parsed["image/encoded"], label

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

    return Streamed(sum(count_records(path) for path in files), config.classes, stream)


def divides_files(seed, files, workers):
    """Whether workers share the files or, exactly alike, the records.

    Training divides the files where there are enough; evaluation needs shares of equal size.
    """
    return seed is not None and files >= workers


def count_records(path):
    """Number of records in a TFRecord file, from their lengths alone."""
    count = 0
    with open(path, "rb") as file:
        while header := file.read(12):
            length = struct.unpack("<Q", header[:8])[0]
            file.seek(length + 4, 1)
            count += 1
    return count


def imagenet2012(config, held_out):
    """ImageNet as tensorflow-datasets prepares it, its JPEGs not decoded."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            '--dataset=imagenet2012 needs tensorflow-datasets: pip install "keras-tnt[train]"'
        ) from error
    builder = tfds.builder("imagenet2012", data_dir=config.data_dir or None)
    split = "validation" if held_out else "train"
    if split not in builder.info.splits:
        raise ValueError(
            f"tensorflow-datasets has no imagenet2012 in {builder.data_dir}. Prepare it there with "
            "`tfds build imagenet2012`, or give --data_dir."
        )

    def stream(seed, worker, workers):
        files = len(builder.info.splits[split].filenames)
        by_file = divides_files(seed, files, workers)
        read = tfds.ReadConfig(
            shuffle_seed=seed,
            interleave_cycle_length=READERS,
            add_tfds_id=True,
            try_autocache=False,
            input_context=tf.distribute.InputContext(workers, worker) if by_file else None,
        )
        read.options.deterministic = True
        dataset = builder.as_dataset(
            split=split,
            shuffle_files=seed is not None,
            decoders={"image": tfds.decode.SkipDecoding()},
            read_config=read,
        )
        dataset = dataset.map(lambda x: (x["tfds_id"], x["image"], x["label"]))
        return dataset if by_file else dataset.shard(workers, worker)

    info = builder.info
    return Streamed(info.splits[split].num_examples, info.features["label"].num_classes, stream)
