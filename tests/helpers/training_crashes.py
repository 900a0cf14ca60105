"""Kills training at random times.

    python -m tests.helpers.training_crashes DIRECTORY STRATEGY KILLS

Configuration values may follow: optimizer=lion jit=on. The trainer runs in processes that are
forked after TensorFlow is imported and before it starts. Each run must end with the weights and
reports of an uninterrupted one. Each kill is logged on standard error; the counts are printed at
the end, also after an error.
"""

import collections
import functools
import json
import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from safetensors.numpy import load_file

from tests.helpers.crash_injection import finish, forked, is_killed
from training import checkpoint, commands, configuration, loop, models

STEPS = 8
# The optimizers with the most state.
OPTIMIZERS = {"one_device": "muon", "mirrored": "adamw"}
TINY = {"depth": 1, "outer_dim": 16, "inner_dim": 4, "outer_heads": 2, "inner_stride": 4}


def start(workdir, strategy, given=()):
    """Starts or resumes a run in a forked process, and returns its id."""
    values = {"strategy": strategy, "cpu_devices": 2, "stochastic_depth": 0.2}
    values |= {"optimizer": OPTIMIZERS[strategy], **dict(each.split("=") for each in given)}
    return fork(workdir, workdir.with_suffix(".log"), {}, **values)


def fork(workdir, log, environment, **values):
    """Starts or resumes a run with other values, log and environment variables; returns its id."""

    def train(arguments):
        os.environ |= environment
        models.TNT_DIGITS |= TINY
        short = {"epochs": 2, "steps_per_epoch": STEPS // 2, "batch_size": 8, "ema": 0.9}
        short |= {"checkpoint_steps": 1, "report_steps": 1, "evaluate_epochs": 2, "report": False}
        loop.train(configuration.make("digits", workdir=str(workdir), **{**short, **values}))

    return forked(lambda: commands.exit_status(train), log)


def outcome(workdir):
    """Returns the final checkpoint's tensors, and the reported losses."""
    state = load_file(workdir / "checkpoints" / checkpoint.NAME.format(STEPS))
    reports = checkpoint.read_metrics(workdir / "metrics.jsonl")
    state["losses"] = np.array([[r["step"], r["loss"]] for r in reports if "loss" in r])
    return state


def check(workdir, expected):
    """Exits with an error if a run differs from the uninterrupted one or leaves temporary files."""
    found = outcome(workdir)
    different = [name for name in expected if not np.array_equal(found[name], expected[name])]
    left = [str(path) for path in workdir.rglob("*") if path.name.startswith(".writing-")]
    if different or left or found.keys() != expected.keys():
        raise SystemExit(f"{workdir}: other weights or reports {different}, left behind {left}")


def main(directory, strategy, kills, *values):
    directory, random = Path(directory), np.random.default_rng(0)
    undisturbed = directory / "undisturbed"
    length = finish(start(undisturbed, strategy, values), directory)
    expected = outcome(undisturbed)
    killed = finished = 0
    steps = collections.Counter()
    try:
        while killed < int(kills):
            workdir = directory / f"killed_{finished}"
            reached, seconds, begun = newest_step(workdir), 1.1 * length, None
            if killed % 2 == 0 and reached < STEPS - 1:
                # Startup dominates such a short run: every other kill happens after it.
                wanted, seconds = random.integers(reached + 1, STEPS), 0.2
                begun = functools.partial(has_reached, workdir, wanted)
            process = start(workdir, strategy, values)
            if is_killed(process, random.uniform(0, seconds), directory, begun):
                killed += 1
                steps[newest_step(workdir)] += 1
                print(f"kill {killed} of {kills}", file=sys.stderr, flush=True)
            else:
                check(workdir, expected)
                finished += 1
        workdir = directory / f"killed_{finished}"
        finish(start(workdir, strategy, values), directory)
        check(workdir, expected)
        finished += 1
    finally:
        counted = {"killed": killed, "identical_runs": finished}
        counted |= {"kills_by_newest_checkpoint": dict(sorted(steps.items()))}
        print(json.dumps({**counted, "processor_seconds_undisturbed": length}), flush=True)


def has_reached(workdir, step):
    return newest_step(workdir) >= step


def newest_step(workdir):
    """Returns the step of the newest checkpoint. 0 if there is none."""
    paths = (workdir / "checkpoints").glob("step_*.safetensors")
    return max(map(checkpoint.step_of, paths), default=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
