"""The inner transformer in C++, one loop over patches, where torch compiles for a CPU."""

import contextlib
import contextvars
import ctypes
import functools
from pathlib import Path

_enabled = contextvars.ContextVar("fused_inner_transformers", default=False)
# Words lie along the lanes of vectors, of which AVX-512 has the most.
LANES = 16


@contextlib.contextmanager
def fused_inner_transformers():
    """Within the context, transformers among words are one operator each, where that can be."""
    token = _enabled.set(True)
    try:
        yield
    finally:
        _enabled.reset(token)


def can_fuse(words):
    """Whether transformers among these words may be the operator here."""
    return (
        _enabled.get()
        and len(words.shape) == 4
        and words.shape[2] % LANES == 0
        and words.device.type == "cpu"
    )


@functools.cache
def operator():
    """The torch operator: (words, weights, heads, epsilon, across_words) to words.

    words: `(batch, patches, words, dim)`, float32. weights: as fused.cpp has them.
    """
    import torch

    @torch.library.custom_op(
        "keras_tnt::inner_transformer", mutates_args=(), tags=torch.Tag.flexible_layout
    )
    def run(
        words: torch.Tensor,
        weights: list[torch.Tensor],
        heads: int,
        epsilon: float,
        across_words: bool,
    ) -> torch.Tensor:
        words, weights = words.contiguous(), [weight.contiguous() for weight in weights]
        result = torch.empty_like(words)
        function = compiled(
            WORDS=words.shape[2],
            DIM=words.shape[3],
            HEADS=heads,
            HIDDEN=len(weights[-3]),
            ACROSS_WORDS=int(across_words),
        )
        pointers = (ctypes.c_void_p * len(weights))(*(weight.data_ptr() for weight in weights))
        patches = words.shape[0] * words.shape[1]
        function(words.data_ptr(), result.data_ptr(), pointers, epsilon, patches)
        return result

    @run.register_fake
    def _(words, weights, heads, epsilon, across_words):
        return torch.empty_like(words, memory_format=torch.contiguous_format)

    return run


@functools.cache
def compiled(**sizes):
    """fused.cpp's function for these sizes, by the compiler that Inductor uses."""
    from torch._inductor.codecache import CppCodeCache

    defined = "".join(f"#define {name} {value}\n" for name, value in sizes.items())
    source = Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8")
    function = CppCodeCache.load(defined + source, "cpu").inner_transformer
    pointer = ctypes.c_void_p
    function.argtypes = [pointer, pointer, pointer, ctypes.c_float, ctypes.c_int64]
    function.restype = None
    return function
