"""Averages checkpoints of a run (model soup), and writes the result into the run's directory.

    python training/average.py --run=runs/x --last=5
    python training/average.py --run=runs/x --best=3
    python training/average.py --run=runs/x runs/x/checkpoints/step_*.safetensors

Writes averaged.keras, averaged.weights.h5 and averaged.json. A run retains the last --keep
checkpoints, that of its best evaluation, and with --keep_best=N those of the best N.
"""

import json
import os
import sys
from pathlib import Path

BACKEND = os.environ.get("KERAS_BACKEND", "tensorflow")
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
from absl import flags  # noqa: E402

from keras_tnt.files import write_atomically  # noqa: E402
from training import checkpoint, commands, evaluate, regular  # noqa: E402

NAME = "averaged"


def main(arguments):
    """Averages as the flags say, and prints the result as text or JSON."""
    commands.say_backend(BACKEND)
    asked = flags.FLAGS
    for name in ("weights", "checkpoint", "report"):
        if asked[name].present:
            raise ValueError(f"--{name} is evaluate.py's: leave it out")
    given = {n: asked[n].value for n in evaluate.SHARED if asked[n].value is not None}
    if given and not asked.evaluate:
        raise ValueError(f"--{next(iter(given))} goes with --evaluate")
    result = average(
        asked["run"].value,
        last=asked.last,
        best=asked.best,
        files=arguments,
        ema=asked.ema,
        evaluate_with=given if asked.evaluate else None,
        progress=not asked.json,
    )
    if asked.json:
        print(json.dumps(result))
        return
    print(f"averaged {len(result['checkpoints'])} checkpoints: {result['files']['averaged.keras']}")
    if result["results"]:
        found = result["results"]
        print(
            f"{found['images']} images: top-1 {found['accuracy']:.2%}, top-5 "
            f"{found['top5_accuracy']:.2%}, loss {found['evaluation_loss']:.4f}"
        )


def average(run, last=None, best=None, files=(), ema=False, evaluate_with=None, progress=False):
    """Averages the weights of checkpoints, moving statistics included, in float64.

    Args:
        run: Directory of the run, which defines the model and receives the result.
        last: Number of the last checkpoints to average. Defaults to `None`.
        best: Number of the checkpoints of the best evaluations to average. Defaults to `None`.
        files: Paths to average instead: checkpoints of the trainer, `.keras` or `.weights.h5`
            files. Defaults to none.
        ema: Whether to average the moving averages of the weights (`--ema`) in the checkpoints.
            Defaults to `False`.
        evaluate_with: Dict of `training.configuration.Config` fields with which to evaluate the
            result on the held-out images; empty for the run's own. If `None`, it is not evaluated.
        progress: Whether to print the progress of the evaluation. Defaults to `False`.

    Returns:
        A dict, as in `averaged.json`: `checkpoints`, `steps`, `ema`, `results` (`None` if not
        evaluated), `files`.

    Raises:
        ValueError: If there are fewer checkpoints, or one is damaged or of another model.
    """
    if not run:
        raise ValueError("give --run, the directory of the run that gets the average")
    run = os.path.expanduser(run)
    config, record = evaluate.make_config({}, run), evaluate.read_record(run)
    paths = choose(Path(run), last, best, [os.path.expanduser(file) for file in files], ema)
    from training import models

    plain = models.build_plain(config, record["classes"], record.get("label_names"))
    # An older averaged.json is removed first, because it does not describe the new weights.
    described = Path(run) / f"{NAME}.json"
    values, steps = average_files(paths, plain, ema)
    for variable in plain.weights:
        variable.assign(values[variable.path])
    described.unlink(missing_ok=True)
    written = models.write_model(plain, run, NAME)
    result = {
        "checkpoints": [os.fspath(path) for path in paths],
        "steps": steps,
        "ema": ema,
        "results": None,
        "files": written,
    }
    if evaluate_with is not None:
        result["results"] = evaluate.evaluate(
            evaluate_with, run=run, checkpoint=NAME, progress=progress
        )
    write_atomically(described, json.dumps(result, indent=2))
    return result


# === Selection ===


def choose(run, last, best, files, ema):
    """Returns the paths to average.

    Args:
        run: Directory of the run, a `Path`.
        last: Number of last checkpoints, or `None`.
        best: Number of best checkpoints, or `None`.
        files: List of paths.
        ema: Whether checkpoints are ranked by the accuracy of the moving average.

    Raises:
        ValueError: If not exactly one of `last`, `best` and `files` is given, or there are fewer
            checkpoints.
    """
    asked = [
        name for name, value in (("--last", last), ("--best", best), ("files", files or None))
        if value is not None
    ]  # fmt: skip
    if len(asked) != 1:
        raise ValueError(
            "give one of --last=N, --best=N, and files to average. Received: "
            + (" and ".join(asked) or "none of them")
        )
    if files:
        return check_files(files)
    number, flag = (last, "--last") if best is None else (best, "--best")
    if isinstance(number, bool) or number < 1:
        raise ValueError(f"{flag} must be at least 1. Received: {number}")
    found = last_checkpoints(run) if best is None else best_checkpoints(run, ema)
    if len(found) < number:
        raise ValueError(f"{flag}={number}: {available(run)}")
    return found[:number]


def last_checkpoints(run):
    """Returns the paths of a run's last checkpoints, newest first.

    That of step 0 is left out: its weights are untrained.
    """
    paths = checkpoint.Checkpoints(run / "checkpoints", {}, keep=1).paths()
    return [path for path in paths if checkpoint.step_of(path)]


def best_checkpoints(run, ema):
    """Returns the paths of the checkpoints of a run's best evaluations, best first.

    Args:
        run: Directory of the run, a `Path`.
        ema: Whether to rank by the accuracy of the moving average.

    Raises:
        ValueError: If a checkpoint records no such accuracy.
    """
    directory = run / "checkpoints"
    names = checkpoint.Checkpoints(directory, {}, keep=1).names()
    names = [name for name in names if checkpoint.RANKED.fullmatch(name)]
    if regular.exists(directory / checkpoint.BEST):
        names.append(checkpoint.BEST)
    key, found = "ema_accuracy" if ema else "accuracy", {}
    for name in names:
        notes = checkpoint.read(directory / name)[1]
        accuracy = notes.get("results", {}).get(key)
        if accuracy is None:
            raise ValueError(
                f"{directory / name} records no {key}" + ": the run had no --ema" * bool(ema)
            )
        found.setdefault(notes["step"], (-accuracy, notes["step"], directory / name))
    return [path for _, _, path in sorted(found.values())]


def available(run):
    """Returns a message that lists a run's checkpoints, and how to retain more."""
    steps = [checkpoint.step_of(path) for path in last_checkpoints(run)]
    names = checkpoint.Checkpoints(run / "checkpoints", {}, keep=1).names()
    ranked = [int(found[1]) for name in names if (found := checkpoint.RANKED.fullmatch(name))]
    best = checkpoint.BEST in names
    untrained = ", without the untrained step 0" * (checkpoint.NAME.format(0) in names)
    return (
        f"{run} has {len(steps)} last checkpoints (steps {listed(steps)}{untrained}), "
        + (f"{len(ranked)} of the best evaluations (steps {listed(ranked)})" if ranked else
           f"{'one' if best else 'none'} of the best evaluation")
        + ". A run keeps the last --keep=N, and those of the best N evaluations under "
        "--keep_best=N: the same command with a larger number keeps more from then on"
    )  # fmt: skip


def listed(numbers):
    """Returns numbers as sorted, comma-separated text, "none" if there are none."""
    return ", ".join(map(str, sorted(numbers))) or "none"


def check_files(files):
    """Returns the paths of the given files.

    Raises:
        ValueError: If one is not a weight file, does not exist, or is given twice.
    """
    paths, seen = [Path(file) for file in files], set()
    for path in paths:
        if not path.name.endswith((".safetensors", ".keras", ".weights.h5")):
            raise ValueError(
                f"{path} is no checkpoint: .safetensors, .keras and .weights.h5 can be averaged"
            )
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        real = os.path.realpath(path)
        if real in seen:
            raise ValueError(f"{path} is named twice")
        seen.add(real)
    return paths


# === Averaging ===


def average_files(paths, model, ema):
    """Averages weight files in float64, in the given order.

    Args:
        paths: Paths of the files.
        model: `keras.Model` of the same architecture; its weights are overwritten.
        ema: Whether to use the moving averages of the trainable weights.

    Returns:
        (mean weights by path, steps).

    Raises:
        ValueError: If a file is damaged, holds other weights, or values that are not finite.
    """
    sums, steps, first = {}, [], {}
    for path in paths:
        values, step = read_weights(path, model, ema)
        steps.append(step)
        first = first or values
        for variable in model.weights:
            name, value = variable.path, values[variable.path]
            if not np.issubdtype(value.dtype, np.floating):
                if not np.array_equal(value, first[name]):
                    raise ValueError(f"{path}: {name} are whole numbers, and differ between files")
                sums[name] = value
                continue
            value = value.astype("float64")
            if not np.isfinite(value).all():
                raise ValueError(f"{path}: {name} holds values that are not finite")
            sums[name] = sums[name] + value if name in sums else value
    means = {
        name: (total / len(paths)).astype("float32") if total.dtype == np.float64 else total
        for name, total in sums.items()
    }
    return means, steps


def read_weights(path, model, ema):
    """Returns (weights by path, step or `None`) of a file.

    Args:
        path: Path of the file.
        model: `keras.Model` of the same architecture, which may be overwritten.
        ema: Whether to use the moving averages of the trainable weights.

    Raises:
        ValueError: If it is damaged, holds weights of another model, or, with `ema`, no moving
            averages.
    """
    if path.suffix == ".safetensors":
        tensors, notes = checkpoint.read(path)
        weights = {
            name.partition("/")[2]: value
            for name, value in tensors.items()
            if name.startswith("model/")
        }
        if ema:
            averages = {
                name.partition("/")[2]: value
                for name, value in tensors.items()
                if name.startswith("ema/")
            }
            if not averages:
                raise ValueError(f"--ema: {path} holds no moving average: the run had no --ema")
            weights |= averages
        step = notes.get("step")
    elif ema:
        raise ValueError(f"--ema is of the trainer's checkpoints. Received: {path}")
    else:
        weights, step = read_keras_weights(path, model), None
    check_same(path, weights, model)
    return weights, step


def read_keras_weights(path, model):
    """Returns the weights by path of a `.keras` or `.weights.h5` file."""
    from keras_tnt.weights import load_keras_file, load_keras_model

    if path.suffix == ".keras":
        model = load_keras_model(os.fspath(path))
    else:
        load_keras_file(model, os.fspath(path))
    return {variable.path: variable.numpy() for variable in model.weights}


def check_same(path, weights, model):
    """Raises a ValueError if the names and shapes of weights are not those of a model."""
    shapes = {variable.path: tuple(variable.shape) for variable in model.weights}
    found = {name: value.shape for name, value in weights.items()}
    different = [name for name in shapes if found.get(name) != shapes[name]]
    different += [name for name in found if name not in shapes]
    if different:
        name = different[0]
        raise ValueError(
            f"{path} holds weights of another model than the run's: {len(different)} tensors "
            f"differ, first {name!r} of shape {found.get(name)}, the run's {shapes.get(name)}"
        )


def define_flags():
    """Defines the flags of this command, in addition to those of evaluate.py."""
    flags.DEFINE_integer("last", None, "average the last N checkpoints")
    flags.DEFINE_integer("best", None, "average the checkpoints of the best N evaluations")
    flags.DEFINE_bool("ema", False, "average the moving averages of the weights")
    flags.DEFINE_bool("evaluate", False, "evaluate the result on the run's held-out images")
    flags.adopt_module_key_flags(evaluate)


if __name__ == "__main__":
    define_flags()
    commands.run(main)
