"""Measures the faithfulness of relevance maps, for every method and level, on digits and scenes.

    python benchmarks/relevance.py
    python benchmarks/relevance.py --epochs=5 --images=20

DeiT and TNT have equal size. On held-out digits, it measures deletion, insertion and SaCo, compared
with random maps. On scenes of two different held-out digits, left and right, which a model has to
name, it measures how often the relevance for a digit is in that digit's half. Trained weights are
saved in --workdir, from which an interrupted benchmark resumes.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_tnt  # noqa: E402
from benchmarks import digits_families as digits  # noqa: E402
from keras_tnt import files, inspection  # noqa: E402
from keras_tnt.inspection.relevance import LEVELS, METHODS  # noqa: E402
from training import sources  # noqa: E402

PAPER = 0  # baseline for removed parts: the background around a digit


def main():
    """Trains the models, measures every method and level, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--images", type=int, default=100, help="digits, and scenes, a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "relevance")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/relevance.json")
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)

    train, held_out = sources.digits()
    images, labels = (x[: options.images] for x in held_out)
    draw = np.random.default_rng(options.seed)
    scenes, pairs = make_scenes(*held_out, draw.permutation(len(held_out[0])))
    scenes, pairs = scenes[: options.images], pairs[: options.images]
    rows = []
    for family in ("DeiT", "TNT"):
        single = trained(family, 32, "softmax", SingleDigits(*train, options.seed), options)
        double = trained(family, 64, "sigmoid", TwoDigits(*train, options.seed), options)
        accuracy = np.mean(single.predict(held_out[0], verbose=0).argmax(axis=-1) == held_out[1])
        both = np.sort(double.predict(scenes, verbose=0).argsort(axis=-1)[:, -2:], axis=-1)
        accuracies = {
            "digits": float(accuracy),
            "scenes": float(np.mean(np.all(both == np.sort(pairs, axis=-1), axis=-1))),
        }
        for method in METHODS:
            for level in LEVELS if family == "TNT" else LEVELS[:1]:
                rows.append(
                    {"model": family, "method": method, "level": level, "accuracies": accuracies}
                    | row(single, double, images, labels, scenes, pairs, method, level)
                )
                print(line(rows[-1]), flush=True)
    report(rows, options)


def row(single, double, images, labels, scenes, pairs, method, level):
    """Returns the measures of a method at a level."""
    maps = inspection.relevance(single, images, labels, method, level, baseline=PAPER)
    found = inspection.faithfulness(single, images, maps, labels, baseline=PAPER)
    measures = ("deletion_area", "insertion_area", "saco")
    shares = own_half(double, scenes, pairs, method, level)
    return {
        **{name: found[name] for name in measures},
        "random": {name: found["random"][name] for name in measures},
        "images": found["images"],
        "in_own_half": float(np.mean(shares > 0.5)),
        "share_in_own_half": float(np.mean(shares)),
        "scenes": len(scenes),
    }


def own_half(model, scenes, pairs, method, level):
    """Returns the fraction of each digit's positive relevance in its half, (2 * scenes,)."""
    shares = []
    for side in (0, 1):
        maps = inspection.relevance(model, scenes, pairs[:, side], method, level, baseline=PAPER)
        halves = np.stack(np.split(np.maximum(maps, 0), 2, axis=2)).sum(axis=(2, 3))
        total = halves.sum(axis=0)
        shares.append(np.divide(halves[side], total, out=np.zeros_like(total), where=total > 0))
    return np.concatenate(shares)


# === Models ===


def trained(family, width, activation, batches, options):
    """Returns a model of a family, trained now or in an earlier run."""
    keras.utils.set_random_seed(options.seed)
    builder, sizes = {"DeiT": (keras_tnt.DeiT, digits.DEIT), "TNT": (keras_tnt.TNT, digits.TNT)}[
        family
    ]
    arguments = {**digits.COMMON, **sizes, "input_shape": (32, width, 3)}
    model = builder(**arguments, classifier_activation=activation)
    name = f"{family}_{width}_{options.epochs}_epochs_seed_{options.seed}.weights.h5".lower()
    path = options.workdir / name
    if path.exists():
        model.load_weights(path)
        return model
    updates = options.epochs * len(batches)
    rate = keras.optimizers.schedules.CosineDecay(
        1e-5,
        updates - updates // 10,
        warmup_target=digits.LEARNING_RATE,
        warmup_steps=updates // 10,
    )
    losses = {"softmax": "categorical_crossentropy", "sigmoid": "binary_crossentropy"}
    model.compile(keras.optimizers.AdamW(rate, weight_decay=0.05, clipnorm=1.0), losses[activation])
    model.fit(batches, epochs=options.epochs, verbose=0)
    model.save_weights(path)
    return model


class SingleDigits(digits.Shifted):
    """Shifted digits with one-hot labels."""

    def __init__(self, images, labels, seed):
        """Converts the labels to one-hot."""
        super().__init__(images, keras.utils.to_categorical(labels, 10), seed)


class TwoDigits(SingleDigits):
    """Scenes of a batch's digits next to those of the next batch, where they differ."""

    def __getitem__(self, i):
        """Returns batch `i`: scenes and multi-hot labels; its size varies."""
        left, names = super().__getitem__(i)
        right, others = super().__getitem__((i + 1) % len(self))
        different = np.any(names != others, axis=-1)
        scenes = np.concatenate([left, right], axis=2)
        return scenes[different], np.maximum(names, others)[different]


def make_scenes(images, labels, order):
    """Returns (scenes, (left, right) digits) of pairs of different held-out digits."""
    left, right = order[: len(order) // 2], order[len(order) // 2 :]
    different = labels[left] != labels[right]
    left, right = left[different], right[different]
    return (
        np.concatenate([images[left], images[right]], axis=2),
        np.stack([labels[left], labels[right]], axis=1),
    )


# === Results ===


def line(found):
    """Returns a row of the table."""
    cells = [found["model"], found["method"], found["level"]]
    cells += [f"{found[name]:.3f}" for name in ("deletion_area", "insertion_area", "saco")]
    cells += [f"{found['in_own_half']:.1%}", f"{found['share_in_own_half']:.1%}"]
    return "| " + " | ".join(cells) + " |"


def report(rows, options):
    """Prints the table and writes the rows."""
    print(f"\n{rows[0]['images']} digits and {rows[0]['scenes']} scenes (two digits each)\n")
    print("| model | method | level | deletion | insertion | SaCo | in its half | share there |")
    print("|---|---|---|---|---|---|---|---|")
    for found in rows:
        print(line(found))
    settings = {"epochs": options.epochs, "seed": options.seed, "keras": keras.__version__}
    settings |= {"backend": keras.backend.backend()}
    record = {"settings": settings, "rows": rows}
    files.write_atomically(options.out, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
