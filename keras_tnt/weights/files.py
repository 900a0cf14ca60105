"""Files of PyTorch-named tensors: their names and shapes first, the values one by one."""

import os
import pickle
import re
import stat
import zipfile

import numpy as np

from keras_tnt.files import expand, open_regular
from keras_tnt.text import printable
from keras_tnt.weights.companions import safe_globals
from keras_tnt.weights.wrappers import LIGHTNING, choose, without_wrappers

SAFETENSORS = (".safetensors",)
TORCH = (".pth", ".pt", ".pth.tar", ".bin", ".ckpt")
# The types of weights, as safetensors and as torch call them.
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
# What pickles of protocol 2, the only one of torch.save, begin with.
PICKLE = b"\x80\x02"
# How torch names a global that it refuses.
GLOBAL = re.compile(r"\bGLOBAL (\S+)")
ENCRYPTED = 1  # in the flags of a zip archive's entry


def open_tensors(path, ema=False):
    """Open a file of tensors without reading their values.

    Args:
        path: path of a `.safetensors` file, or of a `.pth`, `.pt`, `.pth.tar`, `.bin` or `.ckpt`
            file where torch is installed.
        ema: whether to read the moving average of the weights, which some `.pth` files hold beside
            the weights.

    Returns:
        A `TensorFile`.

    Raises:
        OSError: if there is no such file, or it may not be read.
        ImportError: if it takes torch to read it, which is not installed.
        ValueError: for another kind of file, a damaged one, and one that would run code.
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
    """Raise an OSError that says why, or a ValueError, if a path is no file that can be read."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # Opening a pipe would wait for its writer.
        raise ValueError(f"'{path}' is a folder or a device, not a file.")
    open_regular(path).close()


def advice_on_keras_files(path):
    if path.endswith((".keras", ".h5")):
        return ". A file that Keras wrote is loaded with model.load_weights(path)."
    return ""


class TensorFile:
    """Tensors of a file by name.

    Attributes:
        path: of the file.
        shapes: dict from each tensor's name to its shape.
    """

    def read(self, names):
        """The values of tensors as a list of float arrays.

        Raises:
            ValueError: if one is no array of finite floating-point numbers.
        """
        return [self.read_one(name) for name in names]

    def check(self, names):
        """Read tensors one by one, keep none, and raise what `read` would."""
        for name in names:
            self.read_one(name)

    def read_one(self, name):
        if problem := self.problem(name):
            raise self.unreadable(name, problem)
        value = self.value(name)
        value = np.asarray(value, "float64" if value.dtype == "float64" else "float32")
        with np.errstate(over="ignore"):  # The variables are of float32 or smaller types.
            finite = np.isfinite(value.astype("float32", copy=False))
        if not np.all(finite):
            raise self.unreadable(name, "holds NaN or infinity")
        return value

    def unreadable(self, name, problem):
        return ValueError(
            f"'{self.path}' cannot be loaded: tensor '{printable(name)}' {problem}. Weights are "
            f"finite numbers of {', '.join(FLOATS.values())}."
        )


class SafetensorsFile(TensorFile):
    """A `.safetensors` file; what has been read of it does not stay in memory."""

    def __init__(self, path):
        self.path = path
        with self.open() as file:
            self.names = without_wrappers(path, file.keys())
            slices = {name: file.get_slice(stored) for name, stored in self.names.items()}
            self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            self.dtypes = {name: part.get_dtype() for name, part in slices.items()}

    def open(self):
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path, framework="np")
        except SafetensorError as error:
            raise ValueError(
                f"'{self.path}' is no whole .safetensors file ({printable(str(error))}). It may be "
                "truncated or damaged: delete it, and fetch it again."
            ) from error

    def problem(self, name):
        dtype = self.dtypes[name]
        return None if dtype in FLOATS else f"is of type {dtype}"

    def value(self, name):
        # Opened anew each time: the pages of an open file that have been read count as memory of
        # the process.
        with self.open() as file:
            return file.get_tensor(self.names[name])


class TorchFile(TensorFile):
    """A file that `torch.save` wrote, of tensors alone."""

    def __init__(self, path, ema):
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
        import torch

        tensor = self.tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout is not torch.strided or tensor.is_nested:
            return f"is {str(tensor.layout).removeprefix('torch.')}, not dense"
        if tensor.is_meta:
            return "is on the device 'meta', where no values are"
        if dtype not in FLOATS.values():
            return f"is of type {dtype}"
        # `expand` shows the same number at many places.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            return f"of shape {tuple(tensor.shape)} has fewer numbers in the file"
        return None

    def value(self, name):
        return self.tensors[name].detach().float().resolve_neg().numpy()


# === Files of torch.save ===


def load_torch(path):
    """What a file of `torch.save` holds, none of it code, its tensors mapped from the disk."""
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
        # Many files hold the settings of a training run next to the weights.
        with torch.serialization.safe_globals(safe_globals()):
            content = torch.load(
                path, map_location=claims.add, weights_only=True, mmap=stored is not None
            )
        if stored is not None and sorted(claims.sizes) != sorted(stored):
            raise ValueError("its tensors claim other sizes than its entries have")
        return content
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"'{path}' is refused: {refusal(error)}, and opening it could run code of whoever made "
            "it. Where you trust the file, write the state dict alone as .safetensors."
        ) from error
    except Exception as error:  # A damaged pickle raises whatever its garbage leads to.
        raise damaged(path, f"{type(error).__name__}: {error}".rstrip(": ")) from error


def refusal(error):
    """Returns why torch refused a pickle: the global that it names, where there is one."""
    found = GLOBAL.search(str(error))
    if found is None:
        return "it is damaged, or holds more than tensors"
    name = printable(found[1])
    return f"it holds the global '{name}', which is neither a tensor nor a plain setting"


def damaged(path, reason):
    return ValueError(
        f"'{path}' cannot be read: {printable(reason, longest=300)}. It may be truncated or "
        "damaged: delete it, and fetch it again."
    )


class Claims:
    """The bytes that a file claims for its tensors, each storage as torch comes to it."""

    def __init__(self, room):
        self.room = room
        self.sizes = []

    def add(self, storage, _):
        """Leave a storage where it is, on the CPU; a file cannot hold more than its own size."""
        size = storage.nbytes()
        self.room -= size
        if self.room < 0:
            raise ValueError("its tensors claim more bytes than it has")
        if size:
            self.sizes.append(size)
        return storage


def check_torch_format(path):
    """Check what can be checked before torch reads a file.

    Returns:
        The sizes of the stored tensors in bytes where the file is a zip archive; None where it is
        of torch's older format.

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
    """The entries of a zip archive, each of them there once, uncompressed and undamaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            problem = entry_problem(entries)
            if problem is None and (changed := archive.testzip()):
                problem = f"the checksum of its entry '{changed}' differs"
    except Exception as error:  # A damaged archive raises whatever its garbage leads to.
        raise damaged(path, str(error) or type(error).__name__) from error
    if problem:
        raise damaged(path, problem)
    return entries


def entry_problem(entries):
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        return "two of its entries have the same name"
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & ENCRYPTED:
            return f"its entry '{entry.filename}' is compressed or encrypted, unlike when written"
    return None
