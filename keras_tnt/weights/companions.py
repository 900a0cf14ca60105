"""Inert stand-ins for objects that training scripts save next to the weights.

`torch.load(weights_only=True)` rejects every global that it does not know. The globals listed here
(scalars, paths, settings) are common and carry no weights. Each is unpickled as an inert stand-in,
so that no constructor of another package runs on values of an untrusted file.
"""

import argparse
import datetime
import pathlib
import re

import numpy as np

# NumPy type codes of numbers, strings and times, with the item size in bytes.
SCALAR_TYPE = re.compile(r"[biufcSUMm]\d{1,6}")


class Refused(ValueError):
    """Raised for a whole file with contents that are no plain setting."""


class Dtype:
    """Stand-in for `numpy.dtype`: the type code and the byte order."""

    def __init__(self, code="", *_):
        """Stores the type code; other arguments are ignored."""
        self.code, self.order = code, "="

    def __setstate__(self, state):
        """Reads the byte order, the second item of the pickled state."""
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]


class Array:
    """Stand-in for `numpy.ndarray`: an array next to the weights, whose values are not read."""

    def __init__(self, *_):
        """Ignores all arguments."""
        pass

    def __setstate__(self, state):
        """Discards the pickled state."""
        pass


class Inert:
    """Stand-in for a value without a state, such as a `range`, and for a NumPy type."""

    def __init__(self, *_):
        """Ignores all arguments."""
        pass


class Dict:
    """Stand-in for subclasses of `dict`."""

    def __new__(cls, *_):
        """Returns a plain empty dict, which the unpickler fills."""
        return {}


class List:
    """Stand-in for other sequences."""

    def __new__(cls, *_):
        """Returns a plain empty list, which the unpickler fills."""
        return []


class Factory:
    """Stand-in for a built-in type that a pickle names, such as the factory of a `defaultdict`.

    Args:
        type: the type, of which only the empty value is ever created.
    """

    def __init__(self, type):
        """Stores the type."""
        self.type = type

    def __call__(self, *arguments):
        """Returns the type's empty value; raises `Refused` if given arguments."""
        if arguments:
            raise Refused(f"it calls the global 'builtins.{self.type.__name__}'")
        return self.type()


def scalar(dtype, data=b""):
    """Returns a Python number, string or time, in place of NumPy's `scalar`.

    Args:
        dtype: a `Dtype` of a number, string or time.
        data: bytes of the item.

    Raises:
        Refused: if the type is another one, or `data` does not have its size.
    """
    if not isinstance(dtype, Dtype) or not SCALAR_TYPE.fullmatch(str(dtype.code)):
        code = f" of type {dtype.code}" if isinstance(dtype, Dtype) else ""
        raise Refused(f"it holds a NumPy scalar{code} that is no number, no text and no time")
    dtype = np.dtype(dtype.order + dtype.code)
    if not isinstance(data, bytes) or len(data) != dtype.itemsize:
        raise Refused("it holds a NumPy scalar of another size than its type has")
    return np.frombuffer(data, dtype)[0].item()


def posix_path(*parts):
    """Returns a pure POSIX path, which cannot access the disk, in place of `pathlib.Path`."""
    return pathlib.PurePosixPath(*map(str, parts))


def windows_path(*parts):
    """Returns a pure Windows path, which cannot access the disk, in place of `WindowsPath`."""
    return pathlib.PureWindowsPath(*map(str, parts))


def safe_globals():
    """Returns the pairs (stand-in, name) that `torch.serialization.safe_globals` takes."""
    found = [
        (argparse.Namespace, "argparse.Namespace"),
        (argparse.Namespace, "types.SimpleNamespace"),
        (Dict, "collections.defaultdict"),
        (List, "collections.deque"),
        (Dtype, "numpy.dtype"),
        (Array, "numpy.ndarray"),
        (Inert, "decimal.Decimal"),
    ]
    found += [(Inert, f"builtins.{name}") for name in ("frozenset", "range", "slice")]
    found += [(Inert, f"numpy.{kind.__name__}") for kind in np.sctypeDict.values()]
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
