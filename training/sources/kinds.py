"""Kinds of sources: `Indexed` with random access, and `Streamed`, read sequentially."""

import dataclasses
import decimal
import os
import re
from collections.abc import Callable, Sequence

import numpy as np


class Source:
    """Base of the sources, with defaults for properties that are unknown before reading."""

    labels = None
    classes_from_images = False
    paths = ()
    stretches = ()
    several_labels = False
    in_process = False


@dataclasses.dataclass(frozen=True, eq=False)
class Indexed(Source):
    """Split with random access to its images.

    Args:
        size: Number of images.
        classes: Number of classes.
        item: Function from an index tensor to (name, image, label): a string; uint8 (height, width,
            3), a path or whatever `read` accepts; an integer.
        read: Function from such an image to pixels or encoded bytes. If `None`, it is the pixels.
        label_names: Class names, in order. Defaults to `None`, no names.
        labels: Labels of all images. If `None`, they are unknown before reading.
        paths: Path or location of each image, by which overlapping splits are found. Defaults to
            none.
        in_process: Whether Python reads the images, which a tf.data service cannot run. Defaults to
            `False`.
        classes_from_images: Whether the images alone define the classes, as folders do, so that
            each class must have images in both splits. Defaults to `False`.
    """

    size: int
    classes: int
    item: Callable
    read: Callable | None = None
    label_names: Sequence[str] | None = None
    labels: np.ndarray | None = None
    paths: Sequence[str] = ()
    in_process: bool = False
    classes_from_images: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Streamed(Source):
    """Split that is read sequentially.

    Args:
        size: Number of images.
        classes: Number of classes.
        stream: Function from (seed, worker, workers) to a `tf.data.Dataset` of (name, bytes,
            label), that worker's part of the images, in an order that is a function of the seed, or
            the stored order if the seed is `None`. The label is an integer or, for multi-label
            images, float32 (classes,), 1 at the correct labels.
        label_names: Class names, in order. Defaults to `None`, no names.
        labels: Labels of all images, in any order. If `None`, they are unknown before reading.
        stretches: Ranges of records that are read: (file, first record, end, exclusive). Defaults
            to none.
        several_labels: Whether images are multi-label, for evaluation only. Defaults to `False`.
        in_process: Whether Python reads the images, which a tf.data service cannot run. Defaults to
            `False`.
    """

    size: int
    classes: int
    stream: Callable
    label_names: Sequence[str] | None = None
    labels: np.ndarray | None = None
    stretches: Sequence[tuple[str, int, int]] = ()
    several_labels: bool = False
    in_process: bool = False

    read = staticmethod(lambda data: data)


def read_in_python(read):
    """Wraps a Python reader as a function from an index tensor to the encoded bytes of an image.

    Args:
        read: Function from an index to bytes, called by several threads concurrently. An exception
            makes the image count as unreadable.
    """
    import tensorflow as tf

    def read_tensor(index):
        # Declared stateless, because op determinism runs stateful functions sequentially.
        data = tf.numpy_function(lambda i: read(int(i)), [index], tf.string, stateful=False)
        return tf.ensure_shape(data, [])

    return read_tensor


def in_memory(images, labels, classes, name, label_names=None):
    """Returns a source of arrays.

    Args:
        images: uint8 (n, height, width, 3), in [0, 255].
        labels: Integers (n,), in [0, classes).
        classes: Number of classes.
        name: Prefix of an image's name in messages; its index follows.
        label_names: Class names. Defaults to `None`.

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


def of_files(paths, labels, label_names, real_paths=None, classes_from_images=False):
    """Returns a source of image files.

    Args:
        paths: Paths of the files.
        labels: Integers (n,), class indices.
        label_names: Class names, in order.
        real_paths: Paths by which overlapping splits are found. If `None`, `paths`.
        classes_from_images: Whether the images alone define the classes. Defaults to `False`.

    Returns:
        An `Indexed`.
    """
    import tensorflow as tf

    numbers = np.asarray(labels, "int64")
    # As bytes, because file names need not be UTF-8.
    files, labels = tf.constant([os.fsencode(path) for path in paths]), tf.constant(numbers)

    def item(index):
        path = tf.gather(files, index)
        return path, path, tf.gather(labels, index)

    known = paths if real_paths is None else real_paths
    return Indexed(
        len(paths),
        len(label_names),
        item,
        tf.io.read_file,
        label_names=label_names,
        labels=numbers,
        paths=known,
        classes_from_images=classes_from_images,
    )


LABEL_NUMBER = re.compile(r"[+-]?([0-9]+([.][0-9]*)?|[.][0-9]+)([eE][+-]?[0-9]+)?")


def clean_label(label, place):
    """Returns a label of a table as text without surrounding whitespace.

    Args:
        label: Text, a number or `None`.
        place: Location of the row, for messages.

    Raises:
        ValueError: If it is empty, NaN, or not one line of valid UTF-8.
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
    """Returns the distinct labels in the order of their class indices.

    If all labels are decimal numbers, they are sorted by value, and equal values, such as "1" and
    "01", which are different classes, as text. Otherwise all are sorted as text.
    """
    labels = sorted(set(labels))
    if not all(map(LABEL_NUMBER.fullmatch, labels)):
        return labels
    try:
        return sorted(labels, key=decimal.Decimal)
    except decimal.InvalidOperation:  # an exponent out of range
        return labels


def held_out_mask(labels, label_names, share, seed):
    """Draws a stratified held-out split: the same share of each class.

    Args:
        labels: Integers (n,), class indices.
        label_names: Class names.
        share: Share of each class to hold out, in (0, 1); at least one image is held out and one is
            not.
        seed: Seed of the draw.

    Returns:
        Booleans (n,), true for held-out images.

    Raises:
        ValueError: If a class has a single image.
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
