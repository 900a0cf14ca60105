"""Safe access to paths that may not be regular files: links, devices, FIFOs."""

import os

from keras_tnt import files


def exists(path):
    """Returns whether a path exists, without following links: a dangling link exists.

    Raises:
        OSError: If the file system cannot tell, for example because a disk is unmounted.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_regular(path):
    """Checks that a path is a readable regular file, without blocking on a FIFO.

    Raises:
        OSError: If it is not; the message says what it is.
    """
    try:
        files.open_regular(path).close()
    except ValueError as error:
        raise OSError(str(error)) from error


def read_regular(path, max_bytes):
    """Returns the contents of a regular file of at most `max_bytes`, as bytes.

    Raises:
        OSError: If it is unreadable, too large, or not a regular file.
    """
    try:
        return files.read_regular(path, max_bytes)
    except ValueError as error:
        raise OSError(str(error)) from error


def aside(path, suffix=".corrupt"):
    """Renames a path to an unused name next to it.

    Args:
        path: A `Path`.
        suffix: Suffix of the new name. Defaults to ".corrupt".

    Returns:
        The new path.
    """
    number, free = 1, path.with_suffix(suffix)
    while os.path.lexists(free):
        number += 1
        free = path.with_suffix(f".{number}{suffix}")
    os.replace(path, free)
    return free
