"""KerasCV's RandAugment, cutout, mixup and cutmix as functions of a seed.

KerasCV's layers draw from TensorFlow's global generator, whose state is not checkpointed and which
op determinism forbids. Here they are built and traced while `tf.random` is patched to draw from a
seed, as everywhere in the trainer: the image's seed for augmentation, the sum of the images' seeds
for mixing.
"""

import contextlib
import functools

import tensorflow as tf


@functools.cache
def image_augmentation(randaugment, erasing):
    """Builds the function that applies RandAugment and cutout to an image.

    It is cached, because tracing takes as long as an epoch of a small data set.

    Args:
        randaugment: Whether to apply RandAugment.
        erasing: Probability of cutout.

    Returns:
        Function from uint8 (height, width, 3) and an integer tensor (2,) to float32 of the same
        shape, in [0, 255].

    Raises:
        ImportError: If KerasCV is not installed.
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
    """Builds the function that applies mixup or cutmix to a batch, with even odds if both are on.

    Args:
        mixup: Alpha of mixup; 0 turns it off.
        cutmix: Alpha of cutmix; 0 turns it off.
        classes: Number of classes.

    Returns:
        Function from a batch with `image`, `label` and `seed` (batch, 2) to one with soft labels
        (batch, classes) and without `seed`.
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
    """Returns `keras_cv.layers`.

    Raises:
        ImportError: If KerasCV is not installed; the message names the extra.
    """
    try:
        import keras_cv
    except ImportError as error:
        raise ImportError(
            '--augmentation=keras_cv needs KerasCV: pip install "keras-tnt[train]"'
        ) from error
    return keras_cv.layers


class SeededDraws:
    """Replacement of a `tf.random.Generator`, whose n-th draw is a function of the seed and n.

    Args:
        seed: Integer tensor (2,).
    """

    def __init__(self, seed):
        """Starts the count of draws at 0."""
        self.seed = seed
        self.drawn = 0

    def next_seed(self):
        """Returns the seed of the next draw, an integer tensor (2,)."""
        self.drawn += 1
        return tf.random.experimental.stateless_fold_in(self.seed, self.drawn)

    def uniform(self, shape, minval=0, maxval=None, dtype=tf.float32, seed=None, name=None):
        """Returns a draw of `tf.random.uniform`; `seed` and `name` are ignored."""
        maxval = 1 if maxval is None else maxval
        return tf.random.stateless_uniform(shape, self.next_seed(), minval, maxval, dtype)

    def normal(self, shape, mean=0.0, stddev=1.0, dtype=tf.float32, seed=None, name=None):
        """Returns a draw of `tf.random.normal`; `seed` and `name` are ignored."""
        return tf.random.stateless_normal(shape, self.next_seed(), mean, stddev, dtype)

    def gamma(self, shape, alpha, beta=None, dtype=tf.float32, seed=None, name=None):
        """Returns a draw of `tf.random.gamma`; `seed` and `name` are ignored."""
        return tf.random.stateless_gamma(shape, self.next_seed(), alpha, beta, dtype)

    def shuffle(self, value, seed=None, name=None):
        """Returns a draw of `tf.random.shuffle`; `seed` and `name` are ignored."""
        return tf.random.experimental.stateless_shuffle(value, self.next_seed())


@contextlib.contextmanager
def draws_from(seed):
    """Patches `tf.random` to draw from a seed within the context."""
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
