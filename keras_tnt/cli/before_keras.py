"""Part of the command that runs before Keras, which takes seconds, is imported.

`keras_tnt` imports this module before all others.
"""

import importlib.util
import os
import sys

from keras_tnt.cli import NAME, environment, fail, parse
from keras_tnt.text import escape_unencodable_output

BACKENDS = ("tensorflow", "jax", "torch")


def start():
    """Exits if this process is the command, and the answer needs no Keras.

    That is so for `--help`, argument errors and a backend that is not installed.
    """
    if not is_command():
        return
    escape_unencodable_output()
    options = parse(sys.argv[1:])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    backend = environment.configured_backend()
    if importlib.util.find_spec(backend) is None:
        if options.run is environment.show_version:
            sys.exit(environment.show_version(options, devices=False))
        installed = [name for name in BACKENDS if importlib.util.find_spec(name)]
        ways = [f"pip install 'keras-tnt[{backend}]'"] if backend in BACKENDS else []
        ways += [f"set KERAS_BACKEND={name}" for name in installed]
        sys.exit(
            fail(f"Keras's backend is {backend!r}, which is not installed: {', or '.join(ways)}.")
        )


def is_command():
    """Returns whether this process was started as `keras-tnt` or `python -m keras_tnt`."""
    if sys.argv[:1] == ["-m"]:  # while `python -m` imports the package
        return sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == ["keras_tnt"]
    return os.path.splitext(os.path.basename("".join(sys.argv[:1])))[0] == NAME


start()
