"""The two kinds of sources: one whose images are had by index, and one that is read in order."""

import dataclasses
import decimal
import os
import re
from collections.abc import Callable, Sequence

import numpy as np


class Source:
    """What is not known of a source without reading it, unless it says so."""

    labels = None
    paths = ()
    stretches = ()
    several_labels = False
    in_process = False


@dataclasses.dataclass(frozen=True, eq=False)
class Indexed(Source):
    """A split whose images are had by index.

    Args:
        size: number of images.
        classes: number of classes.
        item: function from an index tensor to (name, image, label): a string, uint8
            (height, width, 3) or the path of a file, and an integer.
        read: function from such an image to pixels or bytes; None: it is the pixels.
        label_names: the classes' names, in order; None: they have none.
        labels: every image's label; None: not known without reading.
        paths: every image's file, or its place in one, by which two splits are compared.
        in_process: whether images are read by Python, which a tf.data service cannot run.
    """

    size: int
    classes: int
    item: Callable
    read: Callable | None = None
    label_names: Sequence[str] | None = None
    labels: np.ndarray | None = None
    paths: Sequence[str] = ()
    in_process: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Streamed(Source):
    """A split that is read in order.

    Args:
        size: number of images.
        classes: number of classes.
        stream: function (seed, worker, workers) to a `tf.data.Dataset` of (name, bytes, label),
            that worker's share of the images, in an order that is a function of the seed; None:
            as they lie. The label is an integer or, for an image with several right labels or
            none, float32 (classes,): 1 at the right ones.
        label_names: the classes' names, in order; None: they have none.
        stretches: what is read of which file: (file, first record, record after the last).
        several_labels: whether the labels are of the second kind, which is for evaluation alone.
        in_process: whether images are read by Python, which a tf.data service cannot run.
    """

    size: int
    classes: int
    stream: Callable
    label_names: Sequence[str] | None = None
    stretches: Sequence[tuple[str, int, int]] = ()
    several_labels: bool = False
    in_process: bool = False

    read = staticmethod(lambda data: data)


def read_in_python(read):
    """Returns a function from an index tensor to the bytes of an image.

    Args:
        read: function from an index to bytes; called by several threads at once. What it raises
            makes the image an unreadable one.
    """
    import tensorflow as tf

    def read_tensor(index):
        # Declared stateless, as it is: op determinism would else let one thread read alone.
        data = tf.numpy_function(lambda i: read(int(i)), [index], tf.string, stateful=False)
        return tf.ensure_shape(data, [])

    return read_tensor


def in_memory(images, labels, classes, name, label_names=None):
    """A source of arrays.

    Args:
        images: uint8 (n, height, width, 3), in [0, 255].
        labels: integers (n,), in [0, classes).
        classes: number of classes.
        name: what one image is called in messages; its number follows.
        label_names: the classes' names.

    Returns:
        An `Indexed`.
    """
    import tensorflow as tf

    numbers = np.asarray(labels, "int64")
    images, labels = tf.constant(images), tf.constant(numbers)

    def item(index):
        named = tf.strings.join([name, tf.strings.as_string(index)], " ")
        return named, tf.gather(images, index), tf.gather(labels, index)

    return Indexed(len(numbers), classes, item, label_names=label_names, labels=numbers)


def of_files(paths, labels, label_names, real_paths=None):
    """Returns a source of image files.

    Args:
        paths: of the files.
        labels: the files' classes, numbers from 0.
        label_names: the classes' names, in order.
        real_paths: by which two splits' files are compared. If `None`, `paths`.

    Returns:
        An `Indexed`.
    """
    import tensorflow as tf

    numbers = np.asarray(labels, "int64")
    # As bytes: names of files need not be UTF-8.
    files, labels = tf.constant([os.fsencode(path) for path in paths]), tf.constant(numbers)

    def item(index):
        path = tf.gather(files, index)
        return path, path, tf.gather(labels, index)

    known = paths if real_paths is None else real_paths
    return Indexed(len(paths), len(label_names), item, tf.io.read_file, label_names, numbers, known)


LABEL_NUMBER = re.compile(r"[+-]?([0-9]+([.][0-9]*)?|[.][0-9]+)([eE][+-]?[0-9]+)?")


def clean_label(label, place):
    """Returns a label of a table as text without the spaces around it.

    Args:
        label: text, a number or `None`.
        place: of the row, for messages.

    Raises:
        ValueError: if it is empty, NaN, or not one line of text that UTF-8 can hold.
    """
    text = "" if label is None else str(label).strip()
    if not text:
        raise ValueError(f"{place} has no label")
    if text.lower().lstrip("+-") == "nan":
        raise ValueError(f"{place} has the label {text}, which is no class: remove or label it")
    from keras_tnt.text import is_encodable, is_line

    if not is_line(text) or not is_encodable(text):
        raise ValueError(f"{place} has the label {text!r}, which is not one line of UTF-8 text")
    return text


def sorted_labels(labels):
    """Returns different labels in the order of their classes.

    Labels that are all decimal numbers are sorted by value, and those of one value, such as "1"
    and "01", which remain different classes, as text. Others are all sorted as text.
    """
    labels = sorted(set(labels))
    if not all(map(LABEL_NUMBER.fullmatch, labels)):
        return labels
    try:
        return sorted(labels, key=decimal.Decimal)
    except decimal.InvalidOperation:  # an exponent beyond all bounds
        return labels


def held_out_mask(labels, label_names, share, seed):
    """Which images are held out where the data set is not split: the same share of each class.

    Args:
        labels: every image's class, numbers from 0.
        label_names: the classes' names.
        share: in (0, 1), of a class's images; at least one is held out and one is not.
        seed: of the draw.

    Returns:
        bool array like `labels`.

    Raises:
        ValueError: if a class has a single image.
    """
    labels = np.asarray(labels)
    mask = np.zeros(len(labels), bool)
    for label, name in enumerate(label_names):
        members = np.flatnonzero(labels == label)
        if len(members) == 1:
            raise ValueError(
                f"class {name!r} has one image, and --validation_share needs two: one to train "
                "with and one to hold out"
            )
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        mask[np.random.default_rng([seed, label]).permutation(members)[:count]] = True
    return mask
