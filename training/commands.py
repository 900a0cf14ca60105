"""Entry point of the trainer's commands: flag parsing, `--help` and one-line errors."""

import difflib
import logging
import os
import sys
import warnings

from absl import app, flags

HELP = {"--help", "-help", "--helpshort", "-h", "-?"}


def run(main):
    """Runs a command and exits with its status.

    Args:
        main: Function from the positional arguments to the exit status; `exit_status` handles its
            exceptions.
    """
    # Same as keras_tnt.text.escape_unencodable_output, which would import Keras.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app.run(lambda arguments: exit_status(main, arguments[1:]), flags_parser=parse)


def exit_status(main, arguments=()):
    """Calls the main function of a command and returns its exit status.

    Its exceptions are printed as one line: ValueError (invalid request) is status 2; ImportError,
    OSError and RuntimeError (failures) are status 1.

    Args:
        main: Function from the positional arguments to the exit status.
        arguments: Positional arguments. Defaults to none.
    """
    try:
        return main([os.path.expanduser(argument) for argument in arguments])
    except KeyboardInterrupt:
        print("stopped", flush=True)
        return 130
    except ValueError as error:
        return fail(error, 2)
    except (ImportError, OSError, RuntimeError) as error:
        return fail(error, 1)


def parse(arguments):
    """Parses absl flags; handles `--help` and suggests the nearest flag for an unknown one.

    Returns:
        The positional arguments, the name of the program first.
    """
    if HELP & set(arguments[1:]):
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
    try:
        positional = flags.FLAGS(arguments)
        for name in flags.FLAGS:  # A shell does not expand `~` in `--workdir=~/runs`.
            flag = flags.FLAGS[name]
            if isinstance(flag.value, str) and flag.value.startswith("~"):
                flag.value = os.path.expanduser(flag.value)
        return positional
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        sys.exit(fail(f"there is no flag --{name}. {nearest(name, list(flags.FLAGS))}", 2))
    except flags.Error as error:
        sys.exit(fail(error, 2))


# Flags of timm, DeiT and other trainers, mapped to ours.
HABITS = {
    "arch": "model",
    "model_name": "model",
    "pretrained": "weights",
    "initial_checkpoint": "weights",
    "checkpoint": "weights",
    "resume": "workdir",
    "output": "workdir",
    "output_dir": "workdir",
    "data": "data_dir",
    "data_path": "data_dir",
    "data_set": "dataset",
    "num_classes": "classes",
    "nb_classes": "classes",
    "img_size": "image_size",
    "input_size": "image_size",
    "b": "batch_size",
    "bs": "batch_size",
    "lr": "learning_rate",
    "base_lr": "learning_rate",
    "blr": "learning_rate",
    "min_lr": "min_learning_rate",
    "warmup_lr": "warmup_learning_rate",
    "sched": "schedule",
    "lr_scheduler": "schedule",
    "wd": "weight_decay",
    "opt": "optimizer",
    "opt_betas": "beta_1",
    "clip_grad": "clip_norm",
    "drop_path": "stochastic_depth",
    "drop_path_rate": "stochastic_depth",
    "drop": "dropout",
    "drop_rate": "dropout",
    "smoothing": "label_smoothing",
    "reprob": "erasing",
    "aa": "randaugment",
    "aug_repeats": "repeats",
    "repeated_aug": "repeats",
    "model_ema": "ema",
    "model_ema_decay": "ema",
    "grad_accum_steps": "accumulation",
    "accum_iter": "accumulation",
    "grad_checkpointing": "remat",
    "amp": "precision",
    "amp_dtype": "precision",
    "num_epochs": "epochs",
    "teacher_model": "teacher",
    "distillation_type": "distill",
    "distillation_alpha": "distill_alpha",
    "distillation_tau": "temperature",
    "lr_find": "find_learning_rate",
}


def nearest(name, names):
    """Returns a sentence that suggests the flags closest to an unknown one."""
    wanted = name.lower().replace("-", "_").removeprefix("no_")
    wanted = HABITS.get(wanted, wanted)
    found = [wanted] if wanted in names else difflib.get_close_matches(wanted, names, n=3)
    if found:
        return f"Did you mean {' or '.join('--' + each for each in found)}?"
    return "--help lists the flags."


def fail(error, status):
    """Prints an error to standard error; returns the exit status."""
    # Same as keras_tnt.text.printable, which would import Keras before the error is printed.
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(error))
    print(f"error: {text}", file=sys.stderr)
    return status


def quiet_libraries():
    """Silences deprecation warnings of libraries, on which a user cannot act."""
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)


def refuse_arguments(arguments):
    """Raises a ValueError if a command without positional arguments is given any."""
    if arguments:
        raise ValueError(f"this command takes flags alone; what is {arguments[0]!r}?")


def say_backend(asked):
    """Warns if KERAS_BACKEND names another backend than the trainer's, TensorFlow."""
    if asked != "tensorflow":
        print(
            f"KERAS_BACKEND={asked} is left aside: the trainer is TensorFlow's. What it trains "
            "loads on every backend",
            file=sys.stderr,
        )
