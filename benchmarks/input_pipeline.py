"""Images per second of the input pipeline, stage by stage: python benchmarks/input_pipeline.py

The limit is raw JPEG decoding; what counts is the full recipe over decode, crop and resize alone.
Mixing and the noise of random erasing are part of the training step; the last rows run them on the
CPU too. `--keras_cv` measures KerasCV's layers in their place.
"""

import argparse
import io
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from training import augmentation, configuration, data, sources, step_functions  # noqa: E402

SIZE = (224, 224)
FILL = (128, 128, 128)
PLAIN = {"repeats": 1, "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "randaugment": False}

# What each row adds to the one before.
STAGES = (
    ("decode, crop, resize", {**PLAIN, "flip": False}),
    ("+ flip", {**PLAIN, "flip": True}),
    ("+ RandAugment", {**PLAIN, "randaugment": True}),
    ("+ erasing, repeats: the full recipe", {}),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10, help="length of a measurement")
    parser.add_argument("--images", type=int, default=200, help="number of 500x375 JPEGs")
    parser.add_argument("--keras_cv", action="store_true", help="measure KerasCV's layers too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write_pictures(Path(directory) / "train" / "class", arguments.images)
        measure(directory, arguments)


def write_pictures(directory, number):
    """JPEGs of ImageNet's usual size, with detail at every scale, as photographs have."""
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


def measure(directory, arguments):
    paths = tf.constant([str(p) for p in Path(directory).rglob("*.jpg")])
    raw = tf.data.Dataset.from_tensor_slices(paths).repeat()
    raw = raw.map(
        lambda path: tf.io.decode_jpeg(tf.io.read_file(path)), num_parallel_calls=tf.data.AUTOTUNE
    )
    show("JPEG decoding alone", rate(raw, 1, arguments.seconds))
    reference = None
    for name, values in STAGES:
        images = rate(recipe(directory, values), 32, arguments.seconds)
        reference = reference or images
        show(name, images, reference)
    mixed = recipe(directory, {}).map(mix, num_parallel_calls=tf.data.AUTOTUNE)
    show("+ erasing's noise and mixing, on the CPU", rate(mixed, 32, arguments.seconds), reference)
    if arguments.keras_cv:
        theirs = recipe(directory, {"augmentation": "keras_cv"})
        show(
            "the full recipe with KerasCV's layers", rate(theirs, 32, arguments.seconds), reference
        )


def recipe(directory, values):
    """Batches of 32 of tnt_small's recipe with some values changed."""
    values = {"dataset": "folder", "data_dir": directory, "batch_size": 32, **values}
    settings = configuration.make("tnt_small", **values)
    source = sources.open_split(settings, held_out=False)
    unreadable = data.UnreadableImages(source, 0.0)
    share = data.WorkerShare(0, 1, 1)
    return data.training_batches(source, settings, SIZE, FILL, 0, 0, 10_000, share, unreadable)


def mix(batch):
    """What the training step does to a batch, for tnt_small's recipe."""
    settings = configuration.make("tnt_small")
    mixing = tf.constant(step_functions.draw_mixing(settings, 0, SIZE, 0))
    images = tf.cast(batch["image"], tf.float32)
    noise = tf.random.stateless_normal(tf.shape(images), [0, 0])
    images = tf.where(augmentation.inside(batch["erase"], SIZE), noise, images)
    box = augmentation.inside(tf.cast(mixing[1:], tf.int32), SIZE)
    kept = mixing[0] * (1 - tf.cast(box, tf.float32))
    return augmentation.mix_with_neighbours(images, kept)


def rate(dataset, batch_size, seconds):
    """Images per second, after a warm-up."""
    batches = iter(dataset)
    for _ in range(max(2, 64 // batch_size)):
        next(batches)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        next(batches)
        count += batch_size
    return count / (time.perf_counter() - began)


def show(name, images, reference=None):
    share = f"  {images / reference:5.2f} of decode, crop, resize" if reference else ""
    print(f"{name:42s} {images:8.0f} images/s{share}", flush=True)


if __name__ == "__main__":
    main()
