"""Experiment trackers by name: the table of `--logger`.

A row is a function from (configuration, the tracker's run id or `None`) to an object with:

- `run_id`: the tracker's id of the run. It is stored in the run's directory and passed back when
  the run is resumed, so that a resumed run is one run in the tracker too.
- `log(step, values)`: receives a report, a dict of numbers, after `step` updates.
- `finish(results)`: receives the results, a dict of numbers, or `None` if the run ends before its
  last step (a signal, an error) and may be resumed.

A module that `--plugins=` names adds a row:

    register_logger("mine", lambda config, run_id: Mine(config.workdir, run_id))

Only the chief logs. The calls are made by a thread, in order. An exception of a tracker becomes one
warning and never ends the run.
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
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from keras_tnt.files import write_atomically
from training import regular

IDS = "loggers.json"
MAX_IDS_BYTES = 2**20
MAX_FAILURES = 3  # consecutive failures after which a logger receives no more reports
FINISH_SECONDS = 60.0  # timeout for the last reports at the end of a run
# Limits of MLflow's tracking server per batch and value.
MLFLOW_PARAMS = 100
MLFLOW_METRICS = 1000
MLFLOW_VALUE = 6000  # characters


@dataclasses.dataclass(frozen=True)
class Row:
    """Row of the table of loggers.

    Args:
        factory: Function from (`training.configuration.Config`, run id or `None`) to a logger.
        package: Module that it needs. Defaults to "", none.
        extra: Extra of keras-tnt that installs the package. Defaults to "".
    """

    factory: Callable
    package: str = ""
    extra: str = ""


def register_logger(name, factory):
    """Adds a logger to the table.

    Args:
        name: Value of `--logger`, a string without commas.
        factory: Function from (`training.configuration.Config`, run id or `None`) to an object
            with `run_id`, `log(step, values)` and `finish(results)`.

    Raises:
        ValueError: If the name is invalid or taken.
    """
    if not name or name != name.strip() or "," in name:
        raise ValueError(f"A logger's name must be text without commas. Received: {name!r}")
    if name in LOGGERS and LOGGERS[name].factory is not factory:
        raise ValueError(f"There is a logger {name!r} already: choose another name")
    LOGGERS[name] = Row(factory)


def names_of(config):
    """Returns the distinct names in `--logger`."""
    return list(dict.fromkeys(filter(None, map(str.strip, config.logger.split(",")))))


def check(config):
    """Checks that every logger of a configuration exists and that its package is installed.

    Args:
        config: A `training.configuration.Config`.

    Raises:
        ValueError: If there is no logger of a name; the message suggests the nearest ones.
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
    """Imports and returns the package of a row.

    Args:
        name: Name of the logger, for messages.
        row: Its `Row`.

    Raises:
        ImportError: If it is missing; the message names the extra.
    """
    try:
        return importlib.import_module(row.package)
    except ImportError as error:
        raise ImportError(
            f"--logger={name} needs the package {row.package} ({error}): "
            f'pip install "keras-tnt[{row.extra}]"'
        ) from error


class Loggers:
    """Loggers of a run, none of which can end or delay it.

    Each runs in a thread, so that an unresponsive tracker delays no update.

    Args:
        config: A `training.configuration.Config`.
        active: Whether this process logs.
    """

    def __init__(self, config, active):
        """Reads `--logger`; the threads are created by `start`."""
        self.config = config
        self.names = names_of(config) if active else []
        self.workers = []

    def start(self):
        """Starts the loggers, each with its run id of the resumed run, if there is one."""
        if self.names:
            ids = RunIds(Path(self.config.workdir) / IDS)
            self.workers = [LoggerThread(name, self.config, ids) for name in self.names]

    def log(self, step, values):
        """Sends a report to every logger.

        Args:
            step: Updates made.
            values: Dict from name to value; values that are not numbers are dropped.
        """
        if self.workers:
            values = numbers_of(values)
        for worker in self.workers:
            worker.put("log", step, values)

    def finish(self, results=None):
        """Ends the loggers, and waits for them for up to `FINISH_SECONDS`.

        Args:
            results: Dict of the run's results. If `None`, the run did not reach its last step.
        """
        workers, self.workers = self.workers, []
        results = None if results is None else numbers_of(results)
        for worker in workers:
            worker.put("finish", results)
        until = time.monotonic() + FINISH_SECONDS
        for worker in workers:
            worker.end(max(until - time.monotonic(), 0))


class LoggerThread:
    """Thread that makes the calls to one logger, in order.

    Args:
        name: Name of the logger.
        config: A `training.configuration.Config`.
        ids: A `RunIds`.
    """

    def __init__(self, name, config, ids):
        """Starts the thread, a daemon."""
        self.name = name
        self.calls = queue.SimpleQueue()
        self.failures = 0  # consecutive
        self.warned = False
        self.thread = threading.Thread(
            target=self._run, args=(config, ids), name=f"logger {name}", daemon=True
        )
        self.thread.start()

    def put(self, method, *arguments):
        """Enqueues a call of a method of the logger."""
        self.calls.put((method, arguments))

    def end(self, seconds):
        """Waits for up to `seconds` until all enqueued calls are made."""
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
        """Returns the result of a function; its first exception becomes a warning."""
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
    """Run ids of the loggers, stored in a JSON file.

    Args:
        path: Path of the file.
    """

    def __init__(self, path):
        """Reads the file."""
        self.path = path
        self.lock = threading.Lock()
        self.ids = self.read()

    def get(self, name):
        """Returns the run id of a logger, or `None`."""
        return self.ids.get(name)

    def put(self, name, run_id):
        """Stores the run id of a logger; `None` is ignored."""
        if run_id is None or self.ids.get(name) == str(run_id):
            return
        with self.lock:
            self.ids[name] = str(run_id)
            write_atomically(self.path, json.dumps(self.ids, indent=2))

    def read(self):
        """Returns the ids by logger; warns and returns none if the file is damaged."""
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
    """Prints a warning to standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def numbers_of(values):
    """Returns the numeric entries of a dict, as Python's int and float."""
    return {
        name: int(value) if isinstance(value, numbers.Integral) else float(value)
        for name, value in values.items()
        if isinstance(value, numbers.Real) and not isinstance(value, bool)
    }


# === Weights & Biases ===


class WandbLogger:
    """Weights & Biases run; it is configured by WANDB_PROJECT, WANDB_MODE and its other variables.

    Args:
        config: A `training.configuration.Config`.
        run_id: Id of the run to resume. If `None`, a new run is created.
    """

    def __init__(self, config, run_id):
        """Creates or resumes the run."""
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
        # W&B drops reports with a smaller step than before, as after a rollback, so the step is
        # logged as a metric, which is the x-axis of all others.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step, values):
        """Logs a report."""
        self.run.log({"step": step, **values})

    def finish(self, results):
        """Writes the results to the run's summary and ends it; `None` marks it failed."""
        if results is not None:
            self.run.summary.update({f"final_{name}": value for name, value in results.items()})
        self.run.finish(exit_code=0 if results is not None else 1)


# === MLflow ===


class MLflowLogger:
    """MLflow run, in the store of MLFLOW_TRACKING_URI and the experiment of MLFLOW_EXPERIMENT_NAME.

    Args:
        config: A `training.configuration.Config`.
        run_id: Id of the run to resume. If `None`, a new run is created.
    """

    def __init__(self, config, run_id):
        """Creates or resumes the run."""
        if is_file_store(os.environ.get("MLFLOW_TRACKING_URI", "")):
            # MLflow 3.7 and later reject their file store without this opt-in.
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
        """Logs the finite values of a report, in batches."""
        now = int(1000 * time.time())
        metrics = [
            self.entities.Metric(name, float(value), now, step)
            for name, value in values.items()
            if math.isfinite(value)
        ]
        for first in range(0, len(metrics), MLFLOW_METRICS):
            self.client.log_batch(self.run_id, metrics=metrics[first : first + MLFLOW_METRICS])

    def finish(self, results):
        """Logs the results and ends the run; `None` marks it killed."""
        if results is not None:
            step = int(results.get("step", 0))
            self.log(step, {f"final_{name}": value for name, value in results.items()})
        self.client.set_terminated(self.run_id, "KILLED" if results is None else "FINISHED")


def is_file_store(uri):
    """Returns whether a tracking URI is a local directory: a `file:` URI, or a path."""
    # Databricks is the one server whose URI may have no scheme.
    return bool(uri) and urllib.parse.urlsplit(uri).scheme in ("", "file") and uri != "databricks"


def run_name(config):
    """Returns the run's display name: the name of its directory."""
    return os.path.basename(os.path.abspath(config.workdir)) or config.model


LOGGERS = {
    "wandb": Row(WandbLogger, "wandb", "wandb"),
    "mlflow": Row(MLflowLogger, "mlflow", "mlflow"),
}
