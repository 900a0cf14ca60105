"""Data set of images in one folder per class, for `fit` on every backend."""

import os

import keras
import numpy as np

from keras_tnt.images.folders import SUFFIXES, list_folders, walk_images
from keras_tnt.preprocessing import load_image


class ImageFolder(keras.utils.PyDataset):
    """Batches of images from one folder per class, preprocessed as by `load_image`.

    It requires only Pillow, and `fit`, `evaluate` and `predict` accept it on every backend. The
    order of an epoch depends only on `seed` and the epoch's number.

    Args:
        directory: path of a directory with a folder for each class, named after it. Hidden files
            and folders, and those of archivers and file systems, are skipped.
        model: model that receives the images; it determines their size and channels.
        batch_size: images per batch; the last batch may have fewer. Defaults to 32.
        shuffle: whether epochs are shuffled; if not, images are in the order of their names.
            Defaults to `True`.
        seed: seed of the order and of the split. Defaults to 0.
        validation_share: fraction of each class, drawn with `seed`, that is in
            `subset="validation"` and not in `"training"`. Defaults to 0.
        subset: `"training"` or `"validation"`. If `None`, all images.
        kwargs: `workers`, `use_multiprocessing` and `max_queue_size` of `keras.utils.PyDataset`.

    Attributes:
        class_names: names of the folders, sorted.
        paths: paths of the images, in the order of their names.
        labels: indices of their classes.

    Raises:
        ValueError: if there are no folders with images, or an argument is out of range.

    Example:
        >>> model = keras_tnt.DeiTTiny()
        >>> images = keras_tnt.ImageFolder("photos", model, batch_size=16)
        >>> model = keras_tnt.reset_classifier(model, class_names=images.class_names)
        >>> model.compile("adamw", "sparse_categorical_crossentropy")
        >>> model.fit(images, epochs=3)
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        model: keras.Model,
        batch_size: int = 32,
        shuffle: bool = True,
        seed: int = 0,
        validation_share: float = 0.0,
        subset: str | None = None,
        **kwargs,
    ):
        """Lists the images; the class documents the arguments."""
        super().__init__(**kwargs)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a positive integer. Received: {batch_size!r}")
        if subset not in (None, "training", "validation"):
            raise ValueError(
                f"`subset` must be 'training', 'validation' or None. Received: {subset!r}"
            )
        if not 0 <= validation_share < 1 or (subset is None) != (validation_share == 0):
            raise ValueError(
                "`validation_share` must be from 0 up to 1, and goes with `subset`. Received: "
                f"validation_share={validation_share}, subset={subset!r}"
            )
        self.directory = os.path.expanduser(os.fspath(directory))
        self.model = model
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.class_names, files = find_classes(self.directory)
        if subset:
            files = [
                part(paths, validation_share, (seed, label), subset)
                for label, paths in enumerate(files)
            ]
        self.paths = [path for paths in files for path in paths]
        self.labels = np.repeat(np.arange(len(files)), [len(paths) for paths in files])
        if not self.paths:
            raise ValueError(f"No images of '{self.directory}' are in the subset '{subset}'.")
        self.order = self.draw_order()

    def draw_order(self):
        """Returns the order of the images in the current epoch, as an array of indices."""
        count = len(self.paths)
        if not self.shuffle:
            return np.arange(count)
        return np.random.default_rng((self.seed, self.epoch)).permutation(count)

    def on_epoch_end(self):
        """Draws the order of the next epoch."""
        self.epoch += 1
        self.order = self.draw_order()

    def __len__(self):
        """Returns the number of batches."""
        return -(-len(self.paths) // self.batch_size)

    def __getitem__(self, index):
        """Returns a batch: stacked images as of `load_image`, and int32 labels (batch,)."""
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} batches. Received: {index}")
        chosen = self.order[index * self.batch_size :][: self.batch_size]
        images = [load_image(self.paths[number], self.model) for number in chosen]
        return np.stack(images), self.labels[chosen].astype("int32")


def find_classes(directory):
    """Returns the class names in a directory, and a list of the image paths of each class.

    Args:
        directory: path of the directory.

    Raises:
        ValueError: if there is no directory, or none of its folders has images.
    """
    if not os.path.isdir(directory):
        raise ValueError(f"`directory` must be a folder. Received: '{directory}'")
    visited = set()
    files = {
        name: list(walk_images(os.path.join(directory, name), visited=visited))
        for name in list_folders(directory)
    }
    files = {name: paths for name, paths in files.items() if paths}
    if not files:
        raise ValueError(
            f"'{directory}' must have a folder of images for each class: {', '.join(SUFFIXES)} are "
            "looked for."
        )
    return list(files), list(files.values())


def part(paths, share, seed, subset):
    """Returns the paths of a class that belong to a subset."""
    count = round(len(paths) * share)
    held_out = set(np.random.default_rng(seed).permutation(len(paths))[:count].tolist())
    return [p for i, p in enumerate(paths) if (i in held_out) == (subset == "validation")]
