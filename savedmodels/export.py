"""Exports a model for TF Serving, Triton and MLServer, and to ONNX; see docs/serve.md.

python savedmodels/export.py --model=TNTSmall --weights=imagenet
python savedmodels/export.py --run=runs/demo --onnx=digits.onnx
python savedmodels/export.py --run=runs/demo --no_saved_model --triton=repository
"""

import argparse
import json
import os
import sys

DIRECTORY = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(DIRECTORY))
MAX_TEXT_BYTES = 16 * 2**20


def main(arguments=None):
    """Exports the model that the options describe in every requested format."""
    options = parse(arguments)
    for name, value in vars(options).items():  # Shells do not expand `--onnx=~/model.onnx`.
        if isinstance(value, str):
            setattr(options, name, os.path.expanduser(value))
    check(options)
    import keras_tnt

    keras_tnt.models.registry.load_plugins(options.plugins)
    labels = read_labels(options.labels) if options.labels else None
    model, weights = load(options)
    directory = options.directory or os.path.join(DIRECTORY, model.name)
    print(f"Exporting {model.name}, {model.count_params():,} parameters")
    if not options.no_saved_model:
        path = keras_tnt.export.saved_model(
            model,
            directory,
            version=options.version,
            labels=labels,
            signatures=options.signatures,
            weights=weights,
        )
        print(f"SavedModel, verified: {path}")
    if options.onnx:
        path = keras_tnt.export.onnx(
            model,
            options.onnx,
            opset=options.opset,
            precision=options.precision,
            labels=labels,
            weights=weights,
        )
        print(f"ONNX, verified: {path} ({agreement(path)})")
    if options.triton:
        path = keras_tnt.export.triton(
            model,
            options.triton,
            version=options.version,
            name=options.name,
            opset=options.opset,
            precision=options.precision,
            labels=labels,
            weights=weights,
        )
        print(f"Triton repository, verified: {path}")


def parse(arguments):
    """Returns the options of the command line."""
    parser = make_parser(argparse.ArgumentParser)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # Only then is it worth the import, which includes Keras.
        from keras_tnt.cli import Parser

        make_parser(Parser).parse_args(arguments)
    if options.model is None and options.run is None:
        parser.error("one of the arguments --model --run is required")
    return options


def make_parser(kind):
    """Returns the parser of the command line, an object of a subclass of `ArgumentParser`."""
    parser = kind(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # Not required here, so that an unknown option is answered before a missing one.
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="a variant, such as TNTSmall, or a .keras file")
    source.add_argument("--run", help="working directory of a training run that has ended")
    parser.add_argument(
        "--checkpoint",
        choices=("best", "final", "final_ema", "averaged"),
        help="which weights of --run: of its best evaluation, of its end, their moving average, or "
        "what training/average.py wrote; default: final or final_ema, the one with the better "
        "accuracy",
    )
    parser.add_argument(
        "--plugins",
        default="",
        help="modules to import first, by commas: those that register models",
    )
    parser.add_argument("--weights", help="as the variant's weights=, or none for random ones")
    parser.add_argument("--image_size", type=int, help="side in pixels; default: the variant's own")
    parser.add_argument("--classes", type=int, help="number of classes; default: 1000")
    parser.add_argument("--labels", help="text file, a class name a line")
    parser.add_argument(
        "--directory", help="what a server is told to poll; default: savedmodels/<model's name>"
    )
    parser.add_argument("--version", type=int, help="default: the next free one")
    parser.add_argument(
        "--signatures",
        type=lambda names: names.split(","),
        help="comma-separated; default: serving_default,serving_bytes,classify,features",
    )
    parser.add_argument(
        "--no_saved_model", action="store_true", help="write what else is named alone"
    )
    parser.add_argument("--onnx", help="path of an ONNX file to write as well")
    parser.add_argument(
        "--triton", help="a Triton model repository to write a version into as well"
    )
    parser.add_argument(
        "--name", help="what the model is called in the --triton repository; default: its own name"
    )
    parser.add_argument("--opset", type=int, help="of the ONNX file, 13 to 18 or 23; default: 18")
    parser.add_argument(
        "--precision", choices=("float32", "float16", "int8"), default="float32", help="of the ONNX"
    )
    return parser


def check(options):
    """Exits with a message if the options cannot work, before Keras is imported."""
    settings = (options.weights, options.image_size, options.classes)
    is_changed = any(value is not None for value in settings)
    if options.run and is_changed:
        stop("--run has its own weights, size and classes; leave out --weights and the like")
    averaged = options.checkpoint == "averaged"
    if options.run and averaged and not os.path.exists(final(options.run, "averaged")):
        stop(
            f"{options.run} holds no averaged.keras: python training/average.py "
            f"--run={options.run} writes it"
        )
    if options.run and not averaged and not os.path.exists(final(options.run)):
        stop(f"{options.run} holds no final.keras: it is no training run, or has not ended")
    if options.checkpoint and not options.run:
        stop("--checkpoint goes with --run")
    if options.labels and not os.path.isfile(options.labels):
        stop(f"--labels: there is no file {options.labels}")
    if options.no_saved_model and not (options.onnx or options.triton):
        stop("--no_saved_model leaves nothing to do without --onnx or --triton")
    if options.name and not options.triton:
        stop("--name goes with --triton")
    is_file = options.model and options.model.endswith(".keras")
    if is_file and not os.path.isfile(options.model):
        stop(f"--model: there is no file {options.model}")
    if is_file and is_changed:
        stop(
            "a .keras file has its own weights, size and classes; leave out --weights and the like"
        )


def load(options):
    """Returns (model, description of the weights' origin)."""
    import keras_tnt
    from keras_tnt.cli.runtime import parse_weights
    from keras_tnt.weights import load_keras_model

    if options.run:
        checkpoint = options.checkpoint or better(options.run)
        print(f"The weights of {options.run} are {checkpoint}")
        return load_checkpoint_of(options.run, checkpoint), f"run {options.run}, {checkpoint}"
    if options.model.endswith(".keras"):
        return load_keras_model(options.model), options.model
    try:
        given = parse_weights("imagenet" if options.weights is None else options.weights)
        builder = keras_tnt.models.registry.find_model(options.model, given)
    except ValueError as error:
        stop(f"--model: {error}".removesuffix("."))
    settings = {}
    weights = f"the default of {options.model}"
    if options.weights is not None:
        settings["weights"] = given
        weights = given or "none, random values"
    if options.image_size is not None:
        settings["input_shape"] = (options.image_size, options.image_size, 3)
    if options.classes is not None:
        settings["classes"] = options.classes
    return builder(**settings), weights


def final(run, checkpoint="final"):
    """Returns the path of a run's `.keras` file."""
    return os.path.join(run, f"{checkpoint}.keras")


def better(run):
    """Returns the weights of a run that were more accurate at its end, according to its results.

    Returns:
        "final", or "final_ema" for their moving average.
    """
    from keras_tnt.files import read_regular

    try:
        data = read_regular(os.path.join(run, "results.json"), MAX_TEXT_BYTES)
        found = json.loads(data.decode("utf-8")).get("better", "final")
        if found not in ("final", "final_ema"):
            raise ValueError("it names no weights as the better ones")
        return found
    except FileNotFoundError:
        return "final"
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{run}/results.json is damaged ({error}): say --checkpoint") from error


def load_checkpoint_of(run, checkpoint):
    """Returns the model of a run with the weights of a checkpoint."""
    from keras_tnt.weights import load_keras_model

    if checkpoint != "best":
        path = final(run, checkpoint)
        if not os.path.isfile(path):
            missing = {
                "final_ema": "the run had no --ema",
                "averaged": f"python training/average.py --run={run} writes it",
            }
            raise ValueError(
                f"{run} holds no {checkpoint}.keras: {missing.get(checkpoint, 'has it ended?')}"
            )
        return load_keras_model(path)
    from training.checkpoint import load_best

    model = load_keras_model(final(run))
    load_best(model, run)
    return model


def read_labels(path):
    """Returns the lines of a text file of labels."""
    from keras_tnt.files import read_regular

    try:
        return read_regular(path, MAX_TEXT_BYTES).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--labels: {path} is no UTF-8 text ({error.reason})") from error


def agreement(path):
    """Returns a sentence about the agreement of an ONNX file with the model, from its metadata."""
    import onnx

    properties = {p.key: p.value for p in onnx.load(path).metadata_props}
    measured = json.loads(properties["agreement"])
    return (
        f"{properties['precision']}: off by {measured['largest_difference_of_spread']:.1e} of the "
        f"outputs' spread, the same best class for {measured['same_top1']:.0%} of "
        f"{measured['images']} images"
    )


def stop(message):
    """Exits with a message, a sentence without its period."""
    sys.exit(f"export.py: {with_flags(message)}.")


def with_flags(message):
    """Returns a message with the library's argument names replaced by flags.

    The library is not imported for it: only its own messages have such names.
    """
    text = sys.modules.get("keras_tnt.text")
    return text.as_flags(str(message)) if text else str(message)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # escapes characters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"export.py: {with_flags(error)}")
