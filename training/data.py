"""Input pipeline: from a data set to batches.

The order is a pure function of (seed, epoch), and an image's augmentation one of (seed, epoch,
position in the epoch). So a run resumes within an epoch by starting there, and any number of
workers and devices sees the same global batches. Exceptions: of a streamed source each worker has
its own order, and a tf.data service with several workers shows each image once, in no fixed order.
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

# Size of the shuffle buffer of a streamed source, in images.
SHUFFLE_BUFFER = 8192
# Images that are read and augmented in parallel: a base, and a number for each core. There are more
# than cores, because a thread that waits for a file uses none.
BASE_IN_FLIGHT = 8
IN_FLIGHT_PER_CORE = 4


@dataclasses.dataclass(frozen=True)
class WorkerShare:
    """Part of each global batch that this process loads: its worker's columns.

    Args:
        index: Index of this process's worker, counted from 0.
        workers: Number of workers.
        replicas: Number of devices of all workers.
    """

    index: int
    workers: int
    replicas: int

    def columns(self, batch_size):
        """Returns this worker's columns of a global batch, a slice."""
        width = batch_size // self.workers
        return slice(self.index * width, (self.index + 1) * width)


class UnreadableImages:
    """Counter of unreadable images, which logs each once and fails if their share exceeds a limit.

    Args:
        source: The `Indexed` or `Streamed` source.
        largest_share: Largest share of its images that may be unreadable, in [0, 1].
    """

    def __init__(self, source, largest_share):
        """Lists the source's record files, to find a damaged one."""
        self.files = sorted({file for file, _, _ in source.stretches})
        self.size = source.size
        self.limit = int(source.size * largest_share)
        self.names = set()
        self.lock = threading.Lock()

    def add(self, name):
        """Counts an image by its name, bytes, and logs it the first time."""
        name = name.decode(errors="replace")
        with self.lock:
            new = name not in self.names
            self.names.add(name)
            number = len(self.names)
        if new:
            hint = " (animated WebP is not read)" if name.lower().endswith(".webp") else ""
            print(f"corrupt image {number} (of {self.size}), skipped: {name}{hint}", flush=True)
        return np.float32(0)

    def count(self, batch):
        """Counts the unreadable images of a batch, in the trainer's own process.

        The `numpy_function` is declared stateless, because under op determinism one stateful
        function makes tf.data run the whole pipeline synchronously. This is safe: it adds names to
        a set, which depends neither on order nor on repetition.

        Args:
            batch: Dict of tensors with `unreadable`, string (batch,): the names of the unreadable
                images, "" for the others.

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
        """Raises a ValueError if too many images are unreadable.

        Args:
            count: Number of unreadable images. If `None`, those that this process found.
        """
        count = len(self.names) if count is None else count
        if count > self.limit:
            raise ValueError(
                f"{count} of {self.size} images cannot be read, more than --max_corrupt allows "
                f"({self.limit}). Among them: {', '.join(sorted(self.names)[:5])}"
            )

    @contextlib.contextmanager
    def reading(self):
        """Converts TensorFlow's errors about damaged records to ValueErrors."""
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
    """Returns the indices of an epoch's images, integers (steps, batch_size).

    With repeated augmentation a batch holds each of its distinct images `repeats` times, so an
    epoch shows fewer distinct images.

    Args:
        config: A `training.configuration.Config`.
        size: Number of images.
        steps: Updates per epoch.
        epoch: Counted from 0.
    """
    shuffled = np.random.default_rng([config.seed, epoch]).permutation(size)
    distinct = -(-config.batch_size // config.repeats)
    rows = np.resize(shuffled, (steps, distinct))
    return np.tile(rows, (1, config.repeats))[:, : config.batch_size]


def evaluation_order(batch_size, size):
    """Returns the indices of all images in order, integers (steps, batch_size).

    The last row is padded with -1.
    """
    steps = -(-size // batch_size)
    order = np.full(steps * batch_size, -1)
    order[:size] = np.arange(size)
    return order.reshape(steps, batch_size)


def training_batches(source, config, size, fill, epoch, first_step, steps, share, unreadable):
    """Returns an epoch's batches from `first_step` on, each for one replica.

    Args:
        source: An `Indexed` or `Streamed` source.
        config: A `training.configuration.Config`.
        size: (height, width) of the model's input.
        fill: Color that geometric augmentation fills in.
        epoch: Counted from 0.
        first_step: Updates of this epoch made before.
        steps: Updates per epoch.
        share: A `WorkerShare`.
        unreadable: An `UnreadableImages`.

    Returns:
        A `tf.data.Dataset` of dicts: `image` uint8 (float32 with KerasCV), `label`, `weight` (0 for
        unreadable images) and `erase`, the box of random erasing, int32 (batch, 4).
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
    """Returns batches of every image once; padding to whole batches has weight 0.

    Args:
        source: An `Indexed` or `Streamed` source.
        config: A `training.configuration.Config`.
        size: (height, width) of the model's input.
        share: A `WorkerShare`.
        unreadable: An `UnreadableImages`.

    Returns:
        A `tf.data.Dataset` of dicts: `image` uint8, `label`, `weight`, and `place`, the image's
        position in the data set, -1 for padding.
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
    """Implements repeated augmentation of a streamed source.

    Args:
        items: A `tf.data.Dataset` of tuples.
        distinct: Number of distinct items per group.
        repeats: Number of copies of each.
        size: Number of items per group in the result; the group is truncated to it.
    """

    def repeated(*group):
        return tf.data.Dataset.from_tensor_slices(
            tuple(tf.tile(x, [repeats])[:size] for x in group)
        )

    return items.batch(distinct, drop_remainder=True).flat_map(repeated)


def in_order(source, order, places):
    """Returns a dataset of (name, image, label, place, counts) for the given indices.

    Args:
        source: An `Indexed` source.
        order: Indices of images, -1 for padding, for which `counts` is false.
        places: Positions, in the shape of `order`.
    """

    def item(index, place):
        return (*source.item(tf.maximum(index, 0)), place, index >= 0)

    slices = tf.data.Dataset.from_tensor_slices((order.reshape(-1), places.reshape(-1)))
    return slices.map(item)


def batches(items, source, transform, config, share, unreadable, service=""):
    """Reads, transforms and batches items, for one replica each.

    Args:
        items: A `tf.data.Dataset` of (name, image, label, place, counts).
        source: An `Indexed` or `Streamed` source.
        transform: Function from (image, place) to a dict of tensors.
        config: A `training.configuration.Config`.
        share: A `WorkerShare`.
        unreadable: An `UnreadableImages`.
        service: Address of a tf.data service whose workers divide the items among themselves.
            Defaults to "", no service.

    Returns:
        A `tf.data.Dataset` of dicts.
    """

    def finish(name, image, label, place, counts):
        image = source.read(image) if source.read else image
        weight = tf.cast(counts, tf.float32)
        if label.shape.rank == 1:  # multi-label; an image without any label does not count
            weight *= tf.reduce_max(label)
        return {**transform(image, place), "label": label, "weight": weight}

    if source.read is None:
        dataset = items.map(finish, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    else:
        # A private thread pool of fixed size: tf.data's shared pool has one thread per core, all of
        # which may be waiting for files on a network.
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

    It contains no stateful op: under op determinism tf.data runs an `interleave` sequentially if
    its function holds one. `from_tensors` counts as stateful, `from_tensor_slices` does not.

    Args:
        item: (name, image, label, place, counts).
        finish: Function from these to a dict of tensors.
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


def usable_cores():
    """Returns the number of cores that this process may use.

    It is TensorFlow's inter-op parallelism if a user has set it, else the number of cores in the
    process's affinity mask, which a container or a batch system may restrict.
    """
    threads = tf.config.threading.get_inter_op_parallelism_threads()
    if threads > 0:
        return threads
    if hasattr(os, "sched_getaffinity"):  # neither macOS nor Windows has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def images_in_flight():
    """Returns how many images are read and augmented in parallel; it grows with the cores."""
    return BASE_IN_FLIGHT + IN_FLIGHT_PER_CORE * usable_cores()
