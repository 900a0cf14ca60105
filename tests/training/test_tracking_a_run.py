"""Traces, loggers and config files in whole runs, none of which changes the result."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from training import configuration, loggers, loop, profiling


def short(workdir, **values):
    """Returns the configuration of a run with two epochs of four updates."""
    defaults = {"epochs": 2, "steps_per_epoch": 4, "batch_size": 8, "warmup_epochs": 1.0}
    quiet = {"tensorboard": False, "report": False, "evaluate_epochs": 2, "checkpoint_steps": 2}
    return configuration.make(workdir=str(workdir), **{**defaults, **quiet, **values})


def assert_same_end(first, second):
    first, second = (
        load_file(run / "checkpoints" / "step_000000008.safetensors") for run in (first, second)
    )
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def traces(workdir):
    return list((workdir / "tensorboard" / "plugins" / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    "text", ["10", "20,10", "0,3", "a,b", "1,2,3", "-1,4", "3,", "1.5,2", "²,³", "3;4"]
)
def test_invalid_profile_steps_raise(text):
    with pytest.raises(ValueError, match="--profile_steps must be the first and the last update"):
        configuration.make("digits", profile_steps=text)


def test_profile_steps_after_the_end_raise(tmp_path):
    config = configuration.make("digits", workdir=str(tmp_path), profile_steps="3,9")
    with pytest.raises(ValueError, match="--profile_steps=3,9: the run has 8 updates"):
        profiling.Profiler(config, 8, True)


def test_profile_steps_after_the_end_raise_before_the_model_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.models, "build", None)
    with pytest.raises(ValueError, match="--profile_steps=3,9: the run has 8 updates"):
        loop.train(short(tmp_path, recipe="digits", deterministic=False, profile_steps="3,9"))
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(("step", "warned"), [(0, False), (4, False), (5, True), (8, True)])
def test_run_resumed_after_the_traced_updates_warns(tmp_path, calls, capsys, step, warned):
    config = configuration.make("digits", workdir=str(tmp_path), profile_steps="3,5")
    for active in (True, False):
        profiler = profiling.Profiler(config, 8, active)
        profiler.resume(step)
        shown = capsys.readouterr().err
        assert ("warning: --profile_steps=3,5: no trace is written" in shown) == (warned and active)
        assert not shown or f"resumed after update {step}. Give a later range" in shown
    assert calls == []


def test_executions_end_at_the_trace_boundaries(tmp_path):
    config = configuration.make("digits", workdir=str(tmp_path), profile_steps="3,5")
    for active in (True, False):
        profiler = profiling.Profiler(config, 8, active)
        assert [profiler.ends(step) for step in (0, 2, 4, 5)] == [[2, 5], [5], [5], []]


@pytest.fixture
def calls(monkeypatch):
    """Returns a list of the calls of TensorFlow's profiler."""
    made = []
    monkeypatch.setattr(
        profiling.tf.profiler.experimental, "start", lambda path: made.append("start")
    )
    monkeypatch.setattr(profiling.tf.profiler.experimental, "stop", lambda: made.append("stop"))
    return made


def test_trace_covers_the_given_updates(tmp_path, calls):
    config = configuration.make("digits", workdir=str(tmp_path), profile_steps="3,5")
    profiler = profiling.Profiler(config, 8, True, calls.append)
    for step in range(8):
        with profiler.updates(step, 1, lambda: calls.append("wait")):
            calls.append(step + 1)
    *before, said, six, seven, eight = calls
    assert before == [1, 2, "start", 3, 4, 5, "wait", "stop"]
    assert said.startswith("trace of updates 3 to 5 in ") and [six, seven, eight] == [6, 7, 8]


def test_partial_trace_is_written_when_a_run_ends_early(tmp_path, calls):
    config = configuration.make("digits", workdir=str(tmp_path), profile_steps="3,5")
    profiler = profiling.Profiler(config, 8, True, calls.append)
    with profiler.updates(3, 1, None):  # resumed after update 3
        pass
    profiler.close()
    profiler.close()
    assert calls[:2] == ["start", "stop"] and "updates 4 to 4" in calls[2] and len(calls) == 3


def test_failing_profiler_warns(tmp_path, calls, monkeypatch, capsys):
    def fail(path):
        raise profiling.tf.errors.AlreadyExistsError(None, None, "another one is active")

    monkeypatch.setattr(profiling.tf.profiler.experimental, "start", fail)
    config = configuration.make("digits", workdir=str(tmp_path), profile_steps="3,5")
    profiler = profiling.Profiler(config, 8, True)
    for step in range(8):
        with profiler.updates(step, 1, None):
            pass
    assert capsys.readouterr().err.count("another one is active") == 1 and calls == []


class Recorder:
    made = []

    def __init__(self, config, run_id):
        self.config, self.given, self.run_id = config, run_id, run_id or "run-7"
        self.reports, self.results = [], "none yet"
        Recorder.made.append(self)

    def log(self, step, values):
        self.reports.append((step, values))

    def finish(self, results):
        self.results = results


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(loggers, "LOGGERS", dict(loggers.LOGGERS))
    monkeypatch.setattr(Recorder, "made", [])
    loggers.register_logger("recorder", Recorder)
    return Recorder


@pytest.mark.slow
def test_tracing_and_logging_do_not_change_the_result_and_config_yaml_repeats_the_run(
    tiny, tmp_path, recorder, capsys
):
    values = {"stochastic_depth": 0.3, "ema": 0.9, "mixup": 0.5, "steps_per_execution": 4}
    plain, watched, again = tmp_path / "plain", tmp_path / "watched", tmp_path / "again"
    loop.train(short(plain, recipe="digits", **values))
    watch = {"logger": "recorder", "profile_steps": "3,6", "keep_best": 2, "evaluate_epochs": 1}
    result = loop.train(short(watched, recipe="digits", **values, **watch))
    assert_same_end(plain, watched)
    assert not (plain / "tensorboard").exists() and len(traces(watched)) == 1
    assert "trace of updates 3 to 6 in" in capsys.readouterr().out

    (made,) = recorder.made
    assert made.given is None and made.config.batch_size == 8
    lines = [json.loads(line) for line in (watched / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in made.reports] == [line.pop("step") for line in lines]
    assert [values for _, values in made.reports] == lines
    assert made.results["accuracy"] == result["accuracy"] and made.results["step"] == 8
    kept = sorted(path.name for path in (watched / "checkpoints").glob("best_*"))
    assert kept == ["best_000000004.safetensors", "best_000000008.safetensors"]

    repeated = configuration.make(config=str(watched / "config.yaml"), workdir=str(again))
    assert repeated.keep_best == 2 and repeated.profile_steps == "3,6"
    loop.train(repeated)
    assert_same_end(plain, again)
    # The same command resumes the run under the same id.
    loop.train(configuration.make(config=str(watched / "config.yaml")))
    assert recorder.made[-1].given == "run-7" and recorder.made[-1].config.workdir == str(watched)
    loop.train(configuration.make(config=str(watched / "config.json"), logger="", keep_best=0))


@pytest.mark.slow
def test_stopped_run_finishes_its_loggers_without_results(tiny, tmp_path, recorder, monkeypatch):
    update = loop.Run.update

    def terminated(self, batch, step):
        if step == 5:
            self.told_to_end = 15
        return update(self, batch, step)

    config = short(tmp_path, recipe="digits", logger="recorder")
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "update", terminated)
        with pytest.raises(loop.Stopped):
            loop.train(config)
    loop.train(config)
    first, second = recorder.made
    assert first.results is None and second.results["step"] == 8
    assert (first.given, second.given) == (None, "run-7")
    assert [step for step, _ in second.reports] == [8, 8]


def test_unknown_logger_raises_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="--logger: there is no logger 'tensorbord'"):
        loop.train(short(tmp_path / "run", recipe="digits", logger="tensorbord"))
    assert not (tmp_path / "run").exists()
