"""Measures accuracy loss and speedup of bfloat16 and int8 against float32, on trained weights.

    python benchmarks/low_precision.py
    python benchmarks/low_precision.py --models=tnt_digits --runtimes=onnxruntime,openvino

The models are first trained on handwritten digits for --steps batches: tnt_digits on 32x32 pixels,
TNTSmall on 64x64. Then all held-out digits are predicted in both precisions, for the top-1
agreement and the largest difference of a probability; the speedup is that of a batch of 8, for
which the precisions take turns. int8 is static quantization, calibrated on 64 training images.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BACKENDS = ("tensorflow", "jax", "torch")
RUNTIMES = ("onnxruntime", "openvino", *BACKENDS)
BATCH, CALIBRATION = 8, 64


def main():
    """Trains the models, compares every runtime, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="tnt_digits,TNTSmall")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    parser.add_argument("--steps", default="600,400", help="by model")
    parser.add_argument("--batch_size", type=int, default=32, help="images of a step")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/low_precision.json")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part, *arguments = json.loads(options.part)
        return {"train": train, "compare": compare}[part](*arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, steps in zip(options.models.split(","), options.steps.split(","), strict=True):
            print(run("tensorflow", "train", name, int(steps), options.batch_size, folder))
            for runtime in options.runtimes.split(","):
                backend = runtime if runtime in BACKENDS else "tensorflow"
                found = run(backend, "compare", name, runtime, options.rounds, folder)
                rows.append({"model": name, "runtime": runtime, **json.loads(found)})
                print(
                    "| {model} | {runtime} | {precision} | {images} | {same_top1:.2%} "
                    "| {largest_difference:.4f} | {ratio:.2f} |".format(**rows[-1]),
                    flush=True,
                )
    from keras_tnt.files import write_atomically

    write_atomically(options.out, json.dumps({"rows": rows}, indent=1) + "\n")


def run(backend, *part):
    """Runs a function in a separate process, and returns the last line that it prints."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, __file__, "--part", json.dumps(part)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


def side_of(name):
    """Returns the side of a model's images in pixels."""
    return 32 if name == "tnt_digits" else 64


def build(name):
    """Builds a model for ten classes."""
    from training import models

    side = side_of(name)
    arguments = {} if name == "tnt_digits" else {"weights": None, "input_shape": (side, side, 3)}
    return models.find_builder(name)(classes=10, **arguments)


def digits(name):
    """Returns (images, labels) of the training and held-out split, as the model takes them."""
    import numpy as np

    from training import sources

    def enlarged(images):
        side = side_of(name)
        return np.repeat(np.repeat(images, side // 32, 1), side // 32, 2).astype("float32")

    return [(enlarged(images), labels) for images, labels in sources.digits()]


def train(name, steps, batch, folder):
    """Trains a model, saves its weights, and prints its accuracy."""
    import keras
    import numpy as np

    keras.utils.set_random_seed(0)
    model = build(name)
    (images, labels), (held_out, right) = digits(name)
    rate = 2e-3 if name == "tnt_digits" else 5e-4
    schedule = keras.optimizers.schedules.CosineDecay(
        rate / 100, steps - steps // 10, warmup_target=rate, warmup_steps=steps // 10
    )
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=0.05, clipnorm=1.0),
        "sparse_categorical_crossentropy",
        jit_compile=name != "tnt_digits",
    )
    draw = np.random.default_rng(0)
    for step in range(steps):
        chosen = draw.integers(0, len(images), batch)
        loss = model.train_on_batch(images[chosen], labels[chosen])
        if step % 20 == 0:
            print(f"{name}: step {step} of {steps}, loss {float(loss):.3f}", file=sys.stderr)
    model.save_weights(f"{folder}/{name}.weights.h5")
    accuracy = np.mean(
        model.predict(held_out[:CALIBRATION], verbose=0).argmax(-1) == right[:CALIBRATION]
    )
    print(f"{name}: accuracy on {CALIBRATION} held-out digits {accuracy:.1%}")


def compare(name, runtime, rounds, folder):
    """Prints agreement and speedup of a runtime's two precisions, as JSON."""
    import numpy as np

    model = build(name)
    model.load_weights(f"{folder}/{name}.weights.h5")
    (images, _), (held_out, _) = digits(name)
    precision = "int8" if runtime == "onnxruntime" else "bfloat16"
    both = [
        opened(model, runtime, which, images[:CALIBRATION], folder)
        for which in ("float32", precision)
    ]
    pieces = [held_out[i : i + BATCH] for i in range(0, len(held_out), BATCH)]
    expected, found = (np.concatenate([f(piece) for piece in pieces]) for f in both)
    seconds = ([], [])
    for _ in range(rounds):
        for predict, spent in zip(both, seconds, strict=True):
            began = time.perf_counter()
            predict(pieces[0])
            spent.append(time.perf_counter() - began)
    slow, fast = map(statistics.median, seconds)
    result = {
        "precision": precision,
        "images": len(expected),
        "same_top1": float(np.mean(expected.argmax(-1) == found.argmax(-1))),
        "largest_difference": float(np.abs(expected - found).max()),
        "images_per_second": [len(pieces[0]) / slow, len(pieces[0]) / fast],
        "ratio": slow / fast,
    }
    print(json.dumps(result))


def opened(model, runtime, precision, calibration, folder):
    """Returns a function from images to probabilities."""
    import numpy as np

    import keras_tnt

    if runtime in BACKENDS:
        predict = keras_tnt.compile_inference(model, precision=precision)
        return lambda images: np.asarray(predict(images))
    if runtime == "openvino":
        predict = keras_tnt.export.openvino_session(written(model, folder), precision=precision)
        return lambda images: predict(images)["probabilities"]
    calibrated = {"precision": precision, "calibration": calibration} if precision == "int8" else {}
    session = keras_tnt.export.onnx_session(written(model, folder, **calibrated))
    return lambda images: session.run(["probabilities"], {"images": images})[0]


def written(model, folder, precision="float32", **arguments):
    """Returns the path of the model's ONNX file, which is exported once for all runtimes."""
    import keras_tnt

    path = f"{folder}/{model.name}_{precision}.onnx"
    if not os.path.exists(path):
        keras_tnt.export.onnx(model, path, precision=precision, opset=23, **arguments)
    return path


if __name__ == "__main__":
    main()
