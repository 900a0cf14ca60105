"""What a run leaves to read: config.json, metrics.jsonl, TensorBoard events, lines."""

import json
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_tnt
from training import configuration
from training.checkpoint import read_metrics, write_aside


def check_workdir(config):
    """Raise a ValueError if the directory holds a run of another configuration."""
    path = Path(config.workdir) / "config.json"
    if path.exists():
        different = configuration.differences(config, path)
        if different:
            raise ValueError(
                f"{config.workdir} holds a run of another configuration:\n  "
                + "\n  ".join(different)
                + "\nGive another --workdir, or the same flags to go on with that run."
            )


def write_config(config, strategy, devices, classes):
    """Record the whole truth of a run, unless it stands there from its first start."""
    path = Path(config.workdir) / "config.json"
    if path.exists():
        return
    record = {
        "config": vars(config),
        "command": sys.argv,
        "classes": classes,
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
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, json.dumps(record, indent=2).encode())


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


class Reporter:
    """Writes reports, from one process of a run.

    Args:
        config: a `training.configuration.Config`.
        total_steps, steps_per_epoch: updates of the run and of an epoch.
        replicas: number of devices.
        active: whether this process reports.
        peak_images: images per second at which a device would be at its peak; 0: unknown.
    """

    def __init__(self, config, total_steps, steps_per_epoch, replicas, active, peak_images=0.0):
        self.config = config
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.replicas = replicas
        self.active = active
        self.peak_images = peak_images
        self.path = Path(config.workdir) / "metrics.jsonl"
        self.board = None
        if active and config.tensorboard:
            self.board = tf.summary.create_file_writer(str(Path(config.workdir) / "tensorboard"))
        self.restart()

    def restart(self):
        """Begin a new stretch of time."""
        self.began = time.perf_counter()
        self.waited = 0.0
        self.steps = 0

    def go_on_from(self, step):
        """Forget reports of steps that will be run again."""
        self.restart()
        if self.active and self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= step]
            write_aside(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def training(self, step, loss, learning_rate, **extra):
        """Report on the steps since the last report."""
        seconds = max(time.perf_counter() - self.began, 1e-9)
        images_per_second = self.steps * self.config.batch_size / seconds
        waiting = self.waited / seconds
        utilisation = ""
        if self.peak_images:
            extra["flops_utilisation"] = images_per_second / self.replicas / self.peak_images
            utilisation = f", {extra['flops_utilisation']:.1%} of the peak"
        left = (self.total_steps - step) * seconds / max(self.steps, 1)
        self.write(
            step,
            loss=loss,
            learning_rate=learning_rate,
            images_per_second=images_per_second,
            images_per_second_per_device=images_per_second / self.replicas,
            input_wait=waiting,
            seconds_left=left,
            **extra,
        )
        self.say(
            f"epoch {-(-step // self.steps_per_epoch)}/{self.config.epochs}  "
            f"step {step}/{self.total_steps}  loss {loss:.4f}  lr {learning_rate:.2e}  "
            f"{images_per_second:,.0f} images/s "
            f"({images_per_second / self.replicas:,.0f} a device, "
            f"{waiting:.0%} waiting for input{utilisation})  {timedelta(seconds=round(left))} left"
        )
        self.restart()

    def evaluation(self, step, results):
        """Report on an evaluation: a dict of accuracy, top5_accuracy, loss and images."""
        self.write(step, **results)
        self.say(
            f"epoch {step // self.steps_per_epoch}/{self.config.epochs}  held out "
            f"({results['images']} images): "
            + ", ".join(f"{key} {results[key]:.2%}" for key in results if "accuracy" in key)
        )
        self.restart()

    def write(self, step, **values):
        if not self.active:
            return
        line = {"step": step, "epoch": step / self.steps_per_epoch, **values}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.board:
            with self.board.as_default(step=step):
                for name, value in values.items():
                    tf.summary.scalar(name, value)
            self.board.flush()

    def say(self, text):
        if self.active:
            print(text, flush=True)
