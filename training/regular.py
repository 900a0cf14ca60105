"""Reading of files at names where something else than a file may be: links, devices, FIFOs."""

import os

from keras_tnt import files


def exists(path):
    """Returns whether anything has this name, be it a link to nothing or a device.

    Raises:
        OSError: if the file system does not say, for instance because the disk is absent.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_regular(path):
    """Checks that a name is that of a regular file that can be read, without waiting for a FIFO.

    Raises:
        OSError: if it is not. Its message says what the name is of.
    """
    try:
        files.open_regular(path).close()
    except ValueError as error:
        raise OSError(str(error)) from error


def read_regular(path, max_bytes):
    """Returns the bytes of a regular file of at most `max_bytes`.

    Raises:
        OSError: if it cannot be read, or the name is of something else.
    """
    try:
        return files.read_regular(path, max_bytes)
    except ValueError as error:
        raise OSError(str(error)) from error


def aside(path, suffix=".corrupt"):
    """Renames whatever has a name, to a free name next to it; returns the new path."""
    number, free = 1, path.with_suffix(suffix)
    while os.path.lexists(free):
        number += 1
        free = path.with_suffix(f".{number}{suffix}")
    os.replace(path, free)
    return free
