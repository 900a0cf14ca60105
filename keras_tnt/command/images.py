"""Which images a command is about, and their pixels."""

import os

import numpy as np

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def find_images(paths):
    """The image files that arguments stand for: files as given, and those in folders, sorted.

    Folders are listed as they are come to, so that no list of all files is held.

    Args:
        paths: of files and folders.

    Yields:
        Paths.

    Raises:
        ValueError: for a folder without images.
    """
    for path in paths:
        if not os.path.isdir(path):
            yield path
            continue
        found = None
        for found in images_below(path, (os.path.realpath(path),)):
            yield found
        if found is None:
            raise ValueError(
                f"Folder '{path}' holds no image: {', '.join(SUFFIXES)} are looked for."
            )


def images_below(folder, above):
    """The images in a folder and the folders in it, each folder's in the order of their names."""
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            place = os.path.realpath(entry.path)
            if place not in above:  # a link to a folder above would be gone through for ever
                yield from images_below(entry.path, (*above, place))
        elif entry.name.lower().endswith(SUFFIXES):
            yield entry.path


def evaluation_array(path, transform):
    """The pixels of an image file as a model takes them.

    Args:
        path: of the file.
        transform: a `runtime.Transform`.

    Returns:
        A float32 array.
    """
    from keras_tnt.images import convert, evaluation_crop, open_picture

    picture = convert(open_picture(path), transform.channels)
    crop = evaluation_crop(picture, transform.size, transform.covered)
    pixels = np.reshape(np.asarray(crop, "float32"), (*transform.size, transform.channels))
    if transform.mean is not None:
        pixels = (pixels / 255 - transform.mean) / transform.std
    return np.moveaxis(pixels, -1, 0) if transform.channels_first else pixels
