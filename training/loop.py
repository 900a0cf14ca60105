"""The training loop: one for every model, data set and strategy."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_tnt.files import write_atomically
from training import (
    configuration,
    data,
    models,
    optimization,
    optimizers,
    predictions,
    report,
    sources,
    step_functions,
    strategies,
    workdir,
)
from training.checkpoint import Checkpoints, NoneReadable, read
from training.find_rate import find_learning_rate

PICTURES = 16  # of the first training images in TensorBoard
# What a collective says when its other end is gone.
LOST_WORKER = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError)
END_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run was told to end before its last step; a checkpoint is written.

    Args:
        step: the step it reached.
        signal: number of the signal that told it.
    """

    def __init__(self, step, signal):
        super().__init__(f"stopped at step {step}; the same command goes on from there")
        self.signal = signal


def train(config):
    """Train as a configuration says, or go on with the run in its directory.

    Args:
        config: a `training.configuration.Config`.

    Returns:
        A dict: `accuracy`, `top5_accuracy` and `loss` on the held-out images, `step`, `files`.

    Raises:
        ValueError: for what cannot be, before any long work.
        Stopped: after SIGTERM or Ctrl-C, with a checkpoint written.
        OSError: if the disk is full; the last checkpoint is whole.
        RuntimeError: if the loss blew up more than `max_rollbacks` times, or another worker died.
    """
    models.custom_arguments(config, models.find_builder(config.model))
    optimizers.find_optimizer(config.optimizer)
    workdir.check_config(config)
    for warning in configuration.warnings(config):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    keras.utils.set_random_seed(config.seed)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    strategy = strategies.make(config)
    share = data.WorkerShare(*strategies.worker(strategy), strategy.num_replicas_in_sync)
    check_batch(config, strategy)
    try:
        with workdir.held(config.workdir) if share.index == 0 else contextlib.nullcontext():
            return train_held(config, strategy, share)
    except LOST_WORKER as error:
        if share.workers == 1:
            raise
        raise RuntimeError(
            f"worker {share.index} of {share.workers} has lost another one, and ends: started "
            "again, all of them go on from the last checkpoint"
        ) from error


def train_held(config, strategy, share):
    """Train in a directory that no other trainer writes to."""
    changes = workdir.check_config(config)
    training_source, held_out = sources.open_sources(config)
    classes, names = config.classes or training_source.classes, training_source.label_names
    steps = config.steps_per_epoch or training_source.size // config.batch_size
    if not steps:
        raise ValueError(
            f"--batch_size={config.batch_size} is more than the {training_source.size} images"
        )
    with strategy.scope():
        model = models.build(config, classes, names)
        models.freeze(config, model)
        optimizer = optimization.Optimizer(model, config)
        teacher = models.build_teacher(config, model)
    size, fill = models.image_size(model), models.mean_colour(model)
    corrupt = data.UnreadableImages(training_source, config.max_corrupt)
    corrupt_held_out = data.UnreadableImages(held_out, config.max_corrupt)
    run = Run(config, strategy, share, model, optimizer, teacher, steps, classes, names)
    # What is recorded is what was asked for, 0 for the model's own crop among it.
    images = dataclasses.replace(config, crop=models.crop_share(config, model))
    return run.go(
        lambda epoch, first: data.training_batches(
            training_source, images, size, fill, epoch, first, steps, share, corrupt
        ),
        lambda: data.evaluation_batches(held_out, images, size, share, corrupt_held_out),
        held_out,
        (corrupt, corrupt_held_out),
        changes,
    )


def check_batch(config, strategy):
    """Raises a ValueError if devices, accumulation and groups do not divide the batch."""
    step_functions.count_groups(config, strategy.num_replicas_in_sync)


class Run:
    """A run under way: the state that the loop's parts share."""

    def __init__(
        self, config, strategy, share, model, optimizer, teacher, steps, classes, label_names
    ):
        self.config = config
        self.strategy = strategy
        self.model = model
        self.optimizer = optimizer
        self.steps = steps
        self.total = steps * config.total_epochs
        self.chief = share.index == 0
        self.workers = share.workers
        self.classes = classes
        self.label_names = label_names
        self.workdir = Path(config.workdir)
        self.size = models.image_size(model)
        self.groups = step_functions.count_groups(config, strategy.num_replicas_in_sync)
        self.train_step = step_functions.make_train_step(
            strategy, model, optimizer, config, classes, teacher
        )
        self.evaluation_step = step_functions.make_evaluation_step(strategy, model, classes)
        # A training step costs three forward passes: one forward, two backward.
        peak = models.peak_tflops(config) * 1e12
        peak_images = peak / (3 * models.forward_flops(model)) if peak else 0.0
        self.reporter = report.Reporter(
            config, self.total, steps, strategy.num_replicas_in_sync, self.chief, peak_images
        )
        self.checkpoints = Checkpoints(
            self.workdir / "checkpoints", models.state(model) | optimizer.state(), config.keep
        )
        # "healthy" is the last step whose loss was: the weights that it was computed of are good.
        self.notes = {"skipped": [], "rollbacks": 0, "healthy": -1, "best": -1.0, "results": {}}
        self.pending = []  # (step, loss, gradient norm) since the last look
        self.told_to_end = 0  # the number of the signal

    def go(self, training_batches, evaluation_batches, held_out, corrupt, changes):
        """Run to the end and write the results.

        Args:
            training_batches: function (epoch, first step) to a `tf.data.Dataset`.
            evaluation_batches: function to one.
            held_out: the source of the latter.
            corrupt: `data.UnreadableImages` of both.
            changes: what is changed in a run that is gone on with, of `workdir.check_config`.
        """
        self.corrupt = corrupt
        if self.config.find_learning_rate:
            return find_learning_rate(self, training_batches)
        step = self.start(changes)
        self.saved_at = time.monotonic()
        report_steps = self.config.report_steps or min(100, self.steps)
        old_handlers = {number: signal.signal(number, self.on_signal) for number in END_SIGNALS}
        try:
            while step < self.total and not self.stale():
                step = self.epoch(step, training_batches, evaluation_batches, report_steps)
        finally:
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
        return self.finish(step, evaluation_batches, held_out)

    def on_signal(self, number, frame):
        """End after this update; a second signal ends the process at once."""
        self.told_to_end = number
        signal.signal(number, signal.SIG_DFL)

    def start(self, changes):
        """Begin the run, or go on with it; returns the step."""
        try:
            step = self.restore()
        except NoneReadable:
            if not self.config.start_afresh:
                raise
            if self.chief:
                self.checkpoints.set_aside()
            step = None
        if step is None and self.reporter.lines and not self.config.start_afresh:
            raise ValueError(
                f"{self.workdir} holds reports up to step {self.reporter.lines[-1]['step']} and no "
                "checkpoint. Give another --workdir, or --start_afresh to begin at step 0"
            )
        if changes:
            self.notes["rollbacks"] = 0
        if self.chief:
            devices = list(self.strategy.extended.worker_devices)
            workdir.write_config(
                self.config,
                self.strategy,
                devices,
                self.classes,
                self.label_names,
                changes,
                step or 0,
            )
        if step is None:
            self.reporter.go_on_from(0)
            self.reporter.begin()
            self.save(0)
        return step or 0

    def epoch(self, step, training_batches, evaluation_batches, report_steps):
        """Go on to the end of the epoch, or back to a checkpoint; returns the step reached."""
        epoch, first = divmod(step, self.steps)
        batches = iter(
            self.strategy.distribute_datasets_from_function(
                lambda context: training_batches(epoch, first)
            )
        )
        for _ in range(first, self.steps):
            began = time.perf_counter()
            with self.corrupt[0].reading():
                batch = next(batches)
            self.reporter.waited += time.perf_counter() - began
            self.check_images()
            if step == 0:
                (images, *_) = self.strategy.experimental_local_results(batch["image"])
                self.reporter.pictures(0, {"augmented": images[:PICTURES]})
            stop = self.update(batch, step)
            step += 1
            ends = step % self.steps == 0
            stop |= bool(self.told_to_end) and self.workers == 1
            due = self.checkpoint_due(step)
            if (ends or stop or due or step % report_steps == 0) and not self.healthy():
                return self.roll_back(step)
            if ends or step % report_steps == 0:
                self.report(step)
            best = False
            if step == self.total or ends and (epoch + 1) % self.config.evaluate_epochs == 0:
                best = self.evaluate(step, evaluation_batches)
            if due or best or stop or self.stale():
                self.save(step, best)
            if self.stale():
                return step
            if stop and step < self.total:
                raise Stopped(step, self.told_to_end or signal.SIGTERM)
        return step

    def update(self, batch, step):
        """Train on a batch; returns whether a worker was told to end."""
        if step in self.notes["skipped"]:
            return False
        rate = optimization.learning_rate(self.config, step, self.steps)
        arguments = (float(step), rate, float(self.told_to_end > 0))
        mixing = step_functions.draw_mixing(
            self.config, step, self.size, step // self.steps, self.groups
        )
        loss, norm, stop = self.train_step(batch, *(tf.constant(x) for x in (*arguments, mixing)))
        self.pending.append((step, loss, norm))
        self.reporter.steps += 1
        return self.workers > 1 and stop.numpy() > 0

    # === Looking ===

    def healthy(self):
        """Whether no loss since the last look is a NaN or has blown up."""
        self.pending = [(step, float(loss), float(norm)) for step, loss, norm in self.pending]
        # A guess costs log(classes); float16 may overflow a gradient, never the loss.
        limit = 4 * np.log(self.classes) + 4
        scaling = self.optimizer.scaling
        self.bad = [
            step
            for step, loss, norm in self.pending
            if not loss < limit or not (scaling or np.isfinite(norm))
        ]
        if self.pending and not self.bad:
            self.notes["healthy"] = self.pending[-1][0]
        return not self.bad

    def report(self, step):
        losses = [loss for _, loss, _ in self.pending]
        rate = optimization.learning_rate(self.config, step - 1, self.steps)
        self.pending = []
        if losses:
            self.reporter.training(step, float(np.mean(losses)), rate)

    def evaluate(self, step, evaluation_batches):
        """Evaluate the weights, and their average; returns whether it was the best yet."""
        results = self.evaluate_once(evaluation_batches)
        if self.optimizer.averages:
            with self.optimizer.averaged():
                averaged = self.evaluate_once(evaluation_batches)
            results |= {f"ema_{key}": averaged[key] for key in averaged if key != "images"}
        self.reporter.evaluation(step, results)
        self.notes["results"] = results
        accuracy = max(results["accuracy"], results.get("ema_accuracy", 0.0))
        best = accuracy > self.notes["best"]
        self.notes["evaluations_since_best"] = (
            0 if best else self.notes.get("evaluations_since_best", 0) + 1
        )
        self.notes["best"] = max(accuracy, self.notes["best"])
        return best

    def stale(self):
        """Whether so many evaluations brought nothing better that the run ends early."""
        limit = self.config.early_stopping
        return bool(limit) and self.notes.get("evaluations_since_best", 0) >= limit

    def evaluate_once(self, evaluation_batches):
        with self.corrupt[1].reading():
            results = step_functions.evaluate(
                self.strategy, self.evaluation_step, evaluation_batches()
            )
        self.check_images()
        return results

    def check_images(self):
        for corrupt in self.corrupt:
            corrupt.check()

    # === Keeping ===

    def checkpoint_due(self, step):
        if self.config.checkpoint_steps:
            return step % self.config.checkpoint_steps == 0
        return time.monotonic() - self.saved_at > 60 * self.config.checkpoint_minutes

    def save(self, step, best=False):
        if self.chief:
            self.checkpoints.save(step, self.notes, best)
        self.saved_at = time.monotonic()

    def restore(self):
        """Fill the state from the last good checkpoint; returns its step, None without any."""
        notes = self.checkpoints.restore(self.chief)
        if notes is None:
            return None
        step = notes.pop("step")
        notes.setdefault("healthy", step - 1)
        self.notes = {**notes, "skipped": sorted({*notes["skipped"], *self.notes["skipped"]})}
        self.pending = []
        self.reporter.go_on_from(step)
        if step:
            self.reporter.say(f"going on from the checkpoint of step {step} of {self.total}")
        return step

    def roll_back(self, step):
        """Go back to the last checkpoint and skip the first batch that did harm."""
        bad, rollbacks = self.bad[0], self.notes["rollbacks"] + 1
        loss, norm = next((loss, norm) for s, loss, norm in self.pending if s == bad)
        reason = f"the loss of step {bad} was {loss:.4g}, its gradient norm {norm:.4g}"
        if rollbacks > self.config.max_rollbacks:
            if self.chief:
                self.checkpoints.set_aside(after=self.notes["healthy"])
            raise RuntimeError(
                f"{reason}, after {self.config.max_rollbacks} rollbacks (--max_rollbacks). A lower "
                "--learning_rate, --clip_norm=1 or --precision=float32 may help: --change goes on "
                "with the run under another."
            )
        self.notes["skipped"] = [*self.notes["skipped"], bad]
        step = self.restore()
        self.notes["rollbacks"] = rollbacks
        self.reporter.say(f"{reason}: back to step {step}, without that batch")
        return step

    def finish(self, step, evaluation_batches, held_out):
        """Write the trained model and say where everything lies."""
        files = {}
        if self.chief and self.checkpoints.step() < step:
            self.save(step)
        if self.stale():
            step = self.take_best(step)
        results = dict(self.notes["results"])
        averaged = results.get("ema_accuracy", -1.0) > results["accuracy"]
        results["better"] = "final_ema" if averaged else "final"
        if self.chief:
            arguments = (self.model, self.config, self.classes, self.label_names, self.workdir)
            files = models.save_final(*arguments)
            if self.optimizer.averages:
                with self.optimizer.averaged():
                    files |= models.save_final(*arguments, "final_ema")
        if self.config.report:
            with self.optimizer.averaged() if averaged else contextlib.nullcontext():
                files |= self.write_report(step, evaluation_batches, held_out, results)
        if self.chief:
            record = {"step": step, **results, "files": files}
            write_atomically(self.workdir / "results.json", json.dumps(record, indent=2))
            for name in ("config.json", "metrics.jsonl", "results.json", "checkpoints"):
                files[name] = os.fspath(self.workdir / name)
        return {**results, "step": step, "files": files}

    def write_report(self, step, evaluation_batches, held_out, results):
        """Pictures and tables of the better weights' answers; returns the files."""
        with self.corrupt[1].reading():
            found = predictions.predict(
                self.strategy, self.model, evaluation_batches(), held_out.size
            )
        if not self.chief:
            return {}
        directory = self.workdir / "report"
        error, files = predictions.write_report(found, held_out, self.model, directory)
        results["calibration_error"] = error
        drawn = {name: path for name, path in files.items() if name.endswith(".png")}
        self.reporter.pictures(step, {name: read_picture(path) for name, path in drawn.items()})
        if self.optimizer.averages:
            self.reporter.say(
                f"plain weights {results['accuracy']:.2%}, moving average "
                f"{results['ema_accuracy']:.2%}: {results['better']} is the better"
            )
        self.reporter.say(f"calibration error {error:.2%}; pictures and tables in {directory}")
        return files

    def take_best(self, last):
        """Put the best weights in place of the last; returns their step."""
        path = self.checkpoints.directory / "best.safetensors"
        tensors, notes = read(path)
        self.checkpoints.fill(tensors, path)
        self.notes["results"] = notes["results"]
        self.reporter.say(
            f"no better accuracy in {self.config.early_stopping} evaluations (--early_stopping): "
            f"ended at step {last}, with the best weights, of step {notes['step']}"
        )
        return notes["step"]


def read_picture(path):
    """A PNG as a batch of one for TensorBoard."""
    return tf.io.decode_png(tf.io.read_file(path), channels=3)[None]
