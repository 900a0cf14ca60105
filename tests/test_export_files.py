"""Exports on full disks and in killed processes leave no partial files."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_tnt

pytest.importorskip("tensorflow")
pytest.importorskip("onnx")
pytest.importorskip("tensorflow_serving")

from keras_tnt.export import onnx_file, servable
from keras_tnt.export.handover import in_tensorflow
from keras_tnt.export.network import serving_network
from keras_tnt.weights import checkpoint
from tests.helpers.checks import ROOT
from tests.helpers.onnx_models import TINY


@contextlib.contextmanager
def small_disk(folder):
    """Mounts an 8 MB file system; yields a function that leaves `free` bytes available."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small file system")

    def leave(free):
        (folder / "filler").unlink(missing_ok=True)
        with open(folder / "filler", "wb") as file:
            free_now = shutil.disk_usage(folder).free  # noqa: TID251
            os.posix_fallocate(file.fileno(), 0, free_now - free)

    try:
        yield leave
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.one_backend
@pytest.mark.parametrize("checked", [True, False])
def test_full_disk_leaves_no_partial_export(checked, tmp_path, monkeypatch):
    model = keras_tnt.TNT(**TINY)
    disk = tmp_path / "disk"
    if not checked:  # as if another process filled the disk after the check
        for module in (servable, onnx_file, checkpoint):
            monkeypatch.setattr(module, "check_space", lambda *_: None)
    exports = {
        "tnt": lambda path: keras_tnt.export.saved_model(
            model, path, signatures=["serving_default"]
        ),
        "tnt.onnx": lambda path: keras_tnt.export.onnx(model, path),
        "tnt.safetensors": lambda path: keras_tnt.save_checkpoint(model, path),
    }
    amounts = np.linspace(0, 2e6, int(os.environ.get("KERAS_TNT_FULL_DISKS", 3))).astype(int)
    with small_disk(disk) as leave:
        for free in amounts[:-1]:
            for name, export in exports.items():
                leave(int(free))
                try:
                    export(disk / name)
                except OSError as error:
                    assert error.errno == errno.ENOSPC, error
                    assert ("takes" in str(error)) or not checked
                    left = sum(len(names) for _, _, names in os.walk(disk))
                    assert left == 1, list(disk.rglob("*"))  # the filler
                else:
                    assert free > 50_000
                    shutil.rmtree(disk / name) if name == "tnt" else (disk / name).unlink()
        leave(int(amounts[-1]))
        assert os.listdir(exports["tnt"](disk / "tnt"))


@pytest.mark.slow
def test_export_uses_no_more_space_than_estimated_and_no_temporary_directory(tmp_path, monkeypatch):
    temporary, counted = tmp_path / "temporary", []
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(
        servable, "check_space", lambda folder, needed, what: counted.append(needed)
    )
    path = keras_tnt.export.saved_model(keras_tnt.TNT(**TINY), tmp_path / "tnt")
    written = sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
    if keras.backend.backend() != "torch":
        assert written <= counted[-1] < 2 * written
        # TensorFlow's temporary files would remain after a killed process.
        assert os.listdir(temporary) == []


@pytest.mark.slow
@pytest.mark.one_backend
def test_error_of_the_tensorflow_process_is_raised_unchanged(tmp_path):
    network = serving_network(keras_tnt.TNT(**TINY))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "3").mkdir()
    card = {"labels": None, "image_size": [32, 32], "channels": 3, "input": "", "data_format": ""}
    arguments = {"card": card, "directory": str(tmp_path / "file"), "version": 3, "signatures": []}
    (tmp_path / "file").write_text("")
    function = "keras_tnt.export.servable:write_saved_model"
    with pytest.raises(FileExistsError) as caught:
        in_tensorflow(function, network, {}, arguments, tmp_path / "model")
    assert caught.value.filename == str(tmp_path / "file")
    assert os.listdir(tmp_path / "model") == ["3"]


KILLED = """
import numpy as np
import keras_tnt
from keras_tnt.export.handover import in_tensorflow
from keras_tnt.export.network import serving_network
from keras_tnt.export.verification import examples
from keras_tnt.export.card import describe
model = keras_tnt.TNT(**TINY)
network = serving_network(model)
card = describe(model, network)
arguments = {
    "card": card, "path": PATH, "opset": 18, "names": ["logits"], "precision": "int8"
}
references = {"images": examples(network, card)}
print("begins", flush=True)
in_tensorflow("keras_tnt.export.onnx_file:write_onnx", network, references, arguments, FOLDER)
"""


@pytest.mark.one_backend
@pytest.mark.slow
def test_killed_export_leaves_no_temporary_files_and_no_process(tmp_path):
    temporary, folder = tmp_path / "tmp", tmp_path / "out"
    temporary.mkdir()
    code = KILLED.replace("PATH", repr(str(folder / "tnt.onnx")))
    code = code.replace("FOLDER", repr(str(folder))).replace("TINY", repr(TINY))
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    writer = subprocess.Popen([sys.executable, "-c", code], env=settings, stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"begins\n"
    while not list(folder.glob(".writing-*/task.json")):
        assert writer.poll() is None
        time.sleep(0.001)
    writer.send_signal(signal.SIGKILL)
    # The pipe stays open while either process runs.
    assert writer.communicate(timeout=60)[0] == b""
    assert os.listdir(temporary) == []
    assert not (folder / "tnt.onnx").exists()
    keras_tnt.export.onnx(keras_tnt.TNT(**TINY), folder / "other.onnx")
    assert os.listdir(folder) == ["other.onnx"]
