"""The inner transformer in C++, in programs that compute on a CPU.

torch has it as an operator of its own, which Inductor compiles; XLA as a custom call.
"""

import ctypes
import functools
import tempfile

import keras
import numpy as np

from keras_tnt import native


def inner_transformer(words, heads, hidden, across_words):
    """The C++ for these words.

    Args:
        words: `(batch, patches, words, dim)`, float32.
        heads, hidden, across_words: see `native.Sizes`.

    Returns:
        A function (words, weights, epsilon) to words, weights as inner_transformer.h has them; None
        where there is no C++ for these words.
    """
    if len(words.shape) != 4 or words.shape[2] % native.LANES:
        return None
    calls = {"tensorflow": tensorflow_call, "jax": jax_call, "torch": torch_call}
    sizes = native.Sizes(*words.shape[2:], heads, hidden, across_words)
    return calls[keras.backend.backend()](sizes)


def torch_call(sizes):
    def call(words, weights, epsilon):
        return torch_operator()(words, weights, sizes.heads, epsilon, sizes.across_words)

    return call


@functools.cache
def torch_operator():
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
        sizes = native.Sizes(*words.shape[2:], heads, len(weights[-3]), across_words)
        function = torch_function(sizes)
        pointers = (ctypes.c_void_p * len(weights))(*(weight.data_ptr() for weight in weights))
        patches = words.shape[0] * words.shape[1]
        function(words.data_ptr(), result.data_ptr(), pointers, epsilon, patches)
        return result

    @run.register_fake
    def _(words, weights, heads, epsilon, across_words):
        return torch.empty_like(words, memory_format=torch.contiguous_format)

    return run


@functools.cache
def torch_function(sizes):
    from torch._inductor import config
    from torch._inductor.codecache import CppCodeCache

    defined = [f"#define {name} {value}" for name, value in sizes.definitions().items()]
    texts = [
        path.read_text(encoding="utf-8") for path in (native.HEADER, native.FOLDER / "torch.cpp")
    ]
    with config.patch({"cpp.enable_floating_point_contract_flag": "fast"}):
        library = CppCodeCache.load("\n".join(defined + texts), "cpu")
    function, pointer = library.inner_transformer, ctypes.c_void_p
    function.argtypes = [pointer, pointer, pointer, ctypes.c_float, ctypes.c_int64]
    function.restype = None
    return function


def xla_library(sizes, include, *settings):
    """The library that XLA calls, which stays loaded; None where it cannot be compiled."""
    with tempfile.TemporaryDirectory() as folder:
        path = native.build(folder, "xla.cpp", sizes, "-isystem", include, *settings)
        return path and ctypes.CDLL(path)


@functools.cache
def jax_call(sizes):
    import jax

    library, name = xla_library(sizes, jax.ffi.include_dir()), sizes.name()
    if library is None:
        return None
    target = jax.ffi.pycapsule(library.inner_transformer)
    jax.ffi.register_ffi_target(name, target, platform="cpu")

    def call(words, weights, epsilon):
        result = jax.ShapeDtypeStruct(words.shape, words.dtype)
        return jax.ffi.ffi_call(name, result)(words, *weights, epsilon=np.float32(epsilon))

    return call


@functools.cache
def tensorflow_call(sizes):
    import tensorflow as tf
    from tensorflow.compiler.tf2xla.python import xla

    name = sizes.name()
    settings = f'-DNAME="{name}"', *tf.sysconfig.get_link_flags()
    if xla_library(sizes, tf.sysconfig.get_include(), *settings) is None:
        return None

    def call(words, weights, epsilon):
        operands = [words, *weights]
        types = [f"tensor<{'x'.join(map(str, x.shape))}xf32>" for x in operands]
        values = [f"%operand{i}" for i in range(len(operands))]
        parameters = ", ".join(map(": ".join, zip(values, types, strict=True)))
        module = f"""
            func.func public @main({parameters}) -> {types[0]} {{
              %words = stablehlo.custom_call @{name}({", ".join(values)}) {{
                api_version = 4 : i32, backend_config = {{epsilon = {epsilon:.9e} : f32}}
              }} : ({", ".join(types)}) -> {types[0]}
              return %words : {types[0]}
            }}"""
        (result,) = xla.call_module(
            operands,
            version=9,
            module=module,
            Tout=[words.dtype],
            Sout=[words.shape],
            platforms=["CPU"],
        )
        return result

    return call
