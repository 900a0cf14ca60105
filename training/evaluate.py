r"""Evaluates a model on the held-out images, and prints top-1, top-5 and the loss.

    python training/evaluate.py --run=runs/train
    python training/evaluate.py --model=tnt_small --weights=imagenet \
        --dataset=imagenet2012 --data_dir=...

Each image is counted exactly once, on any number of devices.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

BACKEND = os.environ.get("KERAS_BACKEND", "tensorflow")
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags  # noqa: E402

from training import commands, configuration, sources  # noqa: E402

SHARED = (
    *(
        "plugins",
        "model",
        "model_args",
        "image_size",
        "dataset",
        "data_dir",
        "train_split",
        "eval_split",
    ),
    *("validation_share", "seed", "label_offset", "classes", "max_corrupt"),
    *("strategy", "cpu_devices", "tpu", "precision", "batch_size", "crop", "distilled"),
)
configuration.define_flags(SHARED)
flags.adopt_module_key_flags(configuration)
flags.DEFINE_string("run", None, "directory of a run: its model, weights and data set")
flags.DEFINE_enum(
    "checkpoint",
    "final",
    ("final", "final_ema", "best", "averaged"),
    "which weights of --run; averaged: those of training/average.py",
)
flags.DEFINE_string(
    "weights", None, "imagenet, a .keras or .weights.h5 file, a checkpoint, hf://owner/repo"
)
flags.DEFINE_string("report", None, "directory for pictures and tables of the answers")
flags.DEFINE_bool("json", False, "print the result as one JSON object, and nothing else")


def main(arguments):
    """Evaluates as the flags say, and prints the result as text or JSON."""
    commands.refuse_arguments(arguments)
    commands.say_backend(BACKEND)
    given = {n: flags.FLAGS[n].value for n in SHARED if flags.FLAGS[n].value is not None}
    asked = flags.FLAGS
    result = evaluate(
        given, asked.run, asked.weights, asked.checkpoint, not asked.json, asked.report
    )
    if flags.FLAGS.json:
        print(json.dumps(result))
    else:
        print(
            f"{result['images']} images: top-1 {result['accuracy']:.2%}, top-5 "
            f"{result['top5_accuracy']:.2%}, loss {result['evaluation_loss']:.4f}"
            + (f"; {result['corrupt']} could not be read" if result["corrupt"] else "")
        )


def evaluate(given, run=None, weights=None, checkpoint="final", progress=False, report=None):
    """Returns top-1, top-5 and the loss of a model on the held-out images.

    Args:
        given: Dict of `training.configuration.Config` fields that override those of the run, or the
            defaults if `run` is `None`.
        run: Directory of a run. Defaults to `None`.
        weights: Weights to evaluate instead of the run's. Defaults to `None`.
        checkpoint: Which of a run's weights to load: "final", "final_ema", "best" or "averaged".
            Defaults to "final".
        progress: Whether to print progress. Defaults to `False`.
        report: Directory for tables and pictures of the predictions. If `None`, none are written.

    Returns:
        A dict: `accuracy`, `top5_accuracy`, `evaluation_loss`, `images`, `corrupt`, and
        `calibration_error` in the chief if `report` is given.

    Raises:
        ValueError: If neither `run` nor `weights` is given, if the model does not match the data
            set, or if too many images are unreadable.
    """
    run, weights, report = (path and os.path.expanduser(path) for path in (run, weights, report))
    config = make_config(given, run)
    if not weights and not run:
        raise ValueError("give --run, or --model and --weights")
    from training import data, models, predictions, step_functions, strategies

    models.custom_arguments(config, models.find_builder(config.model))
    strategy = strategies.make(config)
    replicas = strategy.num_replicas_in_sync
    share = data.WorkerShare(*strategies.worker(strategy), replicas)
    if config.batch_size % replicas:
        raise ValueError(f"--batch_size={config.batch_size} must be a multiple of {replicas}")
    source = sources.open_split(config, held_out=True)
    if report and source.several_labels:
        raise ValueError("--report is of images with one right label each")
    if run:
        sources.check_label_names(source, read_record(run).get("label_names"))
    with strategy.scope():
        classes = config.classes or source.classes
        model = models.load(config, classes, run, weights, checkpoint)
    if model.output_shape[-1] != classes:
        raise ValueError(
            f"the model tells {model.output_shape[-1]} classes apart, and --dataset="
            f"{config.dataset} has {classes}"
        )
    corrupt = data.UnreadableImages(source, config.max_corrupt)
    config = dataclasses.replace(config, crop=models.crop_share(config, model))
    dataset = data.evaluation_batches(source, config, models.image_size(model), share, corrupt)
    step = step_functions.make_evaluation_step(strategy, model)
    if progress:
        step = reporting(step, -(-source.size // config.batch_size))
    with corrupt.reading():
        result = step_functions.evaluate(strategy, step, dataset)
        if report:
            found = predictions.predict(strategy, model, dataset, source.size)
            if share.index == 0:
                error, _ = predictions.write_report(found, source, model, report)
                result["calibration_error"] = error
    result["corrupt"] = strategies.total(strategy, len(corrupt.names))
    corrupt.check(result["corrupt"])
    return result


def make_config(given, run):
    """Returns the run's configuration, or the defaults, overridden by the given fields."""
    values = {"dataset": "digits", "weights": ""}
    if run:
        recorded = read_record(run)
        values = {k: v for k, v in recorded["config"].items() if k in configuration.FIELDS}
        values |= {"strategy": "one_device", "cpu_devices": 0, "accumulation": 1, "weights": ""}
        values |= {"cross_device_ops": "auto", "communication": "auto"}
        values |= {"distill": "none", "teacher": "", "teacher_preprocessing": "auto"}
        values |= {"classes": recorded["classes"]}
        if given.get("dataset", values["dataset"]) != values["dataset"]:
            values = {k: v for k, v in values.items() if k not in sources.OPTIONS}
    values |= given
    configuration.load_plugins(values.get("plugins"))
    return dataclasses.replace(configuration.Config(), **values)


def read_record(run):
    """Returns the contents of a run's `config.json`.

    Raises:
        ValueError: If the directory holds no run.
    """
    from training import workdir

    recorded = workdir.read_config(run)
    if recorded is None:
        raise ValueError(f"--run={run} is no directory of a run: it holds no config.json")
    return recorded


def reporting(step, steps):
    """Wraps an evaluation step so that it prints progress about ten times."""
    done = 0

    def reported(batch):
        nonlocal done
        done += 1
        if done % max(1, steps // 10) == 0 or done == steps:
            print(f"batch {done}/{steps}", flush=True)
        return step(batch)

    return reported


if __name__ == "__main__":
    commands.run(main)
