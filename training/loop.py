"""Training loop: one for every model, data set and strategy."""

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
from training.watchdog import Watchdog, watch

PICTURES = 16  # number of the first training images shown in TensorBoard
EVALUATION_LOOK = 20  # evaluation batches between two exchanges of signals among workers
# Errors raised by a collective when a peer dies.
LOST_WORKER = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.InternalError,
)


class Stopped(Exception):
    """Raised when a signal ends the run before its last step, after a checkpoint is written.

    Args:
        step: Step that the run reached.
        signal: Number of the signal.
    """

    def __init__(self, step, signal):
        """Builds the message from the step."""
        super().__init__(f"stopped at step {step}; the same command goes on from there")
        self.signal = signal


class Interrupted(Exception):
    """Raised when a signal ends an evaluation."""


class Decision(typing.NamedTuple):
    """Decision of all workers in an update.

    Args:
        stop: Whether a worker received a signal to stop.
        due: Whether a checkpoint is due by the chief's clock.
    """

    stop: bool
    due: bool


def train(config):
    """Trains as configured, or resumes the run in its directory.

    Args:
        config: A `training.configuration.Config`.

    Returns:
        A dict: `accuracy`, `top5_accuracy` and `evaluation_loss` on the held-out images, `step`,
        `files`.

    Raises:
        ValueError: If the configuration is invalid; raised before any expensive work.
        Stopped: After SIGTERM or Ctrl-C, with a checkpoint written.
        OSError: If the disk is full; the last checkpoint is intact.
        RuntimeError: If the loss diverged more than `max_rollbacks` times, or another worker died.
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
    with watch("start", 60 * config.stall_minutes):
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
    """Trains in a directory that this process has locked.

    Args:
        config: A `training.configuration.Config`.
        strategy: A `tf.distribute.Strategy`.
        share: A `training.data.WorkerShare`.

    Returns:
        The results, as `train` returns them.
    """
    changes = workdir.check_config(config)
    training_source, held_out = sources.open_sources(config)
    classes, names = config.classes or training_source.classes, training_source.label_names
    steps = config.steps_per_epoch or training_source.size // config.batch_size
    if not steps:
        raise ValueError(
            f"--batch_size={config.batch_size} is more than the {training_source.size} images"
        )
    profiling.check_range(config, steps * config.total_epochs)
    # Workers agree on the initial value of each variable in a collective.
    stall = 60 * config.stall_minutes, config.data_service, worker_name(share)
    with watch("start", *stall), strategy.scope():
        model = models.build(config, classes, names)
        models.freeze(config, model)
        optimizer = optimization.Optimizer(model, config)
        teacher = models.build_teacher(config, model)
    size, fill = models.image_size(model), models.mean_color(model)
    corrupt = data.UnreadableImages(training_source, config.max_corrupt)
    corrupt_held_out = data.UnreadableImages(held_out, config.max_corrupt)
    run = Run(
        config, strategy, share, model, optimizer, teacher, steps, classes, names, held_out.size
    )
    # A copy, because config.json records the requested values, such as 0 for the model's crop.
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


def worker_name(share):
    """Returns a worker's name for messages, with a trailing space; "" if it is the only one."""
    return f"worker {share.index} of {share.workers} " if share.workers > 1 else ""


def check_batch(config, strategy):
    """Raises a ValueError if devices, accumulation and groups do not divide the batch."""
    step_functions.count_groups(config, strategy.num_replicas_in_sync)


def call_and_trace(function, *arguments):
    """Returns (result of a `tf.function`, whether the call traced and so compiled it)."""
    traces = function.experimental_get_tracing_count()
    result = function(*arguments)
    return result, function.experimental_get_tracing_count() > traces


class Run:
    """State of a run, shared by the parts of the loop.

    Every decision (a checkpoint, a rollback, an evaluation, the end) is taken at the same step by
    all workers: it depends on the step number, on values reduced over the workers, or on the
    chief's vote.

    Args:
        config: A `training.configuration.Config`.
        strategy: A `tf.distribute.Strategy`.
        share: A `training.data.WorkerShare`.
        model: The `keras.Model`, on pixels.
        optimizer: A `training.optimization.Optimizer`.
        teacher: Function from pixels to a teacher's logits, or `None`.
        steps: Updates per epoch.
        classes: Number of classes.
        label_names: Class names, or `None`.
        evaluation_images: Number of held-out images, to estimate the time left. Defaults to 0.
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
        """Builds the step functions, the reporter, the checkpoints and the watchdog."""
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
        self.evaluation_step = step_functions.make_evaluation_step(strategy, model)
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
            # A run in float32 or bfloat16 may be resumed in float16.
            defaults=optimization.LOSS_SCALE,
        )
        self.profiler = profiling.Profiler(config, self.total, self.chief, self.reporter.say)
        # `healthy`: last step with a good loss, so that the weights before its update are good.
        self.notes = {"skipped": [], "rollbacks": 0, "healthy": -1, "best": -1.0, "results": {}}
        self.step = 0  # updates made
        self.pending = []  # (step, loss, gradient norm) since the last report
        self.counted = -1  # last step counted in notes["skipped_in_a_row"]
        self.told_to_end = 0  # number of the signal received, 0 for none
        self.compile_seconds = 0.0  # of the evaluation in progress
        self.stall = 60 * config.stall_minutes, config.data_service, worker_name(share)
        self.watchdog = Watchdog(self.on_signal, self.save_at_end, *self.stall)

    def go(self, training_batches, evaluation_batches, held_out, corrupt, changes):
        """Runs to the end and writes the results.

        Args:
            training_batches: Function from (epoch, first step) to a `tf.data.Dataset`.
            evaluation_batches: Function that returns a `tf.data.Dataset` of the held-out images.
            held_out: Source of the held-out images.
            corrupt: Tuple of `data.UnreadableImages`: training and held-out.
            changes: Changed fields of a resumed run, as `workdir.check_config` returns them.

        Returns:
            A dict of results; with `--find_learning_rate` that of `find_learning_rate`.
        """
        self.corrupt = corrupt
        if self.config.find_learning_rate:
            with watch("start", *self.stall) as watchdog:
                return find_learning_rate(self, training_batches, watchdog.during)
        with watch("start", *self.stall):
            step = self.step = self.start(changes)
        self.saved_at = time.monotonic()
        report_steps = self.config.report_steps or min(100, self.steps)
        self.profiler.resume(step)
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
        with watch("report", *self.stall) as watchdog:
            return self.finish(step, evaluation_batches, held_out, watchdog.tick)

    def on_signal(self, number):
        """Ends the run after this update; a second signal ends the process at once."""
        self.told_to_end = number

    def start(self, changes):
        """Starts or resumes the run; returns the step.

        Raises:
            ValueError: If the directory holds reports of a run but no checkpoint.
        """
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
        """Trains to the end of the epoch, unless a rollback or early stopping ends it sooner.

        Returns:
            The step reached; after a rollback, that of the checkpoint.

        Raises:
            Stopped: If a worker received a signal.
        """
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
        """Returns the number of updates to run in one execution.

        An execution ends where a report, a checkpoint, a skipped batch or a trace is due.
        """
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
        # A single update uses the same graph as several, so that a resumed run, whose executions
        # may end at other steps, is bit-identical.
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
        """Trains on one batch; returns the `Decision` of all workers."""
        if step in self.notes["skipped"]:
            return Decision(False, False)
        arguments = float(step), self.learning_rate(step), self.votes(step), self.mixing(step)
        (loss, norm, votes), traced = call_and_trace(
            self.train_step, batch, *(tf.constant(x) for x in arguments)
        )
        self.pending.append((step, loss, norm))
        self.reporter.executed(1, traced)
        return self.decision(votes)

    def update_several(self, batches, step, count):
        """Trains on `count` batches in one execution; returns a `Decision`."""
        steps = range(step, step + count)
        rates = tf.constant([self.learning_rate(each) for each in steps])
        mixings = tf.stack([tf.constant(self.mixing(each)) for each in steps])
        votes = tf.constant(self.votes(step))
        (losses, norms, votes), traced = call_and_trace(
            self.train_steps, batches, tf.constant(count), tf.constant(step), rates, votes, mixings
        )
        self.pending += zip(steps, tf.unstack(losses), tf.unstack(norms), strict=True)
        self.reporter.executed(count, traced)
        return self.decision(votes)

    def wait_for_update(self):
        """Blocks until the devices have finished the last update."""
        for _, loss, _ in self.pending[-1:]:
            float(loss)

    def learning_rate(self, step):
        """Returns the learning rate of update `step`, without layer decay."""
        return optimization.learning_rate(self.config, step, self.steps)

    def mixing(self, step):
        """Returns the mixup and cutmix parameters of update `step`: float32 (groups, 5)."""
        return step_functions.draw_mixing(
            self.config, step, self.size, step // self.steps, self.groups
        )

    def votes(self, step):
        """Returns this worker's votes for `Decision`: [stop, due], 0.0 or 1.0 each.

        Only the chief votes on `due`, because clocks differ between workers.
        """
        clock = self.chief and not self.config.checkpoint_steps and self.checkpoint_due(step)
        return [float(self.told_to_end > 0), float(clock)]

    def decision(self, votes):
        """Returns the `Decision` for votes summed over the workers."""
        if self.workers == 1:  # `execute` decides after the update instead
            return Decision(False, False)
        return Decision(*(bool(vote > 0) for vote in votes.numpy()))

    # === Inspection ===

    def looks(self, step, report_steps, decision):
        """Returns whether to inspect losses, gradient norms and unreadable images after a step.

        Inspection waits for the devices, so it is not done after every update.
        """
        limit = self.skip_limit()
        return (
            decision.stop
            or decision.due
            or step % self.steps == 0
            or step % report_steps == 0
            or bool(limit and step % limit == 0)
        )

    def bad_steps(self):
        """Returns the steps since the last report with a NaN or diverged loss.

        A non-finite gradient norm counts too, except with float16, whose loss scaling expects
        overflows.
        """
        self.pending = [(step, float(loss), float(norm)) for step, loss, norm in self.pending]
        # Uniform predictions have a loss of log(classes), a diverged one is several times that.
        # With float16 a gradient may overflow, but never the loss.
        limit = 4 * np.log(self.classes) + 4
        scaling = self.optimizer.scaling
        return [
            step
            for step, loss, norm in self.pending
            if not loss < limit or not (scaling or np.isfinite(norm))
        ]

    def healthy(self):
        """Returns whether all losses since the last report are good on all workers.

        Sets `self.bad` to a list of the first bad step of any worker, empty if there is none.
        """
        first = min(self.bad_steps(), default=self.total)
        first = int(strategies.of_each_worker(self.strategy, [first]).min())
        self.bad = [first] if first < self.total else []
        if self.pending and not self.bad:
            self.notes["healthy"] = self.pending[-1][0]
        return not self.bad

    def skip_limit(self):
        """Returns how many consecutive updates float16 may skip; 0 if unlimited."""
        return self.config.max_skipped_updates if self.optimizer.scaling else 0

    def count_skipped(self):
        """Raises a RuntimeError if float16 skipped too many updates in a row."""
        row = longest = self.notes.get("skipped_in_a_row", 0)
        for step, _, norm in self.pending:
            if step > self.counted:
                row, self.counted = 0 if np.isfinite(norm) else row + 1, step
                # A finite update before this look does not undo a row that was too long.
                longest = max(longest, row)
        if not self.optimizer.scaling:
            row = 0
        self.notes["skipped_in_a_row"] = row
        if self.skip_limit() and longest >= self.skip_limit():
            raise RuntimeError(
                f"{longest} updates in a row were skipped (--max_skipped_updates): their gradients "
                f"overflowed float16 at a loss scale of {self.loss_scale():g}, and no weight "
                "learns. Try --precision=bfloat16 or float32, which --change allows for this run, "
                "or a lower --learning_rate; check the images and labels"
            )

    def loss_scale(self):
        """Returns the float16 loss scale, or `None` in other precisions."""
        return float(self.optimizer.scale[0].numpy()) if self.optimizer.scaling else None

    def report(self, step):
        """Reports the mean loss, learning rate and gradient norm since the last report."""
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
        """Evaluates; after a signal, records that the evaluation is due when the run resumes.

        Returns:
            Whether the accuracy is the best so far.

        Raises:
            Stopped: If a worker received a signal.
        """
        try:
            return self.evaluate(step, evaluation_batches)
        except Interrupted:
            self.notes["evaluation_due"] = True
            self.save(step)
            self.checkpoints.wait()
            raise Stopped(step, self.told_to_end or signal.SIGTERM) from None

    def evaluate_and_save(self, step, evaluation_batches):
        """Runs the evaluation that a signal interrupted, and saves."""
        del self.notes["evaluation_due"]
        self.save(step, self.evaluate_or_stop(step, evaluation_batches))

    def evaluate(self, step, evaluation_batches):
        """Evaluates the weights and, if there is one, their moving average.

        Returns:
            Whether the better of the two accuracies is the best so far.
        """
        began, self.compile_seconds = time.perf_counter(), 0.0
        results = self.evaluate_once(evaluation_batches)
        if self.optimizer.averages:
            with self.optimizer.averaged():
                averaged = self.evaluate_once(evaluation_batches)
            results |= {f"ema_{key}": averaged[key] for key in averaged if key != "images"}
        seconds = time.perf_counter() - began - self.compile_seconds
        self.reporter.evaluation(step, results, seconds)
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
        """Returns whether the evaluation after a step is among the best `--keep_best`."""
        return step in [each for _, each in self.notes.get("ranked", [])]

    def stale(self):
        """Returns whether to stop early.

        That is so once the last `--early_stopping` evaluations brought no better accuracy.
        """
        limit = self.config.early_stopping
        return bool(limit) and self.notes.get("evaluations_since_best", 0) >= limit

    def evaluate_once(self, evaluation_batches):
        """Evaluates the current weights; returns the results of `step_functions.evaluate`.

        Raises:
            Interrupted: If a worker received a signal.
        """
        done = itertools.count()

        def step(batch):
            self.before_evaluation(next(done))
            began = time.perf_counter()
            sums, traced = call_and_trace(self.evaluation_step, batch)
            if traced:
                self.compile_seconds += time.perf_counter() - began
            return sums

        with self.watchdog.during("evaluation"), self.corrupt[1].reading():
            results = step_functions.evaluate(self.strategy, step, evaluation_batches())
        self.check_images()
        return results

    def before_evaluation(self, done):
        """Raises `Interrupted` if a worker received a signal; called before each evaluation batch.

        Args:
            done: Batches evaluated. Several workers exchange signals every `EVALUATION_LOOK` of
                them.
        """
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
        """Raises a ValueError, in all workers, if too many images are unreadable."""
        if self.workers == 1:
            for corrupt in self.corrupt:
                corrupt.check()
            return
        # Copied, because threads of the input pipeline add names concurrently.
        names = [frozenset(corrupt.names) for corrupt in self.corrupt]
        counts = strategies.of_each_worker(self.strategy, [len(each) for each in names])
        for corrupt, mine, count in zip(self.corrupt, names, counts.T, strict=True):
            if count.sum() > corrupt.limit:  # an upper bound: workers may share unreadable images
                digests = [name_digest(name) for name in mine]
                digests += [0] * (int(count.max()) - len(digests))
                found = strategies.of_each_worker(self.strategy, digests)
                corrupt.check(len(np.setdiff1d(found, [0])))

    # === Checkpoints ===

    def checkpoint_due(self, step):
        """Returns whether a checkpoint is due, by steps or by minutes."""
        if self.config.checkpoint_steps:
            return step % self.config.checkpoint_steps == 0
        return time.monotonic() - self.saved_at > 60 * self.config.checkpoint_minutes

    def save(self, step, best=False):
        """Saves a checkpoint from the chief.

        Args:
            step: Updates made.
            best: Whether it is the best evaluation so far. Defaults to `False`.
        """
        if self.chief:
            self.checkpoints.save(step, self.notes, best)
        self.saved_at = time.monotonic()

    def save_at_end(self, between_updates):
        """Writes a last checkpoint from the watchdog's thread while the main thread is blocked.

        Args:
            between_updates: Whether the state is consistent, not in the middle of an update.

        Returns:
            Its step, or `None` if none could be written.
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
        """Restores the state from the chief's last good checkpoint.

        Args:
            afresh: Whether to set all checkpoints aside if none is readable. Defaults to `False`.

        Returns:
            Step of the checkpoint, or `None` if there is none.
        """
        notes = self.restore_chief(afresh) if self.chief else None
        if self.workers > 1:
            # The others restore exactly the checkpoint that the chief found readable.
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
        """Restores the chief's state; returns the notes, or `None` without a checkpoint.

        Args:
            afresh: Whether to set all checkpoints aside if none is readable.
        """
        self.checkpoints.wait()
        try:
            return self.checkpoints.restore()
        except NoneReadable:
            if not afresh:
                raise
            self.checkpoints.set_aside()
            return None

    def roll_back(self, step):
        """Restores the last checkpoint and marks the first bad batch as skipped.

        Returns:
            Step of the checkpoint.

        Raises:
            RuntimeError: After `max_rollbacks` rollbacks.
        """
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
        """Returns a CRC-32 of the trainable weights."""
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

    def finish(self, step, evaluation_batches, held_out, tick=None):
        """Writes the final weights, the report and `results.json`.

        Args:
            step: Step that the run reached.
            evaluation_batches: Function that returns a `tf.data.Dataset` of the held-out images.
            held_out: Source of the held-out images.
            tick: Function that is called after each batch of the report, or `None`.

        Returns:
            The results, as `train` returns them.
        """
        files = {}
        self.check_weights_changed(step)
        if self.chief:
            if self.checkpoints.step() < step:
                self.save(step)
            self.checkpoints.wait()
        if self.stale():
            strategies.total(self.strategy, 1)  # barrier: the chief has written its checkpoint
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
                files |= self.write_report(step, evaluation_batches, held_out, results, tick)
        if self.chief:
            record = {"step": step, **results, "files": files}
            write_atomically(self.workdir / "results.json", json.dumps(record, indent=2))
            for name in ("config.json", "metrics.jsonl", "results.json", "checkpoints"):
                files[name] = os.fspath(self.workdir / name)
        return {**results, "step": step, "files": files}

    def write_report(self, step, evaluation_batches, held_out, results, tick=None):
        """Writes tables and pictures of the predictions; returns the files.

        The current weights are used; `finish` swaps in their moving average if it is more accurate.
        """
        with self.corrupt[1].reading():
            found = predictions.predict(
                self.strategy, self.model, evaluation_batches(), held_out.size, tick=tick
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
        """Replaces the weights with those of the best evaluation; returns their step.

        Args:
            last: Step at which the run ended.
        """
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
    """Returns a PNG as a batch of one, uint8 (1, height, width, 3), for TensorBoard."""
    return tf.io.decode_png(tf.io.read_file(path), channels=3)[None]


def name_digest(name):
    """Returns a positive 63-bit hash of a name."""
    digest = hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 1) | 1
