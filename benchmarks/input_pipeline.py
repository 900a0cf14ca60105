"""Measures images/s of the trainer's input pipeline.

    python benchmarks/input_pipeline.py

Each mode, with op determinism (`--deterministic`, the trainer's default) and without, is a separate
process, because TensorFlow cannot turn determinism off again. The modes take turns, and the median
of the rounds is shown, so other load affects both equally. Mixup, CutMix and the noise of random
erasing are part of the training step, and are not measured. `--keras_cv` adds a row with KerasCV's
layers instead of the trainer's own augmentation.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

FILL = (128, 128, 128)
PLAIN = {"repeats": 1, "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "randaugment": False}

# Each row adds a stage to the one before.
STAGES = {
    "decode, crop, resize": {**PLAIN, "flip": False},
    "+ flip": {**PLAIN, "flip": True},
    "+ RandAugment": {**PLAIN, "randaugment": True},
    "+ erasing, repeats: the full recipe": {},
}
KERAS_CV = {"the full recipe with KerasCV's layers": {"augmentation": "keras_cv"}}


def main(arguments=None):
    """Measures every stage in both modes, and returns the medians that it prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5, help="length of a measurement")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each mode")
    parser.add_argument("--images", type=int, default=200, help="number of 500x375 JPEGs")
    parser.add_argument("--image_size", type=int, default=224, help="side that the model takes")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument(
        "--gpu", type=float, help="images/s of a GPU: print how many cores it needs"
    )
    parser.add_argument("--keras_cv", action="store_true", help="measure KerasCV's layers too")
    parser.add_argument("--full_only", action="store_true", help="measure the full recipe alone")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # internal, for the worker processes
    options = parser.parse_args(arguments)
    if options.serve:
        return serve(options)
    stages = {**STAGES, **(KERAS_CV if options.keras_cv else {})}
    if options.full_only:
        stages = dict([list(STAGES.items())[-1]])
    with tempfile.TemporaryDirectory() as directory:
        write_pictures(Path(directory) / "train" / "class", options.images)
        return report(measure(directory, stages, options), options)


def write_pictures(directory, number):
    """Writes JPEGs of ImageNet's usual size, with detail at every scale, as in photographs."""
    from PIL import Image

    directory.mkdir(parents=True)
    for i in range(number):
        random = np.random.default_rng(i)
        pixels = np.zeros((375, 500, 3))
        for scale in (4, 8, 16, 32, 64):
            shape = (-(-375 // scale), -(-500 // scale), 3)
            noise = random.normal(0, 6 * scale**0.4, shape)
            pixels += np.kron(noise, np.ones((scale, scale, 1)))[:375, :500]
        file = io.BytesIO()
        Image.fromarray(np.uint8(np.clip(128 + pixels, 0, 255))).save(file, "JPEG", quality=90)
        (directory / f"{i}.jpg").write_bytes(file.getvalue())


def measure(directory, stages, options):
    """Returns {stage: {deterministic: images/s of each round}}."""
    processes = {
        deterministic: start(directory, deterministic, options) for deterministic in (1, 0)
    }
    found = {stage: {1: [], 0: []} for stage in stages}
    try:
        for stage, values in stages.items():
            for number in range(options.rounds):
                # The modes alternate in going first.
                for deterministic in ((1, 0), (0, 1))[number % 2]:
                    rate = ask(processes[deterministic], values)
                    found[stage][deterministic].append(rate)
    finally:
        for process in processes.values():
            process.stdin.close()
            process.wait()
    return found


def start(directory, deterministic, options):
    """Starts the worker process of a mode."""
    command = [sys.executable, __file__, f"--serve={directory}", f"--seconds={options.seconds}"]
    command += [f"--rounds={deterministic}", f"--image_size={options.image_size}"]
    command += [f"--batch_size={options.batch_size}"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process, values):
    """Returns the images/s that a worker measures for these values of the recipe."""
    process.stdin.write(json.dumps(values) + "\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("images/s "):
            return float(line.split()[1])
    raise RuntimeError(f"the process ended with status {process.wait()}")


def serve(options):
    """Measures a recipe per line of standard input; `--rounds` is the determinism, 0 or 1."""
    import tensorflow as tf

    if options.rounds:
        tf.config.experimental.enable_op_determinism()
        tf.random.set_seed(0)
    pipelines = {}
    for line in sys.stdin:
        if line not in pipelines:
            pipelines.clear()
            pipelines[line] = iter(pipeline(options, json.loads(line)))
            for _ in range(max(2, 64 // options.batch_size)):  # a warm-up
                next(pipelines[line])
        print("images/s", rate(pipelines[line], options.batch_size, options.seconds), flush=True)


def pipeline(options, values):
    """Returns the batches of tnt_small's recipe with `values` changed."""
    from training import configuration, data, sources

    values = {
        "dataset": "folder",
        "data_dir": options.serve,
        "batch_size": options.batch_size,
        **values,
    }
    config = configuration.make("tnt_small", **values)
    source = sources.DATASETS["folder"].open_split(config, False)
    unreadable = data.UnreadableImages(source, 0.0)
    share = data.WorkerShare(0, 1, 1)
    size = (options.image_size, options.image_size)
    return data.training_batches(source, config, size, FILL, 0, 0, 100_000, share, unreadable)


def rate(batches, batch_size, seconds):
    """Returns the images/s of batches during `seconds`."""
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        next(batches)
        count += batch_size
    return count / (time.perf_counter() - began)


def report(found, options):
    """Prints and returns the medians, {stage: {deterministic: images/s}}."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    medians = {
        stage: {mode: statistics.median(rates) for mode, rates in modes.items()}
        for stage, modes in found.items()
    }
    print(f"{f'images/s, median of {options.rounds}':38s} deterministic      not    cost  per core")
    for stage, modes in medians.items():
        cost = 1 - modes[1] / modes[0]
        print(f"{stage:38s} {modes[1]:13.0f} {modes[0]:8.0f} {cost:7.1%} {modes[1] / cores:9.1f}")
    print(f"{cores} cores")
    if options.gpu:
        per_core = list(medians.values())[-1][1] / cores
        print(f"a GPU of {options.gpu:.0f} images/s needs {options.gpu / per_core:.0f} such cores")
    return medians


if __name__ == "__main__":
    main()
