"""From a data set to batches: which image stands where, and what it goes through on its way.

The order is a pure function of (seed, epoch), an image's augmentation one of (seed, epoch, place in
the epoch): a run goes on in the middle of an epoch by starting there, and however many workers and
devices there are, they see the same global batches (of a streamed source: each worker its own). A
tf.data service with several workers shows each image once, in whatever order they answer.
"""

import contextlib
import dataclasses
import os
import re
import threading

import numpy as np
import tensorflow as tf

from training import augmentation, keras_cv_augmentation
from training.sources import Streamed, records

# How many items of a streamed source are shuffled at once.
SHUFFLE_BUFFER = 8192
# The least number of images that are read and augmented at once.
READ_AHEAD = 16


@dataclasses.dataclass(frozen=True)
class WorkerShare:
    """What part of each global batch this process feeds: its worker's columns of it.

    Args:
        index: number of this process's worker, counted from 0.
        workers: how many workers feed the devices together.
        replicas: number of devices of all workers.
    """

    index: int
    workers: int
    replicas: int

    def columns(self, batch_size):
        width = batch_size // self.workers
        return slice(self.index * width, (self.index + 1) * width)


class UnreadableImages:
    """The images that could not be read: named once, counted, and no more than so many.

    Args:
        source: the `Indexed` or `Streamed` that they are of.
        largest_share: the largest share of its images that may be unreadable, in [0, 1].
    """

    def __init__(self, source, largest_share):
        self.files = sorted({file for file, _, _ in source.stretches})
        self.size = source.size
        self.limit = int(source.size * largest_share)
        self.names = set()
        self.lock = threading.Lock()

    def add(self, name):
        name = name.decode(errors="replace")
        with self.lock:
            new = name not in self.names
            self.names.add(name)
            number = len(self.names)
        if new:
            print(f"corrupt image {number} (of {self.size}), skipped: {name}", flush=True)
        return np.float32(0)

    def count(self, batch):
        """Counts the unreadable images of a batch, in the trainer's own process.

        The function is declared stateless, since a stateful one anywhere in a pipeline makes
        tf.data run all of it synchronously under op determinism. What it records are names in a
        set, which no order and no repetition changes.

        Args:
            batch: a dict of tensors with `unreadable`, the names of the unreadable images and "".

        Returns:
            The batch without `unreadable`.
        """
        names = batch["unreadable"]

        def add(names, weight):
            for name in filter(None, names.tolist()):
                self.add(name)
            return weight

        weight = tf.numpy_function(add, [names, batch["weight"]], tf.float32, stateful=False)
        counted = {key: value for key, value in batch.items() if key != "unreadable"}
        return {**counted, "weight": tf.ensure_shape(weight, batch["weight"].shape)}

    def check(self, count=None):
        """Raise a ValueError if there are too many: `count`, or those that this process found."""
        count = len(self.names) if count is None else count
        if count > self.limit:
            raise ValueError(
                f"{count} of {self.size} images cannot be read, more than --max_corrupt allows "
                f"({self.limit}). Among them: {', '.join(sorted(self.names)[:5])}"
            )

    @contextlib.contextmanager
    def reading(self):
        """Turn what TensorFlow says of damaged or wrong records into a ValueError of one line."""
        try:
            yield
        except tf.errors.DataLossError as error:
            damaged = next(filter(records.is_damaged, self.files), "a TFRecord file")
            raise ValueError(f"{damaged} is damaged: it holds a corrupted record") from error
        except tf.errors.InvalidArgumentError as error:
            wrong = re.search(r"assertion failed: \[(.*?)\]", str(error))
            if not wrong:
                raise
            raise ValueError(wrong[1]) from error


def training_order(config, size, steps, epoch):
    """Indices of an epoch's images, (steps, batch_size).

    Under repeated augmentation a batch holds all of its images once, then all of them again, and
    an epoch shows so many fewer of them.
    """
    shuffled = np.random.default_rng([config.seed, epoch]).permutation(size)
    distinct = -(-config.batch_size // config.repeats)
    rows = np.resize(shuffled, (steps, distinct))
    return np.tile(rows, (1, config.repeats))[:, : config.batch_size]


def evaluation_order(batch_size, size):
    """Indices of all images in order, (steps, batch_size); -1 fills the last row."""
    steps = -(-size // batch_size)
    order = np.full(steps * batch_size, -1)
    order[:size] = np.arange(size)
    return order.reshape(steps, batch_size)


def training_batches(source, config, size, fill, epoch, first_step, steps, share, unreadable):
    """An epoch's batches from `first_step` on, one a replica at a time.

    Args:
        source: an `Indexed` or `Streamed` source.
        config: a `training.configuration.Config`.
        size: (height, width) that the model takes.
        fill: colour that geometric augmentation fills in with.
        epoch: counted from 0.
        first_step: updates of this epoch that are done.
        steps: updates an epoch.
        share: a `WorkerShare`.
        unreadable: an `UnreadableImages`.

    Returns:
        A `tf.data.Dataset` of dicts: `image` uint8 (from KerasCV float32), `label`, `weight` (0 for
        what could not be read), `erase` (where random erasing erases).
    """
    base = int(np.random.SeedSequence([config.seed, epoch, 1]).generate_state(1)[0] >> 1)
    local = config.batch_size // share.workers
    if config.augmentation == "keras_cv":
        augment = keras_cv_augmentation.image_augmentation(config.randaugment, config.erasing)

    def transform(image, place):
        seeds = tf.random.experimental.stateless_split(tf.stack([base, place]), 2)
        image = augmentation.training_image(image, seeds[0], config, size, fill)
        box = tf.zeros([4], tf.int32)
        if config.augmentation == "keras_cv":
            return {"image": augment(image, seeds[1]), "erase": box, "seed": seeds[1]}
        if config.erasing:
            box = augmentation.erasing_box(seeds[1], config.erasing, size)
        return {"image": image, "erase": box}

    if isinstance(source, Streamed):
        items = source.stream(base, share.index, share.workers)
        items = items.shuffle(SHUFFLE_BUFFER, base, reshuffle_each_iteration=False).repeat()
        if config.repeats > 1:
            items = repeat_within(items, -(-local // config.repeats), config.repeats, local)
        items = items.enumerate().skip(first_step * local).take((steps - first_step) * local)
        items = items.map(
            lambda place, item: (*item, place * share.workers + share.index, tf.constant(True))
        )
    else:
        order = training_order(config, source.size, steps, epoch)
        places = np.arange(order.size).reshape(order.shape)
        columns = share.columns(config.batch_size)
        items = in_order(source, order[first_step:, columns], places[first_step:, columns])
    dataset = batches(items, source, transform, config, share, unreadable, config.data_service)
    if config.augmentation == "keras_cv":
        classes = config.classes or source.classes
        mix = keras_cv_augmentation.batch_mixing(config.mixup, config.cutmix, classes)
        dataset = dataset.map(mix).prefetch(tf.data.AUTOTUNE)
    return dataset


def evaluation_batches(source, config, size, share, unreadable):
    """Every image once, filled up with images of weight 0 to whole batches.

    Returns:
        A `tf.data.Dataset` of dicts: `image` uint8, `label`, `weight`, and `place`, an image's
        number in the data set; what only fills a batch has none that an image has.
    """

    def transform(image, place):
        return {"image": augmentation.evaluation_image(image, config.crop, size), "place": place}

    if isinstance(source, Streamed):
        steps = -(-source.size // config.batch_size)
        items = source.stream(None, share.index, share.workers)
        items = items.enumerate().map(
            lambda place, item: (*item, place * share.workers + share.index, tf.constant(True))
        )
        filling = [tf.zeros(spec.shape, spec.dtype) for spec in items.element_spec]
        filling[-2] = tf.constant(-1, tf.int64)
        items = items.concatenate(tf.data.Dataset.from_tensors(tuple(filling)).repeat())
        items = items.take(steps * (config.batch_size // share.workers))
    else:
        order = evaluation_order(config.batch_size, source.size)
        order = order[:, share.columns(config.batch_size)]
        items = in_order(source, order, order)
    return batches(items, source, transform, config, share, unreadable)


def repeat_within(items, distinct, repeats, size):
    """Groups of `distinct` items, each `repeats` times, the first `size` of them."""

    def repeated(*group):
        return tf.data.Dataset.from_tensor_slices(
            tuple(tf.tile(x, [repeats])[:size] for x in group)
        )

    return items.batch(distinct, drop_remainder=True).flat_map(repeated)


def in_order(source, order, places):
    """(name, image, label, place, whether it counts) of indices; -1 does not count."""

    def item(index, place):
        return (*source.item(tf.maximum(index, 0)), place, index >= 0)

    slices = tf.data.Dataset.from_tensor_slices((order.reshape(-1), places.reshape(-1)))
    return slices.map(item)


def batches(items, source, transform, config, share, unreadable, service=""):
    """Batches for one replica each of what `transform(image, place)` makes of the items.

    Args:
        service: address of a tf.data service whose workers divide the items among themselves.
    """

    def finish(name, image, label, place, counts):
        image = source.read(image) if source.read else image
        weight = tf.cast(counts, tf.float32)
        if label.shape.rank == 1:  # several right labels, or none: then it cannot be judged
            weight *= tf.reduce_max(label)
        return {**transform(image, place), "label": label, "weight": weight}

    if source.read is None:
        dataset = items.map(finish, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    else:
        # Not AUTOTUNE, and threads of its own: tf.data's shared ones are no more than the cores,
        # all of which may wait for files of a network.
        count = images_in_flight()
        dataset = items.interleave(
            lambda *item: image_or_black(item, finish),
            cycle_length=count,
            block_length=1,
            num_parallel_calls=count,
            deterministic=True,
        )
        options = tf.data.Options()
        options.threading.private_threadpool_size = count
        dataset = dataset.with_options(options)
    if service:
        sharding = tf.data.experimental.service.ShardingPolicy.DYNAMIC
        dataset = dataset.apply(tf.data.experimental.service.distribute(sharding, service))
    dataset = dataset.batch(config.batch_size // share.replicas, drop_remainder=True)
    if source.read is not None:
        dataset = dataset.map(unreadable.count)
    return dataset.prefetch(tf.data.AUTOTUNE)


def image_or_black(item, finish):
    """Returns a dataset of one element: the image, or a black one of weight 0 if it is unreadable.

    Nothing in it is stateful: under op determinism, tf.data runs an `interleave` one element at a
    time if its function holds a stateful operation, and `from_tensors` counts as one, where
    `from_tensor_slices` does not.
    """

    def readable(name, image, label, place, counts):
        return {**finish(name, image, label, place, counts), "unreadable": tf.constant("")}

    alone = tf.data.Dataset.from_tensor_slices(tuple(tf.expand_dims(x, 0) for x in item))
    good = alone.map(readable)
    spec = good.element_spec

    def black(name, image, label, place, counts):
        element = {key: tf.zeros(value.shape, value.dtype) for key, value in spec.items()}
        element["label"] = label
        if "place" in spec:
            element["place"] = place
        element["unreadable"] = tf.where(counts, name, "")
        return element

    return good.ignore_errors().concatenate(alone.map(black)).take(1)


def images_in_flight():
    """Returns how many images are read and augmented at once, at most: it grows with the cores."""
    return max(READ_AHEAD, 2 * (os.cpu_count() or 1))
