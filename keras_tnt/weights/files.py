"""PyTorch-named tensor files: names and shapes are read first, values on demand."""

import os
import pickle
import re
import stat
import zipfile

import numpy as np

from keras_tnt.files import expand, open_regular
from keras_tnt.text import printable
from keras_tnt.weights.companions import Refused, safe_globals
from keras_tnt.weights.wrappers import LIGHTNING, choose, without_wrappers

SAFETENSORS = (".safetensors",)
TORCH = (".pth", ".pt", ".pth.tar", ".bin", ".ckpt")
# Weight types, by safetensors' names, with torch's.
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
# First bytes of a pickle of protocol 2, the one that torch.save writes.
PICKLE = b"\x80\x02"
# Matches the name of the global in torch's error when it rejects a pickle.
GLOBAL = re.compile(r"\bGLOBAL (\S+)")
ENCRYPTED = 1  # flag bit of a zip entry


def open_tensors(path, ema=False):
    """Opens a file of tensors without reading their values.

    Args:
        path: path of a `.safetensors` file, or of a `.pth`, `.pt`, `.pth.tar`, `.bin` or `.ckpt`
            file if torch is installed.
        ema: whether to read the exponential moving average (EMA) of the weights, which some `.pth`
            files store in addition to the weights. Defaults to `False`.

    Returns:
        A `TensorFile`.

    Raises:
        OSError: if the file does not exist or cannot be read.
        ImportError: if reading it needs torch, which is not installed.
        ValueError: for other file types, damaged files, files that would execute code, and
            `ema=True` for a file without an EMA.
    """
    path = expand(path)
    if not path.endswith(SAFETENSORS + TORCH):
        raise ValueError(
            f"A checkpoint is a file that ends in {', '.join(SAFETENSORS + TORCH)}. "
            f"Received: '{path}'" + advice_on_keras_files(path)
        )
    check_readable(path)
    if path.endswith(SAFETENSORS):
        if ema:
            raise ValueError(f"'{path}' holds one set of weights: leave `ema` out.")
        return SafetensorsFile(path)
    return TorchFile(path, ema)


def check_readable(path):
    """Checks that a path is a readable regular file.

    Args:
        path: the path.

    Raises:
        OSError: if it does not exist or cannot be opened.
        ValueError: if it is a directory or a device.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # Opening a pipe would wait for its writer.
        raise ValueError(f"'{path}' is a folder or a device, not a file.")
    open_regular(path).close()


def advice_on_keras_files(path):
    """Returns a hint on `load_weights` for the path of a Keras file; else an empty string."""
    if path.endswith((".keras", ".h5")):
        return ". A file that Keras wrote is loaded with model.load_weights(path)."
    return ""


class TensorFile:
    """Tensors of a file, by name.

    Attributes:
        path: path of the file.
        shapes: dict from tensor name to shape.
    """

    BY_NAME = ("shapes",)  # attributes that are dicts by tensor name

    def select(self, prefix):
        """Keeps the tensors whose names begin with a prefix, and removes it from the names."""
        for attribute in self.BY_NAME:
            values = getattr(self, attribute).items()
            selected = {name[len(prefix) :]: v for name, v in values if name.startswith(prefix)}
            setattr(self, attribute, selected)

    def read(self, names):
        """Returns the values of tensors as a list of float32 or float64 arrays.

        Args:
            names: names of the tensors.

        Raises:
            ValueError: if a tensor is not a dense floating-point array, or contains NaN or Inf.
        """
        return [self.read_one(name) for name in names]

    def check(self, names):
        """Reads tensors one at a time and discards them; raises as `read` does."""
        for name in names:
            self.read_one(name)

    def read_one(self, name):
        """Returns one tensor as a float32 or float64 array; raises as `read` does."""
        if problem := self.problem(name):
            raise self.unreadable(name, problem)
        value = self.value(name)
        value = np.asarray(value, "float64" if value.dtype == "float64" else "float32")
        with np.errstate(over="ignore"):  # Variables are float32 or smaller.
            finite = np.isfinite(value.astype("float32", copy=False))
        if not np.all(finite):
            raise self.unreadable(name, "holds NaN or infinity")
        return value

    def unreadable(self, name, problem):
        """Returns the `ValueError` for a tensor that cannot be loaded."""
        return ValueError(
            f"'{self.path}' cannot be loaded: tensor '{printable(name)}' {problem}. Weights are "
            f"finite numbers of {', '.join(FLOATS.values())}."
        )


class SafetensorsFile(TensorFile):
    """File in the `.safetensors` format, whose tensors do not stay in memory after reading."""

    BY_NAME = ("names", "shapes", "dtypes")

    def __init__(self, path):
        """Reads names, shapes and types from the header."""
        self.path = path
        with self.open() as file:
            self.names = without_wrappers(path, file.keys())
            slices = {name: file.get_slice(stored) for name, stored in self.names.items()}
            self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            self.dtypes = {name: part.get_dtype() for name, part in slices.items()}

    def open(self):
        """Opens the file; raises a `ValueError` if it is truncated or damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path, framework="np")
        except SafetensorError as error:
            raise ValueError(
                f"'{self.path}' is no whole .safetensors file ({printable(str(error))}). It may be "
                "truncated or damaged: delete it, and fetch it again."
            ) from error

    def problem(self, name):
        """Returns the reason that a tensor is not a usable weight; `None` if it is."""
        dtype = self.dtypes[name]
        return None if dtype in FLOATS else f"is of type {dtype}"

    def value(self, name):
        """Returns a tensor as an array of its stored type."""
        # The file is reopened each time, because pages of an open mapping that have been read
        # count as resident memory of the process.
        with self.open() as file:
            return file.get_tensor(self.names[name])


class TorchFile(TensorFile):
    """Tensors of a file that `torch.save` wrote."""

    BY_NAME = ("tensors", "shapes")

    def __init__(self, path, ema):
        """Unpickles the file without running code, and selects the weights or their EMA."""
        self.path = path
        whole = load_torch(path)
        content = choose(path, whole, ema)
        import torch

        tensors = {name: value for name, value in content.items() if torch.is_tensor(value)}
        for name in tensors:
            if not isinstance(name, str):
                raise ValueError(
                    f"'{path}' cannot be loaded: the name of a tensor is {printable(name)}, which "
                    "is no text."
                )
        names = without_wrappers(path, tensors, others_may_be=LIGHTNING in whole)
        self.tensors = {name: tensors[stored] for name, stored in names.items()}
        self.shapes = {name: tuple(value.shape) for name, value in self.tensors.items()}

    def problem(self, name):
        """Returns the reason that a tensor is not a usable weight; `None` if it is."""
        import torch

        tensor = self.tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout is not torch.strided or tensor.is_nested:
            return f"is {str(tensor.layout).removeprefix('torch.')}, not dense"
        if tensor.is_meta:
            return "is on the device 'meta', where no values are"
        if dtype not in FLOATS.values():
            return f"is of type {dtype}"
        # Tensors from `expand` repeat stored numbers, so the file does not bound their size.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            return f"of shape {tuple(tensor.shape)} has fewer numbers in the file"
        return None

    def value(self, name):
        """Returns a tensor as a float32 array."""
        return self.tensors[name].detach().float().resolve_neg().numpy()


# === torch.save files ===


def load_torch(path):
    """Returns the content of a `torch.save` file, without running code in it.

    Tensors of zip archives are memory-mapped.

    Args:
        path: path of the file.

    Raises:
        ImportError: if torch is not installed.
        ValueError: if the file is damaged, or would execute code.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"Reading '{path}' needs torch. Install it with "
            '`pip install "keras-tnt[torch]"`, or convert the file to .safetensors.'
        ) from error
    stored = check_torch_format(path)
    claims = Claims(os.path.getsize(path))
    try:
        # Many checkpoints store training settings next to the weights.
        with torch.serialization.safe_globals(safe_globals()):
            content = torch.load(
                path, map_location=claims.add, weights_only=True, mmap=stored is not None
            )
        if stored is not None and sorted(claims.sizes) != sorted(stored):
            raise ValueError("its tensors claim other sizes than its entries have")
        return content
    except Refused as error:
        raise ValueError(
            f"'{path}' is refused: {printable(str(error))}. Write the state dict alone as "
            ".safetensors."
        ) from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"'{path}' is refused: {refusal(error)}, and opening it could run code of whoever made "
            "it. Where you trust the file, write the state dict alone as .safetensors."
        ) from error
    except Exception as error:  # A damaged pickle may raise any exception.
        raise damaged(path, f"{type(error).__name__}: {error}".rstrip(": ")) from error


def refusal(error):
    """Returns the reason that torch rejected a pickle, with the global that it names, if any."""
    found = GLOBAL.search(str(error))
    if found is None:
        return "it is damaged, or holds more than tensors"
    name = printable(found[1])
    return f"it holds the global '{name}', which is neither a tensor nor a plain setting"


def damaged(path, reason):
    """Returns the `ValueError` for a damaged file."""
    return ValueError(
        f"'{path}' cannot be read: {printable(reason, longest=300)}. It may be truncated or "
        "damaged: delete it, and fetch it again."
    )


class Claims:
    """Byte sizes that a file claims for its tensor storages, limited by the file's own size."""

    def __init__(self, room):
        """Takes the size of the file in bytes."""
        self.room = room
        self.sizes = []

    def add(self, storage, _):
        """Returns a storage unchanged, on the CPU, as torch's `map_location` callback.

        Args:
            storage: torch storage.
            _: location tag, ignored.

        Raises:
            ValueError: if all storages together claim more bytes than the file has.
        """
        size = storage.nbytes()
        self.room -= size
        if self.room < 0:
            raise ValueError("its tensors claim more bytes than it has")
        if size:
            self.sizes.append(size)
        return storage


def check_torch_format(path):
    """Validates a file before torch reads it.

    Args:
        path: path of the file.

    Returns:
        A list of the storages' sizes in bytes for a zip archive; `None` for torch's legacy format.

    Raises:
        ValueError: if it is neither, or a damaged archive.
    """
    if zipfile.is_zipfile(path):
        entries = check_archive(path)
        if not any(entry.filename.endswith("/data.pkl") for entry in entries):
            raise damaged(path, "it is a zip archive, but not of torch.save")
        return [e.file_size for e in entries if "/data/" in e.filename and e.file_size]
    with open_regular(path) as file:
        start = file.read(40)
    if not start.startswith(PICKLE):
        raise damaged(path, f"it is no file of torch.save, and begins with {start!r}")
    return None


def check_archive(path):
    """Returns the entries of a zip archive; they must be unique, uncompressed and undamaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            problem = entry_problem(entries)
            if problem is None and (changed := archive.testzip()):
                problem = f"the checksum of its entry '{changed}' differs"
    except Exception as error:  # A damaged archive may raise any exception.
        raise damaged(path, str(error) or type(error).__name__) from error
    if problem:
        raise damaged(path, problem)
    return entries


def entry_problem(entries):
    """Returns the reason that zip entries are not acceptable; `None` if they are."""
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        return "two of its entries have the same name"
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & ENCRYPTED:
            return f"its entry '{entry.filename}' is compressed or encrypted, unlike when written"
    return None
