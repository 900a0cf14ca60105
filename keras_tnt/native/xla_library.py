"""The C++ of XLA's custom calls: one library, and to it a kernel of each inner transformer."""

import ctypes

from keras_tnt import native


def targets(sizes: native.Sizes) -> tuple[str, str | None]:
    """What xla.cpp calls its functions, and a framework the custom calls: forward and gradient.

    Where there is none for the gradient, it is computed in plain operations.
    """
    name = f"keras_tnt_{sizes.part}"
    return name, None if sizes.half else f"{name}_gradient"


def kept_count(sizes: native.Sizes) -> int:
    """How many operands of the gradient are what the forward pass kept."""
    return len(sizes.kept((1, 1, 1)))


def inputs_count(sizes: native.Sizes) -> int:
    """How many operands of the forward pass have a gradient: x and the weights."""
    return 1 + len(sizes.weights._fields)


def load(sizes: native.Sizes, *settings: str) -> ctypes.CDLL | None:
    """The library of the custom calls, which from now on finds the kernel of an inner transformer.

    Args:
        sizes: of what is computed.
        settings: arguments for the compiler: where a framework has XLA's headers, and the like.

    Returns:
        The library; None, with a warning, where it cannot be had.

    Raises:
        AttributeError: if the compiler knows no instructions for what is computed.
    """
    library = native.library("xla.cpp", None, *settings)
    if library is None:
        return None
    for name in filter(None, targets(sizes)):
        getattr(library, name)
    if sizes.part != "inner":
        return library
    kernel = native.library("kernel.cpp", sizes)
    if kernel is None:
        return None
    library.keras_tnt_add_kernel.restype = None
    address = ctypes.addressof(ctypes.c_char.in_dll(kernel, "kernel"))
    library.keras_tnt_add_kernel(sizes.name().encode(), ctypes.c_void_p(address))
    return library
