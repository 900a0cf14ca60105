"""Average checkpoints of a run: python training/average.py --run=runs/x --last=5, or --best=3, or
files: python training/average.py --run=runs/x runs/x/checkpoints/step_*.safetensors

Writes averaged.keras, averaged.weights.h5 and averaged.json into the run. A run keeps the last
--keep checkpoints, that of its best evaluation, and under --keep_best=N those of the best N.
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
    """Averages the weights of checkpoints, moving statistics among them, in float64.

    Args:
        run: Directory of the run, which says what model it is, and gets the result.
        last: Number of the last checkpoints to average.
        best: Number of the checkpoints of the best evaluations to average.
        files: Paths to average in their place: checkpoints of the trainer, `.keras` or
            `.weights.h5` files.
        ema: Whether to average the moving averages of the weights (`--ema`) in the checkpoints.
        evaluate_with: Fields of a `training.configuration.Config` under which to evaluate the
            result on the held-out images; an empty dict for the run's own. If `None`, it is not
            evaluated.
        progress: Whether to print how far the evaluation is.

    Returns:
        A dict, as in `averaged.json`: `checkpoints`, `steps`, `ema`, `results` (`None` if not
        evaluated), `files`.

    Raises:
        ValueError: If there are not as many checkpoints, or one is damaged or of another model.
    """
    if not run:
        raise ValueError("give --run, the directory of the run that gets the average")
    run = os.path.expanduser(run)
    config, record = evaluate.make_config({}, run), evaluate.read_record(run)
    paths = choose(Path(run), last, best, [os.path.expanduser(file) for file in files], ema)
    from training import models

    plain = models.build_plain(config, record["classes"], record.get("label_names"))
    # The older result is no longer that of averaged.json.
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


# === Which ones ===


def choose(run, last, best, files, ema):
    """Returns the paths to average.

    Raises:
        ValueError: If it is not said which, or there are fewer.
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
    """Returns the paths of a run's last checkpoints, newest first."""
    return checkpoint.Checkpoints(run / "checkpoints", {}, keep=1).paths()


def best_checkpoints(run, ema):
    """Returns the paths of the checkpoints of a run's best evaluations, best first."""
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
    """Returns what a run has to average, and how it would have more."""
    steps = [checkpoint.step_of(path) for path in last_checkpoints(run)]
    names = checkpoint.Checkpoints(run / "checkpoints", {}, keep=1).names()
    ranked = [int(found[1]) for name in names if (found := checkpoint.RANKED.fullmatch(name))]
    best = checkpoint.BEST in names
    return (
        f"{run} has {len(steps)} last checkpoints (steps {listed(steps)}), "
        + (f"{len(ranked)} of the best evaluations (steps {listed(ranked)})" if ranked else
           f"{'one' if best else 'none'} of the best evaluation")
        + ". A run keeps the last --keep=N, and those of the best N evaluations under "
        "--keep_best=N: the same command with a larger number keeps more from then on"
    )  # fmt: skip


def listed(numbers):
    return ", ".join(map(str, sorted(numbers))) or "none"


def check_files(files):
    """Returns the paths of files that were named.

    Raises:
        ValueError: If one is no file of weights, does not exist, or is named twice.
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


# === Their mean ===


def average_files(paths, model, ema):
    """Returns (mean weights by path, steps) of files, added in float64 in their order.

    Args:
        paths: Files of weights.
        model: `keras.Model` that they are weights of; its own are used as scratch space.
        ema: Whether to take moving averages of weights where a checkpoint has them.

    Raises:
        ValueError: If a file is damaged, or holds other weights, or values that are not finite.
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

    Raises:
        ValueError: If it is damaged, or holds weights of another model.
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
    """Raises a ValueError if weights are not those of a model."""
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
    flags.DEFINE_integer("last", None, "average the last N checkpoints")
    flags.DEFINE_integer("best", None, "average the checkpoints of the best N evaluations")
    flags.DEFINE_bool("ema", False, "average the moving averages of the weights")
    flags.DEFINE_bool("evaluate", False, "evaluate the result on the run's held-out images")
    flags.adopt_module_key_flags(evaluate)


if __name__ == "__main__":
    define_flags()
    commands.run(main)
