"""The parts of TNT's block as operations of torch; sizes are read off their tensors."""

import ctypes
import functools

import torch

from keras_tnt import native
from keras_tnt.native import plain


def make(sizes: native.Sizes):
    """The function that `runtimes.operator` describes; None where there is no library for it."""
    if library_of(sizes) is None:
        return None
    heads, across_words = getattr(sizes, "heads", 1), getattr(sizes, "across_words", False)

    def call(x, weights, epsilon, keep=None):
        return run(x, list(weights), keep, heads, epsilon, across_words, sizes.half)[0]

    return call


@functools.cache
def library_of(sizes):
    """The library with the functions `forward` and `gradient`, as this file calls them."""
    inner = sizes.part == "inner"
    library = native.library(f"torch_{sizes.part}.cpp", sizes if inner else None, "-fopenmp")
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
    if len(weights) == len(native.PatchWeights._fields):
        return native.PatchSizes(native.PatchWeights(*weights).bias.numel(), half)
    hidden = native.Weights(*weights).fc1_bias.numel()
    if x.ndim == 3:
        return native.OuterSizes(heads, hidden, half)
    return native.InnerSizes(*x.shape[2:], heads, hidden, across_words, half)


def check(sizes, x, weights, keep, kept=(), gradient=None):
    """Refuse tensors that the C++ does not take: a program may bring any.

    Raises:
        ValueError: if a tensor has another shape, type or device than the sizes say.
    """
    shape = tuple(x.shape)
    factors = (2, *shape[: 2 if sizes.part == "inner" else 1])
    if not sizes.takes(shape) or (
        sizes.half and sizes.weights is native.Weights and keep is not None
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
    """What the C++ is told in numbers: sizes, epsilon, and how many threads to use."""
    return *sizes.numbers(x.shape), epsilon, torch.get_num_threads()


def side_by_side(x, weights, keep):
    """The same tensors with their numbers one after another, and pointers to the weights."""
    weights = [weight.contiguous() for weight in weights]
    return x.contiguous(), weights, keep if keep is None else keep.contiguous(), pointers(weights)


def pointers(tensors):
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def address(tensor):
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
    """What x becomes, and what the gradient needs beside it."""
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
    """What `run_gradient` gives, in operations that can be differentiated again."""
    sizes = sizes_of(x, weights, heads, across_words, half)
    # Of x as it came the weights of a block that is applied twice would be found once more.
    inputs = [
        y.view_as(y) if y.requires_grad else y.detach().requires_grad_() for y in (x, *weights)
    ]
    result = plain.compute(inputs[0], inputs[1:], keep, sizes, epsilon)
    return torch.autograd.grad(result, inputs, gradient, create_graph=True)


def remember(ctx, inputs, output):
    x, weights, keep, *ctx.settings = inputs
    ctx.count = len(weights)
    ctx.set_materialize_grads(False)  # there is none by what is kept
    ctx.save_for_backward(x, keep, *weights, *output[1:])


def is_batched(tensor):
    """Whether a tensor is one of several that a `vmap`, the older one too, computes at once."""
    kinds = torch._C._functorch
    return kinds.is_batchedtensor(tensor) or kinds.is_legacy_batchedtensor(tensor)


def backward(ctx, gradients):
    x, keep, *rest = ctx.saved_tensors
    count = ctx.count
    in_plain = torch.is_grad_enabled() or is_batched(gradients[0]) or ctx.settings[-1]
    find = plain_gradient if in_plain else run_gradient
    of_x, *of_weights = find(x, rest[:count], keep, rest[count:], gradients[0], *ctx.settings)
    return of_x, list(of_weights), *[None] * 5


run.register_autograd(backward, setup_context=remember)
