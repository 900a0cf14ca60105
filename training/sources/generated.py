"""Data sets that need no files: handwritten digits and noise."""

import numpy as np

from training.sources.kinds import Indexed, in_memory

DIGITS_SPLIT_SEED = 0
IMAGENET_IMAGES = 1_281_167


def digits():
    """Returns scikit-learn's 1,797 handwritten digits, resized to 32x32x3, with 20% held out.

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
    from training import augmentation

    small, labels = load_digits(return_X_y=True)
    small = np.reshape(small, (-1, 8, 8, 1)) * (255 / 16)
    images = np.repeat(augmentation.resize(small, (32, 32)).numpy(), 3, axis=-1)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=DIGITS_SPLIT_SEED
    )
    return (train_images, train_labels), (test_images, test_labels)


def digits_split(config, held_out):
    """Returns a split of the digits as an `Indexed`."""
    images, labels = digits()[held_out]
    return in_memory(images, labels, 10, "digit", tuple("0123456789"))


def synthetic(config, held_out):
    """Returns black images, which the training step replaces by noise on the device."""
    import tensorflow as tf

    side = config.image_size or 32
    classes = config.classes or 1000

    def item(index):
        return "synthetic", tf.zeros([side, side, 3], tf.uint8), tf.cast(index % classes, tf.int64)

    return Indexed(config.batch_size if held_out else IMAGENET_IMAGES, classes, item)
