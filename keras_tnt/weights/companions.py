"""Stand-ins for what training scripts save next to the weights: scalars, paths, settings.

`torch.load(weights_only=True)` refuses every global that it does not know. The globals listed
here are common and carry no weights; each is read as an inert stand-in, so that no constructor of
another package is called with the values of an untrusted file.
"""

import argparse
import datetime
import pathlib
import re

import numpy as np

# Kinds of NumPy's types that are plain numbers or text, with the bytes of an item.
SCALAR_TYPE = re.compile(r"[biufcSU]\d{1,6}")


class Dtype:
    """Stands in for `numpy.dtype`: the code of a type and its byte order."""

    def __init__(self, code="", *_):
        self.code, self.order = code, "="

    def __setstate__(self, state):
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]


class Array:
    """Stands in for `numpy.ndarray`: an array next to the weights, whose values are not read."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


class Dict:
    """Stands in for subclasses of `dict`: makes a plain one, which is filled afterwards."""

    def __new__(cls, *_):
        return {}


class List:
    """Stands in for other sequences: makes a plain list, which is filled afterwards."""

    def __new__(cls, *_):
        return []


class Factory:
    """Stands in for a built-in type that is named, such as the factory of a `defaultdict`.

    Args:
        type: the type, of which only the empty value is made.
    """

    def __init__(self, type):
        self.type = type

    def __call__(self, *arguments):
        if arguments:
            raise ValueError(f"it calls {self.type.__name__}")
        return self.type()


def scalar(dtype, data=b""):
    """Stands in for NumPy's `scalar`: returns a Python number or string of the bytes `data`."""
    if not isinstance(dtype, Dtype) or not SCALAR_TYPE.fullmatch(str(dtype.code)):
        raise ValueError("it holds a NumPy scalar that is no number and no text")
    dtype = np.dtype(dtype.order + dtype.code)
    if not isinstance(data, bytes) or len(data) != dtype.itemsize:
        raise ValueError("it holds a NumPy scalar of another size than its type has")
    return np.frombuffer(data, dtype)[0].item()


def posix_path(*parts):
    """Stands in for `pathlib.Path`: a path that never reaches the disk."""
    return pathlib.PurePosixPath(*map(str, parts))


def windows_path(*parts):
    """Stands in for `pathlib.WindowsPath`: a path that never reaches the disk."""
    return pathlib.PureWindowsPath(*map(str, parts))


def safe_globals():
    """Returns what `torch.serialization.safe_globals` takes: pairs of a stand-in and a name."""
    found = [
        (argparse.Namespace, "argparse.Namespace"),
        (argparse.Namespace, "types.SimpleNamespace"),
        (Dict, "collections.defaultdict"),
        (List, "collections.deque"),
        (Dtype, "numpy.dtype"),
        (Array, "numpy.ndarray"),
    ]
    for core in ("numpy.core", "numpy._core"):
        found += [(scalar, f"{core}.multiarray.scalar"), (Array, f"{core}.multiarray._reconstruct")]
    for module in ("pathlib", "pathlib._local"):
        for name in ("Path", "PosixPath", "PurePath", "PurePosixPath"):
            found.append((posix_path, f"{module}.{name}"))
        for name in ("WindowsPath", "PureWindowsPath"):
            found.append((windows_path, f"{module}.{name}"))
    for name in ("datetime", "date", "time", "timedelta", "timezone"):
        found.append((getattr(datetime, name), f"datetime.{name}"))
    for kind in (list, dict, tuple, int, float, str, bool, bytes, object):
        found.append((Factory(kind), f"builtins.{kind.__name__}"))
    for module in (
        "lightning.fabric.utilities.data",
        "lightning_fabric.utilities.data",
        "lightning.pytorch.utilities.parsing",
        "pytorch_lightning.utilities.parsing",
    ):
        found.append((Dict, f"{module}.AttributeDict"))
    return found
