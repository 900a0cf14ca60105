"""Options, backbone, training and export, shared by detection.py and segmentation.py."""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TNT_SCENES = {
    "patch_size": 8,
    "inner_stride": 2,
    "depth": 4,
    "outer_dim": 96,
    "inner_dim": 12,
    "outer_heads": 4,
    "inner_heads": 2,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Training configuration; each field but `architecture` is a flag of the commands.

    Attributes:
        model: name for `keras_tnt.create_model`.
        architecture: keyword arguments of the model.
        weights: "digits", from pretraining on small scenes of one digit; "imagenet", or any other
            value that the model supports; "none".
        image_size: side of the square that images are fitted into, a multiple of 32.
        batch: images per step.
        steps: number of training steps.
        learning_rate: peak learning rate of AdamW, after a linear warm-up over a twentieth of the
            steps.
        schedule: "cosine" or "poly" (power 0.9), both down to 0.
        weight_decay: weight decay of AdamW, on kernels.
        flip: whether to flip images at random.
        crop: whether to crop squares at random scales (segmentation).
        freeze: layers to freeze: None, "stem", a number of blocks, or "head" for the whole model
            except the layers that resample its maps to levels.
    """

    model: str
    weights: str
    image_size: int
    batch: int
    steps: int
    learning_rate: float
    architecture: dict = dataclasses.field(default_factory=dict)
    schedule: str = "cosine"
    weight_decay: float = 0.05
    flip: bool = False
    crop: bool = False
    freeze: str | None = None


# === Options ===


def parse(description, settings: dict[str, Settings], arguments):
    """Parses the options; flags override the values of the chosen settings."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", default="scenes", help="scenes, tfds:NAME, or a folder; default: scenes")
    add("--data_dir", default=None, help="where tensorflow-datasets keeps its data sets")
    add("--classes", type=int, default=None, help="number of classes, where masks do not say")
    add("--settings", choices=sorted(settings), help="named values; default: by the data set")
    add("--workdir", type=Path, default=None, help="of everything written; default: runs/...")
    add("--scenes", type=int, default=12_000, help="scenes to learn from; default: 12000")
    add("--held_out_scenes", type=int, default=200, help="scenes to evaluate; default: 200")
    add("--seed", type=int, default=0)
    add("--no_export", action="store_true", help="leave the SavedModel out")
    for field in dataclasses.fields(Settings):
        if field.name == "architecture":
            add("--architecture", type=json.loads, help="arguments of the model: '{\"depth\": 4}'")
        elif field.type is bool:
            add(f"--{field.name}", action=argparse.BooleanOptionalAction, default=None)
        else:
            kind = field.type if field.type in (int, float) else str
            add(f"--{field.name}", type=kind, default=None)
    options = parser.parse_args(arguments)
    for key in ("dataset", "data_dir", "workdir", "weights", "model"):
        if (value := getattr(options, key, None)) is not None:
            setattr(options, key, type(value)(os.path.expanduser(value)))
    name = options.settings or ("scenes" if options.dataset == "scenes" else "paper")
    for key, value in vars(settings[name]).items():
        if getattr(options, key) is None:
            # The architecture of the settings is for their own model.
            own = key != "architecture" or options.model == settings[name].model
            setattr(options, key, value if own else {})
    if options.image_size % 32:
        parser.error(f"--image_size must be a multiple of 32. Received: {options.image_size}")
    if options.schedule not in ("cosine", "poly"):
        parser.error(f"--schedule is cosine or poly. Received: {options.schedule}")
    if options.freeze is not None and options.freeze.isdigit():
        options.freeze = int(options.freeze)
    task = Path(sys.argv[0]).stem if arguments is None else parser.prog
    options.workdir = options.workdir or ROOT / "runs" / f"{task}_{name}"
    return options


def run(main, arguments=None):
    """Runs a command; user errors are reported in one line.

    Returns:
        The exit status.
    """
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        main(arguments)
        return 0
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last finished epoch", flush=True)
        return 130
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def require(*modules):
    """Raises an ImportError with the command that installs what is missing of these modules."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"This needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            'installed: pip install "keras-tnt[dense]"'
        )


# === The backbone ===


def make_model(options):
    """Builds the model for the backbone, with the weights of the options."""
    import keras_tnt

    weights = {"none": None}.get(options.weights, options.weights)
    if options.weights == "digits":
        weights = digits_weights(options)
    size = options.image_size
    return keras_tnt.create_model(
        options.model,
        include_top=False,
        weights=weights,
        input_shape=(size, size, 3),
        **options.architecture,
    )


def digits_weights(options, count=6000, epochs=12, size=32):
    """Trains a classifier of single digits in small scenes, or finds its weights.

    Returns:
        The path of a `.weights.h5` file in the working directory.
    """
    import keras

    import keras_tnt
    from examples import scenes

    path = options.workdir / "digits.weights.h5"
    if path.exists():
        return str(path)
    print("A classifier learns digits in small scenes", flush=True)
    keras.utils.set_random_seed(options.seed)
    images, labels = scenes.crops(count, held_out=False, size=size, seed=1 + options.seed)
    model = keras_tnt.create_model(
        options.model,
        weights=None,
        input_shape=(size, size, 3),
        classes=10,
        **options.architecture,
    )
    steps = epochs * (count // 64)
    optimizer = make_optimizer(steps, 2e-3, options.weight_decay, "cosine")
    model.compile(
        optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"], jit_compile=jit()
    )
    held_out = scenes.crops(300, held_out=True, size=size)
    model.fit(images, labels, 64, epochs, verbose=2, validation_data=held_out)
    options.workdir.mkdir(parents=True, exist_ok=True)
    model.save_weights(path)
    return str(path)


# === Training ===


def make_optimizer(steps, learning_rate, weight_decay, schedule):
    """Returns AdamW with warm-up, with weight decay on kernels only."""
    import keras

    warmup = max(1, steps // 20)
    if schedule == "poly":
        rate = keras.optimizers.schedules.PolynomialDecay(learning_rate, steps, 0.0, power=0.9)
    else:
        rate = keras.optimizers.schedules.CosineDecay(
            learning_rate / 10,
            max(1, steps - warmup),
            warmup_target=learning_rate,
            warmup_steps=warmup,
        )
    optimizer = keras.optimizers.AdamW(rate, weight_decay=weight_decay, clipnorm=1.0)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta", "table", "token"])
    return optimizer


def jit():
    """Returns whether to compile with XLA: only on JAX, because models this small train fast."""
    import keras

    return keras.backend.backend() == "jax"


def train(model, dataset, options, epochs=20):
    """Trains with `fit`; an interrupted run resumes after its last completed epoch.

    Args:
        model: a compiled model.
        dataset: endless batches.
        options: steps, workdir.
        epochs: number of parts into which the steps are divided for progress and backups. Defaults
            to 20.
    """
    import keras

    epochs = min(epochs, options.steps)
    options.workdir.mkdir(parents=True, exist_ok=True)
    model.fit(
        dataset,
        epochs=epochs,
        steps_per_epoch=max(1, options.steps // epochs),
        verbose=1 if sys.stdout.isatty() else 2,
        callbacks=[
            keras.callbacks.BackupAndRestore(options.workdir / "backup"),
            keras.callbacks.TerminateOnNaN(),
        ],
    )


# === Export ===

EXPORT = """
import sys
sys.path.insert(0, sys.argv[1])
import keras, keras_tnt
from examples import {task}
{task}.export(keras.saving.load_model(sys.argv[2]), sys.argv[3])
"""

# Only TensorFlow reads the SavedModel. It may import Keras itself, but the program does not.
SERVE = """
import sys
import numpy as np
import tensorflow as tf
served = tf.saved_model.load(sys.argv[1])
images = np.load(sys.argv[2])
parts = [served.serve(images[i : i + 32]) for i in range(0, len(images), 32)]
np.savez(sys.argv[3], **{key: np.concatenate([x[key] for x in parts]) for key in parts[0]})
assert "keras_tnt" not in sys.modules and "keras_hub" not in sys.modules
"""


def export(task, path, directory):
    """Writes the SavedModel of a `.keras` file, in a process with Keras on TensorFlow."""
    python(EXPORT.format(task=task), ROOT, path, directory)


def serve(directory, images, workdir):
    """Runs a SavedModel on images, in a process without Keras.

    Returns:
        A dict of arrays.
    """
    import numpy as np

    np.save(workdir / "served_images.npy", images)
    python(SERVE, directory, workdir / "served_images.npy", workdir / "served.npz")
    with np.load(workdir / "served.npz") as found:
        result = dict(found)
    for name in ("served_images.npy", "served.npz"):
        (workdir / name).unlink()
    return result


def python(program, *arguments):
    """Runs a Python program in a process with Keras on TensorFlow and without a GPU."""
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1"}
    finished = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        raise RuntimeError(finished.stderr)


def write_results(workdir, results):
    """Writes the metrics to results.json, and prints a row for each form of the model."""
    from keras_tnt.files import write_atomically

    write_atomically(workdir / "results.json", json.dumps(results, indent=2))
    for form, numbers in results.items():
        told = ", ".join(f"{key} {value:.4f}" for key, value in numbers.items())
        print(f"{form:>8}: {told}")
