"""The inner transformer as operations of torch; sizes are read off their tensors."""

import ctypes
import functools

import torch

from keras_tnt import native
from keras_tnt.native import plain


def make(sizes: native.Sizes):
    """The function that `runtimes.operator` describes; None where there is no library for it."""
    if library_of(sizes) is None:
        return None

    def call(words, weights, epsilon, keep=None):
        return run(words, list(weights), keep, sizes.heads, epsilon, sizes.across_words)

    return call


@functools.cache
def library_of(sizes):
    library = native.library("torch.cpp", sizes, "-fopenmp")
    if library is not None:
        pointer, numbers = ctypes.c_void_p, (ctypes.c_float, ctypes.c_int64, ctypes.c_int)
        library.inner_transformer.argtypes = [*[pointer] * 4, *numbers]
        library.inner_transformer_gradient.argtypes = [*[pointer] * 6, *numbers]
        for function in (library.inner_transformer, library.inner_transformer_gradient):
            function.restype = None
    return library


def sizes_of(words, weights, heads, across_words):
    hidden = native.Weights(*weights).fc1_bias.numel()
    return native.Sizes(*words.shape[2:], heads, hidden, across_words)


def side_by_side(words, weights, keep):
    """The same tensors with their numbers one after another, and pointers to the weights."""
    weights = [weight.contiguous() for weight in weights]
    pointers = (ctypes.c_void_p * len(weights))(*(weight.data_ptr() for weight in weights))
    return words.contiguous(), weights, keep if keep is None else keep.contiguous(), pointers


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


@torch.library.custom_op(
    "keras_tnt::inner_transformer", mutates_args=(), tags=torch.Tag.flexible_layout
)
def run(
    words: torch.Tensor,
    weights: list[torch.Tensor],
    keep: torch.Tensor | None,
    heads: int,
    epsilon: float,
    across_words: bool,
) -> torch.Tensor:
    library = library_of(sizes_of(words, weights, heads, across_words))
    words, weights, keep, pointers = side_by_side(words, weights, keep)
    result = torch.empty_like(words)
    library.inner_transformer(
        *(address(words), address(result), pointers, address(keep)),
        *(epsilon, words.shape[0] * words.shape[1], torch.get_num_threads()),
    )
    return result


@torch.library.custom_op("keras_tnt::inner_transformer_gradient", mutates_args=())
def run_gradient(
    words: torch.Tensor,
    weights: list[torch.Tensor],
    keep: torch.Tensor | None,
    gradient: torch.Tensor,
    heads: int,
    epsilon: float,
    across_words: bool,
) -> list[torch.Tensor]:
    library = library_of(sizes_of(words, weights, heads, across_words))
    words, weights, keep, pointers = side_by_side(words, weights, keep)
    gradient, result = gradient.contiguous(), torch.empty_like(words)
    threads, counts = torch.get_num_threads(), [weight.numel() for weight in weights]
    sums = torch.zeros(threads, sum(counts))
    library.inner_transformer_gradient(
        *(address(words), address(gradient), address(result), pointers, address(keep)),
        *(address(sums), epsilon, words.shape[0] * words.shape[1], threads),
    )
    found = zip(sums[0].split(counts), weights, strict=True)
    return [result, *(flat.reshape(weight.shape).clone() for flat, weight in found)]


@run.register_fake
def _(words, weights, keep, heads, epsilon, across_words):
    return torch.empty_like(words, memory_format=torch.contiguous_format)


@run_gradient.register_fake
def _(words, weights, keep, gradient, heads, epsilon, across_words):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (words, *weights)]


def plain_gradient(words, weights, keep, gradient, heads, epsilon, across_words):
    """What `run_gradient` gives, in operations that can be differentiated again."""
    sizes = sizes_of(words, weights, heads, across_words)
    inputs = [x if x.requires_grad else x.detach().requires_grad_() for x in (words, *weights)]
    result = plain.inner_transformer(inputs[0], inputs[1:], keep, sizes, epsilon)
    return torch.autograd.grad(result, inputs, gradient, create_graph=True)


def remember(ctx, inputs, output):
    words, weights, keep, *ctx.settings = inputs
    ctx.save_for_backward(words, keep, *weights)


def backward(ctx, gradient):
    words, keep, *weights = ctx.saved_tensors
    find = plain_gradient if torch.is_grad_enabled() else run_gradient
    of_words, *of_weights = find(words, weights, keep, gradient, *ctx.settings)
    return of_words, of_weights, None, None, None, None


run.register_autograd(backward, setup_context=remember)
