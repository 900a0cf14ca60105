"""Writes the fixtures of this directory with the code of commit c156e7b.

    git worktree add --detach /tmp/c156e7b c156e7b
    cd /tmp/c156e7b && PYTHONPATH=$PWD python REPOSITORY/tests/golden/c156e7b/make.py

`fixtures.tar.xz`, next to this file, then holds:

- `<family>.keras` and `tnt.weights.h5`: tiny models saved by Keras.
- `bundle/`: the TNT, written by `save_pretrained`.
- `outputs.npz`: the images, and each model's logits on TensorFlow.
- `run_plain/` and `run_augmented/`: runs on the digits that SIGTERM ended in the middle.
- `final_plain.npz`: the weights at the end of `run_plain`, continued by c156e7b.

The commit has the flags' first names (`repeats`, `erasing`, `ema`, `keep`) and the modules' first
places, so this script runs on no later commit.
"""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import numpy as np

SIZES = {"depth": 1, "outer_dim": 16, "inner_dim": 4, "outer_heads": 2, "inner_stride": 4}
SHORT = {
    "epochs": 2,
    "steps_per_epoch": 4,
    "batch_size": 8,
    "warmup_epochs": 1.0,
    "checkpoint_steps": 2,
    "keep": 2,
    "report_steps": 1,
    "evaluate_epochs": 2,
    "ema": 0.9,
    "report": False,
    "tensorboard": False,
}
RUNS = {
    "plain": {"shift": 0, "rotate": 0.0, "min_crop": 1.0},
    "augmented": {"repeats": 2, "erasing": 0.25, "mixup": 0.8, "stochastic_depth": 0.2},
}
CLASSES = ["apple", "pear", "quince", "cherry"]


def models():
    """Returns a tiny model of each family, with random weights in all variables."""
    import keras_tnt

    common = {"input_shape": (32, 32, 3), "classes": 4}
    tnt = keras_tnt.TNT(
        depth=1, outer_dim=16, inner_dim=4, outer_heads=2, inner_heads=2, input_shape=(32, 32, 3)
    )
    built = {
        "tnt": keras_tnt.reset_classifier(tnt, classes=4, class_names=CLASSES),
        "deit": keras_tnt.DeiT(depth=1, embed_dim=16, num_heads=2, distilled=True, **common),
        "cait": keras_tnt.CaiT(
            depth=1, embed_dim=16, num_heads=2, class_attention_depth=1, **common
        ),
        "pyramid_tnt": keras_tnt.PyramidTNT(
            depths=(1, 1, 1, 1),
            outer_dims=(8, 8, 16, 16),
            inner_dims=(4, 4, 8, 8),
            outer_heads=(1, 1, 2, 2),
            inner_heads=(1, 1, 2, 2),
            **common,
        ),
    }
    generator = np.random.default_rng(0)
    for model in built.values():
        for weight in model.weights:
            if weight.dtype == "float32":
                noise = generator.normal(0, 0.2, weight.shape).astype("float32")
                weight.assign(weight + noise)
    return built


def write_models(directory):
    """Writes the saved models, the bundle and the outputs."""
    import keras_tnt

    images = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3)).astype("uint8")
    outputs = {"images": images}
    for name, model in models().items():
        model.save(directory / f"{name}.keras")
        outputs[name] = model.predict_on_batch(images.astype("float32"))
        if name == "tnt":
            model.save_weights(directory / "tnt.weights.h5")
            keras_tnt.save_pretrained(model, directory / "bundle")
    np.savez_compressed(directory / "outputs.npz", **outputs)


def train(workdir, name, stop):
    """Trains to the end, or until SIGTERM after the first checkpoint."""
    from training import checkpoint, configuration, loop
    from training import models as training_models

    training_models.TNT_DIGITS |= SIZES
    save = checkpoint.Checkpoints.save

    def save_and_end(self, step, *arguments, **keywords):
        save(self, step, *arguments, **keywords)
        if step == SHORT["checkpoint_steps"]:
            os.kill(os.getpid(), signal.SIGTERM)

    if stop:
        checkpoint.Checkpoints.save = save_and_end
    config = configuration.make("digits", workdir=str(workdir), **{**SHORT, **RUNS[name]})
    try:
        loop.train(config)
    except loop.Stopped as stopped:
        print(stopped)


def write_runs(directory):
    """Writes the interrupted runs, and the end of the one without augmentation."""
    for name in RUNS:
        workdir = directory / f"run_{name}"
        subprocess.run([sys.executable, __file__, str(workdir), name, "stop"], check=True)
        if name == "plain":
            continued = directory / "continued"
            shutil.copytree(workdir, continued)
            subprocess.run([sys.executable, __file__, str(continued), name, "go"], check=True)
            model = keras.models.load_model(continued / "final.keras")
            weights = {weight.path: weight.numpy() for weight in model.weights}
            np.savez_compressed(directory / "final_plain.npz", **weights)
            shutil.rmtree(continued)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        train(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "stop")
    else:
        with tempfile.TemporaryDirectory() as name:
            write_models(Path(name))
            write_runs(Path(name))
            with tarfile.open(Path(__file__).with_name("fixtures.tar.xz"), "w:xz") as archive:
                archive.add(name, ".")
