"""Image search and image preprocessing of the commands."""

import os
import sys

import numpy as np

from keras_tnt.images.folders import SUFFIXES, Skipped, walk_images


def find_images(paths, skipped=None):
    """Yields the image files of path arguments: files as given, and those in folders, sorted.

    Args:
        paths: paths of files and folders.
        skipped: a `Skipped` that counts skipped files in folders. If `None`, they are not counted.

    Yields:
        Paths.

    Raises:
        ValueError: for a folder without images.
    """
    skipped = Skipped() if skipped is None else skipped
    for path in paths:
        if not os.path.isdir(path):
            yield path
            continue
        found = None
        for found in walk_images(path, skipped):
            yield found
        if found is None:
            raise ValueError(
                f"Folder '{path}' holds no image: {', '.join(SUFFIXES)} are looked for ({skipped})."
            )


def report(skipped):
    """Prints the counts of skipped files in folders on stderr, if there are any."""
    if skipped:
        print(f"Folders: {skipped}.", file=sys.stderr, flush=True)


def evaluation_array(path, transform):
    """Returns the pixels of an image file, preprocessed for a model.

    Args:
        path: path of the file.
        transform: a `runtime.Transform`.

    Returns:
        A float32 array (height, width, channels), or channels first.
    """
    from keras_tnt.images.decoding import convert, evaluation_crop, open_picture

    picture = convert(open_picture(path), transform.channels)
    crop = evaluation_crop(picture, transform.size, transform.covered)
    pixels = np.reshape(np.asarray(crop, "float32"), (*transform.size, transform.channels))
    if transform.mean is not None:
        pixels = (pixels / 255 - transform.mean) / transform.std
    return np.moveaxis(pixels, -1, 0) if transform.channels_first else pixels
