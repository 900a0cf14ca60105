"""How the trainer's commands begin and end: flags, --help, and errors in one line."""

import logging
import sys
import warnings

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
            return main(arguments[1:])
        except KeyboardInterrupt:
            print("stopped", flush=True)
            return 130
        except ValueError as error:
            return fail(error, 2)
        except (ImportError, OSError, RuntimeError) as error:
            return fail(error, 1)

    app.run(guarded, flags_parser=parse)


def parse(arguments):
    """absl's flags, with --help and misspelt flags answered as other commands do."""
    if HELP & set(arguments[1:]):
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        sys.exit(fail(error, 2))


def fail(error, status):
    """Say what went wrong; returns the exit status."""
    # As keras_tnt.text.printable, which would import Keras before a wrong flag is told.
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(error))
    print(f"error: {text}", file=sys.stderr)
    return status


def quiet_libraries():
    """Keeps deprecation warnings of libraries, which no user can act on, from between the lines."""
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)


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
