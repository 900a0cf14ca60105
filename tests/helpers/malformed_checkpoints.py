"""Malicious, malformed and damaged weight files.

`crafted` generates hand-designed cases, `fuzzed` random mutations.
"""

import io
import itertools
import json
import os
import pickle
import struct
import zipfile

import h5py
import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import save as stored

ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202e"


def crafted(folder, tensors, keras_files):
    """Writes crafted files one after another.

    Args:
        folder: directory to write to.
        tensors: dict of arrays by name, a checkpoint that matches the model.
        keras_files: paths of a matching `.keras` and `.weights.h5` file.

    Yields:
        (path, fits): `fits` is whether the file must load and contains `tensors`. `None` if both
        outcomes are acceptable.
    """
    cases = itertools.chain(
        torch_tensors(tensors),
        torch_contents(tensors, folder),
        archives(tensors),
        safetensors(tensors),
        (case for path in keras_files for case in keras(path)),
        anything(tensors),
    )
    for number, (ending, data, fits) in enumerate(cases):
        path = folder / f"crafted_{number}{ending}"
        path.write_bytes(data)
        yield path, fits


def fuzzed(folder, originals, count, seed=0):
    """Writes `count` files, each a mutation of one of `originals`.

    Args:
        folder: directory to write to.
        originals: paths of valid files.
        count: number of files.
        seed: seed of the mutations. Defaults to 0.

    Yields:
        The paths.
    """
    for number in range(count):
        random = np.random.default_rng((seed, number))
        original = originals[number % len(originals)]
        data = bytearray(original.read_bytes())
        for _ in range(random.integers(1, 4)):
            data = change(data, random)
        path = folder / f"fuzzed_{number}{''.join(original.suffixes)}"
        path.write_bytes(data)
        yield path


def change(data, random):
    """Applies a random mutation, half of the time near either end, where the headers are."""
    size = len(data)
    start = int(random.integers(size + 1))
    if random.random() < 0.5:
        start = start % 1000 if random.random() < 0.5 else max(0, size - 1 - start % 1000)
    length = int(random.choice([1, 1, 2, 8, 64, 500]))
    piece = data[start : start + length]
    kind = random.integers(8)
    if kind == 0:
        return data[:start]
    if kind == 1:
        return data[:start] + data[start + length :]
    if kind == 2:
        return data[:start] + random.bytes(length) + data[start:]
    if kind == 3:
        return data[:start] + piece + data[start:]
    if kind == 4:
        piece = bytes(len(piece))
    elif kind == 5:
        piece = b"\xff" * len(piece)
    elif kind == 6:
        piece = random.bytes(len(piece))
    else:
        piece = bytes(byte ^ (1 << int(random.integers(8))) for byte in piece)
    return data[:start] + piece + data[start + length :]


# === torch.save files ===


def saved(content, zipped=True):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def as_torch(tensors):
    return {name: torch.tensor(value) for name, value in tensors.items()}


FAULTS = {
    "coo": lambda t: t.to_sparse(),
    "csr": lambda t: t.reshape(len(t), -1).to_sparse_csr(),
    "meta": lambda t: t.to("meta"),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "complex64": lambda t: t.to(torch.complex64),
    "complex128": lambda t: t.to(torch.complex128),
    "float8_e4m3fn": lambda t: t.to(torch.float8_e4m3fn),
    "float8_e5m2": lambda t: t.to(torch.float8_e5m2),
    "int8": lambda t: t.to(torch.int8),
    "int64": lambda t: t.to(torch.int64),
    "bool": lambda t: t.to(torch.bool),
    "expanded": lambda t: t.flatten()[:1].clone().expand(t.shape),
    "huge": lambda t: t.flatten()[:1].expand(2**20, 2**20),
    "overlapping": lambda t: torch.as_strided(t, (10_000, 10_000), (0, 0)),
    "NaN": lambda t: torch.where(t == t.max(), torch.nan, t),
    "infinity": lambda t: torch.where(t == t.max(), torch.inf, t),
    "too large": lambda t: t.double() + 1e300,
    "scalar": lambda t: t.flatten()[0],
    "empty": lambda t: t[:0],
    "another axis": lambda t: t[None],
    "flat": lambda t: t.flatten(),
    "longer": lambda t: torch.cat([t, t]),
    "a list": lambda t: t.tolist(),
    "text": lambda t: "weights",
}
HARMLESS = {
    "parameter": torch.nn.Parameter,
    "double": lambda t: t.double(),
    "strided": lambda t: t.t().contiguous().t() if t.ndim == 2 else t,
    "a view": lambda t: torch.cat([t, t])[len(t) :],
}


def torch_tensors(tensors):
    """Yields checkpoints with one invalid tensor: the first, a middle one, or the last."""
    content = as_torch(tensors)
    names = [name for name in content if content[name].ndim > 1 or name == "norm.bias"]
    places = [names[0], names[len(names) // 2], "norm.bias"]
    for (kind, make), place in itertools.product(FAULTS.items(), places):
        if kind in ("csr", "flat") and content[place].ndim != 2:
            continue  # Another fault, or none.
        yield ".pth", saved(content | {place: make(content[place])}), False
    for kind in ("meta", "NaN", "expanded", "huge", "scalar", "int8"):
        fault = FAULTS[kind](content[places[1]])
        yield ".bin", saved(content | {places[1]: fault}, zipped=False), False
    for make in HARMLESS.values():
        changed = {name: make(value) for name, value in content.items()}
        yield ".pt", saved(changed), True
        yield ".pth.tar", saved(changed, zipped=False), True


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def torch_contents(tensors, folder):
    content = as_torch(tensors)
    first = next(iter(content.values()))
    marker = str(folder / "code_ran")
    for key in (3, ("a", 1), None, b"name", 1.5):
        yield ".pth", saved(content | {key: first}), False
        yield ".bin", saved({"state_dict": content | {key: first}}, zipped=False), False
    for other in (
        first,
        list(content),
        tuple(content.values()),
        "text",
        7,
        None,
        {},
        {"model": []},
    ):
        yield ".pth", saved(other), False
        yield ".pt", saved(other, zipped=False), False
    yield ".pth", saved(content | {ESCAPES: first}), False
    yield ".pth", saved(content | {"\ud800": first}), False
    yield ".pth", saved(content | {"a" * 100_000: first}), False
    yield ".pth", saved({"model_ema": content}), False
    yield ".pth", saved({"model": {}, "state_dict": content}), False
    for nested in ({"model": content}, {"state_dict": content, "epoch": 3, "args": {"lr": 0.1}}):
        yield ".pth", saved(nested), True
    yield ".pth", saved({f"module.module.{name}": value for name, value in content.items()}), True
    loop = dict(content)
    loop["loop"] = loop
    yield ".pth", saved(loop), True
    for call in (
        Call(os.mkdir, marker),
        Call(os.system, f"touch {marker}"),
        Call(eval, f"open({marker!r}, 'w')"),
        Call(open, marker, "w"),
        Call(np.save, marker, np.zeros(1)),
        Call(torch.save, 1, marker),
        Call(torch.hub.download_url_to_file, "http://127.0.0.1:9/x", marker),
        Call(getattr, "", "join"),
    ):
        for zipped in (True, False):
            yield ".pth", saved(content | {"extra": call}, zipped), False
        yield ".bin", pickle.dumps(call, protocol=2), False
        yield ".pt", pickle.dumps(call, protocol=4), False
    yield ".pth", saved(torch.nn.Linear(2, 2)), False
    deep = []
    for _ in range(300):
        deep = [deep]
    yield ".pth", saved(content | {"deep": deep}), None


def archives(tensors):
    """Yields `torch.save` zip archives with modified entries or surrounding bytes."""
    whole = saved(as_torch(tensors))

    def rewritten(change=lambda name, data: data, method=zipfile.ZIP_STORED, more=()):
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, "w", method) as new:
            for name in old.namelist():
                if (data := change(name, old.read(name))) is not None:
                    new.writestr(name, data)
            for name, data in more:
                new.writestr(name, data)
        return file.getvalue()

    def replaced(end, data):
        return rewritten(lambda name, old: data if name.endswith(end) else old)

    def edited(old, new):
        return rewritten(lambda n, d: d.replace(old, new) if n.endswith("data.pkl") else d)

    yield ".pth", rewritten(), True
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield ".pth", rewritten(method=method), False
    for end in ("data.pkl", "data/0", "data/3"):
        yield ".pth", replaced(end, None), False
        yield ".pth", replaced(end, b""), False
        yield ".pth", replaced(end, b"short"), False
        yield ".pth", replaced(end, bytes(1_000_000)), False
    yield ".pth", replaced("byteorder", b"middle"), False
    yield ".pth", replaced("byteorder", b"\xff\xfe"), False
    yield ".pth", rewritten(more=[("archive/constants.pkl", b"x")]), None
    yield ".pth", rewritten(more=[("../../../outside", b"x"), ("/etc/outside", b"x")]), None
    yield ".pth", rewritten(more=[("archive/data/999", bytes(100))]), False
    # Sizes in the pickle: the width 16, stored as one byte, becomes 255, or negative in a longer
    # form.
    yield ".pth", edited(b"K\x10", b"K\xff"), False
    yield ".pth", edited(b"K\x10", b"J\xff\xff\xff\xff"), False
    yield ".pth", edited(b"K\x10", b"\x8a\x08" + b"\xff" * 7 + b"\x7f"), False
    yield ".pth", edited(b"FloatStorage", b"DoubleStorage"), False
    yield ".pth", edited(b"FloatStorage", b"HalfStorage"), False
    yield ".pth", edited(b"cpu", b"cuda:7"), None
    start = whole.index(b"data/0")
    for size in (3, 30, 500, len(whole) // 2, len(whole) - 1, len(whole) - 22):
        yield ".pth", whole[:size], False
    yield ".pth", whole[:start] + b"DATA/0" + whole[start + 6 :], False
    yield ".pth", bytes(100) + whole, None
    yield ".pth", whole + bytes(100), None
    yield ".pth", whole.replace(b"PK\x01\x02", b"PK\x00\x00", 1), False
    older = saved(as_torch(tensors), zipped=False)
    for size in (0, 1, 3, 30, 500, len(older) // 2, len(older) - 1):
        yield ".pth", older[:size], False


# === safetensors files ===


def safetensors(tensors):
    def written(change):
        header, data, offset = {}, b"", 0
        for name, value in tensors.items():
            end = offset + value.nbytes
            header[name] = {
                "dtype": "F32",
                "shape": list(value.shape),
                "data_offsets": [offset, end],
            }
            data, offset = data + value.tobytes(), end
        return joined(change(header) or header, data)

    def joined(header, data, length=None):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    first = next(iter(tensors))
    for wrong in (
        {"dtype": "F8_E4M3"},
        {"dtype": "F8_E5M2"},
        {"dtype": "I32"},
        {"dtype": "U32"},
        {"dtype": "F64"},
        {"dtype": "F16"},
        {"dtype": "X9"},
        {"dtype": None},
        {"shape": []},
        {"shape": [2**62]},
        {"shape": [2**40, 2**40]},
        {"shape": [0]},
        {"shape": [-1]},
        {"shape": ["16"]},
        {"shape": None},
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [0]},
        {"data_offsets": None},
    ):
        yield ".safetensors", written(lambda h, w=wrong: h[first].update(w)), False
    for more in (
        {ESCAPES: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
        {"": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
        {"\0": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
        {"__metadata__": [1, 2]},
        {first: 3},
        {first: None},
    ):
        yield ".safetensors", written(lambda h, m=more: h.update(m)), False
    metadata = {"__metadata__": {"format": ESCAPES}}
    yield ".safetensors", written(lambda h: h.update(metadata)), True
    for header in (
        b"",
        b"{}",
        b"[]",
        b"null",
        b"{" * 5000,
        b'{"a": NaN}',
        b"\xff\xfe{}",
        b"x" * 99,
    ):
        yield ".safetensors", joined(header, b""), False
    for length in (0, 1, 2**20, 2**40, 2**63, 2**64 - 1):
        yield ".safetensors", joined(b"{}", b"", length), False
    for kind in (np.nan, np.inf, -np.inf):
        yield ".safetensors", stored(tensors | {first: np.full_like(tensors[first], kind)}), False
    for dtype in (ml_dtypes.float8_e4m3fn, "int8", "complex64", "bool"):
        yield ".safetensors", stored(tensors | {first: tensors[first].astype(dtype)}), False
    yield ".safetensors", stored({n: v.astype("float64") for n, v in tensors.items()}), True
    yield ".safetensors", stored({f"module.{n}": v for n, v in tensors.items()}), True
    for shape in (
        (1, 1, 16),
        (1, 3, 16),
        (5, 20, 16),
        (0, 5, 16),
        (1, 5, 0),
        (17, 16),
        (1, 1, 5, 16),
    ):
        grids = {"pos_embed": np.zeros(shape, "float32")}
        yield ".safetensors", stored(tensors | grids), False


# === Keras files ===


def keras(path):
    """Yields variants of a Keras file with one change to the weights each."""
    whole = path.read_bytes()
    ending = "".join(path.suffixes)
    yield ending, whole, True
    for size in (0, 3, 100, 500, 3000, len(whole) // 2, len(whole) - 1):
        yield ending, whole[:size], False
    if ending == ".keras":
        parts = unpacked(whole)
        for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):
            yield ending, packed(parts, method), False
        yield ending, packed({n: d for n, d in parts.items() if "weights" not in n}), False
        yield ending, packed(parts | {"model.weights.h5": b"x"}), False
        yield ending, packed(parts | {"config.json": b"not JSON"}), True
        yield ending, packed(parts | {"../../outside": b"x"}), True
        return
    for change in (
        lambda h: h["layers/dense/vars/0"].write_direct(np.full((16, 5), np.nan, "float32")),
        lambda h: exchange(h, "layers/dense/vars/0", np.zeros((16, 8), "float32")),
        lambda h: exchange(h, "layers/dense/vars/0", np.zeros((16, 5), "int32")),
        lambda h: exchange(h, "layers/dense/vars/0", np.zeros((16, 5), "complex64")),
        lambda h: exchange(h, "layers/dense/vars/0", np.zeros((), "float32")),
        lambda h: exchange(h, "layers/dense/vars/0", b"text"),
        lambda h: h.pop("layers/dense/vars/1"),
        lambda h: h.pop("layers/dense"),
        lambda h: h.pop("layers"),
        lambda h: exchange(h, "layers/dense", np.zeros(3, "float32")),
        lambda h: link(
            h, "layers/dense/vars/0", h5py.ExternalLink(path.name, "layers/dense/vars/0")
        ),
        lambda h: link(h, "layers/dense", h5py.ExternalLink("/etc/passwd", "x")),
        lambda h: link(h, "layers/dense", h5py.SoftLink("/layers/layer_normalization")),
        lambda h: bomb(h, "layers/dense/vars/0", (2**40, 2**20)),
        lambda h: bomb(h, "layers/dense/vars/0", (16, 5)),
        lambda h: outside(h, "layers/dense/vars/0", "/etc/passwd"),
        lambda h: virtual(h, "layers/dense/vars/0", path),
        lambda h: h.create_dataset(f"layers/{ESCAPES}/vars/0", data=np.zeros(3, "float32")),
        lambda h: h.move("layers/transformer_block_1", "layers/transformer_block_7"),
        lambda h: exchange(h, "layers/position_embedding/vars/grid", np.array([2**31, 2**31])),
        lambda h: exchange(h, "layers/position_embedding/vars/grid", np.array([-1, -4])),
        lambda h: exchange(h, "layers/position_embedding/vars/grid", np.zeros(0)),
    ):
        file = io.BytesIO(whole)
        with h5py.File(file, "r+") as h5:
            change(h5)
        yield ending, file.getvalue(), False


def unpacked(whole):
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(parts, method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return file.getvalue()


def exchange(h5, name, value):
    del h5[name]
    h5[name] = value


def link(h5, name, target):
    del h5[name]
    h5[name] = target


def bomb(h5, name, shape):
    del h5[name]
    h5.create_dataset(name, shape, "float32", chunks=(16, 5), compression="gzip")


def outside(h5, name, path):
    del h5[name]
    h5.create_dataset(name, (16, 5), "float32", external=[(path, 0, 320)])


def virtual(h5, name, path):
    del h5[name]
    layout = h5py.VirtualLayout((16, 5), "float32")
    layout[:] = h5py.VirtualSource(str(path), "layers/dense/vars/0", (16, 5))
    h5.create_virtual_dataset(name, layout)


# === Unrelated contents under each extension ===


def anything(tensors):
    contents = (
        b"",
        b"\0" * 5000,
        b"<html>Please log in</html>" * 50,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"\x1f\x8b\x08" + bytes(100),
        b"ustar" * 200,
        b"\x80\x02.",
        b"\x80\x02" + b"(" * 10_000,
        b"PK\x05\x06" + bytes(18),
        saved(as_torch(tensors)),
        stored(tensors),
        ESCAPES.encode(),
    )
    endings = (".safetensors", ".pth", ".keras", ".weights.h5")
    for number, (content, ending) in enumerate(itertools.product(contents, endings)):
        kind = number // len(endings)
        right = (kind, ending) in {(10, ".pth"), (11, ".safetensors")}
        yield ending, content, right
    for ending in (".npz", ".ckpt", ".h5", ""):
        yield ending, stored(tensors), False
