"""C++ CPU kernels of TNT's block, compiled at run time for this machine and cached on disk.

There are three kernels: the inner (word) transformer block, the outer (patch) transformer block and
the word-to-patch projection. `InnerSizes`, `OuterSizes` and `PatchSizes` describe one kernel each;
`library` compiles it, and `runtimes` binds it to JAX, TensorFlow, torch, ONNX Runtime and OpenVINO.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from keras_tnt.files import replacing
from keras_tnt.kernels import cache, processor
from keras_tnt.kernels.toolchain import COMPILE_SECONDS, PROBE_SECONDS, CompilerError, execute
from keras_tnt.kernels.toolchain import command as command_of_environment

FOLDER = Path(__file__).parent
HEADER = FOLDER / "inner_forward.h"
# Words fill the SIMD lanes of float32 vectors; AVX-512 has the most lanes.
LANES = 16
# The activations of a patch are on the stack. This limits those of the forward pass; the backward
# pass takes three times as much.
STACK_BYTES = 1 << 19


class Weights(NamedTuple):
    """Weights of a pre-norm transformer block, in the order of `Weights` in weights.h.

    LayerScale, if any, is folded into `projection_*` and `fc2_*`.

    Attributes:
        attention_gamma, attention_beta: scale and offset of the layer norm before the attention,
            `(dim, words)` for the inner block and `(dim,)` for the outer one.
        qkv_kernel, qkv_bias: query, key and value, `(dim, 3 * dim)` and `(3 * dim,)`.
        projection_kernel, projection_bias: output projection of the attention, `(dim, dim)` and
            `(dim,)`.
        mlp_gamma, mlp_beta: scale and offset of the layer norm before the MLP, with the shapes of
            `attention_gamma` and `attention_beta`.
        fc1_kernel, fc1_bias: `(dim, hidden)` and `(hidden,)`.
        fc2_kernel, fc2_bias: `(hidden, dim)` and `(dim,)`.
    """

    attention_gamma: Any
    attention_beta: Any
    qkv_kernel: Any
    qkv_bias: Any
    projection_kernel: Any
    projection_bias: Any
    mlp_gamma: Any
    mlp_beta: Any
    fc1_kernel: Any
    fc1_bias: Any
    fc2_kernel: Any
    fc2_bias: Any


class PatchWeights(NamedTuple):
    """Weights of the word-to-patch projection, in the order of `PatchWeights` in weights.h.

    Attributes:
        words_gamma, words_beta: scale and offset of the layer norm before the projection,
            `(inputs,)`, where `inputs` is the number of words times their dimension.
        kernel, bias: weights of the projection, `(inputs, dim)` and `(dim,)`.
        patches_gamma, patches_beta: scale and offset of the layer norm after it, `(dim,)`.
    """

    words_gamma: Any
    words_beta: Any
    kernel: Any
    bias: Any
    patches_gamma: Any
    patches_beta: Any


def shapes_of_weights(norm: tuple, dim: int, hidden: int) -> Weights:
    """Returns the shapes of a block's weights; `norm` is the shape of its layer norms' weights."""
    return Weights(
        *(norm, norm, (dim, 3 * dim), (3 * dim,), (dim, dim), (dim,)),
        *(norm, norm, (dim, hidden), (hidden,), (hidden, dim), (dim,)),
    )


class InnerSizes(NamedTuple):
    """Compile-time constants of the inner kernel; each distinct value compiles its own library.

    Attributes:
        words: number of words of a patch; a multiple of `LANES`.
        dim: dimension of a word.
        heads: number of attention heads.
        hidden: hidden dimension of the MLP.
        across_words: whether the layer norms normalize over all words of a patch together.
        half: whether to multiply in bfloat16, which has no gradient and no drop path, and requires
            `takes_half`. Defaults to `False`.
    """

    words: int
    dim: int
    heads: int
    hidden: int
    across_words: bool
    half: bool = False

    part, weights = "inner", Weights

    def arguments(self) -> list[str]:
        """Returns the compiler arguments that define the constants and include the kernel."""
        defined = [f"-D{name.upper()}={int(value)}" for name, value in self._asdict().items()]
        return [*defined, "-include", str(HEADER)]

    def name(self, prefix: str = "keras_tnt") -> str:
        """Returns a name that is unique to these sizes, such as `keras_tnt_16_24_4_96_0_0`."""
        return "_".join([prefix, *(str(int(value)) for value in self)])

    def fits_stack(self) -> bool:
        """Returns whether the activations of a patch fit in `STACK_BYTES`."""
        numbers = 9 * self.dim + 2 * self.hidden + 3 * LANES
        return 4 * self.words * numbers <= STACK_BYTES

    def result(self, shape: tuple) -> tuple:
        """Returns the output shape for words `(batch, patches, words, dim)`: the same."""
        return shape

    def kept(self, shape: tuple) -> list[tuple]:
        """Returns the shapes of the saved activations: none, the backward pass recomputes them."""
        return []

    def weight_shapes(self, shape: tuple) -> Weights:
        """Returns the expected weight shapes, which do not depend on `shape`."""
        return shapes_of_weights((self.dim, self.words), self.dim, self.hidden)

    def takes(self, shape: tuple) -> bool:
        """Returns whether the kernel supports words of this (untrusted) shape."""
        fits = self.words % LANES == 0 and self.fits_stack() and min(self[:4]) > 0
        return fits and len(shape) == 4 and shape[2:] == self[:2] and self.dim % self.heads == 0

    def numbers(self, shape: tuple) -> tuple:
        """Returns the integer arguments of the torch entry point: the number of all patches."""
        return (shape[0] * shape[1],)

    def attributes(self) -> dict[str, str | int]:
        """Returns the attributes of the XLA custom call."""
        return {"kernel": self.name()}


class OuterSizes(NamedTuple):
    """Sizes of the outer block that the shape of the tokens does not give.

    One library serves all sizes. The methods are those of `InnerSizes`, for tokens
    `(batch, tokens, dim)`.

    Attributes:
        heads: number of attention heads.
        hidden: hidden dimension of the MLP.
        half: whether to multiply in bfloat16, as in `InnerSizes`. Defaults to `False`.
    """

    heads: int
    hidden: int
    half: bool = False

    weights = Weights

    @property
    def part(self) -> str:
        """The kernel's name in the names of files and XLA custom calls."""
        return "outer_half" if self.half else "outer"

    def name(self, prefix: str = "keras_tnt") -> str:
        """Returns a name of the kernel, such as `keras_tnt_outer`."""
        return f"{prefix}_{self.part}"

    def result(self, shape: tuple) -> tuple:
        """Returns the output shape: that of the tokens."""
        return shape

    def kept(self, shape: tuple) -> list[tuple]:
        """Returns the shapes of the saved activations; see outer_transformer.h."""
        return [] if self.half else [(*shape[:2], 5 * shape[2] + self.hidden)]

    def weight_shapes(self, shape: tuple) -> Weights:
        """Returns the expected weight shapes for tokens of a shape."""
        return shapes_of_weights((shape[2],), shape[2], self.hidden)

    def takes(self, shape: tuple) -> bool:
        """Returns whether the kernel supports tokens of this (untrusted) shape."""
        return len(shape) == 3 and self.heads > 0 and shape[2] > 0 and shape[2] % self.heads == 0

    def numbers(self, shape: tuple) -> tuple:
        """Returns the integer arguments of the torch entry point: batch, tokens, dim and so on."""
        return *shape, self.heads, self.hidden

    def attributes(self) -> dict[str, str | int]:
        """Returns the attributes of the XLA custom call."""
        return {"heads": self.heads}


class PatchSizes(NamedTuple):
    """Sizes of the word-to-patch projection that the shape of the words does not give.

    One library serves all sizes. The methods are those of `InnerSizes`, for the concatenated words
    of each patch, `(batch, patches, inputs)`.

    Attributes:
        dim: dimension of a patch.
        half: whether to multiply in bfloat16, as in `InnerSizes`. Defaults to `False`.
    """

    dim: int
    half: bool = False

    weights = PatchWeights

    @property
    def part(self) -> str:
        """The kernel's name in the names of files and XLA custom calls."""
        return "patches_half" if self.half else "patches"

    def name(self, prefix: str = "keras_tnt") -> str:
        """Returns a name of the kernel, such as `keras_tnt_patches`."""
        return f"{prefix}_{self.part}"

    def result(self, shape: tuple) -> tuple:
        """Returns the output shape, `(batch, patches, dim)`."""
        return *shape[:2], self.dim

    def kept(self, shape: tuple) -> list[tuple]:
        """Returns the shape of the saved activation, the output of the dense layer."""
        return [] if self.half else [self.result(shape)]

    def weight_shapes(self, shape: tuple) -> PatchWeights:
        """Returns the expected weight shapes for words of a shape."""
        inputs, dim = (shape[2],), (self.dim,)
        return PatchWeights(inputs, inputs, inputs + dim, dim, dim, dim)

    def takes(self, shape: tuple) -> bool:
        """Returns whether the kernel supports words of this (untrusted) shape."""
        return len(shape) == 3 and shape[2] > 0

    def numbers(self, shape: tuple) -> tuple:
        """Returns the integer arguments of the torch entry point: batch, patches, inputs, dim."""
        return *shape, self.dim

    def attributes(self) -> dict[str, str | int]:
        """Returns the attributes of the XLA custom call: none."""
        return {}


Sizes = InnerSizes | OuterSizes | PatchSizes


def takes_half(*inputs: int) -> bool:
    """Returns whether the bfloat16 kernels support these sizes, and are the fastest choice here.

    They need sizes that are even, a processor with AVX512-BF16 and without AMX, and a compiler that
    knows AVX512-BF16.

    Args:
        *inputs: sizes of the GEMMs' K dimensions.
    """
    if any(count % 2 for count in inputs) or not processor.has_pairs():
        return False
    try:
        return "__AVX512BF16__" in defined(*compiler())
    except CompilerError:
        return False


@functools.cache
def warn_slower(reason: str) -> None:
    """Warns, once for each reason, that a slower fallback replaces the C++ kernel."""
    warnings.warn(
        f"The transformer is not C++ here; what takes its place is slower. {reason}",
        stacklevel=3,
    )


def library(entry: str | Path, sizes: InnerSizes | None, *settings: str) -> ctypes.CDLL | None:
    """Compiles a binding with its kernel to a shared library for this processor, and loads it.

    Libraries are cached in the directory `keras_tnt` of the user's caches (XDG_CACHE_HOME), by
    compiler, processor, sources and arguments, so that only the first process runs the compiler. A
    cached library whose checksum does not match, or that does not load, is compiled again.

    Args:
        entry: source file of the binding, in this directory.
        sizes: `InnerSizes` to compile for; `None` for a library that serves all sizes.
        *settings: additional arguments for the compiler.

    Returns:
        The library, which stays loaded. If it cannot be compiled or loaded, `None`, with a warning.
    """
    try:
        command = [
            *(*compiler(), "-std=c++17", "-O3", "-march=native", "-ffp-contract=fast"),
            *("-fno-math-errno", "-shared", "-fPIC", "-w"),
            *(() if sizes is None else sizes.arguments()),
            *(str(FOLDER / entry), *settings),
        ]
        stem = Path(entry).stem if sizes is None else sizes.name(Path(entry).stem)
        return load_or_compile(f"{stem}-{fingerprint(command)}.so", command)
    except (OSError, CompilerError) as error:
        warn_slower(
            "It could not be compiled and loaded; the environment variable CXX names the compiler "
            f"to use. {error}"
        )
        return None


def load_or_compile(name: str, command: list[str]) -> ctypes.CDLL:
    """Loads a library from the cache, and compiles it if it is missing or damaged.

    Args:
        name: file name of the library in the cache.
        command: compiler command, without the output file.

    Returns:
        The library. If the cache directory is not usable, it is loaded from a temporary directory.

    Raises:
        CompilerError: if it cannot be compiled.
        OSError: if it cannot be loaded from the temporary directory either.
    """
    path = os.path.join(cache_folder(), name)
    if cache.read(path) is not None:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(path)
    with tempfile.TemporaryDirectory() as folder:
        temporary = os.path.join(folder, name)
        try:
            with replacing(path) as aside:
                run([*command, "-o", aside])
                cache.seal(aside)
                shutil.copyfile(aside, temporary)
            return ctypes.CDLL(path)
        except OSError:  # The cache is not writable, is full, or is mounted noexec.
            if not os.path.exists(temporary):
                run([*command, "-o", temporary])
            return ctypes.CDLL(temporary)


cache_folder = cache.folder


def compiler() -> list[str]:
    """Returns the command of the C++ compiler: the environment variable CXX, or `c++`."""
    return command_of_environment()


@functools.cache
def defined(*compiler: str) -> str:
    """Returns the predefined macros of a compiler: its version and the CPU features it targets."""
    arguments = ["-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    return execute([*compiler, *arguments], PROBE_SECONDS)


def fingerprint(command: list[str]) -> str:
    """Returns a hash of all that a library depends on: compiler, CPU, sources and arguments."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.[hc]*"))]
    parts = [defined(*compiler()), *sources, *command]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def run(command: list[str]) -> str:
    """Runs a compiler command and returns its output; see `toolchain.execute`."""
    return execute(command, COMPILE_SECONDS)
