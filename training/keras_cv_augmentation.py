"""KerasCV's RandAugment, cutout, mixup and cutmix, as functions of a seed.

KerasCV's layers draw from TensorFlow's global generator, which has no place for a run to go on
from and which determinism forbids. Here they are made and traced while `tf.random` draws from a
seed instead: an image's augmentation is a function of the image's seed, and a batch's mixing one of
its images' seeds, as everywhere in the trainer.
"""

import contextlib
import functools

import tensorflow as tf


@functools.cache
def image_augmentation(randaugment, erasing):
    """A function (image, seed) to the image after RandAugment and cutout.

    It is kept, for to trace it takes as long as an epoch of a small data set.

    Args:
        randaugment: whether to apply RandAugment.
        erasing: probability of cutout.

    Returns:
        A function of uint8 (height, width, 3) and an integer tensor (2,) to float32 of the same
        shape, in [0, 255].

    Raises:
        ImportError: if KerasCV is not installed.
    """
    layers = import_layers()

    @tf.function  # KerasCV's layers need autograph
    def augment(image, seed):
        augmented = tf.cast(image, tf.float32)
        with draws_from(seed):
            if randaugment:
                magnitudes = {"magnitude": 0.9, "magnitude_stddev": 0.05, "rate": 0.5}
                layer = layers.RandAugment((0, 255), augmentations_per_image=2, **magnitudes)
                augmented = layer(augmented, training=True)
            if erasing:
                layer = layers.RandomCutout((0.1, 0.6), (0.1, 0.6), fill_mode="gaussian_noise")
                erased = layer(augmented, training=True)
                augmented = tf.where(tf.random.uniform([]) < erasing, erased, augmented)
        return tf.ensure_shape(tf.clip_by_value(augmented, 0, 255), image.shape)

    return augment


def batch_mixing(mixup, cutmix, classes):
    """A function on batches: mixup or cutmix, with even odds where both are asked for.

    Args:
        mixup, cutmix: alpha of each; 0: none.
        classes: number of classes.

    Returns:
        A function from a batch with `image`, `label` and `seed` (batch, 2) to one with soft labels
        (batch, classes) and without seeds.
    """
    layers = import_layers()

    def mix(batch):
        seed = tf.reduce_sum(batch.pop("seed"), axis=0)
        labels = tf.one_hot(batch["label"], classes)
        inputs = {"images": batch["image"], "labels": labels}
        with draws_from(seed):
            mixing = [layers.MixUp(mixup)] if mixup else []
            mixing += [layers.CutMix(cutmix)] if cutmix else []
            if mixing[1:]:
                mixing = [layers.RandomChoice(mixing, batchwise=True)]
            for layer in mixing:
                inputs = layer(inputs, training=True)
        return {**batch, "image": inputs["images"], "label": inputs["labels"]}

    return mix


def import_layers():
    """KerasCV's layers."""
    try:
        import keras_cv
    except ImportError as error:
        raise ImportError(
            '--augmentation=keras_cv needs KerasCV: pip install "keras-tnt[train]"'
        ) from error
    return keras_cv.layers


class SeededDraws:
    """Stands in for a `tf.random.Generator`: the n-th draw is a function of the seed and n.

    Args:
        seed: integer tensor (2,).
    """

    def __init__(self, seed):
        self.seed = seed
        self.drawn = 0

    def next_seed(self):
        self.drawn += 1
        return tf.random.experimental.stateless_fold_in(self.seed, self.drawn)

    def uniform(self, shape, minval=0, maxval=None, dtype=tf.float32, seed=None, name=None):
        maxval = 1 if maxval is None else maxval
        return tf.random.stateless_uniform(shape, self.next_seed(), minval, maxval, dtype)

    def normal(self, shape, mean=0.0, stddev=1.0, dtype=tf.float32, seed=None, name=None):
        return tf.random.stateless_normal(shape, self.next_seed(), mean, stddev, dtype)

    def gamma(self, shape, alpha, beta=None, dtype=tf.float32, seed=None, name=None):
        return tf.random.stateless_gamma(shape, self.next_seed(), alpha, beta, dtype)

    def shuffle(self, value, seed=None, name=None):
        return tf.random.experimental.stateless_shuffle(value, self.next_seed())


@contextlib.contextmanager
def draws_from(seed):
    """Let `tf.random` draw from a seed, for the layers that are made and traced meanwhile."""
    draws = SeededDraws(seed)
    replaced = {name: getattr(draws, name) for name in ("uniform", "normal", "gamma", "shuffle")}
    replaced["get_global_generator"] = lambda: draws
    original = {name: getattr(tf.random, name) for name in replaced}
    for name, function in replaced.items():
        setattr(tf.random, name, function)
    try:
        yield
    finally:
        for name, function in original.items():
            setattr(tf.random, name, function)
