"""Directory of a run: its lock, and its recorded configuration."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_tnt
from keras_tnt import files
from keras_tnt.files import write_atomically
from training import config_files, configuration, regular

CONFIG = "config.json"
CONFIG_YAML = "config.yaml"
YAML_HEADER = "# python training/train.py --config="
# Fields that define the model's architecture.
ARCHITECTURE = ("model", "model_args", "image_size", "distilled", "classes")
LOCK = ".lock"
MAX_CONFIG_BYTES = 16 * 2**20


@contextlib.contextmanager
def held(workdir):
    """Locks a run's directory until the context ends or this process dies.

    The lock is the operating system's, which network file systems enforce across hosts. The locked
    file describes the process that holds it.

    Args:
        workdir: Directory, created if it does not exist.

    Raises:
        ValueError: If another process holds the lock, or the path cannot be a directory.
    """
    workdir = files.expand(workdir)
    make_directory(workdir)
    path = Path(workdir) / LOCK
    if path.is_symlink():
        raise ValueError(f"{path} is a link to another file: remove it")
    with contextlib.ExitStack() as stack:
        try:
            reason = stack.enter_context(files.exclusive(path))
        except files.Held as error:
            raise ValueError(f"--workdir={workdir} is held by another trainer: {error}") from error
        if reason:
            print(f"{workdir} cannot be locked ({reason}): start no second trainer on it")
        yield


def make_directory(workdir):
    """Creates the directory; raises a ValueError if the path cannot be one."""
    workdir = files.expand(workdir)
    for path in (Path(workdir), Path(workdir) / "checkpoints"):
        standing = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not standing.is_dir():
            raise ValueError(f"--workdir={workdir}: {standing} is a file, where a directory has to")
    try:
        os.makedirs(workdir, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"--workdir={workdir} cannot be made: {error.strerror}") from error


def read_config(workdir):
    """Returns the recorded configuration of the run in a directory, or `None` if there is no run.

    Raises:
        ValueError: If the file is damaged.
    """
    path = Path(files.expand(workdir)) / CONFIG
    try:
        if not regular.exists(path):
            return None
        record = json.loads(regular.read_regular(path, MAX_CONFIG_BYTES).decode("utf-8"))
        if isinstance(record, dict) and isinstance(record.get("config"), dict):
            return record
        reason = "it holds no configuration"
    except (ValueError, RecursionError) as error:
        reason = error
    except OSError as error:
        reason = error.strerror or error
    raise ValueError(f"{path} is damaged ({reason}): mend it, or give another --workdir")


def check_config(config):
    """Compares a configuration with that of the run in its directory.

    Args:
        config: A `training.configuration.Config`.

    Returns:
        Dict from field name to (recorded, given) of the permitted changes.

    Raises:
        ValueError: If anything else differs.
    """
    record = read_config(config.workdir)
    if record is None:
        return {}
    different = configuration.differences(config, record["config"])
    other = [f"--{name} is {different[name][0]!r}" for name in ARCHITECTURE if name in different]
    if config.extend and other:
        raise ValueError(
            f"--extend goes on with the model of the run in {config.workdir}, whose "
            f"{', '.join(other)}: give the same, or another --workdir"
        )
    flags = {configuration.change_flag(name, *values) for name, values in different.items()}
    missing = [flag for flag in flags if not (flag and getattr(config, flag))]
    if missing:
        lines = [f"--{name}: {old!r} -> {new!r}" for name, (old, new) in different.items()]
        way = "Give another --workdir, or the same flags to go on with that run"
        if all(missing):
            named = " ".join(f"--{flag}" for flag in sorted(missing))
            way += f", or {named} to go on with it under the new values"
        raise ValueError(
            f"{config.workdir} holds a run of another configuration:\n  "
            + "\n  ".join(lines)
            + f"\n{way}."
        )
    return different


def write_config(config, strategy, devices, classes, label_names, changes, step):
    """Records the resolved configuration of a run, and each later change to it.

    Args:
        config: A `training.configuration.Config`.
        strategy: A `tf.distribute.Strategy`.
        devices: Names of its devices.
        classes: Number of classes.
        label_names: Class names, or `None`.
        changes: Result of `check_config`.
        step: Step from which the run is resumed.
    """
    record, started = read_config(config.workdir), time.strftime("%Y-%m-%d %H:%M:%S")
    if record is None:
        record = {
            "config": vars(config),
            "command": sys.argv,
            "classes": classes,
            "label_names": label_names,
            "versions": {
                "python": sys.version.split()[0],
                "keras": keras.__version__,
                "tensorflow": tf.__version__,
                "numpy": np.__version__,
                "keras_tnt": keras_tnt.__version__,
            },
            "commit": commit(),
            "strategy": type(strategy).__name__,
            "devices": devices,
            "started": started,
        }
    elif changes:
        record["config"] |= {name: new for name, (_, new) in changes.items()}
        change = {"step": step, "started": started, "command": sys.argv, "changed": changes}
        record["changes"] = [*record.get("changes", []), change]
    elif regular.exists(Path(config.workdir) / CONFIG_YAML):
        return
    write_atomically(Path(config.workdir) / CONFIG, json.dumps(record, indent=2))
    write_yaml(config.workdir, record["config"])


def write_yaml(workdir, values):
    """Writes `config.yaml`, a file for `--config` with the values in `config.json`.

    An existing file of that name from elsewhere, such as the run's own `--config`, is left
    unchanged.

    Args:
        workdir: Directory of the run.
        values: Dict from field name to value.
    """
    path = Path(workdir) / CONFIG_YAML
    if regular.exists(path):
        try:
            ours = regular.read_regular(path, MAX_CONFIG_BYTES).startswith(YAML_HEADER.encode())
        except OSError:
            ours = False
        if not ours:
            return
    header = (
        f"{YAML_HEADER.removeprefix('# ')}{path} resumes this run;",
        "with another --workdir it trains the same anew. Other flags override the values.",
    )
    write_atomically(path, config_files.to_yaml(values, header))


def commit():
    """Returns the repository's commit, with `+` if tracked files differ, or `None` without git."""
    root = Path(__file__).parent.parent

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
