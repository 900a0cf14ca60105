"""Trains a model on TensorFlow.

    python training/train.py --recipe=tnt_small --workdir=runs/tnt_small

A recipe (training/recipes) sets the configuration, and flags override it. Without any flag a small
TNT is trained on handwritten digits. The same command resumes an interrupted run.
"""

import errno
import os
import sys
from pathlib import Path

BACKEND = os.environ.get("KERAS_BACKEND", "tensorflow")
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags, logging  # noqa: E402

from training import commands, configuration  # noqa: E402

configuration.define_flags()
flags.adopt_module_key_flags(configuration)


def main(arguments):
    """Trains as the flags say; returns the exit status: 128 + the signal's number if stopped."""
    commands.refuse_arguments(arguments)
    commands.say_backend(BACKEND)
    config = configuration.from_flags(flags.FLAGS)
    from training import loop

    commands.quiet_libraries()
    logging.set_verbosity(logging.WARNING)
    try:
        result = loop.train(config)
    except loop.Stopped as stopped:
        print(stopped, flush=True)
        return 128 + stopped.signal
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return commands.fail(
            f"{error}. What is written is whole: the same command goes on when there is room", 1
        )
    if config.find_learning_rate:
        print(f"--learning_rate={result['learning_rate']:.1e}: see {config.workdir}")
        return 0
    print(f"accuracy {result['accuracy']:.4f}  files in {config.workdir}")


if __name__ == "__main__":
    commands.run(main)
