"""The C++ kernels as custom operators of torch, `keras_tnt::compute` and its gradient.

The operators read sizes off their tensors and call the libraries of torch_*.cpp through ctypes.
"""

import ctypes
import functools

import torch

from keras_tnt import kernels
from keras_tnt.kernels import plain


def make(sizes: kernels.Sizes):
    """Returns the function that `runtimes.operator` documents, or `None` without a library."""
    if library_of(sizes) is None:
        return None
    heads, across_words = getattr(sizes, "heads", 1), getattr(sizes, "across_words", False)

    def call(x, weights, epsilon, keep=None):
        return run(x, list(weights), keep, heads, epsilon, across_words, sizes.half)[0]

    return call


@functools.cache
def library_of(sizes):
    """Loads the library with the functions `forward` and `gradient`, and sets their C types."""
    inner = sizes.part == "inner"
    library = kernels.library(f"torch_{sizes.part}.cpp", sizes if inner else None, "-fopenmp")
    if library is not None:
        pointer, integers = ctypes.c_void_p, len(sizes.numbers((1, 1, 1)))
        numbers = [*[ctypes.c_int64] * integers, ctypes.c_float, ctypes.c_int]
        library.forward.argtypes = [*[pointer] * 5, *numbers]
        library.forward.restype = None
        if not sizes.half:
            library.gradient.argtypes = [*[pointer] * 7, *numbers]
            library.gradient.restype = None
    return library


def sizes_of(x, weights, heads, across_words, half):
    """Returns the `kernels.Sizes` that the operator's arguments determine."""
    if len(weights) == len(kernels.PatchWeights._fields):
        return kernels.PatchSizes(kernels.PatchWeights(*weights).bias.numel(), half)
    hidden = kernels.Weights(*weights).fc1_bias.numel()
    if x.ndim == 3:
        return kernels.OuterSizes(heads, hidden, half)
    return kernels.InnerSizes(*x.shape[2:], heads, hidden, across_words, half)


def check(sizes, x, weights, keep, kept=(), gradient=None):
    """Validates tensors before their pointers go to C++; an untrusted program may pass any.

    Args:
        sizes: `kernels.Sizes` that determine the expected shapes.
        x: words or tokens.
        weights: tensors in the order of `sizes.weights`.
        keep: drop-path multipliers, or `None`.
        kept: saved activations, if `gradient` is given. Defaults to none.
        gradient: gradient of the output. Defaults to `None`, in the forward pass.

    Raises:
        ValueError: if a tensor has an unexpected shape, dtype or device.
    """
    shape = tuple(x.shape)
    factors = (2, *shape[: 2 if sizes.part == "inner" else 1])
    if not sizes.takes(shape) or (
        sizes.half and sizes.weights is kernels.Weights and keep is not None
    ):
        raise ValueError(f"`x` has a shape that `keras_tnt::compute` does not take: {shape}.")
    pairs = [(x, shape), *zip(weights, sizes.weight_shapes(shape), strict=True)]
    if keep is not None:
        pairs.append((keep, factors))
    if gradient is not None:
        pairs += [(gradient, sizes.result(shape)), *zip(kept, sizes.kept(shape), strict=True)]
    for tensor, wanted in pairs:
        if tuple(tensor.shape) != wanted or tensor.dtype != torch.float32 or not tensor.is_cpu:
            raise ValueError(
                f"`keras_tnt::compute` takes a float32 tensor of the shape {wanted} on the CPU. "
                f"Received: {tensor.dtype}, {tuple(tensor.shape)}, {tensor.device}."
            )


def numbers_of(x, sizes, epsilon):
    """Returns the scalar arguments of the C++ functions: sizes, epsilon and number of threads."""
    return *sizes.numbers(x.shape), epsilon, torch.get_num_threads()


def side_by_side(x, weights, keep):
    """Returns contiguous x, weights and `keep`, and an array of pointers to the weights."""
    weights = [weight.contiguous() for weight in weights]
    return x.contiguous(), weights, keep if keep is None else keep.contiguous(), pointers(weights)


def pointers(tensors):
    """Returns a C array of the data pointers of tensors, which must stay alive."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def address(tensor):
    """Returns the data pointer of a tensor, or `None` (null) for `None`."""
    return None if tensor is None else tensor.data_ptr()


@torch.library.custom_op("keras_tnt::compute", mutates_args=(), tags=torch.Tag.flexible_layout)
def run(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    keep: torch.Tensor | None,
    heads: int,
    epsilon: float,
    across_words: bool,
    half: bool,
) -> list[torch.Tensor]:
    """Runs a forward kernel; returns the output and the saved activations."""
    sizes = sizes_of(x, weights, heads, across_words, half)
    check(sizes, x, weights, keep)
    x, weights, keep, to_weights = side_by_side(x, weights, keep)
    results = [x.new_empty(shape) for shape in (sizes.result(x.shape), *sizes.kept(x.shape))]
    library_of(sizes).forward(
        *(address(x), to_weights, address(keep)),
        *(address(results[0]), address(results[-1])),
        *numbers_of(x, sizes, epsilon),
    )
    return results


@torch.library.custom_op("keras_tnt::compute_gradient", mutates_args=())
def run_gradient(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    keep: torch.Tensor | None,
    kept: list[torch.Tensor],
    gradient: torch.Tensor,
    heads: int,
    epsilon: float,
    across_words: bool,
    half: bool,
) -> list[torch.Tensor]:
    """Runs a backward kernel; returns the gradients with respect to x and the weights."""
    sizes = sizes_of(x, weights, heads, across_words, half)
    check(sizes, x, weights, keep, kept, gradient)
    x, weights, keep, to_weights = side_by_side(x, weights, keep)
    gradient = gradient.contiguous()
    results = [torch.empty_like(tensor) for tensor in (x, *weights)]
    library_of(sizes).gradient(
        *(address(x), address(gradient), to_weights, address(keep)),
        *(address(kept[0]) if kept else None, address(results[0]), pointers(results[1:])),
        *numbers_of(x, sizes, epsilon),
    )
    return results


@run.register_fake
def _(x, weights, keep, heads, epsilon, across_words, half):
    sizes = sizes_of(x, weights, heads, across_words, half)
    return [x.new_empty(shape) for shape in (sizes.result(x.shape), *sizes.kept(x.shape))]


@run_gradient.register_fake
def _(x, weights, keep, kept, gradient, heads, epsilon, across_words, half):
    return [torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x, *weights)]


@torch.enable_grad()
def plain_gradient(x, weights, keep, kept, gradient, heads, epsilon, across_words, half):
    """Returns the result of `run_gradient` by differentiable operations, for double backward."""
    sizes = sizes_of(x, weights, heads, across_words, half)
    # Use views, not the tensors themselves: where a block is applied twice, x depends on the same
    # weights, and their gradients through x would be counted again.
    inputs = [
        y.view_as(y) if y.requires_grad else y.detach().requires_grad_() for y in (x, *weights)
    ]
    result = plain.compute(inputs[0], inputs[1:], keep, sizes, epsilon)
    return torch.autograd.grad(result, inputs, gradient, create_graph=True)


def remember(ctx, inputs, output):
    """Saves tensors for `backward`; torch calls it `setup_context`."""
    x, weights, keep, *ctx.settings = inputs
    ctx.count = len(weights)
    ctx.set_materialize_grads(False)  # Saved activations have no gradient.
    ctx.save_for_backward(x, keep, *weights, *output[1:])


def is_batched(tensor):
    """Returns whether a tensor is batched by `torch.func.vmap` or the legacy vmap of autograd."""
    kinds = torch._C._functorch
    return kinds.is_batchedtensor(tensor) or kinds.is_legacy_batchedtensor(tensor)


def backward(ctx, gradients):
    """Computes gradients in C++, or by the reference for bfloat16, vmap and double backward."""
    x, keep, *rest = ctx.saved_tensors
    count = ctx.count
    in_plain = torch.is_grad_enabled() or is_batched(gradients[0]) or ctx.settings[-1]
    find = plain_gradient if in_plain else run_gradient
    of_x, *of_weights = find(x, rest[:count], keep, rest[count:], gradients[0], *ctx.settings)
    return of_x, list(of_weights), *[None] * 5


run.register_autograd(backward, setup_context=remember)
