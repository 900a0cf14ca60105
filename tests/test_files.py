"""Folders for what is being written: whose they are, and when nobody's."""

import os
import socket
import subprocess
import sys

import pytest

from keras_tnt import files

pytestmark = pytest.mark.one_backend
HOST = socket.gethostname()
# The module alone, and a folder that it holds until it is killed.
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


def test_what_a_killed_process_left_is_removed(tmp_path, holder):
    process, aside = holder
    assert left_after_another(tmp_path) == [os.path.basename(aside)]
    process.kill()
    process.wait()
    assert left_after_another(tmp_path) == []


def test_what_a_process_that_ended_left_is_removed_and_other_hosts_is_not(tmp_path):
    made_aside(tmp_path, ended_process())
    other = made_aside(tmp_path, ended_process(), host="elsewhere", age=1e6)
    assert left_after_another(tmp_path) == [other.name]


def test_a_folder_whose_process_cannot_be_seen_is_kept_while_it_is_locked(tmp_path):
    """As of another container with the name of this host."""
    path = made_aside(tmp_path, ended_process(), age=1e6)
    with files.locked(path, required=True):
        assert left_after_another(tmp_path) == [path.name]
    assert left_after_another(tmp_path) == []


@pytest.mark.parametrize("age", [0, 1e6])
def test_a_number_that_another_process_has_by_now_keeps_no_folder_for_ever(tmp_path, age):
    """As of a container that is started again: its processes have the same numbers."""
    path = made_aside(tmp_path, os.getppid(), age=age)
    assert left_after_another(tmp_path) == ([] if age else [path.name])


@pytest.mark.parametrize("age", [0, 1e6])
def test_without_locks_the_numbers_of_processes_count(tmp_path, monkeypatch, age):
    monkeypatch.setattr(files, "fcntl", None)
    path = made_aside(tmp_path, os.getppid(), age=age)
    made_aside(tmp_path, ended_process(), age=age)
    assert left_after_another(tmp_path) == [path.name]


def test_a_link_in_the_place_of_such_a_folder_is_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    os.symlink(tmp_path / "mine", tmp_path / f"{files.ASIDE}{HOST}-{ended_process()}-abc")
    with files.scratch(tmp_path):
        pass
    assert (tmp_path / "mine" / "file").read_text() == "kept"
