"""Experiment trackers by name: `--logger`'s table.

A row is a function from (the configuration, the tracker's id of the run or `None`) to an object:

- `run_id`: what the tracker calls the run; stored in the run's directory and given back when the
  run is resumed, so that one run is one run there, too.
- `log(step, values)`: takes a report, numbers by name, after `step` updates.
- `finish(results)`: takes the results, numbers by name, or `None` if the run ends before its last
  step (a signal, an error) and may be resumed.

A module that `--plugins=` names adds a row of its own:

    register_logger("mine", lambda config, run_id: Mine(config.workdir, run_id))

Only the first process of a run logs. The calls are made by a thread, in order. What a tracker
raises becomes one warning and never ends the run.
"""

import dataclasses
import difflib
import importlib
import json
import math
import numbers
import operator
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from keras_tnt.files import write_atomically
from training import regular

IDS = "loggers.json"
MAX_IDS_BYTES = 2**20
MAX_FAILURES = 3  # in a row, after which a logger gets no more reports
FINISH_SECONDS = 60.0  # for the last reports, at the end of a run
# The largest batches that MLflow's tracking server takes.
MLFLOW_PARAMS = 100
MLFLOW_METRICS = 1000
MLFLOW_VALUE = 6000  # characters


@dataclasses.dataclass(frozen=True)
class Row:
    """A logger that can be chosen.

    Args:
        factory: function from (`training.configuration.Config`, run id or `None`) to a logger.
        package: module that it needs; "" for none.
        extra: extra of keras-tnt that brings the package.
    """

    factory: Callable
    package: str = ""
    extra: str = ""


def register_logger(name, factory):
    """Adds a logger under a name that `--logger` takes.

    Args:
        name: String without a comma.
        factory: Function from (`training.configuration.Config`, run id or `None`) to an object
            with `run_id`, `log(step, values)` and `finish(results)`.

    Raises:
        ValueError: If the name is taken, or cannot be one.
    """
    if not name or name != name.strip() or "," in name:
        raise ValueError(f"A logger's name must be text without commas. Received: {name!r}")
    if name in LOGGERS and LOGGERS[name].factory is not factory:
        raise ValueError(f"There is a logger {name!r} already: choose another name")
    LOGGERS[name] = Row(factory)


def names_of(config):
    """Returns the names in `--logger`, each once."""
    return list(dict.fromkeys(filter(None, map(str.strip, config.logger.split(",")))))


def check(config):
    """Checks that every logger of a configuration exists, and its package is installed.

    Raises:
        ValueError: If there is no logger of a name.
        ImportError: If a package is missing.
    """
    for name in names_of(config):
        if name not in LOGGERS:
            near = difflib.get_close_matches(name, LOGGERS)
            raise ValueError(
                f"--logger: there is no logger {name!r}. "
                + (f"Did you mean {' or '.join(near)}? " if near else "")
                + f"There are: {', '.join(LOGGERS)}. --plugins=MODULE imports a module that calls "
                "training.loggers.register_logger"
            )
        row = LOGGERS[name]
        if row.package:
            import_package(name, row)


def import_package(name, row):
    """Returns the imported package of a row.

    Raises:
        ImportError: That names the extra.
    """
    try:
        return importlib.import_module(row.package)
    except ImportError as error:
        raise ImportError(
            f"--logger={name} needs the package {row.package} ({error}): "
            f'pip install "keras-tnt[{row.extra}]"'
        ) from error


class Loggers:
    """The loggers of a run, none of which can end it or hold it up.

    Each runs in a thread, so that a tracker that does not answer delays no update.

    Args:
        config: A `training.configuration.Config`.
        active: Whether this process logs.
    """

    def __init__(self, config, active):
        self.config = config
        self.names = names_of(config) if active else []
        self.workers = []

    def start(self):
        """Starts the loggers, each with the id that it gave the run before, if it did."""
        if self.names:
            ids = RunIds(Path(self.config.workdir) / IDS)
            self.workers = [LoggerThread(name, self.config, ids) for name in self.names]

    def log(self, step, values):
        """Hands a report to every logger.

        Args:
            step: Updates made.
            values: Dict from name to value; what is no number is left out.
        """
        if self.workers:
            values = numbers_of(values)
        for worker in self.workers:
            worker.put("log", step, values)

    def finish(self, results=None):
        """Ends the loggers, and waits for them for `FINISH_SECONDS`.

        Args:
            results: Dict of the run's results. If `None`, it did not reach its last step.
        """
        workers, self.workers = self.workers, []
        results = None if results is None else numbers_of(results)
        for worker in workers:
            worker.put("finish", results)
        until = time.monotonic() + FINISH_SECONDS
        for worker in workers:
            worker.end(max(until - time.monotonic(), 0))


class LoggerThread:
    """A logger, whose calls a thread makes one after the other.

    Args:
        name: Its row.
        config: A `training.configuration.Config`.
        ids: `RunIds`.
    """

    def __init__(self, name, config, ids):
        self.name = name
        self.calls = queue.SimpleQueue()
        self.failures = 0  # in a row
        self.warned = False
        self.thread = threading.Thread(
            target=self._run, args=(config, ids), name=f"logger {name}", daemon=True
        )
        self.thread.start()

    def put(self, method, *arguments):
        self.calls.put((method, arguments))

    def end(self, seconds):
        """Waits until the calls are made, for at most `seconds`."""
        self.calls.put(None)
        self.thread.join(seconds)
        if self.thread.is_alive() and not self.warned:
            warn(f"--logger={self.name} did not take the last reports in {FINISH_SECONDS:g} s")

    def _run(self, config, ids):
        logger = self._attempt(LOGGERS[self.name].factory, config, ids.get(self.name))
        if logger is not None:
            self._attempt(ids.put, self.name, getattr(logger, "run_id", None))
        while (call := self.calls.get()) is not None:
            method, arguments = call
            if logger is not None and (self.failures < MAX_FAILURES or method == "finish"):
                self._attempt(operator.methodcaller(method, *arguments), logger)

    def _attempt(self, function, *arguments):
        """Returns what a function returns; the first exception becomes a warning."""
        try:
            result = function(*arguments)
        except (Exception, SystemExit) as error:
            self.failures += 1
            if not self.warned:
                self.warned = True
                reason = (str(error).strip().splitlines() or [""])[0][:300]
                warn(
                    f"--logger={self.name} failed ({type(error).__name__}: {reason}). Training "
                    "continues and metrics.jsonl holds every report; this logger warns once"
                )
            return None
        self.failures = 0
        return result


class RunIds:
    """What the loggers call a run, in a file of its directory.

    Args:
        path: Path of the file.
    """

    def __init__(self, path):
        self.path = path
        self.lock = threading.Lock()
        self.ids = self.read()

    def get(self, name):
        return self.ids.get(name)

    def put(self, name, run_id):
        if run_id is None or self.ids.get(name) == str(run_id):
            return
        with self.lock:
            self.ids[name] = str(run_id)
            write_atomically(self.path, json.dumps(self.ids, indent=2))

    def read(self):
        try:
            if not regular.exists(self.path):
                return {}
            ids = json.loads(regular.read_regular(self.path, MAX_IDS_BYTES).decode("utf-8"))
            if not isinstance(ids, dict) or not all(isinstance(v, str) for v in ids.values()):
                raise ValueError("it holds no ids by name")
            return ids
        except (OSError, ValueError, RecursionError) as error:
            warn(f"{self.path} is damaged ({error}): the loggers start new runs")
            return {}


def warn(text):
    print(f"warning: {text}", file=sys.stderr, flush=True)


def numbers_of(values):
    """Returns the entries of a dict that are numbers, as Python's int and float."""
    return {
        name: int(value) if isinstance(value, numbers.Integral) else float(value)
        for name, value in values.items()
        if isinstance(value, numbers.Real) and not isinstance(value, bool)
    }


# === Weights & Biases ===


class WandbLogger:
    """A run of Weights & Biases; WANDB_PROJECT, WANDB_MODE and the like are its own settings.

    Args:
        config: A `training.configuration.Config`.
        run_id: Id of the run to continue. If `None`, a new one.
    """

    def __init__(self, config, run_id):
        wandb = import_package("wandb", LOGGERS["wandb"])
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "keras_tnt",
            dir=os.path.abspath(config.workdir),
            name=os.environ.get("WANDB_NAME") or run_name(config),
            id=run_id,
            resume="allow" if run_id else None,
            config=dict(vars(config)),
            allow_val_change=True,
        )
        self.run_id = self.run.id
        # W&B drops what comes with a smaller step than before, as after a rollback: the step is a
        # metric, and the axis of all others.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step, values):
        self.run.log({"step": step, **values})

    def finish(self, results):
        if results is not None:
            self.run.summary.update({f"final_{name}": value for name, value in results.items()})
        self.run.finish(exit_code=0 if results is not None else 1)


# === MLflow ===


class MLflowLogger:
    """A run of MLflow, in the store of MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME.

    Args:
        config: A `training.configuration.Config`.
        run_id: Id of the run to continue. If `None`, or if the store does not know it, a new one.
    """

    def __init__(self, config, run_id):
        if os.environ.get("MLFLOW_TRACKING_URI", "").startswith("file:"):
            # MLflow 3.7 and later refuse their file store unless it is asked for once more.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow = import_package("mlflow", LOGGERS["mlflow"])
        self.entities = importlib.import_module("mlflow.entities")
        self.client = mlflow.MlflowClient()
        self.run_id = run_id or self.create(config)
        if run_id:
            self.client.update_run(run_id, status="RUNNING")

    def create(self, config):
        """Creates a run with the configuration as parameters; returns its id."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "keras_tnt"
        experiment = self.client.get_experiment_by_name(name)
        identifier = experiment.experiment_id if experiment else self.client.create_experiment(name)
        run = self.client.create_run(identifier, run_name=run_name(config)).info.run_id
        params = [
            self.entities.Param(key, str(value)[:MLFLOW_VALUE])
            for key, value in vars(config).items()
            if value != ""
        ]
        for first in range(0, len(params), MLFLOW_PARAMS):
            self.client.log_batch(run, params=params[first : first + MLFLOW_PARAMS])
        return run

    def log(self, step, values):
        now = int(1000 * time.time())
        metrics = [
            self.entities.Metric(name, float(value), now, step)
            for name, value in values.items()
            if math.isfinite(value)
        ]
        for first in range(0, len(metrics), MLFLOW_METRICS):
            self.client.log_batch(self.run_id, metrics=metrics[first : first + MLFLOW_METRICS])

    def finish(self, results):
        if results is not None:
            step = int(results.get("step", 0))
            self.log(step, {f"final_{name}": value for name, value in results.items()})
        self.client.set_terminated(self.run_id, "KILLED" if results is None else "FINISHED")


def run_name(config):
    """Returns what a tracker's page shows: the name of the run's directory."""
    return os.path.basename(os.path.abspath(config.workdir)) or config.model


LOGGERS = {
    "wandb": Row(WandbLogger, "wandb", "wandb"),
    "mlflow": Row(MLflowLogger, "mlflow", "mlflow"),
}
