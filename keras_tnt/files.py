"""Files and folders that appear whole or not at all: written aside, flushed to disk, renamed."""

import contextlib
import errno
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

ASIDE = ".writing-"
# A folder that is not locked so long after it was written to is nobody's.
SECONDS_TO_LOCK = 3600
FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))


@contextlib.contextmanager
def scratch(folder: str | os.PathLike) -> Iterator[str]:
    """A temporary folder inside `folder`, on the same disk, removed at the end of the block.

    What processes left there when they were killed is removed first. The folder is locked while
    it is used, where the file system has locks: they end with their process.

    Args:
        folder: made if it does not exist.

    Yields:
        The path of the temporary folder.
    """
    os.makedirs(folder, exist_ok=True)
    remove_leftovers(folder)
    aside = tempfile.mkdtemp(prefix=f"{ASIDE}{socket.gethostname()}-{os.getpid()}-", dir=folder)
    try:
        with locked(aside):
            yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *companions: str) -> Iterator[str]:
    """A path to write to in place of `path`, which it replaces when the block ends without error.

    Args:
        path: of the file; its folder is made if it does not exist.
        companions: extensions of files that are written beside it, such as ".bin".

    Yields:
        A path of the same file name in a temporary folder.
    """
    folder, name = os.path.split(os.path.abspath(path))
    stem = os.path.splitext(name)[0]
    with scratch(folder) as aside:
        yield os.path.join(aside, name)
        for written in (*(stem + companion for companion in companions), name):
            flush_to_disk(os.path.join(aside, written))
            os.replace(os.path.join(aside, written), os.path.join(folder, written))
        flush_to_disk(folder)


def write_atomically(path: str | os.PathLike, data: bytes | str) -> None:
    """Write a file that is whole or not there, whatever happens meanwhile."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


def flush_to_disk(path: str) -> None:
    """Wait until a file, or the names in a folder, lie on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove the temporary folders of processes of this host that no longer run."""
    for name in os.listdir(folder):
        found = re.match(rf"{re.escape(ASIDE)}(.*)-(\d+)-", name)
        if found and found[1] == socket.gethostname():
            path = os.path.join(folder, name)
            if is_left(path, int(found[2])):
                shutil.rmtree(path, ignore_errors=True)


def is_left(path: str, process: int) -> bool:
    """Whether the process that made a temporary folder is gone.

    Containers may share a host's name and not its processes, and one that is started again gives
    their numbers anew: where locks tell more, they are believed.
    """
    try:
        with locked(path, required=True):
            age = time.time() - os.stat(path).st_mtime
    except BlockingIOError:
        return False
    except OSError:
        return not runs(process)
    return not runs(process) or age > SECONDS_TO_LOCK


@contextlib.contextmanager
def locked(folder: str, required: bool = False) -> Iterator[None]:
    """Lock a folder for as long as the block and this process last.

    Args:
        folder: its path.
        required: whether it is an error if the folder cannot be locked.

    Raises:
        BlockingIOError: if it is required, and another process has the lock.
        OSError: if it is required, and the system or the file system has no such locks.
    """
    if fcntl is None:
        if required:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), folder)
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if required:
                raise
        yield


def runs(process: int) -> bool:
    """Whether a process of this host runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def check_space(folder: str | os.PathLike, needed: int, what: str) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        folder: where it will be written; need not exist yet.
        needed: bytes.
        what: is to be written, for the message: "the export".

    Raises:
        OSError: of number ENOSPC.
    """
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{what} takes {needed / 1e6:,.1f} MB, and the disk has {free / 1e6:,.1f} MB free. "
            "Make room, or write elsewhere",
            folder,
        )


@contextlib.contextmanager
def telling_of_a_full_disk(folder: str | os.PathLike, what: str) -> Iterator[None]:
    """One clear error, whatever the libraries that write say when the disk is full.

    Args:
        folder: where it is written.
        what: is written, for the message: "the export".

    Raises:
        OSError: of number ENOSPC.
    """
    try:
        yield
    except Exception as error:
        if not any(said in str(error) for said in FULL):
            raise
        raise OSError(
            errno.ENOSPC,
            f"The disk ran full while {what} was written, of which nothing was kept. Make room, "
            "or write elsewhere",
            os.fspath(folder),
        ) from error
