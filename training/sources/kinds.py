"""The two kinds of sources: one whose images are had by index, and one that is read in order."""

import dataclasses
import os
from collections.abc import Callable, Sequence

import numpy as np


class Source:
    """What is not known of a source without reading it, unless it says so."""

    labels = None
    paths = ()
    stretches = ()
    several_labels = False


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
        paths: every image's file, if it has one of its own.
    """

    size: int
    classes: int
    item: Callable
    read: Callable | None = None
    label_names: Sequence[str] | None = None
    labels: np.ndarray | None = None
    paths: Sequence[str] = ()


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
    """

    size: int
    classes: int
    stream: Callable
    label_names: Sequence[str] | None = None
    stretches: Sequence[tuple[str, int, int]] = ()
    several_labels: bool = False

    read = staticmethod(lambda data: data)


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


def of_files(paths, labels, label_names):
    """A source of image files.

    Args:
        paths: of the files.
        labels: the files' classes, numbers from 0.
        label_names: the classes' names, in order.

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

    return Indexed(len(paths), len(label_names), item, tf.io.read_file, label_names, numbers, paths)


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
