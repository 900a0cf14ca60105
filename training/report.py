"""Progress reports: metrics.jsonl, TensorBoard events, log lines and a progress bar."""

import errno
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import tensorflow as tf

from keras_tnt.files import write_atomically
from training import loggers, regular
from training.checkpoint import MAX_METRICS_BYTES, read_metrics


class Reporter:
    """Writer of a run's reports, active in one process.

    Args:
        config: A `training.configuration.Config`.
        total_steps: Updates of the run.
        steps_per_epoch: Updates per epoch.
        replicas: Number of devices.
        active: Whether this process reports.
        peak_images: Images per second of a device at its peak throughput. Defaults to 0, unknown.
        evaluation_images: Images per evaluation, to estimate the time left. Defaults to 0.
    """

    def __init__(
        self,
        config,
        total_steps,
        steps_per_epoch,
        replicas,
        active,
        peak_images=0.0,
        evaluation_images=0,
    ):
        """Reads the existing metrics.jsonl and opens the TensorBoard writer."""
        self.config = config
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.replicas = replicas
        self.active = active
        self.peak_images = peak_images
        self.evaluation_images = evaluation_images
        self.evaluation_seconds = None
        self.path = Path(config.workdir) / "metrics.jsonl"
        self.lines = read_metrics(self.path) if active and regular.exists(self.path) else []
        self.bar = None
        self.loggers = loggers.Loggers(config, active)
        self.board = None
        if active and config.tensorboard and not config.find_learning_rate:
            self.board = tf.summary.create_file_writer(str(Path(config.workdir) / "tensorboard"))
        self.compiled = False
        self.seconds_of_updates, self.timed_updates = 0.0, 0
        self.restart()

    def restart(self):
        """Resets the timers of the current reporting interval."""
        self.began = time.perf_counter()
        self.waited = 0.0
        self.steps = 0

    def executed(self, steps, traced=False):
        """Counts updates; an execution that compiles, as a process's first, is not timed.

        Args:
            steps: Number of updates in the execution.
            traced: Whether it traced a graph. Defaults to `False`.
        """
        if self.compiled and not traced:
            self.steps += steps
        else:
            self.compiled = True
            self.restart()
        if self.bar is not None:
            self.bar.update(steps)

    def go_on_from(self, step):
        """Drops reports after `step`, which will be repeated, and a line truncated by a kill."""
        self.restart()
        self.lines = [line for line in self.lines if line["step"] <= step]
        if self.active and regular.exists(self.path):
            content = "".join(json.dumps(line) + "\n" for line in self.lines)
            # A link is replaced by a file, so that nothing is appended outside of the directory.
            changed = regular.read_regular(self.path, MAX_METRICS_BYTES) != content.encode()
            if changed or os.path.islink(self.path):
                write_atomically(self.path, content)
        if self.bar is not None:
            self.bar.n = step
            self.bar.refresh()

    def open_bar(self, step):
        """Shows a progress bar, if standard output is a terminal."""
        if self.active and sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                initial=step,
                total=self.total_steps,
                unit="step",
                file=sys.stdout,
                dynamic_ncols=True,
            )

    def close_bar(self):
        """Closes the progress bar, if there is one."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def training(self, step, loss, learning_rate, **extra):
        """Reports on the updates since the last report.

        Args:
            step: Updates made.
            loss: Their mean loss.
            learning_rate: Learning rate of the last of them.
            **extra: Additional values; `None` values are dropped.
        """
        extra = {name: value for name, value in extra.items() if value is not None}
        seconds = max(time.perf_counter() - self.began, 1e-9)
        speed = self.steps * self.config.batch_size / seconds
        values, shown = {}, ""
        if self.steps:
            # Averaged over all reports, because an epoch's first updates wait for the pipeline.
            self.seconds_of_updates += seconds
            self.timed_updates += self.steps
            left = (self.total_steps - step) * self.seconds_of_updates / self.timed_updates
            left += self.evaluations_left(step) * self.seconds_of_evaluation(speed)
            utilization = ""
            if self.peak_images:
                values["flops_utilisation"] = speed / self.replicas / self.peak_images
                utilization = f", {values['flops_utilisation']:.1%} of the peak"
            values["seconds_left"] = left
            wait = ""
            if self.config.steps_per_execution == 1:  # else the graph waits, which is not measured
                values["input_wait"] = self.waited / seconds
                wait = f", {values['input_wait']:.0%} waiting for input"
            shown = (
                f"{rate_text(speed)} images/s ({rate_text(speed / self.replicas)} a device"
                f"{wait}{utilization})  "
                f"{timedelta(seconds=round(left))} left"
            )
        self.write(
            step,
            loss=loss,
            learning_rate=learning_rate,
            images_per_second=speed,
            images_per_second_per_device=speed / self.replicas,
            **values,
            **extra,
        )
        self.say(
            f"epoch {-(-step // self.steps_per_epoch)}/{self.config.total_epochs}  "
            f"step {step}/{self.total_steps}  loss {loss:.4f}  lr {learning_rate:.2e}  "
            f"{health_text(extra)}{shown or 'compiled'}"
        )
        self.restart()

    def evaluations_left(self, step):
        """Returns the number of evaluations after update `step`, that of its own epoch included."""
        total = self.total_steps // self.steps_per_epoch
        first = max(1, -(-step // self.steps_per_epoch))
        every = self.config.evaluate_epochs
        due = total // every - (first - 1) // every
        return due + (total % every > 0)

    def seconds_of_evaluation(self, speed):
        """Returns the duration of the last evaluation, or an estimate from the training speed.

        Args:
            speed: Training speed in images per second; an update costs three forward passes per
                image.
        """
        if self.evaluation_seconds is not None:
            return self.evaluation_seconds
        passes = 2 if self.config.ema else 1
        return passes * self.evaluation_images / (3 * speed) if speed else 0.0

    def evaluation(self, step, results, seconds=None):
        """Reports on an evaluation.

        Args:
            step: Updates made.
            results: Dict of `accuracy`, `top5_accuracy`, `evaluation_loss`, `images`, and those of
                the moving average.
            seconds: Duration of the evaluation without compilation. If `None`, the previous one is
                used for estimates.
        """
        self.evaluation_seconds = self.evaluation_seconds if seconds is None else seconds
        self.write(step, **results)
        self.say(
            f"epoch {step // self.steps_per_epoch}/{self.config.total_epochs}  held out "
            f"({results['images']} images): "
            + ", ".join(f"{key} {results[key]:.2%}" for key in results if "accuracy" in key)
        )
        self.restart()

    def begin(self):
        """Writes the configuration to TensorBoard as a table."""
        rows = [f"| {name} | {value} |" for name, value in vars(self.config).items()]
        table = "\n".join(["| flag | value |", "|---|---|", *rows])
        self.to_board(0, lambda: tf.summary.text("configuration", table))

    def pictures(self, step, images):
        """Writes images to TensorBoard.

        Args:
            step: Updates made.
            images: Dict from name to a batch (n, height, width, 3) in [0, 255].
        """

        def draw():
            for name, batch in images.items():
                batch = tf.cast(tf.clip_by_value(tf.cast(batch, tf.float32), 0, 255), tf.uint8)
                tf.summary.image(name, batch, max_outputs=len(batch))

        self.to_board(step, draw)

    def to_board(self, step, write):
        """Calls `write` with the TensorBoard writer as the default, if there is one.

        Raises:
            OSError: If the disk is full.
        """
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
        """Writes a report to metrics.jsonl, TensorBoard and the loggers."""
        if not self.active:
            return

        def draw():
            for name, value in values.items():
                tf.summary.scalar(name, value)

        line = {"step": step, "epoch": step / self.steps_per_epoch, **values}
        append_line(self.path, json.dumps(line))
        self.lines.append(line)
        self.to_board(step, draw)
        self.loggers.log(step, {name: value for name, value in line.items() if name != "step"})

    def say(self, text):
        """Prints a line above the progress bar, from the active process."""
        if self.active and self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        elif self.active:
            print(text, flush=True)


def append_line(path, line):
    """Appends a line to a file: all of it or, if the disk is full, nothing.

    Raises:
        OSError: If the write fails; the error names the path.
    """
    data = (line + "\n").encode()
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    # Windows has neither flag.
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, data)
            if written < len(data):
                written += os.write(descriptor, data[written:])
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, before)
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    finally:
        os.close(descriptor)


def rate_text(number):
    """Returns a number as text, with decimals if it is small: 1,234 and 31.4 and 0.52."""
    return (
        f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"
    )


def health_text(values):
    """Returns gradient norm, loss scale, skipped updates and memory for a log line."""
    parts = []
    if "gradient_norm" in values:
        parts.append(f"gradient norm {values['gradient_norm']:.3g}")
    if "loss_scale" in values:
        parts.append(f"loss scale {values['loss_scale']:g}")
    if values.get("skipped_updates"):
        parts.append(f"{values['skipped_updates']} updates skipped")
    if "device_memory_bytes" in values:
        parts.append(f"{values['device_memory_bytes'] / 1e9:.1f} GB")
    return "  ".join(parts) + "  " if parts else ""


def device_memory():
    """Returns the largest peak memory of this process's GPUs in bytes, or `None` if unknown.

    Without GPUs it is the process's peak resident memory.
    """
    gpus = tf.config.list_logical_devices("GPU")
    if gpus:
        names = [device.name.replace("/device:", "") for device in gpus]
        return max(tf.config.experimental.get_memory_info(name)["peak"] for name in names)
    try:
        import resource
    except ImportError:  # on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def finite_mean(numbers):
    """Returns the mean of the finite numbers, or `None` if there are none."""
    finite = [number for number in numbers if math.isfinite(number)]
    return sum(finite) / len(finite) if finite else None
