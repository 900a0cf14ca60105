"""Files that are written atomically, files that are read without trust, and locks.

Files and folders appear whole or not at all: they are written aside, flushed to disk and renamed.
"""

import contextlib
import errno
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

ASIDE = ".writing-"
# A folder that is not locked so long after it was written to is nobody's.
SECONDS_TO_LOCK = 3600
FULL = tuple(
    os.strerror(number) for number in (errno.ENOSPC, getattr(errno, "EDQUOT", 0)) if number
)
# What systems and file systems answer that cannot flush a directory, or any file.
CANNOT_FLUSH = {
    getattr(errno, name, None)
    for name in ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EBADF", "ENOTTY", "EROFS")
}
CANNOT_OPEN_DIRECTORY = {errno.EACCES, errno.EPERM, errno.EISDIR, *CANNOT_FLUSH}
# What they answer that have no locks.
CANNOT_LOCK = {
    getattr(errno, name, None) for name in ("ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL")
}
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}


# === Paths, and files of others ===


def expand(path: str | os.PathLike) -> str:
    """Returns a path as text, with a leading `~` or `~user` replaced by the home directory."""
    return os.path.expanduser(os.fsdecode(path))


def kind_of(path: str | os.PathLike) -> str | None:
    """Returns what stands at a path, itself if it is a link: "file", or one of `KINDS`.

    Returns `None` if there is nothing.
    """
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    return KINDS.get(stat.S_IFMT(mode), "file")


def open_regular(
    path: str | os.PathLike,
    max_bytes: int | None = None,
    *,
    follow: bool = True,
    flags: int = os.O_RDONLY,
    mode: int = 0o666,
) -> BinaryIO:
    """Opens a file that somebody else may have made, if it is a regular file.

    Directories, FIFOs, sockets and devices are refused without being waited for.

    Args:
        path: Path of the file; `~` is expanded.
        max_bytes: The largest size that is accepted. If `None`, any.
        follow: Whether a symbolic link is followed. If not, it is refused.
        flags: Of `os.open`.
        mode: Of a file that is created.

    Returns:
        A binary file.

    Raises:
        ValueError: If it is something else, or larger.
        OSError: If there is no such file, or it may not be opened.
    """
    path = expand(path)
    status = None
    with contextlib.suppress(FileNotFoundError):
        status = os.stat(path, follow_symlinks=follow)
        # Before it is opened: to open a device or a FIFO has effects.
        check_regular(path, status, max_bytes)
    for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    if not follow:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags, mode)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise not_regular(path, "a symbolic link") from error
        raise
    try:
        check_regular(path, os.fstat(descriptor), max_bytes)
        return os.fdopen(descriptor, "r+b" if flags & (os.O_RDWR | os.O_WRONLY) else "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike, max_bytes: int, *, follow: bool = True) -> bytes:
    """Returns the content of a regular file of at most `max_bytes`; see `open_regular`."""
    with open_regular(path, max_bytes, follow=follow) as file:
        data = file.read(max_bytes + 1)  # A file may grow, and those of /proc have no size.
    if len(data) > max_bytes:
        raise too_large(path, len(data), max_bytes)
    return data


def check_regular(path, status, max_bytes=None):
    """Raises a `ValueError` if a file's status is not that of a regular file of that size."""
    if not stat.S_ISREG(status.st_mode):
        raise not_regular(path, KINDS.get(stat.S_IFMT(status.st_mode), "not a file"))
    if max_bytes is not None and status.st_size > max_bytes:
        raise too_large(path, status.st_size, max_bytes)


def not_regular(path, kind):
    return ValueError(f"'{os.fsdecode(path)}' is {kind}; a regular file is needed.")


def too_large(path, size, max_bytes):
    return ValueError(f"'{os.fsdecode(path)}' has {size:,} bytes; at most {max_bytes:,} are read.")


# === Files and folders that are written ===


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
    folder, name = os.path.split(os.path.abspath(expand(path)))
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
    """Waits until a file, or the names in a folder, lie on the disk, where the system can do that.

    Windows opens no directories, and some network file systems flush none (gcsfuse, CIFS): what
    was written is in its place then, and survives a power loss when the system has written it.
    """
    is_directory = os.path.isdir(path)
    # Windows flushes only what may be written to.
    flags = os.O_RDWR | os.O_BINARY if os.name == "nt" else os.O_RDONLY
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if is_directory and error.errno in CANNOT_OPEN_DIRECTORY:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (CANNOT_OPEN_DIRECTORY if is_directory else CANNOT_FLUSH):
            raise
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
    if os.name == "nt":  # where `os.kill(process, 0)` sends Ctrl+C
        return runs_on_windows(process)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def runs_on_windows(process):
    import ctypes

    kernel, synchronize, timed_out = ctypes.windll.kernel32, 0x00100000, 0x102
    handle = kernel.OpenProcess(synchronize, False, process)
    if not handle:
        return kernel.GetLastError() == 5  # Access denied: it runs, as somebody else's.
    try:
        return kernel.WaitForSingleObject(handle, 0) == timed_out
    finally:
        kernel.CloseHandle(handle)


# === Locks between processes ===


class Held(ValueError):
    """Another process holds a lock; the message is what it wrote about itself."""


@contextlib.contextmanager
def exclusive(path: str | os.PathLike, *, remove: bool = False) -> Iterator[str | None]:
    """Holds a lock that no other process gets until the block ends or this process dies.

    The lock is the operating system's (flock, LockFileEx), so that what a killed process leaves
    holds nobody up.

    Args:
        path: Path of the file that is locked, which is made if it does not exist, and describes
            who holds the lock. Its directory must exist.
        remove: Whether the file is removed at the end.

    Yields:
        `None`, or why the file system cannot lock.

    Raises:
        Held: If another process, or another block of this one, holds the lock.
        ValueError: If something else than a regular file stands at the path.
        OSError: If the file cannot be made.
    """
    import filelock

    path = expand(path)
    if (kind := kind_of(path)) not in (None, "file"):
        raise ValueError(f"'{path}' is {kind}, where a lock file has to be: remove it.")
    if has_posix_lock(path):
        raise Held(holder(path))
    lock = filelock.FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise Held(holder(path)) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in CANNOT_LOCK:
            raise
        yield getattr(error, "strerror", None) or str(error)
        return
    try:
        with contextlib.suppress(OSError, ValueError):  # On Windows nobody else may read it.
            with open_regular(path, follow=False, flags=os.O_RDWR) as file:
                file.truncate(0)
                file.write(
                    f"process {os.getpid()} of {socket.gethostname()}, since "
                    f"{time.strftime('%Y-%m-%d %H:%M:%S')}: {' '.join(sys.argv)}".encode(
                        "utf-8", "backslashreplace"
                    )
                )
        yield None
    finally:
        if remove:  # before the release, so that it is nobody else's
            with contextlib.suppress(OSError):
                os.remove(path)
        lock.release()


def has_posix_lock(path):
    """Returns whether a process of an earlier version of this package locks a file: by lockf."""
    if fcntl is None:
        return False
    try:
        with open_regular(path, follow=False, flags=os.O_RDWR) as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
    except (BlockingIOError, PermissionError) as error:
        return error.filename is None  # of lockf, not of open
    except OSError:
        return False
    return False


def holder(path):
    """What the holder of a lock wrote about itself."""
    try:
        text = read_regular(path, 1 << 16, follow=False).decode("utf-8", "replace")
    except (OSError, ValueError):
        text = ""
    return text or "just begun"


# === Disks ===


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
