"""Loads the library of XLA custom calls (xla.cpp), and registers inner kernels (kernel.cpp) in it.

`jax_operator` and `tensorflow_operator` share it.
"""

import ctypes

from keras_tnt import kernels


def targets(sizes: kernels.Sizes) -> tuple[str, str | None]:
    """Returns the names of the XLA custom calls of the forward and the backward pass.

    They are also the names of the functions in xla.cpp. The bfloat16 kernels have no backward pass:
    `None`, so that the gradient is that of the reference implementation.
    """
    name = f"keras_tnt_{sizes.part}"
    return name, None if sizes.half else f"{name}_gradient"


def kept_count(sizes: kernels.Sizes) -> int:
    """Returns the number of saved activations, operands of the backward pass."""
    return len(sizes.kept((1, 1, 1)))


def inputs_count(sizes: kernels.Sizes) -> int:
    """Returns the number of differentiable operands of the forward pass: x and the weights."""
    return 1 + len(sizes.weights._fields)


def load(sizes: kernels.Sizes, *settings: str) -> ctypes.CDLL | None:
    """Loads the library of custom calls and, for an inner transformer, registers its kernel.

    Args:
        sizes: the kernel that is needed.
        *settings: arguments for the compiler, such as the include directory of XLA's headers.

    Returns:
        The library. If it cannot be compiled or loaded, `None`, with a warning.

    Raises:
        AttributeError: if the library lacks a custom call, because the compiler does not target
            AVX512-BF16.
    """
    library = kernels.library("xla.cpp", None, *settings)
    if library is None:
        return None
    for name in filter(None, targets(sizes)):
        getattr(library, name)
    if sizes.part != "inner":
        return library
    kernel = kernels.library("kernel.cpp", sizes)
    if kernel is None:
        return None
    library.keras_tnt_add_kernel.restype = None
    address = ctypes.addressof(ctypes.c_char.in_dll(kernel, "kernel"))
    library.keras_tnt_add_kernel(sizes.name().encode(), ctypes.c_void_p(address))
    return library
