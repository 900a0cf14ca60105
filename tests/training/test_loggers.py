"""Experiment trackers: the data they receive, and that they never stop or delay a run."""

import json
import sys
import threading
import types
from unittest import mock

import numpy as np
import pytest

from training import configuration, loggers


class Recorder:
    """A logger that records every call."""

    def __init__(self, config, run_id):
        self.calls = [("start", config.workdir, run_id)]
        self.run_id = run_id or f"id{len(Recorder.made)}"
        Recorder.made.append(self)

    def log(self, step, values):
        self.calls.append(("log", step, values))

    def finish(self, results):
        self.calls.append(("finish", results))


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(loggers, "LOGGERS", dict(loggers.LOGGERS))
    monkeypatch.setattr(Recorder, "made", [], raising=False)
    loggers.register_logger("recorder", Recorder)


def make(tmp_path, names="recorder", active=True, **values):
    config = configuration.make("digits", workdir=str(tmp_path), logger=names, **values)
    loggers.check(config)
    return loggers.Loggers(config, active)


def test_logger_receives_numbers_by_step_and_results(tmp_path):
    group = make(tmp_path)
    group.start()
    group.log(4, {"loss": np.float32(0.5), "images": np.int64(3), "name": "x", "flag": True})
    group.finish({"accuracy": 0.25, "step": 8, "files": {}, "better": "final"})
    (made,) = Recorder.made
    assert made.calls == [
        ("start", str(tmp_path), None),
        ("log", 4, {"loss": 0.5, "images": 3}),
        ("finish", {"accuracy": 0.25, "step": 8}),
    ]
    assert type(made.calls[1][2]["loss"]) is float and type(made.calls[1][2]["images"]) is int


def test_resumed_run_has_the_same_id_in_each_logger(tmp_path):
    loggers.register_logger("other", lambda config, run_id: Recorder(config, run_id))
    for _ in range(2):
        group = make(tmp_path, "recorder,other")
        group.start()
        group.finish()
    first = {made.run_id for made in Recorder.made[:2]}
    again = {made.calls[0][2] for made in Recorder.made[2:]}
    assert first == again and len(first) == 2
    assert sorted(json.loads((tmp_path / "loggers.json").read_text())) == ["other", "recorder"]


def test_inactive_processes_do_not_log(tmp_path):
    group = make(tmp_path, active=False)
    group.start()
    group.log(1, {"loss": 1.0})
    group.finish({})
    assert Recorder.made == [] and not (tmp_path / "loggers.json").exists()


@pytest.mark.parametrize("error", [RuntimeError("no disk"), SystemExit(1), OSError(28, "full")])
@pytest.mark.parametrize("where", ["factory", "log", "finish", "all"])
def test_failing_logger_warns_once_and_others_continue(tmp_path, capsys, where, error):
    def fail(*arguments):
        raise error

    class Failing(Recorder):
        pass

    for name in ("log", "finish") if where == "all" else (where,):
        setattr(Failing, name, fail)
    loggers.register_logger("failing", fail if where == "factory" else Failing)
    group = make(tmp_path, "failing,recorder")
    group.start()
    for step in range(5):
        group.log(step, {"loss": 1.0})
    group.finish({"accuracy": 1.0})
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and f"--logger=failing failed ({type(error).__name__}" in said
    whole = next(made for made in Recorder.made if type(made) is Recorder)
    assert [call[0] for call in whole.calls] == ["start", *["log"] * 5, "finish"]


def test_logger_that_keeps_failing_is_disabled_until_finish(tmp_path, capsys):
    class Failing(Recorder):
        def log(self, step, values):
            super().log(step, values)
            raise ConnectionError("gone")

    loggers.register_logger("failing", Failing)
    group = make(tmp_path, "failing")
    group.start()
    for step in range(6):
        group.log(step, {"loss": 1.0})
    group.finish({})
    (made,) = Recorder.made
    steps = [call[1] for call in made.calls if call[0] == "log"]
    assert steps == [0, 1, 2] and made.calls[-1] == ("finish", {})


def test_unresponsive_logger_does_not_block(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loggers, "FINISH_SECONDS", 0.05)
    answer = threading.Event()

    class Slow(Recorder):
        def log(self, step, values):
            answer.wait(60)

    loggers.register_logger("slow", Slow)
    group = make(tmp_path, "slow")
    group.start()
    group.log(1, {"loss": 1.0})
    (worker,) = group.workers
    group.finish({})
    assert "--logger=slow did not take the last reports" in capsys.readouterr().err
    answer.set()
    worker.thread.join(60)
    assert not worker.thread.is_alive()


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"recorder": 3}', b"\xff", b"[" * 100_000])
def test_damaged_ids_warn_and_start_a_new_run(tmp_path, capsys, content):
    (tmp_path / "loggers.json").write_bytes(content)
    group = make(tmp_path)
    group.start()
    group.finish()
    assert "loggers.json is damaged" in capsys.readouterr().err
    assert Recorder.made[0].calls[0][2] is None
    assert json.loads((tmp_path / "loggers.json").read_text()) == {"recorder": "id0"}


def test_unknown_logger_error_suggests_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"no logger 'recoder'. Did you mean recorder\?.*mlflow"):
        make(tmp_path, "recoder")
    with pytest.raises(ValueError, match=r"Did you mean wandb\?"):
        make(tmp_path, "recorder, wandbb")


def test_missing_package_error_names_the_extra(tmp_path, monkeypatch):
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=rf'--logger={name}.*"keras-tnt\[{name}\]"'):
            make(tmp_path, name)


@pytest.mark.parametrize("name", ["", " a", "a,b", "wandb"])
def test_invalid_logger_name_raises(name):
    with pytest.raises(ValueError, match="logger"):
        loggers.register_logger(name, Recorder)


# === Weights & Biases, mocked ===


def test_wandb_resumes_its_run_with_step_as_axis(tmp_path, monkeypatch):
    run = mock.MagicMock(id="abc123")
    stand_in = types.ModuleType("wandb")
    stand_in.init = mock.Mock(return_value=run)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setenv("WANDB_PROJECT", "apples")
    for results in (None, {"accuracy": 0.5}):
        group = make(tmp_path / "run", "wandb")
        (tmp_path / "run").mkdir(exist_ok=True)
        group.start()
        group.log(3, {"loss": 1.0})
        group.finish(results)
    first, second = (call.kwargs for call in stand_in.init.call_args_list)
    assert (first["id"], first["resume"]) == (None, None)
    assert (second["id"], second["resume"]) == ("abc123", "allow")
    assert first["project"] == "apples" and first["name"] == "run"
    assert first["config"]["batch_size"] == configuration.make("digits").batch_size
    run.define_metric.assert_any_call("*", step_metric="step")
    run.log.assert_called_with({"step": 3, "loss": 1.0})
    run.summary.update.assert_called_once_with({"final_accuracy": 0.5})
    assert [call.kwargs for call in run.finish.call_args_list] == [
        {"exit_code": 1},
        {"exit_code": 0},
    ]


def test_wandb_writes_its_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "run").mkdir()
    for step, results in ((4, None), (8, {"accuracy": 0.5})):
        group = make(tmp_path / "run", "wandb")
        group.start()
        group.log(step, {"loss": 10.0 / step})
        group.finish(results)
    written = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    identifier = json.loads((tmp_path / "run" / "loggers.json").read_text())["wandb"]
    assert [path.name for path in written] == [f"run-{identifier}.wandb"] * len(written) != []
    content = b"".join(path.read_bytes() for path in written)
    assert b"final_accuracy" in content and b"batch_size" in content


# === MLflow ===


def mlflow_runs(tmp_path):
    """Logs a run that is interrupted and resumed."""
    (tmp_path / "run").mkdir(exist_ok=True)
    for step, results in ((4, None), (8, {"accuracy": 0.5, "step": 8})):
        group = make(tmp_path / "run", "mlflow")
        group.start()
        group.log(step, {"loss": 10.0 / step, "bad": float("nan")})
        group.finish(results)


def test_mlflow_resumes_its_run_within_batch_limits(tmp_path, monkeypatch):
    client = mock.MagicMock()
    client.get_experiment_by_name.return_value = None
    client.create_experiment.return_value = "7"
    client.create_run.return_value.info.run_id = "run7"
    mlflow, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    mlflow.MlflowClient = mock.Mock(return_value=client)
    entities.Param = lambda key, value: (key, value)
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mlflow_runs(tmp_path)
    client.create_experiment.assert_called_once_with("keras_tnt")
    client.create_run.assert_called_once_with("7", run_name="run")
    calls = [call.kwargs for call in client.log_batch.call_args_list]
    params = [call["params"] for call in calls if "params" in call]
    assert all(0 < len(each) <= 100 for each in params)
    assert dict(sum(params, []))["batch_size"] == "64"
    metrics = [call["metrics"] for call in calls if "metrics" in call]
    assert metrics[:2] == [[("loss", 2.5, 4)], [("loss", 1.25, 8)]]
    assert metrics[2] == [("final_accuracy", 0.5, 8), ("final_step", 8.0, 8)]
    client.update_run.assert_called_once_with("run7", status="RUNNING")
    assert [call.args for call in client.set_terminated.call_args_list] == [
        ("run7", "KILLED"),
        ("run7", "FINISHED"),
    ]


@pytest.mark.parametrize("kind", ["URI", "path"])
def test_mlflow_file_store_contains_the_run(tmp_path, monkeypatch, kind):
    mlflow = pytest.importorskip("mlflow")
    store = tmp_path / "store"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.as_uri() if kind == "URI" else str(store))
    # The logger sets it; monkeypatch restores it.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "apples")
    mlflow_runs(tmp_path)
    client = mlflow.MlflowClient(store.as_uri())
    experiment = client.get_experiment_by_name("apples")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert run.data.params["recipe"] == "digits" and run.data.metrics["final_accuracy"] == 0.5
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(4, 2.5), (8, 1.25)]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("file:///runs", True),
        ("/runs", True),
        ("runs/store", True),
        ("", False),
        ("sqlite:///runs.db", False),
        ("http://localhost:5000", False),
        ("databricks", False),
        ("databricks://profile", False),
    ],
)
def test_only_local_directories_are_file_stores(uri, expected):
    assert loggers.is_file_store(uri) == expected
