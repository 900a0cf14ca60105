"""Tensor files: supported formats, wrappers around the tensors, and errors."""

import argparse
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from keras_tnt.weights.files import open_tensors
from tests.helpers.checks import unprivileged

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.one_backend

A = np.arange(6, dtype="float32").reshape(2, 3)
B = A + 10


def tensors(**arrays):
    return OrderedDict((name.replace("__", "."), torch.tensor(x)) for name, x in arrays.items())


def read(path, **options):
    file = open_tensors(path, **options)
    values = {name: file.read([name])[0] for name in file.shapes}
    assert {name: value.shape for name, value in values.items()} == file.shapes
    return values


def assert_holds(path, expected, **options):
    values = read(path, **options)
    assert set(values) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(values[name], value)


@pytest.mark.parametrize("ending", [".pth", ".pt", ".pth.tar", ".bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_both_torch_formats_are_read(ending, zipped, tmp_path):
    path = tmp_path / f"weights{ending}"
    torch.save(tensors(a__weight=A), path, _use_new_zipfile_serialization=zipped)
    assert_holds(path, {"a.weight": A})


@pytest.mark.parametrize("key", ["model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module__", "module__module__"])
def test_nesting_and_data_parallel_prefix_are_removed(key, prefix, tmp_path):
    path = tmp_path / "weights.pth"
    content = {key: tensors(**{f"{prefix}a": A}), "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, path)
    assert_holds(path, {"a": A})


def test_data_parallel_prefix_is_removed_from_safetensors(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"module.a": A, "module.b.c": B}, path)
    assert_holds(path, {"a": A, "b.c": B})


def test_layer_named_module_keeps_its_name(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"module.a": A, "b": B}, path)
    assert_holds(path, {"module.a": A, "b": B})


@pytest.mark.parametrize(
    ("key", "ema_key"), [("model", "model_ema"), ("state_dict", "state_dict_ema")]
)
def test_ema_weights_are_read_on_request(key, ema_key, tmp_path):
    path = tmp_path / "weights.pth.tar"
    torch.save({key: tensors(a=A), ema_key: tensors(module__a=B)}, path)
    assert_holds(path, {"a": A})
    assert_holds(path, {"a": B}, ema=True)


def test_nested_ema_weights_are_read(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": tensors(a=A), "model_ema": {"state_dict": tensors(a=B)}}, path)
    assert_holds(path, {"a": B}, ema=True)


def test_missing_ema_weights_raise(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": tensors(a=A)}, path)
    with pytest.raises(ValueError, match="no moving average"):
        open_tensors(path, ema=True)
    save_file({"a": A}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="leave `ema` out"):
        open_tensors(tmp_path / "weights.safetensors", ema=True)


def test_ema_weights_alone_are_not_read_by_default(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict_ema": tensors(a=A)}, path)
    with pytest.raises(ValueError, match="ema=True"):
        open_tensors(path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_floating_point_dtype_is_read(dtype, tmp_path):
    array = A.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    save_file({"a": array}, tmp_path / "weights.safetensors")
    torch.save({"a": torch.tensor(A).to(getattr(torch, dtype))}, tmp_path / "weights.pth")
    for ending in (".safetensors", ".pth"):
        assert_holds(tmp_path / f"weights{ending}", {"a": A})


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("ending", [".pth", ".bin"])
def test_file_that_would_run_code_is_refused(ending, tmp_path):
    path, marker = tmp_path / f"weights{ending}", tmp_path / "ran"
    torch.save({"model": tensors(a=A), "extra": RunsCode(marker)}, path)
    with pytest.raises(ValueError, match="is refused.*could run code"):
        open_tensors(path)
    path.write_bytes(pickle.dumps(RunsCode(marker), protocol=2))
    with pytest.raises(ValueError, match="is refused.*could run code"):
        open_tensors(path)
    assert not marker.exists()


@pytest.mark.parametrize("size", [0, 5, 60, 300])
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_truncated_file_raises(ending, size, tmp_path):
    path = tmp_path / f"weights{ending}"
    if ending == ".pth":
        torch.save(tensors(a=np.zeros(1000, "float32")), path)
    else:
        save_file({"a": np.zeros(1000, "float32")}, path)
    os.truncate(path, size)
    with pytest.raises(ValueError, match="weights.*(damaged|truncated)"):
        open_tensors(path)


def test_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.safetensors"):
        open_tensors(tmp_path / "no.safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weights.npz", "ends in .safetensors, .pth"),
        ("weights.keras", r"model.load_weights\(path\)"),
        ("weights.weights.h5", r"model.load_weights\(path\)"),
    ],
)
def test_unsupported_extension_raises(name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_tensors(tmp_path / name)


def test_file_without_a_dict_raises(tmp_path):
    torch.save(torch.tensor(A), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="holds a Tensor, not a dict"):
        open_tensors(tmp_path / "weights.pth")


def test_missing_torch_error_names_the_extra(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(tensors(a=A), path)
    code = """
import sys
from keras_tnt.weights.files import open_tensors
sys.modules["torch"] = None
open_tensors(sys.argv[1])
"""
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    result = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, env=environment
    )
    assert 'pip install "keras-tnt[torch]"' in result.stderr


# === Invalid tensors ===


def sparse(layout):
    return torch.tensor(A).to_sparse() if layout == "coo" else torch.tensor(A).to_sparse_csr()


UNREADABLE = {
    "sparse": (lambda: sparse("coo"), "is sparse_coo, not dense"),
    "compressed rows": (lambda: sparse("csr"), "is sparse_csr, not dense"),
    "meta": (lambda: torch.empty(2, 3, device="meta"), "device 'meta'"),
    "complex": (lambda: torch.ones(2, 3, dtype=torch.complex64), "is of type complex64"),
    "float8": (lambda: torch.tensor(A).to(torch.float8_e4m3fn), "is of type float8_e4m3fn"),
    "integers": (lambda: torch.tensor(A).to(torch.int8), "is of type int8"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.tensor(A), 0.1, 0, torch.qint8),
        "is of type qint8",
    ),
    "expanded": (lambda: torch.ones(1).expand(2**20, 2**20), "fewer numbers in the file"),
    "NaN": (lambda: torch.tensor([1.0, float("nan")]), "holds NaN or infinity"),
    "too large": (lambda: torch.tensor([1e300], dtype=torch.float64), "holds NaN or infinity"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_invalid_torch_tensor_raises(kind, tmp_path):
    make, message = UNREADABLE[kind]
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.tensor(A), "b\x1b[2J": make()}, path)
    file = open_tensors(path)
    file.check(["a"])
    with pytest.raises(ValueError) as caught:
        file.check(["a", "b\x1b[2J"])
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert r"'b\x1b[2J'" in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (A.astype(ml_dtypes.float8_e4m3fn), "is of type F8_E4M3"),
        (A.astype("complex64"), "is of type C64"),
        (A.astype("int64"), "is of type I64"),
        (A + np.inf, "holds NaN or infinity"),
        (A + np.float64(1e300), "holds NaN or infinity"),
    ],
)
def test_invalid_safetensors_tensor_raises(array, message, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": array}, path)
    with pytest.raises(ValueError, match=f"{path}.*'a' {message}"):
        open_tensors(path).check(["a"])


@pytest.mark.parametrize("key", [3, ("a", 1), b"a"])
def test_non_string_tensor_name_raises(key, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({key: torch.tensor(A)}, path)
    with pytest.raises(ValueError, match=f"{path}.*is no text"):
        open_tensors(path)


def test_compressed_archive_raises(tmp_path):
    whole, path = tmp_path / "whole.pth", tmp_path / "weights.pth"
    torch.save(tensors(a=np.zeros(1000, "float32")), whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match=f"{path}.*compressed"):
        open_tensors(path)


def test_archive_checksum_error_raises(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(tensors(a=np.full(1000, 3, "float32")), path)
    data = path.read_bytes()
    path.write_bytes(data.replace(np.float32(3).tobytes(), np.float32(5).tobytes(), 1))
    with pytest.raises(ValueError, match=f"{path}.*checksum.*data/0"):
        open_tensors(path)


def test_tensor_larger_than_its_storage_raises(tmp_path):
    whole, path = tmp_path / "whole.pth", tmp_path / "weights.pth"
    torch.save(tensors(a=A, b=np.zeros(1000, "float32")), whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"four" if name.endswith("data/0") else old.read(name))
    with pytest.raises(ValueError, match=f"{path}.*claim"):
        open_tensors(path)


def test_text_file_as_checkpoint_raises(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=f"{path}.*is no file of torch.save.*version https"):
        open_tensors(path)


@pytest.mark.parametrize("size", [3, 500])
def test_truncated_legacy_file_raises(size, tmp_path):
    path = tmp_path / "weights.pth"
    content = tensors(a=np.zeros(1000, "float32"))
    torch.save(content, path, _use_new_zipfile_serialization=False)
    os.truncate(path, size)
    with pytest.raises(ValueError, match=f"{path}.*(damaged|truncated)"):
        open_tensors(path)


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_unreadable_file_raises(ending, tmp_path):
    path = tmp_path / f"weights{ending}"
    path.write_bytes(b"")
    path.chmod(0)
    with unprivileged(), pytest.raises(PermissionError, match=f"weights{ending}"):
        open_tensors(path)


def test_folder_and_fifo_raise(tmp_path):
    (tmp_path / "folder.pth").mkdir()
    os.mkfifo(tmp_path / "pipe.pth")
    for name in ("folder.pth", "pipe.pth"):
        with pytest.raises(ValueError, match=f"{name}' is a folder or a device"):
            open_tensors(tmp_path / name)
