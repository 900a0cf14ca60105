"""How the trainer's commands begin and end: flags, --help, and errors in one line."""

import os
import sys

from absl import app, flags

HELP = {"--help", "-help", "--helpshort", "-h", "-?"}


def run(main):
    """Run a command and exit with its status.

    Args:
        main: function of the arguments that are no flags, to the exit status. What it raises is
            told in one line: ValueError, for what was asked, with status 2; ImportError, OSError
            and RuntimeError, for what happened, with status 1.
    """

    def guarded(arguments):
        try:
            return main([os.path.expanduser(argument) for argument in arguments[1:]])
        except KeyboardInterrupt:
            print("stopped", flush=True)
            return 130
        except ValueError as error:
            return fail(error, 2)
        except (ImportError, OSError, RuntimeError) as error:
            return fail(error, 1)

    # As keras_tnt.text.escape_unencodable_output, before Keras is imported.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app.run(guarded, flags_parser=parse)


def parse(arguments):
    """absl's flags, with --help and misspelt flags answered as other commands do."""
    if HELP & set(arguments[1:]):
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
    try:
        positional = flags.FLAGS(arguments)
        for name in flags.FLAGS:  # A shell expands no `--workdir=~/runs`.
            flag = flags.FLAGS[name]
            if isinstance(flag.value, str) and flag.value.startswith("~"):
                flag.value = os.path.expanduser(flag.value)
        return positional
    except flags.Error as error:
        sys.exit(fail(error, 2))


def fail(error, status):
    """Say what went wrong; returns the exit status."""
    # As keras_tnt.text.printable, which would import Keras before a wrong flag is told.
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(error))
    print(f"error: {text}", file=sys.stderr)
    return status


def refuse_arguments(arguments):
    """Raise a ValueError if a command that takes flags alone was given anything else."""
    if arguments:
        raise ValueError(f"this command takes flags alone; what is {arguments[0]!r}?")


def say_backend(asked):
    """Say in a line that the trainer is TensorFlow's, if KERAS_BACKEND asked for another."""
    if asked != "tensorflow":
        print(
            f"KERAS_BACKEND={asked} is left aside: the trainer is TensorFlow's. What it trains "
            "loads on every backend",
            file=sys.stderr,
        )
