"""End-to-end demo: trains tnt_digits, plots results, exports it, and compares three runtimes.

    make demo

Results are in runs/demo and savedmodels/tnt_digits; summary.json lists the files, accuracies and
speeds. The same command resumes an interrupted training.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import keras  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402

import keras_tnt  # noqa: E402
from keras_tnt.files import write_atomically  # noqa: E402
from training import pictures, sources  # noqa: E402

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

WORKDIR = ROOT / "runs" / "demo"
EXPORTS = ROOT / "savedmodels" / "tnt_digits"
BATCH = 60  # images per call when runtimes are timed
ROUNDS = 7
EXPLORED = 4  # misclassified digits on the page, at most
TARGET = 0.97  # accuracy that the recipe is expected to reach


def main():
    """Runs the demo."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    # In a separate process, because tf.distribute must configure devices before their first use.
    train = [sys.executable, str(ROOT / "training" / "train.py"), "--recipe=digits"]
    status = subprocess.run([*train, f"--workdir={WORKDIR}"]).returncode
    if status:
        sys.exit(status)  # train.py has printed the error
    _, (images, labels) = sources.digits()
    model = keras.models.load_model(WORKDIR / "final.keras")

    print("\nExporting", flush=True)
    if EXPORTS.exists():
        shutil.rmtree(EXPORTS)
    saved_model = Path(keras_tnt.export.saved_model(model, EXPORTS, version=1))
    onnx = Path(keras_tnt.export.onnx(model, WORKDIR / "tnt_digits.onnx"))
    runtimes = {
        "keras": lambda batch: model.predict_on_batch(batch),
        "saved_model": open_saved_model(saved_model),
        "onnx": open_onnx(onnx),
    }
    probabilities, speed = compare(runtimes, images.astype("float32"))
    accuracy = {
        name: float(np.mean(np.argmax(p, axis=-1) == labels)) for name, p in probabilities.items()
    }

    print("Drawing", flush=True)
    pictures = [
        draw_curves(WORKDIR / "metrics.jsonl", WORKDIR / "curves.png"),
        draw_digits(images, labels, probabilities["keras"], WORKDIR / "digits.png"),
        WORKDIR / "attention.png",
    ]
    keras_tnt.inspection.plot_attention(
        model, images[first_correct(probabilities, labels)], pictures[-1]
    )

    explore = WORKDIR / "explore.html"
    explore_digits(model, images, labels, probabilities["keras"], explore)

    files = {
        "weights": WORKDIR / "final.keras",
        "saved_model": saved_model,
        "onnx": onnx,
        **{picture.stem: picture for picture in pictures},
        "explore": explore,
    }
    files = {name: os.path.relpath(path, ROOT) for name, path in files.items()}
    summary = {"accuracy": accuracy, "images_per_second": speed, "files": files}
    write_atomically(WORKDIR / "summary.json", json.dumps(summary, indent=2))
    report(summary, len(images))


def open_saved_model(path):
    """Loads a SavedModel without Keras; returns a function on arrays."""
    import tensorflow as tf

    served = tf.saved_model.load(str(path))
    serve = served.signatures["serving_default"]

    def run(batch, _keep=served):
        return serve(images=tf.constant(batch))["probabilities"].numpy()

    return run


def open_onnx(path):
    """Loads an ONNX file in ONNX Runtime; returns a function on arrays."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda batch: session.run(["probabilities"], {"images": batch})[0]


def compare(runtimes, images):
    """Returns each runtime's probabilities and images/s, the median of interleaved rounds.

    Args:
        runtimes: Dict from name to a function from a batch to probabilities.
        images: float32 (n, height, width, 3).
    """
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    seconds = {name: [] for name in runtimes}
    probabilities = {}
    for _ in range(1 + ROUNDS):
        for name, run in runtimes.items():
            start = time.perf_counter()
            probabilities[name] = np.concatenate([np.asarray(run(batch)) for batch in batches])
            seconds[name].append(time.perf_counter() - start)
    speed = {
        name: round(len(images) / statistics.median(taken[1:]), 1)
        for name, taken in seconds.items()
    }
    return probabilities, speed


def first_correct(probabilities, labels):
    """Returns the index of the first held-out 8 that the model classifies correctly."""
    read = np.argmax(probabilities["keras"], axis=-1)
    return int(np.argmax((read == labels) & (labels == 8)))


def draw_curves(metrics, path):
    """Plots loss, learning rate and held-out accuracy over the epochs."""
    reports = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return pictures.curves(reports, path, target=TARGET, title="Held-out digits")


def draw_digits(images, labels, probabilities, path):
    """Plots held-out digits with predictions: errors first, then the least confident."""
    read, certainty = np.argmax(probabilities, axis=-1), np.max(probabilities, axis=-1)
    order = np.lexsort((certainty, read == labels))[:40]
    figure, grid = plt.subplots(4, 10, figsize=(11, 5.2), layout="constrained")
    for axes, i in zip(grid.flat, order, strict=True):
        right = read[i] == labels[i]
        axes.imshow(images[i, :, :, 0], cmap="gray_r", vmin=0, vmax=255)
        title = (
            f"{read[i]}  {certainty[i]:.0%}" if right else f"predicted {read[i]}, true {labels[i]}"
        )
        axes.set_title(title, fontsize=10 if right else 7, color="0.2" if right else "C3")
        axes.axis("off")
    wrong = int(np.sum(read != labels))
    figure.suptitle(
        f"{wrong} of {len(labels)} held-out digits are misclassified (red); then the least certain"
    )
    return save(figure, path)


def explore_digits(model, images, labels, probabilities, path):
    """Writes an interactive page on misclassified digits and two correct ones."""
    read, certainty = np.argmax(probabilities, axis=-1), np.max(probabilities, axis=-1)
    misread = [i for i in np.argsort(certainty) if read[i] != labels[i]]
    chosen = misread[:EXPLORED] + [int(np.argmax((labels == d) & (read == d))) for d in (3, 8)]
    titles = [f"digit {labels[i]}, predicted {read[i]}" for i in chosen]
    names = [str(digit) for digit in range(10)]
    return keras_tnt.inspection.explore(model, images[chosen], path, names, titles=titles)


def save(figure, path):
    """Saves and closes a figure; returns the path."""
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def report(summary, images):
    """Prints accuracy and speed of each runtime, and the files."""
    names = {"keras": "Keras", "saved_model": "SavedModel", "onnx": "ONNX Runtime"}
    print(f"\n{'runtime':<14}{'accuracy':>10}{'images/s':>12}   ({images} held-out digits)")
    for key, name in names.items():
        accuracy, speed = summary["accuracy"][key], summary["images_per_second"][key]
        print(f"{name:<14}{accuracy:>10.2%}{speed:>12,.0f}")
    print()
    for name, path in summary["files"].items():
        print(f"{name:<14}{path}")
    print(f"{'summary':<14}{os.path.relpath(WORKDIR / 'summary.json', ROOT)}")


if __name__ == "__main__":
    main()
