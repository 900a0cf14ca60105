"""The directory of a run: held by one trainer, its configuration recorded and compared."""

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
# What decides how a model is built.
ARCHITECTURE = ("model", "model_args", "image_size", "distilled", "classes")
LOCK = ".lock"
MAX_CONFIG_BYTES = 16 * 2**20


@contextlib.contextmanager
def held(workdir):
    """Holds a directory that no other trainer can take until the block ends or this process dies.

    The lock is the operating system's, which network file systems keep for all of their hosts; the
    file that is locked describes who holds it.

    Args:
        workdir: Made if it does not exist.

    Raises:
        ValueError: If another process holds it, or if it cannot be a directory.
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
    """Make the directory, or raise a ValueError that says why it cannot be one."""
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
    """What `config.json` records of the run in a directory; None where there is none.

    Raises:
        ValueError: if the file is damaged.
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
    """Compare a configuration with that of the run that its directory holds.

    Returns:
        Dict from name to (recorded, given) of what is changed on request.

    Raises:
        ValueError: if anything else differs.
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
    """Record the whole truth of a run at its first start, and what is changed at a later one.

    Args:
        config: a `training.configuration.Config`.
        strategy: a `tf.distribute.Strategy`.
        devices: names of its devices.
        classes: number of classes.
        label_names: the classes' names, or None.
        changes: of `check_config`.
        step: the step that the run goes on from.
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
    """Writes `config.yaml`, which `--config` takes, of the values in `config.json`.

    A file of that name that somebody else wrote, such as the one that the run was given, stays.
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
    """The repository's commit, with a `+` if files differ from it; None outside a repository."""
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
