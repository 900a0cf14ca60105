"""Kills exports at random times: python -m tests.helpers.export_crashes DIRECTORY KIND KILLS.

KIND is saved_model or onnx. Each export runs in a process that is forked after all imports and
before any runtime starts, and is killed at a random time. Meanwhile, a reader polls for exports and
runs each one: it must be complete and match the model's predictions. At the end, the killed
processes must have left nothing behind: no file, no temporary directory, no process. Each kill is
logged on standard error; the counts are printed at the end, also after an error.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import onnx  # noqa: F401
import onnxruntime
import PIL.Image  # noqa: F401
import tensorflow as tf
import tensorflow_serving.apis  # noqa: F401
import tf2onnx  # noqa: F401

import keras_tnt
from keras_tnt.export import files
from tests.helpers.crash_injection import finish, forked, is_killed, spent, wait_for_end_of
from tests.helpers.onnx_models import TINY

SIGNATURES = {"serving_default", "serving_bytes", "classify", "features"}
IMAGES = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")


# === The three processes ===


def prepare(directory):
    """Writes the model and its predictions for a batch of images."""
    keras.utils.set_random_seed(0)
    model = keras_tnt.TNT(**TINY, class_names=list("abcdefg"))
    model.save(directory / "model.keras")
    np.save(directory / "expected.npy", model.predict(IMAGES, verbose=0))


def export(directory, kind):
    model = keras.saving.load_model(directory / "model.keras")
    (directory / "begun").touch()
    if kind == "saved_model":
        keras_tnt.export.saved_model(model, directory / "tnt")
    else:
        keras_tnt.export.onnx(model, directory / "onnx" / "tnt.onnx")


def read(directory, kind):
    """Runs each new export until a file `stop` exists, and logs it in `read.txt`."""
    expected, seen, last = np.load(directory / "expected.npy"), set(), False
    while not last:
        last = (directory / "stop").exists()  # look once more after `stop` appears
        if kind == "saved_model":
            found = {(n, directory / "tnt" / str(n)) for n in files.versions(directory / "tnt")}
        else:
            found = {(p.stat().st_ino, p) for p in directory.glob("onnx/tnt.onnx")}
        for new, path in found - seen:
            outcome = {"saved_model": run_saved_model, "onnx": run_onnx}[kind](path)
            np.testing.assert_allclose(outcome, expected, atol=1e-5)
            seen.add((new, path))
            with open(directory / "read.txt", "a") as file:
                print(new, file=file)
        time.sleep(0.001)


def run_saved_model(path):
    extra = {p.name for p in (path / "assets.extra").iterdir()}
    assert {"model.json", "tf_serving_warmup_requests"} <= extra, extra
    functions = tf.saved_model.load(str(path)).signatures
    assert set(functions) == SIGNATURES, set(functions)
    return functions["serving_default"](images=tf.constant(IMAGES))["probabilities"]


def run_onnx(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert "agreement" in session.get_modelmeta().custom_metadata_map
    return session.run(["probabilities"], {"images": IMAGES})[0]


# === The kills ===


def begin_export(directory, kind):
    """Starts an export and returns (process id, CPU time in seconds that it has used so far)."""
    (directory / "begun").unlink(missing_ok=True)
    process = forked(lambda: export(directory, kind), directory / "export.log")
    while not (directory / "begun").exists():
        if os.waitpid(process, os.WNOHANG)[0]:
            raise SystemExit("an export did not begin: see export.log")
        time.sleep(0.002)
    return process, spent(process)


def check_nothing_is_left(directory, kind):
    """Exits with an error if killed exports left temporary files or partial exports."""
    temporary = os.listdir(directory / "temporary")
    names = os.listdir(directory / ("tnt" if kind == "saved_model" else "onnx"))
    if kind == "saved_model":
        names = sorted(set(names) - set(map(str, files.versions(directory / "tnt"))))
    else:
        names.remove("tnt.onnx")
    if temporary or names:
        raise SystemExit(f"left behind: {names}, and as temporary files {temporary}")


def main(directory, kind, kills):
    directory, random = Path(directory).absolute(), np.random.default_rng(0)
    finish(forked(lambda: prepare(directory), directory / "prepare.log"), "prepare.log")
    reader = forked(lambda: read(directory, kind), directory / "read.log")
    # The temporary directory is set after the reader's start, so it holds files of exports only.
    (directory / "temporary").mkdir(parents=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(directory / "temporary")

    process, before = begin_export(directory, kind)
    length = finish(process, "export.log") - before
    killed, whole = 0, 1
    try:
        while killed < int(kills):
            process, before = begin_export(directory, kind)
            if is_killed(process, before + random.uniform(0, 1.05 * length), "export.log"):
                killed += 1
                wait_for_end_of(process)
                print(f"kill {killed} of {kills}", file=sys.stderr, flush=True)
            else:
                whole += 1
            if os.waitpid(reader, os.WNOHANG)[0]:
                raise SystemExit("the reader ended, for what it read or otherwise: see read.log")
        finish(begin_export(directory, kind)[0], "export.log")
        whole += 1
        (directory / "stop").touch()
        finish(reader, "read.log")
        check_nothing_is_left(directory, kind)
    finally:
        found = directory / "read.txt"
        seen = len(found.read_text().split()) if found.exists() else 0
        counted = {"killed": killed, "whole": whole, "read": seen}
        print(json.dumps({**counted, "processor_seconds_undisturbed": length}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
