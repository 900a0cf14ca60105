"""Files and runs of commit c156e7b load, predict the same, and continue.

tests/golden/c156e7b/make.py wrote them with the code of that commit, before modules and flags were
renamed.
"""

import json
import os
import subprocess
import sys
import tarfile

import keras
import numpy as np
import pytest

import keras_tnt
from tests.helpers.checks import ROOT, compute
from tests.helpers.golden import DIRECTORY, assert_close

CLASSES = ["apple", "pear", "quince", "cherry"]
# Runs the command of training with a tiny tnt_digits.
CONTINUE = """
from training import commands, models, train
models.TNT_DIGITS |= {"depth": 1, "outer_dim": 16, "inner_dim": 4, "outer_heads": 2}
models.TNT_DIGITS |= {"inner_stride": 4}
commands.run(train.main)
"""


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory):
    """Returns the directory with the commit's files."""
    directory = tmp_path_factory.mktemp("c156e7b")
    with tarfile.open(DIRECTORY / "c156e7b" / "fixtures.tar.xz") as archive:
        archive.extractall(directory, filter="data")
    return directory


@pytest.fixture(scope="module")
def outputs(fixtures):
    return dict(np.load(fixtures / "outputs.npz"))


@pytest.mark.parametrize("family", ["tnt", "deit", "cait", "pyramid_tnt"])
def test_keras_file_predicts_the_same(fixtures, outputs, family):
    model = keras.models.load_model(fixtures / f"{family}.keras")
    assert_close(compute(model, outputs["images"].astype("float32")), outputs[family])
    if family == "tnt":
        assert keras_tnt.class_names(model) == CLASSES


def test_weights_file_fits_the_rebuilt_model(fixtures, outputs):
    model = keras_tnt.TNT(
        depth=1, outer_dim=16, inner_dim=4, outer_heads=2, inner_heads=2, input_shape=(32, 32, 3)
    )
    model = keras_tnt.reset_classifier(model, class_names=CLASSES)
    model.load_weights(fixtures / "tnt.weights.h5")
    assert_close(compute(model, outputs["images"].astype("float32")), outputs["tnt"])


def test_bundle_predicts_the_same(fixtures, outputs):
    model = keras_tnt.load_pretrained(fixtures / "bundle")
    assert keras_tnt.class_names(model) == CLASSES
    assert_close(compute(model, outputs["images"].astype("float32")), outputs["tnt"])


def flags_of(config):
    """Returns recorded values as flags, under their names of that time."""
    for name, value in config.items():
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no{name}"
        elif name != "workdir":
            yield f"--{name}={value}"


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="trains on TensorFlow")
@pytest.mark.parametrize("name", ["plain", pytest.param("augmented", marks=pytest.mark.slow)])
def test_run_is_continued_with_its_recorded_flags(fixtures, name):
    workdir = fixtures / f"run_{name}"
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))["config"]
    done = subprocess.run(
        [sys.executable, "-c", CONTINUE, f"--workdir={workdir}", *flags_of(config)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 3 of 8" in done.stdout + done.stderr
    model = keras.models.load_model(workdir / "final.keras")
    assert all(np.isfinite(weight).all() for weight in model.get_weights())
    if name == "plain":
        expected = np.load(fixtures / "final_plain.npz")
        found = {weight.path: weight.numpy() for weight in model.weights}
        assert found.keys() == set(expected)
        for path, values in found.items():
            assert_close(values, expected[path])
