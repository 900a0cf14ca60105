"""The training loop: one for every model, data set and strategy."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import signal
import sys
import time
import typing
import zlib
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_tnt.files import write_atomically
from training import (
    configuration,
    data,
    loggers,
    models,
    optimization,
    optimizers,
    predictions,
    profiling,
    report,
    service,
    sources,
    step_functions,
    strategies,
    workdir,
)
from training.checkpoint import Checkpoints, NoneReadable, read
from training.find_rate import find_learning_rate
from training.watchdog import Watchdog, starting

PICTURES = 16  # of the first training images in TensorBoard
EVALUATION_LOOK = 20  # batches of an evaluation between which workers ask each other for signals
# What a collective says when its other end is gone.
LOST_WORKER = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
)


class Stopped(Exception):
    """The run was told to end before its last step; a checkpoint is written.

    Args:
        step: the step it reached.
        signal: number of the signal that told it.
    """

    def __init__(self, step, signal):
        super().__init__(f"stopped at step {step}; the same command goes on from there")
        self.signal = signal


class Interrupted(Exception):
    """An evaluation that a signal ended."""


class Decision(typing.NamedTuple):
    """What the workers decided together in an update.

    Args:
        stop: whether one of them was told to end.
        due: whether the chief's clock says that a checkpoint is due.
    """

    stop: bool
    due: bool


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
    loggers.check(config)
    workdir.check_config(config)
    for warning in configuration.warnings(config):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    if config.data_service:
        service.wait_for(config.data_service)
    keras.utils.set_random_seed(config.seed)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    with starting(60 * config.stall_minutes):
        strategy = strategies.make(config)
    share = data.WorkerShare(*strategies.worker(strategy), strategy.num_replicas_in_sync)
    check_batch(config, strategy)
    try:
        with workdir.held(config.workdir) if share.index == 0 else contextlib.nullcontext():
            return train_held(config, strategy, share)
    except LOST_WORKER as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
        if share.workers > 1:
            raise RuntimeError(
                f"worker {share.index} of {share.workers} has lost another one, and ends: started "
                f"again, all of them go on from the last checkpoint ({reason})"
            ) from error
        if config.data_service:
            raise RuntimeError(
                f"--data_service={config.data_service} failed ({reason}): when it runs again, the "
                "same command resumes the run"
            ) from error
        raise


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
    run = Run(
        config, strategy, share, model, optimizer, teacher, steps, classes, names, held_out.size
    )
    # What is recorded is what was asked for, 0 for the model's own crop among it.
    images = dataclasses.replace(config, crop=models.crop_share(config, model))
    results = None
    try:
        results = run.go(
            lambda epoch, first: data.training_batches(
                training_source, images, size, fill, epoch, first, steps, share, corrupt
            ),
            lambda: data.evaluation_batches(held_out, images, size, share, corrupt_held_out),
            held_out,
            (corrupt, corrupt_held_out),
            changes,
        )
        return results
    finally:
        run.reporter.loggers.finish(results)


def check_batch(config, strategy):
    """Raises a ValueError if devices, accumulation and groups do not divide the batch."""
    step_functions.count_groups(config, strategy.num_replicas_in_sync)


class Run:
    """A run under way: the state that the loop's parts share.

    Whatever decides what comes next (a checkpoint, a rollback, an evaluation, the end) is decided
    at the same step by all workers: by the step's number, by values that are reduced over them, or
    by the chief's vote.
    """

    def __init__(
        self,
        config,
        strategy,
        share,
        model,
        optimizer,
        teacher,
        steps,
        classes,
        label_names,
        evaluation_images=0,
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
        self.train_steps = step_functions.make_execution(self.train_step)
        self.evaluation_step = step_functions.make_evaluation_step(strategy, model, classes)
        # A training step costs three forward passes: one forward, two backward.
        peak = models.peak_tflops(config) * 1e12
        peak_images = peak / (3 * models.forward_flops(model)) if peak else 0.0
        self.reporter = report.Reporter(
            config,
            self.total,
            steps,
            strategy.num_replicas_in_sync,
            self.chief,
            peak_images,
            evaluation_images,
        )
        self.checkpoints = Checkpoints(
            self.workdir / "checkpoints",
            models.state(model) | optimizer.state(),
            config.keep,
            background=True,
            keep_best=config.keep_best,
        )
        self.profiler = profiling.Profiler(config, self.total, self.chief, self.reporter.say)
        # "healthy" is the last step whose loss was: the weights that it was computed of are good.
        self.notes = {"skipped": [], "rollbacks": 0, "healthy": -1, "best": -1.0, "results": {}}
        self.step = 0  # updates that the state is after
        self.pending = []  # (step, loss, gradient norm) since the last report
        self.counted = -1  # the last step whose overflow is in notes["skipped_in_a_row"]
        self.told_to_end = 0  # the number of the signal
        self.watchdog = Watchdog(
            self.on_signal,
            self.save_at_end,
            60 * config.stall_minutes,
            config.data_service,
            f"worker {share.index} of {share.workers} " if share.workers > 1 else "",
        )

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
            with starting(0):
                return find_learning_rate(self, training_batches)
        step = self.step = self.start(changes)
        self.saved_at = time.monotonic()
        report_steps = self.config.report_steps or min(100, self.steps)
        self.reporter.open_bar(step)
        try:
            with self.watchdog:
                if self.notes.get("evaluation_due"):
                    self.evaluate_and_save(step, evaluation_batches)
                while step < self.total and not self.stale():
                    step = self.epoch(step, training_batches, evaluation_batches, report_steps)
        finally:
            self.profiler.close()
            self.reporter.close_bar()
            self.checkpoints.wait()
        return self.finish(step, evaluation_batches, held_out)

    def on_signal(self, number):
        """Ends the run after this update; a second signal ends the process at once."""
        self.told_to_end = number

    def start(self, changes):
        """Begins the run, or resumes it; returns the step."""
        step = self.restore(afresh=self.config.start_afresh)
        if step is None and self.reporter.lines and not self.config.start_afresh:
            raise ValueError(
                f"{self.workdir} holds reports up to step {self.reporter.lines[-1]['step']} and no "
                "checkpoint. Give another --workdir, or --start_afresh to begin at step 0"
            )
        if changes:
            self.notes |= {"rollbacks": 0, "skipped_in_a_row": 0}
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
        self.reporter.loggers.start()
        if step is None:
            self.notes["initial_weights"] = self.weights_digest()
            self.reporter.go_on_from(0)
            self.reporter.begin()
            self.save(0)
        return step or 0

    def epoch(self, step, training_batches, evaluation_batches, report_steps):
        """Go on to the end of the epoch, or back to a checkpoint; returns the step reached."""
        self.step = step
        epoch, first = divmod(step, self.steps)
        with self.watchdog.during("input"):
            batches = iter(
                self.strategy.distribute_datasets_from_function(
                    lambda context: training_batches(epoch, first)
                )
            )
        while step < (epoch + 1) * self.steps:
            count = self.execution_length(step, report_steps)
            with self.profiler.updates(step, count, self.wait_for_update):
                decision = self.execute(batches, step, count)
            step = self.step = step + count
            ends = step % self.steps == 0
            if self.looks(step, report_steps, decision):
                self.check_images()
                if not self.healthy():
                    return self.roll_back(step)
                self.count_skipped()
            if ends or step % report_steps == 0:
                self.report(step)
            best = False
            if step == self.total or ends and (epoch + 1) % self.config.evaluate_epochs == 0:
                best = self.evaluate_or_stop(step, evaluation_batches)
            if decision.due or best or decision.stop or self.stale() or self.is_ranked(step):
                self.save(step, best)
            if self.stale():
                return step
            if decision.stop and step < self.total:
                self.checkpoints.wait()
                raise Stopped(step, self.told_to_end or signal.SIGTERM)
        return step

    # === Updates ===

    def execution_length(self, step, report_steps):
        """Returns how many updates to make before anything else has to be done."""
        most = self.config.steps_per_execution
        if most == 1 or step == 0 or step in self.notes["skipped"]:
            return 1
        stretches = [self.steps, report_steps, self.config.checkpoint_steps, self.skip_limit()]
        ends = [(step // stretch + 1) * stretch for stretch in stretches if stretch]
        ends += [skipped for skipped in self.notes["skipped"] if skipped > step]
        ends += self.profiler.ends(step)
        return min(most, min(ends) - step)

    def execute(self, batches, step, count):
        """Trains on the next batches; returns a `Decision`."""
        began = time.perf_counter()
        # One update of several is made by the same graph, so that a resumed run, whose executions
        # may end elsewhere, has the same bits.
        several = self.config.steps_per_execution > 1 and step not in {0, *self.notes["skipped"]}
        if several:
            with self.watchdog.during("update"), self.corrupt[0].reading():
                decision = self.update_several(batches, step, count)
        else:
            with self.watchdog.during("input"), self.corrupt[0].reading():
                batch = next(batches)
            self.reporter.waited += time.perf_counter() - began
            if step == 0:
                (images, *_) = self.strategy.experimental_local_results(batch["image"])
                self.reporter.pictures(0, {"augmented": images[:PICTURES]})
            with self.watchdog.during("update"):
                decision = self.update(batch, step)
        if self.workers == 1:
            self.check_images()
            decision = Decision(bool(self.told_to_end), self.checkpoint_due(step + count))
        elif self.config.checkpoint_steps:
            decision = Decision(decision.stop, self.checkpoint_due(step + count))
        return decision

    def update(self, batch, step):
        """Trains on a batch; returns the `Decision` of all workers."""
        if step in self.notes["skipped"]:
            return Decision(False, False)
        arguments = float(step), self.learning_rate(step), self.votes(step), self.mixing(step)
        loss, norm, votes = self.train_step(batch, *(tf.constant(x) for x in arguments))
        self.pending.append((step, loss, norm))
        self.reporter.executed(1)
        return self.decision(votes)

    def update_several(self, batches, step, count):
        """Trains on `count` batches in one execution; returns the `Decision` of all workers."""
        steps = range(step, step + count)
        rates = tf.constant([self.learning_rate(each) for each in steps])
        mixings = tf.stack([tf.constant(self.mixing(each)) for each in steps])
        votes = tf.constant(self.votes(step))
        losses, norms, votes = self.train_steps(
            batches, tf.constant(count), tf.constant(step), rates, votes, mixings
        )
        self.pending += zip(steps, tf.unstack(losses), tf.unstack(norms), strict=True)
        self.reporter.executed(count)
        return self.decision(votes)

    def wait_for_update(self):
        """Waits until the devices have made the last update."""
        for _, loss, _ in self.pending[-1:]:
            float(loss)

    def learning_rate(self, step):
        return optimization.learning_rate(self.config, step, self.steps)

    def mixing(self, step):
        return step_functions.draw_mixing(
            self.config, step, self.size, step // self.steps, self.groups
        )

    def votes(self, step):
        """Returns this worker's part of a `Decision`; the clock that counts is the chief's."""
        clock = self.chief and not self.config.checkpoint_steps and self.checkpoint_due(step)
        return [float(self.told_to_end > 0), float(clock)]

    def decision(self, votes):
        """Returns the `Decision` of votes that are summed over the workers."""
        if self.workers == 1:  # what this process knows after the update counts
            return Decision(False, False)
        return Decision(*(bool(vote > 0) for vote in votes.numpy()))

    # === Looking ===

    def looks(self, step, report_steps, decision):
        """Returns whether losses, norms and unreadable images are looked at after a step."""
        limit = self.skip_limit()
        return (
            decision.stop
            or decision.due
            or step % self.steps == 0
            or step % report_steps == 0
            or bool(limit and step % limit == 0)
        )

    def bad_steps(self):
        """Returns the steps since the last report whose loss is a NaN or has blown up."""
        self.pending = [(step, float(loss), float(norm)) for step, loss, norm in self.pending]
        # A guess costs log(classes); float16 may overflow a gradient, never the loss.
        limit = 4 * np.log(self.classes) + 4
        scaling = self.optimizer.scaling
        return [
            step
            for step, loss, norm in self.pending
            if not loss < limit or not (scaling or np.isfinite(norm))
        ]

    def healthy(self):
        """Returns whether no worker has a bad loss since the last report."""
        first = min(self.bad_steps(), default=self.total)
        first = int(strategies.of_each_worker(self.strategy, [first]).min())
        self.bad = [first] if first < self.total else []
        if self.pending and not self.bad:
            self.notes["healthy"] = self.pending[-1][0]
        return not self.bad

    def skip_limit(self):
        """Returns how many updates in a row float16 may skip; 0: any number."""
        return self.config.max_skipped_updates if self.optimizer.scaling else 0

    def count_skipped(self):
        """Raises a RuntimeError if float16 skipped too many updates in a row."""
        row = self.notes.get("skipped_in_a_row", 0)
        for step, _, norm in self.pending:
            if step > self.counted:
                row, self.counted = 0 if np.isfinite(norm) else row + 1, step
        if not self.optimizer.scaling:
            row = 0
        self.notes["skipped_in_a_row"] = row
        if self.skip_limit() and row >= self.skip_limit():
            raise RuntimeError(
                f"{row} updates in a row were skipped (--max_skipped_updates): their gradients "
                f"overflowed float16 at a loss scale of {self.loss_scale():g}, and no weight "
                "learns. Try --precision=bfloat16 or float32, which --change allows for this run, "
                "or a lower --learning_rate; check the images and labels"
            )

    def loss_scale(self):
        return float(self.optimizer.scale[0].numpy()) if self.optimizer.scaling else None

    def report(self, step):
        losses = [loss for _, loss, _ in self.pending]
        norms = [norm for _, _, norm in self.pending]
        rate = self.learning_rate(step - 1)
        self.pending = []
        if losses:
            self.reporter.training(
                step,
                float(np.mean(losses)),
                rate,
                gradient_norm=report.finite_mean(norms),
                loss_scale=self.loss_scale(),
                skipped_updates=(
                    len(norms) - int(np.isfinite(norms).sum()) if self.optimizer.scaling else None
                ),
                device_memory_bytes=report.device_memory(),
            )

    def evaluate_or_stop(self, step, evaluation_batches):
        """Evaluates, unless a signal comes: then the evaluation comes first when the run resumes.

        Returns:
            Whether it was the best yet.
        """
        try:
            return self.evaluate(step, evaluation_batches)
        except Interrupted:
            self.notes["evaluation_due"] = True
            self.save(step)
            self.checkpoints.wait()
            raise Stopped(step, self.told_to_end or signal.SIGTERM) from None

    def evaluate_and_save(self, step, evaluation_batches):
        """Makes up for an evaluation that a signal ended."""
        del self.notes["evaluation_due"]
        self.save(step, self.evaluate_or_stop(step, evaluation_batches))

    def evaluate(self, step, evaluation_batches):
        """Evaluate the weights, and their average; returns whether it was the best yet."""
        began = time.perf_counter()
        results = self.evaluate_once(evaluation_batches)
        if self.optimizer.averages:
            with self.optimizer.averaged():
                averaged = self.evaluate_once(evaluation_batches)
            results |= {f"ema_{key}": averaged[key] for key in averaged if key != "images"}
        self.reporter.evaluation(step, results, time.perf_counter() - began)
        self.notes["results"] = results
        accuracy = max(results["accuracy"], results.get("ema_accuracy", 0.0))
        best = accuracy > self.notes["best"]
        self.notes["evaluations_since_best"] = (
            0 if best else self.notes.get("evaluations_since_best", 0) + 1
        )
        self.notes["best"] = max(accuracy, self.notes["best"])
        if self.config.keep_best:
            others = [each for each in self.notes.get("ranked", []) if each[1] != step]
            ranked = sorted([*others, [accuracy, step]], key=lambda each: (-each[0], each[1]))
            self.notes["ranked"] = ranked[: self.config.keep_best]
        return best

    def is_ranked(self, step):
        """Returns whether the evaluation after a step is one of the best `--keep_best`."""
        return step in [each for _, each in self.notes.get("ranked", [])]

    def stale(self):
        """Whether so many evaluations brought nothing better that the run ends early."""
        limit = self.config.early_stopping
        return bool(limit) and self.notes.get("evaluations_since_best", 0) >= limit

    def evaluate_once(self, evaluation_batches):
        done = itertools.count()

        def step(batch):
            self.before_evaluation(next(done))
            return self.evaluation_step(batch)

        with self.watchdog.during("evaluation"), self.corrupt[1].reading():
            results = step_functions.evaluate(self.strategy, step, evaluation_batches())
        self.check_images()
        return results

    def before_evaluation(self, done):
        """Raises `Interrupted` if a worker was told to end; `done` batches are evaluated."""
        self.watchdog.tick()
        if self.workers == 1:
            told = bool(self.told_to_end)
        else:
            told = done % EVALUATION_LOOK == 0 and strategies.total(
                self.strategy, int(self.told_to_end > 0)
            )
        if told:
            raise Interrupted

    def check_images(self):
        """Raises a ValueError, in all workers, if too many images cannot be read."""
        if self.workers == 1:
            for corrupt in self.corrupt:
                corrupt.check()
            return
        # Threads of the pipeline add names meanwhile.
        names = [frozenset(corrupt.names) for corrupt in self.corrupt]
        counts = strategies.of_each_worker(self.strategy, [len(each) for each in names])
        for corrupt, mine, count in zip(self.corrupt, names, counts.T, strict=True):
            if count.sum() > corrupt.limit:  # workers may have met the same images
                digests = [name_digest(name) for name in mine]
                digests += [0] * (int(count.max()) - len(digests))
                found = strategies.of_each_worker(self.strategy, digests)
                corrupt.check(len(np.setdiff1d(found, [0])))

    # === Keeping ===

    def checkpoint_due(self, step):
        if self.config.checkpoint_steps:
            return step % self.config.checkpoint_steps == 0
        return time.monotonic() - self.saved_at > 60 * self.config.checkpoint_minutes

    def save(self, step, best=False):
        if self.chief:
            self.checkpoints.save(step, self.notes, best)
        self.saved_at = time.monotonic()

    def save_at_end(self, between_updates):
        """Writes a last checkpoint while the main thread waits; returns its step, or `None`.

        Args:
            between_updates: whether the state is that between two updates.
        """
        if self.chief and between_updates and not self.bad_steps():
            self.checkpoints.wait()
            if self.checkpoints.step() < self.step:
                if self.pending:
                    self.notes["healthy"] = self.pending[-1][0]
                self.checkpoints.save(self.step, self.notes)
        self.checkpoints.wait()
        return self.step if self.checkpoints.step() == self.step else None

    def restore(self, afresh=False):
        """Fills the state from the last good checkpoint of the chief.

        Args:
            afresh: whether to set all checkpoints aside if none can be read.

        Returns:
            Its step, None without any.
        """
        notes = self.restore_chief(afresh) if self.chief else None
        if self.workers > 1:
            # The others read what the chief has written and found to be whole, and nothing else.
            mine = -1 if notes is None else notes["step"]
            step = int(strategies.of_each_worker(self.strategy, [mine])[0, 0])
            if not self.chief and step >= 0:
                notes = self.checkpoints.restore_step(step)
        if notes is None:
            return None
        step = notes.pop("step")
        notes.setdefault("healthy", step - 1)
        self.notes = {**notes, "skipped": sorted({*notes["skipped"], *self.notes["skipped"]})}
        self.pending, self.counted = [], step - 1
        self.reporter.go_on_from(step)
        if step:
            self.reporter.say(f"going on from the checkpoint of step {step} of {self.total}")
        return step

    def restore_chief(self, afresh):
        """Fills the chief's state; returns the notes, None without a checkpoint."""
        self.checkpoints.wait()
        try:
            return self.checkpoints.restore()
        except NoneReadable:
            if not afresh:
                raise
            self.checkpoints.set_aside()
            return None

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

    def weights_digest(self):
        """Returns a checksum of the weights that are trained."""
        total = 0
        for variable in self.optimizer.variables:
            total = zlib.crc32(
                np.ascontiguousarray(variable.numpy()).reshape(-1).view("uint8"), total
            )
        return total

    def check_weights_changed(self, step):
        """Raises a RuntimeError if training changed no weight."""
        if step and self.notes.get("initial_weights") == self.weights_digest():
            raise RuntimeError(
                f"{step} updates changed no weight: all gradients were zero or overflowed, or the "
                "learning rate is. Try --precision=float32 if it was float16, and another "
                "--learning_rate"
            )

    def finish(self, step, evaluation_batches, held_out):
        """Write the trained model and say where everything lies."""
        files = {}
        self.check_weights_changed(step)
        if self.chief:
            if self.checkpoints.step() < step:
                self.save(step)
            self.checkpoints.wait()
        if self.stale():
            strategies.total(self.strategy, 1)  # the chief's last checkpoint is written
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


def name_digest(name):
    """Returns a positive number of 63 bits that stands for a name."""
    digest = hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 1) | 1
