"""Atomic writes of exported files and of numbered model versions."""

import contextlib
import os
import re
import tempfile

import numpy as np

from keras_tnt.files import flush_to_disk, replacing, scratch, telling_of_a_full_disk

WHAT = "the export"


def versions(directory):
    """Returns the version numbers in a model's directory, sorted."""
    if not os.path.isdir(directory):
        return []
    return sorted(int(name) for name in os.listdir(directory) if re.fullmatch(r"\d+", name))


def check_directory(directory, version=None):
    """Raises an error if a directory cannot take a new version.

    Raises:
        NotADirectoryError: if `directory` or one of its parents is a file.
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
    """Returns the size of a model's weights in float32, in bytes."""
    return 4 * sum(int(np.prod(v.shape)) for v in network.variables)


@contextlib.contextmanager
def new_version(directory, version=None):
    """Yields a temporary folder that becomes a version if the block ends without an error.

    Args:
        directory: the model's directory.
        version: version number. Defaults to the next free number at the end of the block.

    Yields:
        A `Place`. Files are written to its `aside`; after the block, `path` is the version.
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
    """Temporary folder and final path of a version."""

    def __init__(self, aside):
        """Sets the temporary folder; `new_version` sets `path` when the block has ended."""
        self.aside = aside
        self.path = None


@contextlib.contextmanager
def new_file(path, *companions):
    """Yields the path of `keras_tnt.files.replacing`; temporary files go to the same folder."""
    folder = os.path.dirname(os.path.abspath(path))
    with telling_of_a_full_disk(folder, WHAT), replacing(path, *companions) as temporary:
        with temporary_files_in(os.path.dirname(temporary)):
            yield temporary


@contextlib.contextmanager
def temporary_files_in(folder):
    """Sets Python's temporary directory to `folder` within the block.

    A later export removes scratch folders of a killed process, and nothing removes its files in
    `/tmp`, such as the one that AutoGraph writes for the signatures of a SavedModel.
    """
    before, tempfile.tempdir = tempfile.tempdir, os.fspath(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
