"""Malicious and malformed weight files either load their contents or raise without side effects.

Set `FUZZED=2000` in the environment to run that many fuzzed files. Defaults to 150.
"""

import collections
import os
import resource
import sys
import tempfile

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

import keras_tnt
from keras_tnt.models.pretrained import find_source, load_source, tensor_names
from keras_tnt.weights.names import entries

torch = pytest.importorskip("torch")
from tests.helpers import malformed_checkpoints  # noqa: E402

pytestmark = [
    pytest.mark.one_backend,
    # torch and h5py warn about such files.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning"),
]
FUZZED = int(os.environ.get("FUZZED", 150))
REFUSALS = (ValueError, OSError, ImportError)
# Memory growth in MB that is allowed over all files, the largest of which has 1 MB.
GROWTH = 400
# Audit events of Python for side effects.
DONE = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate")
RUN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")


class Watch:
    """Counts file writes, removals and started programs while it is active."""

    def __init__(self):
        self.seen = collections.Counter()
        self.on = False
        sys.addaudithook(self.hook)  # cannot be removed

    def hook(self, event, arguments):
        if self.on and (event in DONE + RUN or event == "open" and writes(*arguments)):
            self.seen[f"{event} {arguments[0]!r}"] += 1

    def __enter__(self):
        self.on = True

    def __exit__(self, *_):
        self.on = False


def writes(path, mode, flags):
    return flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


@pytest.fixture(scope="module")
def watch():
    return Watch()


@pytest.fixture(scope="module")
def model():
    return keras_tnt.DeiT(embed_dim=16, depth=2, num_heads=2, input_shape=(32, 32, 3), classes=5)


@pytest.fixture(scope="module")
def good(model, tmp_path_factory):
    """Returns the paths of valid files of each kind, and the tensors of the first."""
    folder = tmp_path_factory.mktemp("good")
    names = ("a.safetensors", "b.pth", "c.pth", "d.keras", "e.weights.h5")
    paths = [folder / name for name in names]
    keras_tnt.save_checkpoint(model, paths[0])
    tensors = load_file(paths[0])
    paths[1].write_bytes(malformed_checkpoints.saved(malformed_checkpoints.as_torch(tensors)))
    paths[2].write_bytes(
        malformed_checkpoints.saved(malformed_checkpoints.as_torch(tensors), zipped=False)
    )
    model.save(paths[3])
    model.save_weights(paths[4])
    for path in paths:  # Imports modules first, which may write files.
        load_source(model, find_source(path))
    return paths, tensors


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """Sets a home and a temporary directory that must stay empty; returns their parent."""
    for name in ("home", "temporary", "files"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path


def values(model):
    return [keras.ops.convert_to_numpy(v).copy() for v in model.variables]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def attempt(model, path, watch):
    """Returns whether a file loads; checks that an error names it and the model is unchanged."""
    before = values(model)
    try:
        with watch:
            load_source(model, find_source(path))
    except REFUSALS as error:
        assert same(values(model), before), f"{path} changed the model"
        assert path.name in str(error), error
        assert all(c.isprintable() or c == "\n" for c in str(error)), repr(str(error))
        assert len(str(error)) < 3000
        return False
    return True


def independently_read(path):
    if path.suffix == ".safetensors":
        return load_file(path)
    return {name: value.numpy() for name, value in torch.load(path, weights_only=True).items()}


def assert_holds(model, tensors):
    names = tensor_names(model)
    for entry in entries(model, names.table, names.prefix):
        for name, value in zip(entry.names, entry.to_torch(entry.value), strict=True):
            np.testing.assert_array_equal(value, tensors[name], err_msg=name)


def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.slow
def test_crafted_files_load_or_raise_without_side_effects(model, good, watch, sandbox):
    (*_, keras_file, h5_file), tensors = good
    load_source(model, find_source(good[0][0]))
    expected = values(model)
    nothing = [np.zeros_like(value) for value in expected]
    before, count, wrong = megabytes(), 0, []
    for path, fits in malformed_checkpoints.crafted(
        sandbox / "files", tensors, (keras_file, h5_file)
    ):
        model.set_weights(nothing)
        loads = attempt(model, path, watch)
        if fits not in (None, loads) or loads and not same(values(model), expected):
            wrong.append((path.name, fits, loads))
        path.unlink()
        count += 1
    print(f"\n{count} crafted files, {len(wrong)} of them wrong")
    assert wrong == []
    assert count >= 200
    assert untouched(sandbox, watch)
    assert megabytes() - before < GROWTH


def untouched(sandbox, watch):
    """Returns whether the sandbox has no file, after checking that no event was seen."""
    assert not watch.seen
    return not any(path.is_file() for path in sandbox.rglob("*"))


def test_fuzzed_files_load_or_raise_without_side_effects(model, good, watch, sandbox):
    paths, _ = good
    before, loaded = megabytes(), 0
    for path in malformed_checkpoints.fuzzed(sandbox / "files", paths, FUZZED):
        if attempt(model, path, watch):
            loaded += 1
            assert all(np.all(np.isfinite(value)) for value in values(model)), path.name
            if path.suffix in (".safetensors", ".pth"):
                assert_holds(model, independently_read(path))
        path.unlink()
    print(f"\n{loaded} of {FUZZED} fuzzed files load, the others are refused")
    assert 0 < loaded < FUZZED
    assert untouched(sandbox, watch)
    assert megabytes() - before < GROWTH
