"""Train a model: python training/train.py --recipe=tnt_small --workdir=runs/tnt_small

A recipe (training/recipes) gives every value, and a flag overrides it. Without any flag a small TNT
learns handwritten digits. Started again with the same flags, a run goes on where it was.
"""

import os
import sys
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import app, flags, logging  # noqa: E402

from training import configuration  # noqa: E402

configuration.define_flags()
flags.adopt_module_key_flags(configuration)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"train.py takes flags alone; what is {argv[1]!r}?")
    from training import loop

    logging.set_verbosity(logging.WARNING)
    try:
        result = loop.train(configuration.from_flags(flags.FLAGS))
    except (ValueError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except loop.Stopped as stopped:
        print(stopped, flush=True)
        return 143
    print(f"accuracy {result['accuracy']:.4f}  files in {flags.FLAGS.workdir}")
    return 0


if __name__ == "__main__":
    app.run(main)
