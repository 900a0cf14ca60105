"""The C++ of XLA's custom calls: one library for all sizes, and to it a kernel of each."""

import ctypes
import math

from keras import ops

from keras_tnt import native

# What xla.cpp calls its functions, and a framework the custom calls.
FORWARD, GRADIENT = "keras_tnt_inner_transformer", "keras_tnt_inner_transformer_gradient"


def load(sizes: native.Sizes, *settings: str) -> ctypes.CDLL | None:
    """The library of the custom calls, which from now on finds the kernel `sizes.name()`.

    Args:
        sizes: `native.Sizes`.
        settings: arguments for the compiler: where a framework has XLA's headers, and the like.

    Returns:
        The library; None, with a warning, where it cannot be had.
    """
    library = native.library("xla.cpp", None, *settings)
    kernel = native.library("kernel.cpp", sizes)
    if library is None or kernel is None:
        return None
    library.keras_tnt_add_kernel.restype = None
    address = ctypes.addressof(ctypes.c_char.in_dll(kernel, "kernel"))
    library.keras_tnt_add_kernel(sizes.name().encode(), ctypes.c_void_p(address))
    return library


def apart(sums, weights: native.Weights) -> list:
    """The gradients of the weights, from the numbers of all one after another."""
    parts, start = [], 0
    for weight in weights:
        end = start + math.prod(weight.shape)
        parts.append(ops.reshape(sums[start:end], weight.shape))
        start = end
    return parts
