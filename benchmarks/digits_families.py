"""Compares DeiT, TNT of equal size, and TNT distilled from the better one, on held-out digits.

    python benchmarks/digits_families.py
    python benchmarks/digits_families.py --seeds=2 --epochs=5
    KERAS_BACKEND=torch python benchmarks/digits_families.py --models TNT --plain --workdir=runs/p

The seed determines weights, batches and shifts; the 360 held-out images are always the same. A
student's teacher has the student's seed, so no teacher is selected by its accuracy. Completed runs
are saved in --workdir, from which an interrupted benchmark resumes.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_tnt  # noqa: E402
from keras_tnt.files import write_atomically  # noqa: E402
from keras_tnt.kernels import runtimes  # noqa: E402
from training import sources  # noqa: E402

BATCH = 64
SHIFT = 3  # pixels, in any direction
LEARNING_RATE = 2e-3


def main():
    """Trains every model with every seed, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--models", nargs="+", choices=[*BUILDERS], default=[*BUILDERS])
    parser.add_argument("--plain", action="store_true", help="no transformer in C++")
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "digits_families")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/digits_families.json"
    )
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    if options.plain:
        runtimes.operator = lambda backend, sizes: None

    digits = sources.digits()
    rows = [row(name, BUILDERS[name], digits, options) for name in options.models]
    if len(rows) > 1:
        better = max(rows, key=lambda found: found["mean"])["model"]
        rows.append(row(f"TNT from {better}", distilled_tnt, digits, options, teacher=better))
    report(rows, options)


# === Models ===


TNT = {
    "outer_dim": 64,
    "inner_dim": 8,
    "outer_heads": 4,
    "inner_heads": 2,
    "inner_stride": 2,
}
DEIT = {"embed_dim": 69, "num_heads": 3}
COMMON = {"input_shape": (32, 32, 3), "classes": 10, "patch_size": 8, "depth": 3}


def tnt(**arguments):
    """Builds the TNT, with 189,530 parameters."""
    return keras_tnt.TNT(**COMMON, **TNT, **arguments)


def deit():
    """Builds the DeiT, with 189,484 parameters."""
    return keras_tnt.DeiT(**COMMON, **DEIT)


def distilled_tnt():
    """Builds the TNT with a distillation token."""
    return tnt(distilled=True)


BUILDERS = {"DeiT": deit, "TNT": tnt}


# === Runs ===


def row(name, build, digits, options, teacher=None):
    """Returns mean and standard deviation of a model's held-out accuracy over the seeds."""
    accuracies = [run(name, build, digits, options, teacher, s) for s in range(options.seeds)]
    return {
        "model": name,
        "parameters": build().count_params(),
        "mean": statistics.mean(accuracies),
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "accuracies": accuracies,
    }


def run(name, build, digits, options, teacher, seed):
    """Returns the held-out accuracy of one seed, trained now or in an earlier run."""
    path = weights_path(name, options, seed)
    result = path.with_suffix("").with_suffix(".json")
    if result.exists():
        return json.loads(result.read_text())["accuracy"]
    start = time.perf_counter()
    keras.utils.set_random_seed(seed)
    model = build()
    if teacher:
        teacher_model = BUILDERS[teacher]()
        teacher_model.load_weights(weights_path(teacher, options, seed))
        train(keras_tnt.Distiller(model, teacher_model, kind="hard"), digits[0], options, seed)
    else:
        train(model, digits[0], options, seed)
    images, labels = digits[1]
    accuracy = float(np.mean(model.predict(images, verbose=0).argmax(axis=-1) == labels))
    print(f"{name}, seed {seed}: {accuracy:.2%}, {time.perf_counter() - start:.0f} s", flush=True)
    model.save_weights(path)
    write_atomically(result, json.dumps({"accuracy": accuracy}))
    return accuracy


def train(model, digits, options, seed):
    """Trains with AdamW, warm-up, cosine decay, label smoothing and random shifts."""
    images, labels = digits
    batches = Shifted(images, keras.utils.to_categorical(labels, 10), seed)
    updates = options.epochs * len(batches)
    optimizer = keras.optimizers.AdamW(
        keras.optimizers.schedules.CosineDecay(
            1e-5, updates - updates // 10, warmup_target=LEARNING_RATE, warmup_steps=updates // 10
        ),
        weight_decay=0.05,
        clipnorm=1.0,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta", "table", "token"])
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=0.1)
    # Training so small a model takes less time than XLA's compilation.
    model.compile(optimizer, loss, jit_compile=keras.backend.backend() == "jax")
    model.fit(batches, epochs=options.epochs, verbose=0)


class Shifted(keras.utils.PyDataset):
    """Full batches of images with random order and shifts, determined by the seed."""

    def __init__(self, images, labels, seed):
        """Pads the images by the largest shift."""
        super().__init__()
        pad = [(0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)]
        self.images, self.labels = np.pad(images, pad), labels
        self.random = np.random.default_rng(seed)
        self.on_epoch_end()

    def on_epoch_end(self):
        """Draws order and shifts of the next epoch."""
        count = len(self.images)
        self.order = self.random.permutation(count)
        self.shifts = self.random.integers(0, 2 * SHIFT + 1, (count, 2))

    def __len__(self):
        """Returns the number of full batches."""
        return len(self.images) // BATCH

    def __getitem__(self, i):
        """Returns batch `i`: float32 images and one-hot labels."""
        chosen = self.order[i * BATCH : (i + 1) * BATCH]
        size = self.images.shape[1] - 2 * SHIFT
        cut = [
            self.images[n, y : y + size, x : x + size]
            for n, (y, x) in zip(chosen, self.shifts[chosen], strict=True)
        ]
        return np.stack(cut).astype("float32"), self.labels[chosen]


# === Results ===


def weights_path(name, options, seed):
    """Returns the path of a model's weights in the working directory."""
    stem = f"{name.lower().replace(' ', '_')}_{options.epochs}_epochs_seed_{seed}"
    return options.workdir / f"{stem}.weights.h5"


def report(rows, options):
    """Prints the table and writes the rows."""
    print(f"\n| model | parameters | held-out accuracy, {options.seeds} seeds | each |")
    print("|---|---|---|---|")
    for found in rows:
        each = ", ".join(f"{accuracy:.1%}" for accuracy in found["accuracies"])
        print(
            f"| {found['model']} | {found['parameters']:,} "
            f"| {found['mean']:.2%} ± {found['spread']:.2%} | {each} |"
        )
    settings = {"epochs": options.epochs, "seeds": options.seeds, "batch": BATCH}
    settings |= {"backend": keras.backend.backend(), "keras": keras.__version__}
    record = {"settings": settings, "rows": rows}
    write_atomically(options.out, json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
