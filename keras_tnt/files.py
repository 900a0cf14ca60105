"""Atomic file writes, safe reads of untrusted files, and locks.

Files and directories appear completely or not at all: they are written to a temporary directory,
flushed to disk and renamed.
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
except ImportError:  # Windows
    fcntl = None

ASIDE = ".writing-"
# An unlocked temporary directory is stale this long after its last change.
SECONDS_TO_LOCK = 3600
FULL = tuple(
    os.strerror(number) for number in (errno.ENOSPC, getattr(errno, "EDQUOT", 0)) if number
)
# Errors of systems and file systems that cannot flush a directory, or any file.
CANNOT_FLUSH = {
    getattr(errno, name, None)
    for name in ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EBADF", "ENOTTY", "EROFS")
}
CANNOT_OPEN_DIRECTORY = {errno.EACCES, errno.EPERM, errno.EISDIR, *CANNOT_FLUSH}
# Errors of those without locks.
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


# === Paths and untrusted files ===


def expand(path: str | os.PathLike) -> str:
    """Returns a path as text, with a leading `~` or `~user` replaced by the home directory."""
    return os.path.expanduser(os.fsdecode(path))


def kind_of(path: str | os.PathLike) -> str | None:
    """Returns the kind of the object at a path: "file", or one of `KINDS`.

    Symbolic links are not followed. Returns `None` if there is nothing.
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
    """Opens a possibly untrusted file, if it is a regular file.

    Directories, FIFOs, sockets and devices are rejected without blocking.

    Args:
        path: Path of the file; `~` is expanded.
        max_bytes: Maximum size in bytes. If `None`, any size is accepted.
        follow: Whether to follow a symbolic link; if not, it is rejected. Defaults to `True`.
        flags: Flags of `os.open`. Defaults to `os.O_RDONLY`.
        mode: Permissions of a file that is created. Defaults to 0o666.

    Returns:
        A binary file.

    Raises:
        ValueError: If it is not a regular file, or is too large.
        OSError: If there is no such file, or it cannot be opened.
    """
    path = expand(path)
    status = None
    with contextlib.suppress(FileNotFoundError):
        status = os.stat(path, follow_symlinks=follow)
        # Checked before it is opened, because opening a device or a FIFO has side effects.
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
        data = file.read(max_bytes + 1)  # Files may grow, and in /proc their size is 0.
    if len(data) > max_bytes:
        raise too_large(path, len(data), max_bytes)
    return data


def check_regular(path, status, max_bytes=None):
    """Raises a `ValueError` unless a status is that of a regular file of at most `max_bytes`."""
    if not stat.S_ISREG(status.st_mode):
        raise not_regular(path, KINDS.get(stat.S_IFMT(status.st_mode), "not a file"))
    if max_bytes is not None and status.st_size > max_bytes:
        raise too_large(path, status.st_size, max_bytes)


def not_regular(path, kind):
    """Returns the `ValueError` for a path that is not a regular file."""
    return ValueError(f"'{os.fsdecode(path)}' is {kind}; a regular file is needed.")


def too_large(path, size, max_bytes):
    """Returns the `ValueError` for a file that is too large."""
    return ValueError(f"'{os.fsdecode(path)}' has {size:,} bytes; at most {max_bytes:,} are read.")


# === Atomic writes ===


@contextlib.contextmanager
def scratch(folder: str | os.PathLike) -> Iterator[str]:
    """Creates a temporary directory inside `folder`, and removes it at the end of the block.

    It is on the same disk, so that its files can be renamed into place. Stale directories of killed
    processes are removed first. The directory is locked while it is in use, if the file system
    supports locks, which end with their process.

    Args:
        folder: parent directory, created if missing.

    Yields:
        The path of the temporary directory.
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
    """Yields a path to write to; the file replaces `path` if the block ends without an error.

    Args:
        path: path of the file; its directory is created if missing.
        companions: extensions of files that are written next to it, such as ".bin".

    Yields:
        A path with the same file name in a temporary directory.
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
    """Writes a file atomically: at any time it has either its old or its new content."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)


def flush_to_disk(path: str) -> None:
    """Waits until a file, or the entries of a directory, are on disk, if the system supports it.

    Windows opens no directories, and some network file systems (gcsfuse, CIFS) flush none. The data
    is in place then, but survives a power loss only once the system has written it.
    """
    is_directory = os.path.isdir(path)
    # Windows flushes only files that are open for writing.
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
    """Removes the temporary directories of processes of this host that no longer run."""
    for name in os.listdir(folder):
        found = re.match(rf"{re.escape(ASIDE)}(.*)-(\d+)-", name)
        if found and found[1] == socket.gethostname():
            path = os.path.join(folder, name)
            if is_left(path, int(found[2])):
                shutil.rmtree(path, ignore_errors=True)


def is_left(path: str, process: int) -> bool:
    """Returns whether a temporary directory is stale: the process that created it is gone.

    Containers may share a host name without sharing processes, and may reuse process ids after a
    restart. So a locked directory is in use whatever its process id, and an unlocked one is stale
    after `SECONDS_TO_LOCK` even if a process has the id.
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
    """Locks a directory until the block or this process ends.

    Args:
        folder: path of the directory.
        required: whether it is an error if the directory cannot be locked. Defaults to `False`.

    Raises:
        BlockingIOError: if `required`, and another process holds the lock.
        OSError: if `required`, and the system or the file system does not support such locks.
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
    """Returns whether a process of this host is alive."""
    if os.name == "nt":  # `os.kill(process, 0)` would send Ctrl+C
        return runs_on_windows(process)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def runs_on_windows(process):
    """Returns whether a process is alive, by the Windows API."""
    import ctypes

    kernel, synchronize, timed_out = ctypes.windll.kernel32, 0x00100000, 0x102
    handle = kernel.OpenProcess(synchronize, False, process)
    if not handle:
        return kernel.GetLastError() == 5  # access denied: another user's process
    try:
        return kernel.WaitForSingleObject(handle, 0) == timed_out
    finally:
        kernel.CloseHandle(handle)


# === Locks between processes ===


class Held(ValueError):
    """Raised when another process holds a lock; the message is the holder's own description."""


@contextlib.contextmanager
def exclusive(path: str | os.PathLike, *, remove: bool = False) -> Iterator[str | None]:
    """Holds an exclusive lock until the block ends or this process dies.

    The lock is the operating system's (flock, LockFileEx), so that a killed process does not leave
    it behind.

    Args:
        path: Path of the lock file, which is created if missing, and describes the holder. Its
            directory must exist.
        remove: Whether to remove the file at the end. Defaults to `False`.

    Yields:
        `None`, or the reason that the file system cannot lock.

    Raises:
        Held: If another process, or another block of this one, holds the lock.
        ValueError: If the path is not that of a regular file.
        OSError: If the file cannot be created.
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
        with contextlib.suppress(OSError, ValueError):  # Windows denies access to it.
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
        if remove:  # before the release, so that it is still ours
            with contextlib.suppress(OSError):
                os.remove(path)
        lock.release()


def has_posix_lock(path):
    """Returns whether a process of an earlier package version locks a file, by lockf."""
    if fcntl is None:
        return False
    try:
        with open_regular(path, follow=False, flags=os.O_RDWR) as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released on close
    except (BlockingIOError, PermissionError) as error:
        return error.filename is None  # raised by lockf, not by open
    except OSError:
        return False
    return False


def holder(path):
    """Returns the description that the holder of a lock wrote."""
    try:
        text = read_regular(path, 1 << 16, follow=False).decode("utf-8", "replace")
    except (OSError, ValueError):
        text = ""
    return text or "just begun"


# === Destinations ===


def check_destination(path: str | os.PathLike, argument: str, is_folder: bool = False) -> None:
    """Raises an error if a file or directory cannot be written at a path.

    Args:
        path: path of a file or directory, which need not exist yet, nor its parent.
        argument: name of the argument, for the message, such as "--out".
        is_folder: whether a directory is written instead of a file. Defaults to `False`.

    Raises:
        ValueError: if something of another kind exists there, or a parent is no directory.
    """
    path = expand(path)
    wanted = "directory" if is_folder else "file"
    if os.path.exists(path) and not (os.path.isdir if is_folder else os.path.isfile)(path):
        kind = KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "a file")
        raise ValueError(
            f"{argument} must be the path of a {wanted}. Received: '{path}', which is {kind}. "
            f"Name another {wanted}."
        )
    if not is_folder and path.endswith(os.sep):
        raise ValueError(
            f"{argument} must be the path of a file. Received: '{path}', which ends as a directory."
        )
    parent = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise ValueError(
            f"{argument} must be the path of a {wanted} in a directory. Received: '{path}', but "
            f"'{parent}' is no directory. Name another {wanted}."
        )


# === Disks ===


def check_space(folder: str | os.PathLike, needed: int, what: str) -> None:
    """Raises an error if the disk has too little free space.

    Args:
        folder: directory to write to, which need not exist yet.
        needed: required space in bytes.
        what: name of what is written, for the message, such as "the export".

    Raises:
        OSError: with errno ENOSPC.
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
    """Translates every library's error about a full disk into a single clear one.

    Args:
        folder: directory that is written to.
        what: name of what is written, for the message, such as "the export".

    Raises:
        OSError: with errno ENOSPC.
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
