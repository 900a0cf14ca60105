"""Trains and is killed, many times: python -m tests.training.killing DIRECTORY STRATEGY KILLS

The trainer runs in processes forked after TensorFlow is imported and before it starts, and each
run has to end with the weights and reports of one that nobody disturbed. Prints what was counted.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from safetensors.numpy import load_file

from training import checkpoint, configuration, loop, models

STEPS = 8
TINY = {"depth": 1, "outer_dim": 16, "inner_dim": 4, "outer_heads": 2, "inner_stride": 4}


def start(workdir, strategy):
    """Begin a run, or go on with it, in a process of its own; returns its id."""
    process = os.fork()
    if process:
        return process
    try:
        sys.stdout = sys.stderr = open(workdir.with_suffix(".log"), "a")
        models.TNT_DIGITS |= TINY
        values = {"epochs": 2, "steps_per_epoch": STEPS // 2, "batch_size": 8, "ema": 0.9}
        values |= {"checkpoint_steps": 1, "report_steps": 1, "evaluate_epochs": 2}
        values |= {"stochastic_depth": 0.2, "strategy": strategy, "cpu_devices": 2, "report": False}
        loop.train(configuration.make("digits", workdir=str(workdir), **values))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def ends_within(process, seconds):
    """Whether a process ended by itself, and well; it is killed otherwise."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            if status:
                raise SystemExit(f"the trainer ended with status {status}")
            return True
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return False


def outcome(workdir):
    """The state at the end of a run, and the losses that it reported."""
    state = load_file(workdir / "checkpoints" / checkpoint.NAME.format(STEPS))
    reports = checkpoint.read_metrics(workdir / "metrics.jsonl")
    state["losses"] = np.array([[r["step"], r["loss"]] for r in reports if "loss" in r])
    return state


def check(workdir, expected):
    """Exit with the difference, if there is one, between a run's end and the undisturbed one's."""
    found = outcome(workdir)
    different = [name for name in expected if not np.array_equal(found[name], expected[name])]
    left = [str(path) for path in workdir.rglob("*") if path.name.startswith(".writing-")]
    if different or left or found.keys() != expected.keys():
        raise SystemExit(f"{workdir}: other weights or reports {different}, left behind {left}")


def main(directory, strategy, kills):
    directory, random = Path(directory), np.random.default_rng(0)
    undisturbed, began = directory / "undisturbed", time.monotonic()
    assert ends_within(start(undisturbed, strategy), 600)
    length, expected = time.monotonic() - began, outcome(undisturbed)
    killed = finished = 0
    while killed < int(kills):
        workdir = directory / f"killed_{finished}"
        if ends_within(start(workdir, strategy), random.uniform(0, 1.1 * length)):
            check(workdir, expected)
            finished += 1
        else:
            killed += 1
    workdir = directory / f"killed_{finished}"
    assert ends_within(start(workdir, strategy), 600)
    check(workdir, expected)
    print(json.dumps({"killed": killed, "runs": finished + 1, "seconds_undisturbed": length}))


if __name__ == "__main__":
    main(*sys.argv[1:])
