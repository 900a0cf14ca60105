"""What a run reports on its way: metrics.jsonl, TensorBoard events, lines."""

import errno
import json
import os
import time
from datetime import timedelta
from pathlib import Path

import tensorflow as tf

from keras_tnt.files import write_atomically
from training.checkpoint import read_metrics


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
        self.lines = read_metrics(self.path) if active and self.path.exists() else []
        self.board = None
        if active and config.tensorboard and not config.find_learning_rate:
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
        self.lines = [line for line in self.lines if line["step"] <= step]

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
            f"epoch {-(-step // self.steps_per_epoch)}/{self.config.total_epochs}  "
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
            f"epoch {step // self.steps_per_epoch}/{self.config.total_epochs}  held out "
            f"({results['images']} images): "
            + ", ".join(f"{key} {results[key]:.2%}" for key in results if "accuracy" in key)
        )
        self.restart()

    def begin(self):
        """The configuration as text, beside what TensorBoard shows of the run."""
        rows = [f"| {name} | {value} |" for name, value in vars(self.config).items()]
        table = "\n".join(["| flag | value |", "|---|---|", *rows])
        self.to_board(0, lambda: tf.summary.text("configuration", table))

    def pictures(self, step, images):
        """Show batches of pictures, dict from name to values in [0, 255], in TensorBoard."""

        def draw():
            for name, batch in images.items():
                batch = tf.cast(tf.clip_by_value(tf.cast(batch, tf.float32), 0, 255), tf.uint8)
                tf.summary.image(name, batch, max_outputs=len(batch))

        self.to_board(step, draw)

    def to_board(self, step, write):
        """Let `write` write to TensorBoard, if there is one."""
        if not self.board:
            return
        try:
            with self.board.as_default(step=step):
                write()
            self.board.flush()
        except tf.errors.ResourceExhaustedError as error:
            reason = os.strerror(errno.ENOSPC)
            raise OSError(errno.ENOSPC, reason, str(self.path.parent)) from error

    def write(self, step, **values):
        if not self.active:
            return

        def draw():
            for name, value in values.items():
                tf.summary.scalar(name, value)

        self.lines.append({"step": step, "epoch": step / self.steps_per_epoch, **values})
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.to_board(step, draw)

    def say(self, text):
        if self.active:
            print(text, flush=True)
