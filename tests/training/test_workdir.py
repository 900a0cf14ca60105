"""The run directory: its lock, recorded configuration and checkpoints, and errors about damage."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.checks import ROOT
from training import checkpoint, configuration, workdir

HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("process 12 of elsewhere", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def checkpoints(tmp_path):
    """Writes the checkpoints of a run of three steps with the best at step 2."""
    saved = checkpoint.Checkpoints(tmp_path / "checkpoints", {"w": tf.Variable(0.0)}, keep=3)
    for step in (1, 2, 3):
        saved.variables["w"].assign(float(step))
        saved.save(step, {"healthy": step - 1}, best=step == 2)
    return saved


def test_lock_error_names_the_holder_until_it_dies(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / workdir.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(ValueError, match="held by another trainer: process 12 of elsewhere"):
            with workdir.held(tmp_path):
                pass
        holder.kill()
    with workdir.held(tmp_path):
        assert "process" in (tmp_path / workdir.LOCK).read_text()


def test_symlink_as_lock_raises(tmp_path):
    (tmp_path / "mine").write_text("kept")
    (tmp_path / workdir.LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"\.lock is a link to another file: remove it"):
        with workdir.held(tmp_path):
            pass
    assert (tmp_path / "mine").read_text() == "kept"


def test_file_system_without_locks_is_reported_and_used(tmp_path, monkeypatch, capsys):
    def refuse(*arguments, **settings):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with workdir.held(tmp_path):
        assert "cannot be locked (No locks available)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run", "run/checkpoints", "run/deeper/still"])
def test_file_instead_of_a_directory_raises(tmp_path, name):
    (tmp_path / "run").mkdir()
    if name == "run/checkpoints":
        (tmp_path / name).write_text("")
        asked, standing = tmp_path / "run", tmp_path / name
    else:
        (tmp_path / "run").rmdir()
        (tmp_path / "run").write_text("")
        asked, standing = tmp_path / name, tmp_path / "run"
    with pytest.raises(ValueError, match=f"{standing} is a file"):
        with workdir.held(asked):
            pass


def test_directory_that_cannot_be_created_raises():
    with pytest.raises(ValueError, match="--workdir=/proc/run cannot be made: No such file"):
        workdir.make_directory("/proc/run")


# === Paths that are not regular files ===


def link_to_absent_disk(path):
    path.symlink_to("/absent/disk/file")


def link_to_itself(path):
    path.symlink_to(path)


def link_to_device(path):
    path.symlink_to("/dev/zero")


def link_to_directory(path):
    path.symlink_to("/")


def filled_directory(path):
    path.mkdir()
    (path / "file").write_text("")


OTHERS = [
    link_to_absent_disk,
    link_to_itself,
    link_to_device,
    link_to_directory,
    filled_directory,
    os.mkfifo,
]


@pytest.mark.parametrize("make", OTHERS)
def test_config_json_that_is_not_a_regular_file_raises(tmp_path, make):
    make(tmp_path / "config.json")
    with pytest.raises(ValueError, match="config.json is damaged"):
        workdir.read_config(tmp_path)


@pytest.mark.parametrize("make", OTHERS)
def test_metrics_jsonl_that_is_not_a_regular_file_raises(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="metrics.jsonl cannot be read"):
        checkpoint.read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("make", OTHERS)
def test_checkpoint_that_is_not_a_regular_file_is_set_aside(checkpoints, make):
    newest = checkpoints.paths()[0]
    newest.unlink()
    make(newest)
    assert checkpoints.restore()["step"] == 2
    assert not os.path.lexists(newest) and os.path.lexists(newest.with_suffix(".corrupt"))
    make(newest)
    assert checkpoints.restore()["step"] == 2
    assert os.path.lexists(newest.with_suffix(".2.corrupt"))


@pytest.mark.parametrize("make", OTHERS)
@pytest.mark.parametrize("name", ["step_000000004.safetensors", "best.safetensors"])
def test_run_without_a_readable_checkpoint_does_not_restart(tmp_path, make, name):
    (tmp_path / "checkpoints").mkdir()
    make(tmp_path / "checkpoints" / name)
    saved = checkpoint.Checkpoints(tmp_path / "checkpoints", {"w": tf.Variable(0.0)}, keep=3)
    with pytest.raises(checkpoint.NoneReadable, match=f"{name}.*--start_afresh to begin at step 0"):
        saved.restore()
    if name == "best.safetensors":
        with pytest.raises(checkpoint.CorruptCheckpoint, match="best.safetensors cannot be read"):
            checkpoint.load_best(WithoutWeights(), tmp_path)
    saved.set_aside()
    assert saved.restore() is None


class WithoutWeights:
    weights = ()


def test_checkpoints_on_a_missing_disk_raise(tmp_path):
    (tmp_path / "checkpoints").symlink_to("/absent/disk")
    saved = checkpoint.Checkpoints(tmp_path / "checkpoints", {"w": tf.Variable(0.0)}, keep=3)
    with pytest.raises(checkpoint.NoneReadable, match="is it on a disk that is absent"):
        saved.restore()


def test_checkpoint_replaces_a_directory_of_its_name(checkpoints):
    (checkpoints.directory / "best.safetensors").unlink()
    for path in (
        checkpoints.directory / name for name in ("best.safetensors", "step_000000004.safetensors")
    ):
        filled_directory(path)
    checkpoints.save(4, {"healthy": 3}, best=True)
    assert checkpoint.read(checkpoints.directory / "best.safetensors")[1]["step"] == 4
    assert checkpoints.restore()["step"] == 4


@pytest.mark.parametrize("content", [b"", b"\x00" * 64])
def test_unrelated_files_are_not_checkpoints(tmp_path, content):
    (tmp_path / ".nfs0001.safetensors").write_bytes(content)
    (tmp_path / "lost+found").mkdir()
    assert checkpoint.Checkpoints(tmp_path, {}, keep=1).restore() is None


# === Configuration ===


@pytest.mark.parametrize("content", [b'{"config": {', b"\xff\xfe\x00", b"[]", b'{"config": 3}'])
def test_damaged_config_json_raises(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json is damaged"):
        workdir.read_config(tmp_path)


def recorded(directory, **values):
    config = configuration.make("digits", workdir=str(directory), **values)
    (directory / "config.json").write_text(json.dumps({"config": vars(config)}))


def test_change_error_names_the_flag_that_allows_it(tmp_path):
    recorded(tmp_path)
    values = {"workdir": str(tmp_path), "learning_rate": 0.5, "epochs": 90}
    refusal = r"--epochs: 60 -> 90\n  --learning_rate: 0.004 -> 0.5\n.*, or --change --extend to"
    with pytest.raises(ValueError, match=refusal):
        workdir.check_config(configuration.make("digits", **values))
    with pytest.raises(ValueError, match=r"or --change to go on"):
        workdir.check_config(configuration.make("digits", extend=True, **values))
    config = configuration.make("digits", extend=True, change=True, **values)
    changes = workdir.check_config(config)
    assert changes == {"epochs": (60, 90), "learning_rate": (0.004, 0.5)}
    workdir.write_config(config, None, [], 10, None, changes, step=7)
    record = workdir.read_config(tmp_path)
    assert record["config"]["learning_rate"] == 0.5 and record["changes"][0]["step"] == 7
    assert workdir.check_config(config) == {}


@pytest.mark.parametrize("values", [{"epochs": 30}, {"seed": 1}, {"beta_1": 0.8}])
def test_no_flag_allows_a_shorter_or_another_run(tmp_path, values):
    recorded(tmp_path)
    config = configuration.make("digits", workdir=str(tmp_path), change=True, extend=True, **values)
    with pytest.raises(ValueError, match="Give another --workdir, or the same flags.*run.$"):
        workdir.check_config(config)


@pytest.mark.parametrize("values", [{"model": "deit_tiny"}, {"distilled": True}])
def test_run_of_another_architecture_cannot_be_extended(tmp_path, values):
    recorded(tmp_path)
    config = configuration.make("digits", workdir=str(tmp_path), extend=True, epochs=90, **values)
    ((name, _),) = values.items()
    with pytest.raises(ValueError, match=f"^--extend goes on with the model.*--{name} is .*$"):
        workdir.check_config(config)


def test_cooldown_epochs_can_be_extended_but_not_reduced(tmp_path):
    values = {"workdir": str(tmp_path)}
    first = configuration.make("digits", cooldown_epochs=4, **values)
    workdir.write_config(first, None, [], 10, None, {}, step=0)
    longer = configuration.make("digits", cooldown_epochs=6, extend=True, **values)
    assert workdir.check_config(longer) == {"cooldown_epochs": (4, 6)}
    shorter = configuration.make("digits", cooldown_epochs=2, extend=True, **values)
    with pytest.raises(ValueError, match="--cooldown_epochs: 4 -> 2"):
        workdir.check_config(shorter)


# === Checkpoints and reports ===


def damage(path):
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def test_restore_uses_the_newest_intact_checkpoint_and_sets_damaged_ones_aside(checkpoints):
    damage(checkpoints.paths()[0])
    assert checkpoints.restore()["step"] == 2 and checkpoints.variables["w"].numpy() == 2
    assert [path.name for path in checkpoints.directory.glob("*.corrupt")] == [
        "step_000000003.corrupt"
    ]


def test_restore_without_an_intact_checkpoint_raises_and_changes_nothing(checkpoints):
    for path in checkpoints.paths():
        damage(path)
    before = sorted(checkpoints.directory.iterdir())
    for _ in range(2):
        with pytest.raises(checkpoint.NoneReadable) as refusal:
            checkpoints.restore()
    assert sorted(checkpoints.directory.iterdir()) == before
    for said in ("step_000000001.safetensors", "best.safetensors", "--start_afresh", "of step 2"):
        assert said in str(refusal.value)
    damage(checkpoints.directory / "best.safetensors")
    with pytest.raises(checkpoint.NoneReadable, match="--start_afresh to begin at step 0$"):
        checkpoints.restore()
    checkpoints.set_aside()
    assert checkpoints.restore() is None
    assert len(list((checkpoints.directory.parent / "checkpoints_set_aside_1").iterdir())) == 4


@pytest.mark.parametrize("variables", [{"w": [0.0], "v": 0.0}, {"w": [0.0]}])
def test_checkpoint_with_missing_tensors_raises(checkpoints, variables):
    checkpoints.variables = {name: tf.Variable(value) for name, value in variables.items()}
    with pytest.raises(ValueError, match=r"step_000000003.safetensors does not hold .* first 'w'"):
        checkpoints.restore()


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_keep_limits_the_number_of_checkpoints(tmp_path, keep):
    saved = checkpoint.Checkpoints(tmp_path, {"w": tf.Variable(0.0)}, keep)
    for step in range(1, 7):
        saved.save(step, {"healthy": step - 1})
        assert [checkpoint.step_of(path) for path in saved.paths()] == list(
            range(step, max(0, step - keep), -1)
        )


def test_checkpoints_after_a_skipped_step_are_all_retained(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, {"w": tf.Variable(0.0)}, keep=1)
    for step, healthy, left in ((1, 0, 1), (2, 0, 2), (3, 0, 3), (4, 3, 1)):
        saved.save(step, {"healthy": healthy})
        assert len(saved.paths()) == left


def test_restore_step_loads_that_checkpoint(checkpoints):
    assert checkpoints.restore_step(1)["step"] == 1 and checkpoints.variables["w"].numpy() == 1
    damage(checkpoints.paths()[0])
    with pytest.raises(ValueError, match="step_000000003.safetensors"):
        checkpoints.restore_step(3)


# === Background writes ===


@pytest.fixture
def held_write(tmp_path, monkeypatch):
    """Yields (checkpoints whose writes wait for an event, event)."""
    saved = checkpoint.Checkpoints(tmp_path, {"w": tf.Variable([1.0, 1.0])}, 9, background=True)
    released, write = threading.Event(), saved._write

    def held(*arguments):
        assert released.wait(60)
        write(*arguments)

    monkeypatch.setattr(saved, "_write", held)
    yield saved, released
    released.set()
    saved.wait()


def test_background_write_has_the_values_of_its_step(held_write):
    saved, released = held_write
    notes = {"healthy": 0, "results": {"accuracy": 0.5}}
    saved.save(1, notes)
    saved.variables["w"].assign([2.0, 2.0])
    notes["results"]["accuracy"] = 0.75
    assert saved.step() == -1
    released.set()
    saved.wait()
    tensors, written = checkpoint.read(saved.paths()[0])
    assert tensors["w"].tolist() == [1.0, 1.0] and written["results"]["accuracy"] == 0.5


def test_background_writes_are_sequential(held_write):
    saved, released = held_write
    saved.save(1, {"healthy": 0})
    second = threading.Thread(target=saved.save, args=(2, {"healthy": 1}))
    second.start()
    second.join(0.3)
    assert second.is_alive() and saved.step() == -1
    released.set()
    second.join()
    saved.wait()
    assert saved.step() == 2 and len(saved.paths()) == 2


@pytest.mark.parametrize("then", ["save", "wait", "set_aside"])
def test_background_write_error_is_raised_once_by_the_next_call(tmp_path, monkeypatch, then):
    saved = checkpoint.Checkpoints(tmp_path / "c", {"w": tf.Variable(1.0)}, 9, background=True)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", full)
        saved.save(1, {"healthy": 0})
        with pytest.raises(OSError, match="No space left"):
            {"save": lambda: saved.save(2, {"healthy": 1}), "wait": saved.wait}.get(
                then, saved.set_aside
            )()
    saved.wait()
    saved.save(2, {"healthy": 1})
    saved.wait()
    assert saved.step() == 2


def test_background_write_copies_the_state(tmp_path, monkeypatch):
    value = np.ones(3, "float32")

    class Variable:
        shape = (3,)

        def numpy(self):
            return value

    saved = checkpoint.Checkpoints(tmp_path, {"w": Variable()}, 9, background=True)
    write, started = saved._write, threading.Event()

    def later(*arguments):
        assert started.wait(60)
        write(*arguments)

    monkeypatch.setattr(saved, "_write", later)
    saved.save(1, {"healthy": 0})
    value[:] = 5
    started.set()
    saved.wait()
    assert checkpoint.read(saved.paths()[0])[0]["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("line", [b'{"step": 2, "lo', b"\xff", b"3", b'{"loss": 1.0}'])
def test_damaged_metrics_jsonl_error_names_the_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl is damaged: line 2"):
        checkpoint.read_metrics(path)


def test_complete_but_invalid_last_line_raises(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo\n')
    with pytest.raises(ValueError, match="metrics.jsonl is damaged: line 2"):
        checkpoint.read_metrics(path)
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    assert checkpoint.read_metrics(path) == [{"step": 1}]


@pytest.mark.parametrize(("after", "left"), [(0, []), (1, [1]), (2, [2, 1]), (3, [3, 2, 1])])
def test_set_aside_moves_checkpoints_after_a_step(checkpoints, after, left):
    checkpoints.set_aside(after=after)
    assert [checkpoint.step_of(path) for path in checkpoints.paths()] == left
    aside = checkpoints.directory.with_name("checkpoints_set_aside_1")
    assert len(list(aside.glob("*"))) == 3 - len(left)
    assert (checkpoints.directory / "best.safetensors").exists()


def test_full_disk_leaves_no_partial_checkpoint(checkpoints, monkeypatch):
    free = shutil.disk_usage("/")._replace(free=10)  # noqa: TID251
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    before = sorted(checkpoints.directory.iterdir())
    with pytest.raises(OSError, match="The checkpoint of step 4 takes .* the disk has 0.0 MB free"):
        checkpoints.save(4, {"healthy": 3})
    assert sorted(checkpoints.directory.iterdir()) == before
    assert checkpoints.restore()["step"] == 3


@pytest.mark.parametrize("kind", ["FIFO", "directory", "dangling link", "deep"])
def test_invalid_config_json_is_not_treated_as_missing(tmp_path, kind):
    path = tmp_path / "config.json"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "deep":
        path.write_text("[" * 200_000)
    else:
        path.symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"config\.json"):
        workdir.read_config(tmp_path)


def test_metrics_jsonl_that_is_a_fifo_raises(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics\.jsonl' is a FIFO"):
        checkpoint.read_metrics(tmp_path / "metrics.jsonl")


def test_tilde_expands_to_the_home_directory_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = configuration.make("digits", workdir="~/runs/x", data_dir="~/data", weights="~/w.h5")
    assert config.workdir == str(tmp_path / "runs" / "x")
    assert (config.data_dir, config.weights) == (str(tmp_path / "data"), str(tmp_path / "w.h5"))
    workdir.make_directory("~/runs/y")
    with workdir.held("~/runs/y"):
        assert (tmp_path / "runs" / "y" / workdir.LOCK).exists()
    assert workdir.read_config("~/runs/y") is None


TWO = """
import sys
from training import commands
from absl import flags
flags.DEFINE_string("workdir", None, "")

def main(arguments):
    print(flags.FLAGS.workdir, *arguments, "\\u732b")

commands.run(main)
"""


def test_commands_expand_tilde_and_print_to_any_terminal(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TWO, "--workdir=~/runs", "~/other"],
        env={**os.environ, "HOME": "/somewhere", "PYTHONIOENCODING": "ascii"},
        cwd=ROOT,
        capture_output=True,
    )
    assert done.stdout == b"/somewhere/runs /somewhere/other \\u732b\n", done.stderr
