"""Scratch directories, atomic writes, locks, and reading of regular files only."""

import errno
import os
import re
import socket
import stat
import subprocess
import sys

import pytest

from keras_tnt import files

pytestmark = pytest.mark.one_backend
HOST = socket.gethostname()
# Loads the module alone and holds a scratch directory until it is killed.
HOLDER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
with files.scratch(sys.argv[2]) as aside:
    print(aside, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLDER, files.__file__, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process, process.stdout.readline().strip()
        process.kill()


def made_aside(tmp_path, process, host=HOST, age=0.0):
    path = tmp_path / f"{files.ASIDE}{host}-{process}-abc"
    path.mkdir()
    (path / "part").write_text("half")
    now = os.stat(path).st_mtime
    os.utime(path, (now - age, now - age))
    return path


def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def left_after_another(tmp_path):
    with files.scratch(tmp_path) as aside:
        return [name for name in os.listdir(tmp_path) if name != os.path.basename(aside)]


def test_scratch_directory_of_a_killed_process_is_removed(tmp_path, holder):
    process, aside = holder
    assert left_after_another(tmp_path) == [os.path.basename(aside)]
    process.kill()
    process.wait()
    assert left_after_another(tmp_path) == []


def test_scratch_directory_of_another_host_is_kept(tmp_path):
    made_aside(tmp_path, ended_process())
    other = made_aside(tmp_path, ended_process(), host="elsewhere", age=1e6)
    assert left_after_another(tmp_path) == [other.name]


def test_locked_scratch_directory_of_an_unknown_process_is_kept(tmp_path):
    """The process may be in another container with the same host name."""
    path = made_aside(tmp_path, ended_process(), age=1e6)
    with files.locked(path, required=True):
        assert left_after_another(tmp_path) == [path.name]
    assert left_after_another(tmp_path) == []


@pytest.mark.parametrize("age", [0, 1e6])
def test_reused_process_id_does_not_keep_a_directory_forever(tmp_path, age):
    """In a restarted container, processes have the same ids."""
    path = made_aside(tmp_path, os.getppid(), age=age)
    assert left_after_another(tmp_path) == ([] if age else [path.name])


@pytest.mark.parametrize("age", [0, 1e6])
def test_without_locks_the_process_id_decides(tmp_path, monkeypatch, age):
    monkeypatch.setattr(files, "fcntl", None)
    path = made_aside(tmp_path, os.getppid(), age=age)
    made_aside(tmp_path, ended_process(), age=age)
    assert left_after_another(tmp_path) == [path.name]


def test_symlink_in_place_of_a_scratch_directory_is_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    os.symlink(tmp_path / "mine", tmp_path / f"{files.ASIDE}{HOST}-{ended_process()}-abc")
    with files.scratch(tmp_path):
        pass
    assert (tmp_path / "mine" / "file").read_text() == "kept"


# === Systems without directory fsync or locks ===


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF])
def test_write_atomically_without_directory_fsync(tmp_path, monkeypatch, number):
    flush = os.fsync

    def flush_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", flush_files_only)
    files.write_atomically(tmp_path / "new" / "a", "content")
    assert (tmp_path / "new" / "a").read_text() == "content"
    assert os.listdir(tmp_path / "new") == ["a"]


def test_write_atomically_if_directories_cannot_be_opened(tmp_path, monkeypatch):
    """This is the case on Windows."""
    open_any = os.open

    def open_files_only(path, *arguments, **settings):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return open_any(path, *arguments, **settings)

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(os, "open", open_files_only)
    files.write_atomically(tmp_path / "a", "content")
    monkeypatch.undo()
    assert (tmp_path / "a").read_text() == "content"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_disk_errors_during_fsync_are_raised(tmp_path, monkeypatch, number):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        files.write_atomically(tmp_path / "a", "content")


# === Locks ===

LOCKER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
with files.exclusive(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("remove", [False, True])
def test_lock_is_held_until_its_process_dies(tmp_path, remove):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", LOCKER, files.__file__, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(files.Held, match=f"^process {process.pid} of {HOST}"):
            with files.exclusive(path):
                pass
        process.kill()
        process.wait()
    with files.exclusive(path, remove=remove) as reason:
        assert reason is None
        assert path.read_text().startswith(f"process {os.getpid()} ")
        with pytest.raises(files.Held):
            with files.exclusive(path):
                pass
    assert path.exists() != remove


@pytest.mark.parametrize("kind", ["symbolic link", "directory", "FIFO"])
def test_lock_path_that_is_not_a_regular_file_raises(tmp_path, kind):
    (tmp_path / "mine").write_text("mine")
    place_at(tmp_path / "lock", kind)
    with pytest.raises(ValueError, match=f"lock' is a {kind}, where a lock file has to be"):
        with files.exclusive(tmp_path / "lock"):
            pass
    assert (tmp_path / "mine").read_text() == "mine"


# === Special files ===


def place_at(path, kind):
    """Creates a link to the sibling file "mine", a directory, a FIFO or a socket at a path."""
    if kind == "symbolic link":
        path.symlink_to(path.parent / "mine")
    elif kind == "directory":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))


@pytest.mark.parametrize("kind", ["directory", "FIFO", "socket"])
def test_only_regular_files_are_read(tmp_path, kind):
    place_at(tmp_path / "x", kind)
    (tmp_path / "y").symlink_to(tmp_path / "x")
    for name in ("x", "y"):
        with pytest.raises(ValueError, match=f"{name}' is a {kind}; a regular file is needed"):
            files.read_regular(tmp_path / name, 100)
    with pytest.raises(ValueError, match="is a symbolic link"):
        files.read_regular(tmp_path / "y", 100, follow=False)
    with pytest.raises(ValueError, match="is a device"):
        files.read_regular("/dev/zero", 100)


def test_file_above_the_size_limit_raises(tmp_path):
    (tmp_path / "x").write_bytes(bytes(101))
    assert files.read_regular(tmp_path / "x", 101) == bytes(101)
    with pytest.raises(ValueError, match=r"x' has 101 bytes; at most 100"):
        files.read_regular(tmp_path / "x", 100)
    with pytest.raises(ValueError, match="at most 5 are read"):
        files.read_regular("/proc/cpuinfo", 5)
    with pytest.raises(OSError, match="too long"):
        files.read_regular(tmp_path / ("x" * 5000), 100)


def test_tilde_expands_to_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    files.write_atomically("~/deep/x", "content")
    assert files.read_regular("~/deep/x", 100) == b"content"
