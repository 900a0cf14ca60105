"""Entries of the cache directory: regular files that end in a SHA-256 checksum of their content.

An entry that is truncated, modified, or not a regular file counts as missing, and is written again.
Libraries are validated before they are loaded, because the loader maps them into memory, where a
truncated file crashes the process (SIGBUS).
"""

import hashlib
import os
import stat

from keras_tnt.files import replacing

MARK = b"\nkeras_tnt sha256"
SEAL_BYTES = len(MARK) + hashlib.sha256().digest_size


def folder() -> str:
    """Returns the cache directory, `$XDG_CACHE_HOME/keras_tnt` or `~/.cache/keras_tnt`."""
    caches = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"))
    return os.path.join(caches, "keras_tnt")


def is_regular(path: str | os.PathLike) -> bool:
    """Returns whether a path is a regular file, and not a link, directory, FIFO or device."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except (OSError, ValueError):
        return False


def read_regular(path: str | os.PathLike) -> bytes:
    """Returns the bytes of a regular file, without following a link or blocking on a FIFO.

    Raises:
        OSError: if the path is not a regular file, or cannot be read.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC if hasattr(os, "O_CLOEXEC") else os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):
        flags |= getattr(os, name, 0)
    with open(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"'{os.fspath(path)}' is not a regular file.")
        return file.read()


def seal(path: str | os.PathLike) -> None:
    """Appends the checksum to a file; dynamic loaders ignore bytes after the end of a library."""
    with open(path, "r+b") as file:
        file.write(MARK + hashlib.sha256(file.read()).digest())


def read(path: str | os.PathLike) -> bytes | None:
    """Returns the content of an entry, or `None` if it is missing or damaged."""
    try:
        data = read_regular(path)
    except (OSError, ValueError):
        return None
    content, mark = data[:-SEAL_BYTES], data[-SEAL_BYTES:]
    if mark != MARK + hashlib.sha256(content).digest():
        return None
    return content


def write(path: str | os.PathLike, content: bytes) -> None:
    """Writes an entry atomically, with its checksum.

    Raises:
        OSError: if it cannot be written.
    """
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(content)
        seal(temporary)
