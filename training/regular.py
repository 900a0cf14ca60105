"""Reading of files at names where something else than a file may be: links, devices, FIFOs."""

import os
import stat


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
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        mode = os.fstat(descriptor).st_mode
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(mode):
        raise OSError(f"it is {kind(mode)}, not a regular file")


def read_regular(path):
    """Returns the bytes of a regular file.

    Raises:
        OSError: if it cannot be read, or the name is of something else.
    """
    check_regular(path)
    with open(path, "rb") as file:
        return file.read()


def kind(mode):
    """Returns the kind of file that a mode of `os.stat` is of, in words."""
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
        stat.S_IFSOCK: "a socket",
        stat.S_IFLNK: "a link",
    }
    return kinds.get(stat.S_IFMT(mode), "a file of an unknown kind")


def aside(path, suffix=".corrupt"):
    """Renames whatever has a name, to a free name next to it; returns the new path."""
    number, free = 1, path.with_suffix(suffix)
    while os.path.lexists(free):
        number += 1
        free = path.with_suffix(f".{number}{suffix}")
    os.replace(path, free)
    return free
