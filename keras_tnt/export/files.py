"""Exported files, and a model's directory of versions: each appears whole."""

import contextlib
import os
import re
import tempfile

import numpy as np

from keras_tnt.files import flush_to_disk, replacing, scratch, telling_of_a_full_disk

WHAT = "the export"


def versions(directory):
    """The version numbers that a model's directory holds, in order."""
    if not os.path.isdir(directory):
        return []
    return sorted(int(name) for name in os.listdir(directory) if re.fullmatch(r"\d+", name))


def check_directory(directory, version=None):
    """Refuse a directory that cannot take another version.

    Raises:
        NotADirectoryError: if `directory`, or a folder above it, is a file.
        ValueError: if `version` is not a positive integer.
        FileExistsError: if `version` exists.
    """
    above = os.path.abspath(directory)
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise NotADirectoryError(f"'{above}' is a file. A model's versions lie in a directory.")
    if version is None:
        return
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"`version` must be a positive integer or None. Received: {version!r}")
    existing = versions(directory)
    if version in existing:
        raise FileExistsError(
            f"'{os.path.join(directory, str(version))}' exists, and a server may be reading it. "
            f"Leave `version` out for the next one, {existing[-1] + 1}, or remove it yourself."
        )


def size_of(network):
    """Bytes of a model's weights in float32."""
    return 4 * sum(int(np.prod(v.shape)) for v in network.variables)


@contextlib.contextmanager
def new_version(directory, version=None):
    """A folder to write a version into; it takes its place when the block ends without error.

    Args:
        directory: the model's directory.
        version: its number; None: the next free one at the end of the block.

    Yields:
        A `Place`: `aside` is the folder to write into, `path`, after the block, where it lies.
    """
    with telling_of_a_full_disk(directory, WHAT), scratch(directory) as aside:
        place = Place(aside)
        yield place
        for folder, _, names in os.walk(aside, topdown=False):
            for name in (*names, ""):
                flush_to_disk(os.path.join(folder, name))
        os.chmod(aside, 0o755)
        while place.path is None:
            number = version or max(versions(directory), default=0) + 1
            target = os.path.join(directory, str(number))
            try:
                os.rename(aside, target)
            except OSError:
                if version is not None or not os.path.isdir(target):
                    raise
            else:
                place.path = target
        flush_to_disk(directory)


class Place:
    """Where a version is being written, and then where it lies."""

    def __init__(self, aside):
        self.aside = aside
        self.path = None


@contextlib.contextmanager
def new_file(path, *companions):
    """As `keras_tnt.files.replacing`; what tools write meanwhile lies beside the file, too."""
    folder = os.path.dirname(os.path.abspath(path))
    with telling_of_a_full_disk(folder, WHAT), replacing(path, *companions) as temporary:
        with temporary_files_in(os.path.dirname(temporary)):
            yield temporary


@contextlib.contextmanager
def temporary_files_in(folder):
    """Python's temporary files lie in a folder for a while: one that is removed after a kill."""
    before, tempfile.tempdir = tempfile.tempdir, os.fspath(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
