"""The command keras-tnt: a file for each thing that it does.

A module of this package has `HELP`, `add_arguments(parser)` and `run(options)`, which returns the
exit status. Nothing here imports Keras before `run` does, so that `--help` and a wrong argument
are answered at once.
"""

import argparse
import builtins
import importlib
import os
import sys

from keras_tnt.text import escape_unencodable_output, first_line

COMMANDS = ("predict", "merge", "list", "info", "explain")
NAME = "keras-tnt"


def main(arguments=None):
    """Run the command.

    Args:
        arguments: list of its arguments; None: the shell's.

    Returns:
        The exit status: 0; 1 if something was left out, which was said; 2 if nothing could be done.
    """
    escape_unencodable_output()
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.plugins:
            from keras_tnt import registry

            registry.load_plugins(options.plugins)
        return options.run(options)
    except (ValueError, OSError, ImportError) as error:
        return fail(error)
    except MemoryError as error:
        return fail(f"There is not enough memory. {error}".rstrip())
    except KeyboardInterrupt:
        return fail("stopped", 130)


def parse(arguments):
    """The options; a first argument that is no command is an image of `predict`."""
    if arguments and arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments = ["predict", *arguments]
    options = parsers()[NAME].parse_args(arguments)
    for name, value in vars(options).items():  # A shell expands no `--out=~/table.csv`.
        if isinstance(value, str):
            setattr(options, name, os.path.expanduser(value))
        elif isinstance(value, builtins.list):  # `list` is one of the commands
            setattr(options, name, [os.path.expanduser(each) for each in value])
    return options


def parsers():
    """The parser of `keras-tnt`, and that of each command, by name."""
    parser = argparse.ArgumentParser(
        prog=NAME, description="Transformer-in-Transformer image models."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    found = {NAME: parser}
    for name in COMMANDS:
        module = importlib.import_module(f"{__name__}.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.add_argument(
            "--plugins", default="", help="modules to import, by commas, that register families"
        )
        command.set_defaults(run=module.run)
        found[name] = command
    return found


def fail(message, status=2):
    """Say what is wrong, in one line."""
    print(f"error: {first_line(message)}", file=sys.stderr)
    return status
