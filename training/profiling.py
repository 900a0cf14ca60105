"""`--profile_steps`: a TensorBoard trace of some updates, by TensorFlow's profiler."""

import contextlib
import sys
from pathlib import Path

import tensorflow as tf

from training import configuration


class Profiler:
    """Traces a stretch of updates into `tensorboard/plugins/profile`; once in a process.

    Args:
        config: A `training.configuration.Config`.
        total: Updates of the run.
        active: Whether this process traces.
        say: Function that prints a line.

    Raises:
        ValueError: If the run has fewer updates.
    """

    def __init__(self, config, total, active, say=print):
        self.steps = configuration.profile_steps(config)
        if self.steps and self.steps[1] > total:
            raise ValueError(f"--profile_steps={config.profile_steps}: the run has {total} updates")
        self.active = active and self.steps is not None
        self.say = say
        self.directory = Path(config.workdir) / "tensorboard"
        self.tracing = False
        self.made = []  # steps at which traced executions ended

    def ends(self, step):
        """Returns the steps after `step` at which an execution of several updates has to end."""
        if not self.steps:
            return []
        return [end for end in (self.steps[0] - 1, self.steps[1]) if end > step]

    @contextlib.contextmanager
    def updates(self, step, count, wait):
        """Traces, if they are asked for, the updates within the context.

        Args:
            step: Updates made before.
            count: Number of updates.
            wait: Function that waits until the devices have made them.
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
        """Writes the trace, of as many updates as were made."""
        if self.tracing:
            self.tracing = self.active = False
            if self.attempt(tf.profiler.experimental.stop) and self.made:
                self.say(
                    f"trace of updates {self.first} to {max(self.made)} in {self.directory}: "
                    "TensorBoard shows it with the package tensorboard-plugin-profile"
                )

    def attempt(self, function, *arguments):
        """Returns whether a function of the profiler succeeded; if not, it is a warning."""
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
