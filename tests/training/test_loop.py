"""Whole training runs: their files, resuming, faults, and parts of the loop."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import load_file

from training import (
    checkpoint,
    configuration,
    data,
    evaluate,
    loop,
    optimization,
    optimizers,
    plot,
    service,
    step_functions,
    strategies,
)

ROOT = Path(__file__).parent.parent.parent


def short(workdir, **values):
    """Returns the configuration of a run with two epochs of four updates."""
    defaults = {"epochs": 2, "steps_per_epoch": 4, "batch_size": 8, "deterministic": False}
    quiet = {"tensorboard": False, "report": False, "evaluate_epochs": 2, "checkpoint_steps": 2}
    return configuration.make("digits", workdir=str(workdir), **{**defaults, **quiet, **values})


def final_state(workdir, step=8):
    return load_file(Path(workdir) / "checkpoints" / f"step_{step:09d}.safetensors")


def assert_identical(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


# === A run ===


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Yields (result, directory) of a run with a moving average and TensorBoard."""
    from training import models

    sizes = {"depth": 1, "outer_dim": 16, "inner_dim": 4, "outer_heads": 2, "inner_stride": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "TNT_DIGITS", models.TNT_DIGITS | sizes)
        workdir = tmp_path_factory.mktemp("run")
        yield loop.train(short(workdir, ema=0.9, tensorboard=True, report=True)), workdir


def test_run_writes_its_configuration_reports_and_weights(finished):
    result, workdir = finished
    record = json.loads((workdir / "config.json").read_text())
    assert record["config"]["epochs"] == 2 and record["config"]["recipe"] == "digits"
    assert {"keras", "tensorflow", "keras_tnt"} <= set(record["versions"])
    assert record["devices"] and "commit" in record
    lines = checkpoint.read_metrics(workdir / "metrics.jsonl")
    keys = {"step", "epoch", "loss", "learning_rate", "images_per_second"}
    assert [line["step"] for line in lines if keys <= set(line)] == [4, 8]
    (evaluation,) = [line for line in lines if "accuracy" in line]
    assert evaluation["step"] == 8 and evaluation["images"] == 360
    assert evaluation["accuracy"] == result["accuracy"] and "ema_accuracy" in evaluation
    assert all(os.path.exists(path) for path in result["files"].values())
    assert list((workdir / "tensorboard").iterdir())
    assert {"predictions.csv", "classes.csv", "confusion.png", "mistakes.png"} <= set(
        result["files"]
    )
    averaged = result["ema_accuracy"] > result["accuracy"]
    assert result["better"] == ("final_ema" if averaged else "final")
    record = json.loads((workdir / "results.json").read_text())
    assert record["better"] == result["better"] and 0 <= record["calibration_error"] <= 1


def test_final_files_have_the_trained_model(finished):
    result, workdir = finished
    model = keras.models.load_model(workdir / "final.keras")
    trained = final_state(workdir)
    for variable in model.weights:
        np.testing.assert_array_equal(variable, trained[f"model/{variable.path}"])
    model.load_weights(workdir / "final_ema.weights.h5")
    assert (model.get_layer("head").kernel.numpy() == trained["ema/head/kernel"]).all()


@pytest.mark.slow
def test_evaluate_matches_the_results_of_the_run(finished, capsys):
    result, workdir = finished
    found = evaluate.evaluate({"batch_size": 7}, run=str(workdir))
    assert found["images"] == 360 and found["corrupt"] == 0
    assert found["accuracy"] == pytest.approx(result["accuracy"])
    assert found["evaluation_loss"] == pytest.approx(result["evaluation_loss"], rel=1e-5)
    averaged = evaluate.evaluate({}, run=str(workdir), checkpoint="final_ema")
    assert averaged["accuracy"] == pytest.approx(result["ema_accuracy"])
    of_file = evaluate.evaluate({}, weights=str(workdir / "final.keras"))
    assert of_file["accuracy"] == pytest.approx(result["accuracy"])


def test_runs_are_plotted(finished, tmp_path):
    _, workdir = finished
    picture = plot.plot([workdir], tmp_path / "picture.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="holds no metrics.jsonl"):
        plot.plot([tmp_path], tmp_path / "picture.png")


def test_finished_run_is_not_repeated(finished, monkeypatch):
    result, workdir = finished
    monkeypatch.setattr(loop.Run, "epoch", None)
    again = loop.train(short(workdir, ema=0.9, tensorboard=True))
    assert again["accuracy"] == result["accuracy"]


def test_changed_configuration_raises_with_the_difference(finished):
    _, workdir = finished
    with pytest.raises(ValueError, match=r"--learning_rate: 0.004 -> 0.5\n.*--workdir"):
        loop.train(short(workdir, ema=0.9, learning_rate=0.5))
    with pytest.raises(ValueError, match="--ema: 0.9 -> 0.0"):
        loop.train(short(workdir))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "tnt_huge"}, "--model: There is no model 'tnt_huge'. Did you mean"),
        ({"batch_size": 9, "accumulation": 2}, "must be a multiple of 2"),
        ({"batch_size": 9, "mixup": 0.2}, "mixing takes images two by two"),
        ({"batch_size": 2000, "steps_per_epoch": 0}, "more than the 1437 images"),
    ],
)
def test_invalid_sizes_raise(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        loop.train(short(tmp_path, **values))
    assert not (tmp_path / "config.json").exists()


# === Resuming and faults ===


@pytest.mark.slow
def test_run_resumes_identically_after_sigterm(tiny, tmp_path, monkeypatch):
    values = {"stochastic_depth": 0.3, "ema": 0.9, "mixup": 0.5, "checkpoint_steps": 100}
    loop.train(short(tmp_path / "undisturbed", **values))
    update = loop.Run.update

    def terminated(self, batch, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "update", terminated)
        with pytest.raises(loop.Stopped, match="stopped at step 6"):
            loop.train(short(tmp_path / "stopped", **values))
    loop.train(short(tmp_path / "stopped", **values))
    assert_identical(final_state(tmp_path / "undisturbed"), final_state(tmp_path / "stopped"))
    lines = checkpoint.read_metrics(tmp_path / "stopped" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [4, 8]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "jit"), [*((name, "off") for name in optimizers.OPTIMIZERS), ("muon", "on")]
)
def test_each_optimizer_resumes_bit_identically_from_a_checkpoint(
    tiny, tmp_path, optimizer, jit, mirrored, monkeypatch
):
    epoch, ends = loop.Run.epoch, []

    def twice(self, step, *arguments):
        epoch(self, step, *arguments)
        ends.append({name: v.numpy() for name, v in self.checkpoints.variables.items()})
        for later in self.checkpoints.paths()[:2]:
            later.unlink()
        assert self.restore() == 2
        step = epoch(self, 2, *arguments)
        ends.append({name: v.numpy() for name, v in self.checkpoints.variables.items()})
        return step

    monkeypatch.setattr(loop.Run, "epoch", twice)
    monkeypatch.setattr(loop.Run, "evaluate", lambda *arguments: False)
    monkeypatch.setattr(loop.Run, "finish", lambda *arguments: None)
    monkeypatch.setattr(strategies, "make", lambda config: mirrored)
    values = {"optimizer": optimizer, "jit": jit, "stochastic_depth": 0.3, "ema": 0.9, "keep": 9}
    values |= {"epochs": 1, "checkpoint_steps": 1, "clip_norm": 0.5, "layer_decay": 0.8}
    values |= {"shift": 0, "rotate": 0.0, "min_crop": 1.0}
    loop.train(short(tmp_path, **values))
    assert_identical(*ends)


@pytest.mark.slow
def test_nan_loss_rolls_back_and_skips_the_batch(tiny, tmp_path, monkeypatch, capsys):
    make = step_functions.make_train_step

    def poisoned(*arguments):
        step = make(*arguments)

        def train_step(batch, number, *rest):
            if float(number) == 5:
                batch = {**batch, "weight": batch["weight"] * np.nan}
            return step(batch, number, *rest)

        train_step.experimental_get_tracing_count = step.experimental_get_tracing_count
        return train_step

    monkeypatch.setattr(step_functions, "make_train_step", poisoned)
    result = loop.train(short(tmp_path, checkpoint_steps=2))
    printed = capsys.readouterr().out
    assert "the loss of step 5 was nan" in printed and "back to step 4" in printed
    assert result["step"] == 8
    assert all(np.isfinite(value).all() for value in final_state(tmp_path).values())
    _, notes = checkpoint.read(tmp_path / "checkpoints" / "step_000000008.safetensors")
    assert notes["skipped"] == [5] and notes["rollbacks"] == 1


@pytest.mark.slow
def test_diverging_run_stops_and_resumes_with_another_learning_rate(tiny, tmp_path):
    values = {"warmup_epochs": 0.0, "max_rollbacks": 1}
    with pytest.raises(RuntimeError, match=r"the loss of step .* after 1 rollbacks.*--change"):
        loop.train(short(tmp_path, learning_rate=1e9, **values))
    with pytest.raises(ValueError, match="--change to go on"):
        loop.train(short(tmp_path, learning_rate=1e-3, **values))
    assert loop.train(short(tmp_path, learning_rate=1e-3, change=True, **values))["step"] == 8
    (change,) = json.loads((tmp_path / "config.json").read_text())["changes"]
    assert change["changed"] == {"learning_rate": [1e9, 1e-3]}


@pytest.mark.slow
def test_finished_run_can_be_extended(tiny, tmp_path):
    loop.train(short(tmp_path, warmup_epochs=0.0))
    longer = {"warmup_epochs": 0.0, "epochs": 3}
    assert loop.train(short(tmp_path, extend=True, **longer))["step"] == 12
    last = checkpoint.read_metrics(tmp_path / "metrics.jsonl")[-2]
    config = short(tmp_path, **longer)
    assert last["learning_rate"] == optimization.learning_rate(config, 11, 4)


@pytest.mark.slow
def test_early_stopping_restores_the_best_weights(tiny, tmp_path, monkeypatch):
    accuracies = iter([0.3, 0.5, 0.4, 0.5, 0.9])

    def measured(strategy, step, dataset):
        return {"accuracy": next(accuracies), "top5_accuracy": 1.0, "images": 360}

    monkeypatch.setattr(step_functions, "evaluate", measured)
    values = {"epochs": 5, "steps_per_epoch": 1, "evaluate_epochs": 1, "early_stopping": 2}
    result = loop.train(short(tmp_path, keep=9, **values))
    assert result["step"] == 2 and result["accuracy"] == 0.5
    model = keras.models.load_model(tmp_path / "final.keras")
    best = final_state(tmp_path, 2)["model/head/kernel"]
    np.testing.assert_array_equal(model.get_layer("head").kernel, best)
    assert (final_state(tmp_path, 4)["model/head/kernel"] != best).any()
    assert loop.train(short(tmp_path, keep=9, **values))["step"] == 2
    assert next(accuracies) == 0.9


@pytest.mark.slow
def test_damaged_checkpoints_stop_a_run_without_start_afresh(tiny, tmp_path):
    loop.train(short(tmp_path))
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="--start_afresh"):
        loop.train(short(tmp_path))
    assert loop.train(short(tmp_path, start_afresh=True))["step"] == 8
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="reports up to step 8 and no checkpoint"):
        loop.train(short(tmp_path))


# === Float16 ===


@pytest.mark.slow
def test_float16_run_that_always_overflows_raises(tiny, tmp_path, monkeypatch):
    def overflowing(self):
        return tf.convert_to_tensor(self.scale[0]) * 1e36

    monkeypatch.setattr(optimization.Optimizer, "loss_scale", overflowing)
    values = {"precision": "float16", "checkpoint_steps": 1, "report_steps": 1}
    with pytest.raises(RuntimeError, match="^3 updates in a row were skipped.*bfloat16"):
        loop.train(short(tmp_path, max_skipped_updates=3, **values))
    with pytest.raises(RuntimeError, match="^8 updates changed no weight"):
        loop.train(short(tmp_path, max_skipped_updates=0, **values))
    assert not (tmp_path / "results.json").exists()
    lines = checkpoint.read_metrics(tmp_path / "metrics.jsonl")
    first = next(line for line in lines if "loss" in line)
    assert first["skipped_updates"] == 1 and first["loss_scale"] == 2.0**14
    assert "gradient_norm" not in first and first["device_memory_bytes"] > 0


# === Several updates per execution ===


@pytest.mark.slow
def test_stopped_evaluation_and_steps_per_execution_do_not_change_the_result(
    tiny, tmp_path, monkeypatch
):
    values = {"stochastic_depth": 0.3, "ema": 0.9, "mixup": 0.5, "checkpoint_steps": 100}
    values |= {"report_steps": 2, "evaluate_epochs": 1, "steps_per_epoch": 5}
    values |= {"steps_per_execution": 3}
    loop.train(short(tmp_path / "one", **values))
    before, calls = loop.Run.before_evaluation, []

    def terminated(self, done):
        calls.append(done)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(self, done)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "before_evaluation", terminated)
        with pytest.raises(loop.Stopped, match="stopped at step 5"):
            loop.train(short(tmp_path / "three", **values))
    assert calls == [0, 1]
    executed, several = [], loop.Run.update_several

    def counted(self, batches, step, count):
        executed.append((step, count))
        return several(self, batches, step, count)

    monkeypatch.setattr(loop.Run, "update_several", counted)
    loop.train(short(tmp_path / "three", **values))
    assert executed == [(5, 1), (6, 2), (8, 2)]
    assert_identical(final_state(tmp_path / "one", 10), final_state(tmp_path / "three", 10))
    reports = [
        checkpoint.read_metrics(tmp_path / run / "metrics.jsonl") for run in ("one", "three")
    ]
    shown = [
        [(line["step"], line.get("loss"), line.get("accuracy")) for line in lines]
        for lines in reports
    ]
    assert shown[0] == shown[1] and len(shown[0]) == 8


# === Parts of a run ===


def part_of_a_run(**values):
    """Returns a `Run` of one worker that has not started, without model, data and directory."""
    run = object.__new__(loop.Run)
    run.config = short("unused", **values)
    run.strategy, run.workers, run.chief = tf.distribute.get_strategy(), 1, True
    run.steps, run.total, run.classes, run.step = 10, 40, 10, 0
    run.notes = {"skipped": [], "rollbacks": 0, "healthy": -1, "best": -1.0, "results": {}}
    run.pending, run.counted, run.told_to_end, run.saved_at = [], -1, 0, time.monotonic()
    run.optimizer = types.SimpleNamespace(
        scaling=run.config.precision == "float16",
        scale=[tf.constant(4.0)],
        averages=[],
        averaged=contextlib.nullcontext,
        variables=[tf.Variable([1.0, 2.0])],
    )
    run.reporter = types.SimpleNamespace(evaluation=lambda *arguments: None)
    run.profiler = types.SimpleNamespace(ends=lambda step: [])
    run.corrupt = ()
    return run


@pytest.fixture
def of_two_workers(monkeypatch):
    """Returns a function that builds a run of two workers with given replies of the other."""

    def make(*said, **values):
        answers = iter(said)
        monkeypatch.setattr(
            strategies,
            "of_each_worker",
            lambda strategy, numbers: np.array([numbers, next(answers)], "int64"),
        )
        run = part_of_a_run(**values)
        run.workers = 2
        return run

    return make


@pytest.mark.parametrize(
    ("values", "skipped", "step", "length"),
    [
        ({"steps_per_execution": 1}, [], 3, 1),
        ({"steps_per_execution": 4}, [], 0, 1),
        ({"steps_per_execution": 4}, [], 1, 4),
        ({"steps_per_execution": 4}, [], 5, 2),  # a report
        ({"steps_per_execution": 4}, [], 8, 2),  # an epoch
        ({"steps_per_execution": 4, "checkpoint_steps": 3}, [], 1, 2),
        ({"steps_per_execution": 9, "checkpoint_steps": 100}, [4], 1, 3),
        ({"steps_per_execution": 4}, [4], 4, 1),
        ({"steps_per_execution": 4, "precision": "float16", "max_skipped_updates": 3}, [], 1, 2),
        ({"steps_per_execution": 4, "precision": "float32", "max_skipped_updates": 3}, [], 1, 4),
    ],
)
def test_execution_ends_before_reports_checkpoints_and_skipped_steps(values, skipped, step, length):
    run = part_of_a_run(**{"checkpoint_steps": 0, **values})
    run.notes["skipped"] = skipped
    assert run.execution_length(step, report_steps=7) == length


@pytest.mark.parametrize("part", ["start", "finish", "find_learning_rate"])
def test_start_report_and_rate_finder_are_watched(monkeypatch, part):
    """Each part notes the phase, the timeout and the data service of the watchdog around it."""
    noted, dogs = [], []

    @contextlib.contextmanager
    def watch(phase, *arguments):
        dog = loop.Watchdog(None, None, *arguments)
        dogs.append(dog)
        with dog.during(phase):
            yield dog
        dogs.pop()

    def note(*arguments):
        (dog,) = dogs
        noted.append((dog.phase, dog.stall_seconds, dog.data_service, dog.name))
        return 8

    run = part_of_a_run(find_learning_rate=part == "find_learning_rate")
    run.stall = 120.0, "grpc://host:5050", "worker 0 of 2 "
    run.total, run.profiler.resume, run.profiler.close = 8, lambda step: None, lambda: None
    run.reporter = types.SimpleNamespace(open_bar=lambda step: None, close_bar=lambda: None)
    run.checkpoints = types.SimpleNamespace(wait=lambda: None)
    run.watchdog = contextlib.nullcontext()
    run.start, run.finish = lambda changes: 8, lambda *arguments: None
    if part != "find_learning_rate":
        setattr(run, part, note)
    monkeypatch.setattr(loop, "find_learning_rate", note)
    monkeypatch.setattr(loop, "watch", watch)
    run.go(None, None, None, (), [])
    phase = "report" if part == "finish" else "start"
    assert noted == [(phase, 120.0, "grpc://host:5050", "worker 0 of 2 ")]


class Slow:
    """A step function that returns `result` and advances the clock, by 50 s when it traces."""

    def __init__(self, clock, result):
        self.clock, self.result, self.calls = clock, result, 0

    def __call__(self, *arguments):
        self.calls += 1
        self.clock[0] += 50.0 if self.calls == 1 else 2.0
        return self.result

    def experimental_get_tracing_count(self):
        return int(self.calls > 0)


def test_updates_and_executions_that_trace_are_marked_for_the_reporter():
    run, clock, marked = part_of_a_run(steps_per_execution=2), [0.0], []
    run.size, run.groups = (32, 32), 1
    run.reporter.executed = lambda steps, traced: marked.append((steps, traced))
    run.train_step = Slow(clock, (tf.constant(1.0), tf.constant(1.0), None))
    run.train_steps = Slow(clock, (tf.constant([1.0, 1.0]), tf.constant([1.0, 1.0]), None))
    for step in (0, 1):
        run.update(None, step)
    for step in (2, 4):
        run.update_several(None, step, 2)
    assert marked == [(1, True), (1, False), (2, True), (2, False)]


def test_duration_of_an_evaluation_excludes_compilation(monkeypatch):
    run, clock, durations = part_of_a_run(), [0.0], []
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(
        step_functions,
        "evaluate",
        lambda strategy, step, dataset: [step(each) for each in dataset] and {"accuracy": 0.5},
    )
    run.watchdog = loop.Watchdog(None, None)
    run.corrupt = (types.SimpleNamespace(check=lambda: None, reading=contextlib.nullcontext),) * 2
    run.reporter.evaluation = lambda step, results, seconds: durations.append(seconds)
    run.evaluation_step = Slow(clock, None)
    for step in (10, 20):
        run.evaluate(step, lambda: range(4))
    assert durations == [3 * 2.0, 4 * 2.0]


@pytest.mark.parametrize(
    ("step", "decision", "looks"),
    [
        (3, (False, False), False),
        (3, (True, False), True),
        (3, (False, True), True),
        (14, (False, False), True),
        (20, (False, False), True),
        (6, (False, False), True),
        (5, (False, False), False),
    ],
)
def test_losses_are_checked_before_they_are_used(step, decision, looks):
    run = part_of_a_run(precision="float16", max_skipped_updates=6)
    assert run.looks(step, 7, loop.Decision(*decision)) == looks


@pytest.mark.parametrize(
    ("loss", "norm", "precision", "bad"),
    [
        (13.2, 1.0, "float32", False),  # 4 log(10) + 4 = 13.21
        (13.3, 1.0, "float32", True),
        (float("nan"), 1.0, "float16", True),
        (float("inf"), 1.0, "float32", True),
        (1.0, float("inf"), "float32", True),
        (1.0, float("nan"), "float16", False),
    ],
)
def test_healthy_detects_diverged_losses_and_norms(loss, norm, precision, bad):
    run = part_of_a_run(precision=precision)
    run.pending = [(4, 1.0, 1.0), (5, loss, norm), (6, 1.0, 1.0)]
    assert run.healthy() == (not bad)
    assert run.bad == ([5] if bad else []) and run.notes["healthy"] == (-1 if bad else 6)


@pytest.mark.parametrize(("said", "bad"), [(4, [4]), (5, [5]), (6, [5]), (40, [5])])
def test_workers_roll_back_to_the_first_bad_step_of_any_worker(of_two_workers, said, bad):
    run = of_two_workers([said])
    run.pending = [(4, 1.0, 1.0), (5, float("nan"), 1.0)]
    assert not run.healthy() and run.bad == bad
    run = of_two_workers([4])
    run.pending = [(4, 1.0, 1.0)]
    assert not run.healthy() and run.bad == [4] and run.notes["healthy"] == -1
    assert of_two_workers([40]).healthy()


def test_consecutive_skipped_updates_are_counted_once():
    run, inf = part_of_a_run(precision="float16", max_skipped_updates=3), float("inf")
    run.pending = [(0, 1.0, inf), (1, 1.0, inf)]
    for _ in range(2):
        run.count_skipped()
        assert run.notes["skipped_in_a_row"] == 2
    run.pending = [(1, 1.0, inf), (2, 1.0, 1.0), (3, 1.0, inf), (4, 1.0, float("nan"))]
    run.count_skipped()
    assert run.notes["skipped_in_a_row"] == 2
    run.pending = [(5, 1.0, inf)]
    with pytest.raises(RuntimeError, match="^3 updates in a row .* at a loss scale of 4,"):
        run.count_skipped()
    run = part_of_a_run(max_skipped_updates=1)
    run.pending = [(5, 1.0, inf)]
    run.count_skipped()
    assert run.notes["skipped_in_a_row"] == 0


@pytest.mark.parametrize(
    ("looks", "longest"),
    [
        (["ii", "iiiif"], 6),
        (["iiiiif"], 5),
        (["fiiiii"], 5),
        (["iiii", "fiiii", "f", "iiii"], None),
        (["iiii", "iffffi"], 5),
    ],
)
def test_longest_row_of_skipped_updates_is_compared_with_the_limit(looks, longest):
    """`i` is a skipped update, `f` one with finite gradients; the limit is 5."""
    run, step, found = part_of_a_run(precision="float16", max_skipped_updates=5), 0, None
    try:
        for look in looks:
            run.pending = []
            for update in look:
                run.pending.append((step, 1.0, float("inf" if update == "i" else 1.0)))
                step += 1
            run.count_skipped()
    except RuntimeError as error:
        found = int(str(error).split()[0])
    assert found == longest


@pytest.mark.parametrize("average", [[], [0.0]])
def test_best_checkpoint_is_by_the_better_of_weights_and_average(average):
    run = part_of_a_run(early_stopping=2)
    run.optimizer.averages = average
    accuracies = iter([0.3, 0.6, 0.5, 0.4, 0.55, 0.7] if average else [0.6, 0.5, 0.7])
    run.evaluate_once = lambda batches: {"accuracy": next(accuracies), "images": 1}
    best = [(run.evaluate(step, None), run.stale()) for step in (1, 2, 3)]
    assert best == [(True, False), (False, False), (True, False)] and run.notes["best"] == 0.7
    run.evaluate_once = lambda batches: {"accuracy": 0.7, "images": 1}
    assert [(run.evaluate(step, None), run.stale()) for step in (4, 5)] == [
        (False, False),
        (False, True),
    ]


def test_single_worker_uses_its_clock_and_signals_after_an_update():
    run = part_of_a_run(checkpoint_steps=0, checkpoint_minutes=1.0)
    assert not run.checkpoint_due(3)
    run.saved_at -= 61
    assert run.checkpoint_due(3) and run.decision(None) == (False, False)
    assert part_of_a_run(checkpoint_steps=3).checkpoint_due(6)
    assert not part_of_a_run(checkpoint_steps=3).checkpoint_due(7)


def test_workers_vote_on_the_chief_clock_and_any_signal(of_two_workers):
    run = of_two_workers(checkpoint_steps=0, checkpoint_minutes=1.0)
    run.saved_at -= 61
    assert run.votes(3) == [0.0, 1.0]
    run.chief, run.told_to_end = False, 15
    assert run.votes(3) == [1.0, 0.0]
    assert run.decision(tf.constant([1.0, 0.0])) == (True, False)
    assert run.decision(tf.constant([0.0, 2.0])) == (False, True)
    run.chief, run.config = True, short("unused", checkpoint_steps=3)
    assert run.votes(3) == [1.0, 0.0]


def test_evaluation_stops_if_any_worker_is_interrupted(of_two_workers):
    run = of_two_workers([0], [1])
    run.watchdog = types.SimpleNamespace(tick=lambda: None)
    run.before_evaluation(0)
    run.before_evaluation(1)
    with pytest.raises(loop.Interrupted):
        run.before_evaluation(loop.EVALUATION_LOOK)


def test_unreadable_images_of_all_workers_are_counted_once(of_two_workers):
    source = types.SimpleNamespace(stretches=(), size=1000)

    def images(limit, *names):
        corrupt = data.UnreadableImages(source, limit / 1000)
        corrupt.names = set(names)
        return corrupt

    both = [loop.name_digest(name) for name in ("a", "b")]
    assert len(set(both)) == 2 and all(0 < number < 2**63 for number in both)
    run = of_two_workers([2, 0], both)  # 3 names, of 2 images
    run.corrupt = images(2, "a"), images(2)
    run.check_images()
    run = of_two_workers([2, 0], both)
    run.corrupt = images(2, "c"), images(2)
    with pytest.raises(ValueError, match="3 of 1000 images cannot be read"):
        run.check_images()
    run = part_of_a_run()
    run.corrupt = images(0), images(1, "a", "b")
    with pytest.raises(ValueError, match="2 of 1000 images"):
        run.check_images()


def test_run_that_changes_no_weight_raises():
    run = part_of_a_run()
    run.check_weights_changed(8)
    run.notes["initial_weights"] = run.weights_digest()
    with pytest.raises(RuntimeError, match="^8 updates changed no weight"):
        run.check_weights_changed(8)
    run.optimizer.variables[0].assign([1.0, 2.5])
    run.check_weights_changed(8)


def a_saving_run(tmp_path, **values):
    run = part_of_a_run(**values)
    run.checkpoints = checkpoint.Checkpoints(tmp_path, {"w": tf.Variable(0.0)}, 9, background=True)
    return run


def test_save_at_end_writes_only_healthy_completed_updates(tmp_path):
    run = a_saving_run(tmp_path)
    run.step, run.pending = 4, [(3, 1.0, 1.0)]
    assert run.save_at_end(between_updates=False) is None and run.checkpoints.step() == -1
    assert run.save_at_end(between_updates=True) == 4 and run.checkpoints.step() == 4
    assert checkpoint.read(run.checkpoints.paths()[0])[1]["healthy"] == 3
    run.step, run.pending = 5, [(4, float("nan"), 1.0)]
    assert run.save_at_end(between_updates=True) is None and run.checkpoints.step() == 4
    run.step, run.pending, run.chief = 6, [], False
    assert run.save_at_end(between_updates=True) is None and run.checkpoints.step() == 4


def test_workers_restore_the_checkpoint_of_the_chief(of_two_workers, tmp_path):
    run = of_two_workers()
    run.checkpoints = checkpoint.Checkpoints(tmp_path, {"w": tf.Variable(0.0)}, 9)
    run.reporter = types.SimpleNamespace(go_on_from=lambda step: None, say=lambda text: None)
    for step in (2, 4):
        run.checkpoints.variables["w"].assign(float(step))
        run.checkpoints.save(step, {**run.notes, "healthy": step - 1, "skipped": [1]})
    run.chief, run.notes["skipped"] = False, [3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            strategies, "of_each_worker", lambda strategy, numbers: np.array([[2], numbers])
        )
        assert run.restore() == 2 and run.checkpoints.variables["w"].numpy() == 2
        assert run.notes["skipped"] == [1, 3] and run.notes["healthy"] == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            strategies, "of_each_worker", lambda strategy, numbers: np.array([[-1], numbers])
        )
        assert run.restore() is None


@pytest.mark.parametrize(
    "error", [tf.errors.InternalError, tf.errors.UnavailableError, tf.errors.DeadlineExceededError]
)
def test_failed_collective_is_reported_as_a_lost_worker(tmp_path, monkeypatch, error):
    def fail(*arguments):
        raise error(None, None, "Collective ops failed\nwith more lines")

    monkeypatch.setattr(loop, "train_held", fail)
    monkeypatch.setattr(strategies, "make", lambda config: tf.distribute.get_strategy())
    with pytest.raises(error):
        loop.train(short(tmp_path))
    monkeypatch.setattr(strategies, "worker", lambda strategy: (1, 2))
    with pytest.raises(
        RuntimeError, match=r"^worker 1 of 2 has lost.*\(.*Collective ops failed\)$"
    ):
        loop.train(short(tmp_path))


def test_unreachable_data_service_raises_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(service.wait_for, "__defaults__", (0.1,))
    with pytest.raises(OSError, match="--data_service=grpc://localhost:1 cannot be used"):
        loop.train(short(tmp_path, data_service="grpc://localhost:1"))
    with pytest.raises(ValueError, match="is written grpc://HOST:PORT"):
        loop.train(short(tmp_path, data_service="grpc:/localhost:1"))
    assert not (tmp_path / "config.json").exists()


def train_command(workdir, *flags, **environment):
    command = [sys.executable, "training/train.py", "--epochs=2", "--steps_per_epoch=6"]
    command += ["--batch_size=8", "--notensorboard", "--evaluate_epochs=2", "--report_steps=1"]
    command += ["--checkpoint_steps=1", "--stochastic_depth=0.2", "--ema=0.9"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_ctrl_c_saves_and_the_directory_is_locked_meanwhile(tmp_path):
    process = train_command(tmp_path, "--epochs=1000")
    while not list(tmp_path.glob("checkpoints/step_00000000[2-9].safetensors")):
        assert process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.05)
    second = train_command(tmp_path, "--epochs=1000")
    output, _ = second.communicate(timeout=500)
    assert second.returncode == 2 and f"held by another trainer: process {process.pid}" in output
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 130 and "Traceback" not in output
    (step,) = re.findall(r"^stopped at step (\d+); the same command goes on", output, re.M)
    assert checkpoint.read(tmp_path / "checkpoints" / checkpoint.NAME.format(int(step)))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["one_device", "mirrored"])
def test_run_killed_at_random_times_is_bit_identical(tmp_path, strategy):
    """Kills the run KERAS_TNT_KILLS times. Defaults to 2."""
    kills = os.environ.get("KERAS_TNT_KILLS", "2")
    result = subprocess.run(
        [sys.executable, "-m", "tests.helpers.training_crashes", str(tmp_path), strategy, kills],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    logs = "".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert result.returncode == 0, result.stderr[-2000:] + logs
    assert json.loads(result.stdout)["killed"] == int(kills)


@pytest.fixture
def small_disk(tmp_path):
    """Yields a function that mounts a disk of `size` bytes, or resizes it, and returns its path."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size):
        remount = "remount," if os.path.ismount(disk) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{remount}size={size}", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no disk can be mounted here")
        return disk

    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # open files may remain


@pytest.mark.slow
def test_run_resumes_after_a_full_disk_without_partial_files(tiny, tmp_path, small_disk):
    """Tries KERAS_TNT_DISK_SIZES amounts of free space. Defaults to 3."""
    loop.train(short(tmp_path / "whole", tensorboard=True))
    needed = sum(p.stat().st_blocks * 512 for p in (tmp_path / "whole").rglob("*") if p.is_file())
    # The last checkpoint exists next to the two before it, and each result file next to its
    # temporary copy.
    sizes = np.linspace(8192, 2 * needed, int(os.environ.get("KERAS_TNT_DISK_SIZES", "3")))
    for number, size in enumerate(sizes):
        workdir = small_disk(int(size)) / str(number)
        full = False
        try:
            loop.train(short(workdir, tensorboard=True))
        except OSError as error:
            full = error.errno == errno.ENOSPC
            assert full, error
        left = [path for path in workdir.rglob("*") if path.is_file()]
        assert not [path for path in left if ".writing-" in str(path)]
        for path in left:
            if path.suffix == ".safetensors":
                checkpoint.read(path)
            elif path.suffix == ".keras":
                keras.models.load_model(path)
        if (workdir / "metrics.jsonl").exists():
            checkpoint.read_metrics(workdir / "metrics.jsonl")
        small_disk(10 * needed)
        loop.train(short(workdir, tensorboard=True))
        assert_identical(final_state(tmp_path / "whole"), final_state(workdir))
        print(f"{size:.0f} bytes: {'full' if full else 'enough'}")
        shutil.rmtree(workdir)


@pytest.mark.slow
def test_killed_worker_is_restarted_and_results_match_one_process(tmp_path):
    """Runs KERAS_TNT_WORKERS workers. Defaults to 2."""
    number = os.environ.get("KERAS_TNT_WORKERS", "2")
    command = [sys.executable, "-m", "tests.helpers.training_workers", str(tmp_path), number, "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    logs = "".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert result.returncode == 0, result.stderr[-2000:] + logs
    assert len(json.loads(result.stdout)["killed"]) == 1
    assert "has lost another one" in (tmp_path / "several_0.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "number"), [("nan", "2"), ("nan", "3"), ("service", "2")])
def test_workers_exit_after_a_fault_and_resume_bit_identically(tmp_path, fault, number):
    command = [sys.executable, "-m", "tests.helpers.training_faults", str(tmp_path), number, fault]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    logs = "".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert result.returncode == 0, result.stderr[-2000:] + logs
    assert json.loads(result.stdout)["seconds_until_all_had_ended"] < 60
