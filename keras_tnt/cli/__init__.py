"""Command keras-tnt, with a module for each subcommand.

A module of this package has `HELP`, `add_arguments(parser)` and `run(options)`, which returns the
exit status. Nothing here imports Keras before `run`, so that `--help` and argument errors are
answered at once.
"""

import argparse
import builtins
import difflib
import importlib
import os
import re
import sys

from keras_tnt.cli import environment
from keras_tnt.text import as_flags, escape_unencodable_output, first_line

COMMANDS = ("predict", "merge", "list", "info", "explain", "rename")
NAME = "keras-tnt"
# Names of our options in other programs.
HABITS = {
    "arch": "model",
    "model_name": "model",
    "pretrained": "weights",
    "checkpoint": "weights",
    "ckpt": "weights",
    "initial_checkpoint": "weights",
    "b": "batch_size",
    "bs": "batch_size",
    "batch": "batch_size",
    "topk": "top",
    "k": "top",
    "o": "out",
    "output": "out",
    "results_file": "out",
    "names": "classes",
    "class_names": "classes",
    "label_names": "classes",
    "format": "json",
}


def main(arguments=None):
    """Runs the command.

    Args:
        arguments: list of command-line arguments. If `None`, those of the process.

    Returns:
        The exit status: 0; 1 if something was skipped, with a message; 2 on errors; 130 if
            interrupted.
    """
    escape_unencodable_output()
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.plugins:
            from keras_tnt.models import registry

            registry.load_plugins(options.plugins)
        return options.run(options)
    except (ValueError, OSError, ImportError) as error:
        return fail(as_flags(str(error)))
    except MemoryError as error:
        return fail(f"There is not enough memory. {error}".rstrip())
    except KeyboardInterrupt:
        return fail("stopped", 130)


def parse(arguments):
    """Returns the parsed options; without a subcommand, the arguments are those of `predict`."""
    found = parsers()
    arguments = [*arguments]
    if arguments and arguments[0] not in (*COMMANDS, "-h", "--help", "--version"):
        if arguments[0].startswith("-"):
            check_order(found, arguments)
        arguments = ["predict", *arguments]
    options = expand_home(found[NAME].parse_args(arguments))
    if options.version:
        options.run = environment.show_version
    if options.run is None:
        found[NAME].error(f"Name a command: {', '.join(COMMANDS)}. `{NAME} --help` says more.")
    return options


def expand_home(options):
    """Expands `~` in all options, because shells do not expand `--out=~/table.csv`."""
    for name, value in vars(options).items():
        if isinstance(value, str):
            setattr(options, name, os.path.expanduser(value))
        elif isinstance(value, builtins.list):  # `list` is a subcommand's module
            paths = [os.path.expanduser(x) if isinstance(x, str) else x for x in value]
            setattr(options, name, paths)
    return options


def check_order(parsers, arguments):
    """Exits with an error that shows the correct order if options precede the subcommand."""
    number = next((i for i, word in enumerate(arguments) if word in COMMANDS), None)
    if number is None:
        if not any(not word.startswith("-") for word in arguments):
            parsers[NAME].refuse(arguments[0])
        return
    command, option = arguments[number], arguments[0].partition("=")[0]
    if option in parsers[command].options():
        words = [command, *arguments[:number], *arguments[number + 1 :]]
        parsers[NAME].error(
            f"Options stand after the command. Type: {NAME} {' '.join(map(first_line, words))}"
        )
    parsers[command].refuse(arguments[0])


class Parser(argparse.ArgumentParser):
    """Argument parser that answers an unknown option with the closest one, in one line."""

    def options(self):
        """Returns the options of this command, such as `--top`."""
        return [name for action in self._actions for name in action.option_strings]

    def parse_known_args(self, args=None, namespace=None):
        """Parses arguments, among them choices that begin with a minus, `--sort -top1`."""
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args(self.join_choices(args), namespace)

    def join_choices(self, words):
        """Returns arguments with `--sort -top1` as `--sort=-top1`, which argparse accepts."""
        choices = {
            name: action.choices
            for action in self._actions
            for name in action.option_strings
            if action.choices
        }
        joined = []
        for word in words:
            if word.startswith("-") and joined and word in choices.get(joined[-1], ()):
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return joined

    def parse_args(self, args=None, namespace=None):
        """Parses arguments; exits with an error if one is unknown."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            getattr(options, "parser", self).refuse(unknown[0])
        return options

    def refuse(self, word):
        """Exits with an error about an unknown argument."""
        if not word.startswith("-"):
            self.error(f"What is {first_line(word)!r}? `{self.prog} --help` lists the arguments.")
        option = word.partition("=")[0]
        self.error(f"There is no option {first_line(option)}. {self.nearest(option)}")

    def nearest(self, option):
        """Returns a sentence that suggests the options closest to an unknown one."""
        names = [name.removeprefix("--") for name in self.options() if name.startswith("--")]
        wanted = re.sub("-", "_", option.strip("-").lower())
        if HABITS.get(wanted, wanted) in names:
            return f"Did you mean --{HABITS.get(wanted, wanted)}?"
        if found := difflib.get_close_matches(wanted, names, n=3, cutoff=0.5):
            return f"Did you mean {' or '.join('--' + name for name in found)}?"
        return f"`{self.prog} --help` lists the options."

    def error(self, message):
        """Exits with status 2 and a message of one line."""
        self.exit(2, f"error: {message}\n")


class HelpFormatter(argparse.HelpFormatter):
    """Help formatter that shows each option's default after its help."""

    def _get_help_string(self, action):
        text = action.help or ""
        shown = action.default not in (None, "", False, argparse.SUPPRESS)
        if shown and action.option_strings:
            return f"{text} (default: %(default)s)"
        return text


def parsers():
    """Returns a dict of parsers by name: that of `keras-tnt`, and that of each subcommand."""
    parser = Parser(prog=NAME, description="Transformer-in-Transformer image models.")
    parser.add_argument(
        "--version", action="store_true", help="version, backend and devices, and nothing else"
    )
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    found = {NAME: parser}
    parser.set_defaults(run=None, plugins="", parser=parser)
    for name in COMMANDS:
        module = importlib.import_module(f"{__name__}.{name}")
        command = commands.add_parser(
            name, help=module.HELP, description=module.HELP, formatter_class=HelpFormatter
        )
        module.add_arguments(command)
        command.add_argument(
            "--plugins", default="", help="modules to import, by commas, that register families"
        )
        command.set_defaults(run=module.run, parser=command)
        found[name] = command
    return found


def fail(message, status=2):
    """Prints an error in one line on stderr, and returns the exit status."""
    print(f"error: {first_line(message)}", file=sys.stderr)
    return status
