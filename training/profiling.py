"""`--profile_steps`: writes a TensorBoard trace of some updates with TensorFlow's profiler."""

import contextlib
import sys
from pathlib import Path

import tensorflow as tf

from training import configuration


def check_range(config, total):
    """Returns the first and last update to trace, or `None` if there are none.

    Args:
        config: A `training.configuration.Config`.
        total: Number of updates of the run.

    Raises:
        ValueError: If the run has fewer updates than `--profile_steps`.
    """
    steps = configuration.profile_steps(config)
    if steps and steps[1] > total:
        raise ValueError(
            f"--profile_steps={config.profile_steps}: the run has {total} updates. Give a range "
            f"that ends at {total} or before"
        )
    return steps


class Profiler:
    """Profiler of a range of updates; it writes `tensorboard/plugins/profile` once per process.

    Args:
        config: A `training.configuration.Config`.
        total: Number of updates of the run.
        active: Whether this process traces.
        say: Function that prints a line. Defaults to `print`.

    Raises:
        ValueError: If the run has fewer updates than `--profile_steps`.
    """

    def __init__(self, config, total, active, say=print):
        """Reads `--profile_steps`; tracing starts in `updates`."""
        self.steps = check_range(config, total)
        self.active = active and self.steps is not None
        self.say = say
        self.directory = Path(config.workdir) / "tensorboard"
        self.tracing = False
        self.made = []  # final steps of the traced executions

    def resume(self, step):
        """Warns if a run that goes on after `step` has made all of the updates to trace."""
        if self.active and step >= self.steps[1]:
            self.active = False
            first, last = self.steps
            print(
                f"warning: --profile_steps={first},{last}: no trace is written, because the run is "
                f"resumed after update {step}. Give a later range to trace this run",
                file=sys.stderr,
                flush=True,
            )

    def ends(self, step):
        """Returns the steps after `step` at which an execution of several updates must end."""
        if not self.steps:
            return []
        return [end for end in (self.steps[0] - 1, self.steps[1]) if end > step]

    @contextlib.contextmanager
    def updates(self, step, count, wait):
        """Traces the updates within the context, if `--profile_steps` includes them.

        Args:
            step: Updates made before.
            count: Number of updates.
            wait: Function that blocks until the devices have finished them.
        """
        if self.active and not self.tracing and self.steps[0] <= step + 1 <= self.steps[1]:
            self.tracing = self.attempt(tf.profiler.experimental.start, str(self.directory))
            self.active, self.first = self.tracing, step + 1
        if not self.tracing:
            yield
            return
        with tf.profiler.experimental.Trace("update", step_num=step + 1, _r=1):
            yield
        self.made.append(step + count)
        if step + count >= self.steps[1]:
            wait()
            self.close()

    def close(self):
        """Stops tracing and writes the trace of the updates made so far."""
        if self.tracing:
            self.tracing = self.active = False
            if self.attempt(tf.profiler.experimental.stop) and self.made:
                self.say(
                    f"trace of updates {self.first} to {max(self.made)} in {self.directory}: "
                    "TensorBoard shows it with the package tensorboard-plugin-profile"
                )

    def attempt(self, function, *arguments):
        """Calls a profiler function; returns whether it succeeded, and warns if not."""
        try:
            function(*arguments)
        except (tf.errors.OpError, OSError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            print(
                f"warning: --profile_steps: no trace is written ({reason}). Training continues",
                file=sys.stderr,
                flush=True,
            )
            return False
        return True
