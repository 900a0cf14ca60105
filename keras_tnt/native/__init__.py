"""The parts of TNT's block in C++, compiled for the machine where they are to run."""

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
from keras_tnt.native import cache, processor
from keras_tnt.native.toolchain import COMPILE_SECONDS, PROBE_SECONDS, CompilerError, execute
from keras_tnt.native.toolchain import command as command_of_environment

FOLDER = Path(__file__).parent
HEADER = FOLDER / "inner_forward.h"
# Words lie along the lanes of vectors, of which AVX-512 has the most.
LANES = 16
# What a patch may take of the stack in the forward pass; its gradient takes three times as much.
STACK_BYTES = 1 << 19


class Weights(NamedTuple):
    """The weights of a transformer, in the order of `Weights` in weights.h.

    Attributes:
        attention_gamma, attention_beta: scale and offset of the norm before the attention,
            `(dim, words)` of an inner transformer and `(dim,)` of an outer one.
        qkv_kernel, qkv_bias: of query, key and value, `(dim, 3 * dim)` and `(3 * dim,)`.
        projection_kernel, projection_bias: behind the attention, multiplied by LayerScale where
            there is one, `(dim, dim)` and `(dim,)`.
        mlp_gamma, mlp_beta: scale and offset of the norm before the MLP, as of the other.
        fc1_kernel, fc1_bias: `(dim, hidden)` and `(hidden,)`.
        fc2_kernel, fc2_bias: multiplied by LayerScale where there is one, `(hidden, dim)` and
            `(dim,)`.
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
    """The weights by which words become patches, in the order of `PatchWeights` in weights.h.

    Attributes:
        words_gamma, words_beta: scale and offset of the norm of a patch's words, `(inputs,)`.
        kernel, bias: of the projection, `(inputs, dim)` and `(dim,)`.
        patches_gamma, patches_beta: scale and offset of the norm behind it, `(dim,)`.
    """

    words_gamma: Any
    words_beta: Any
    kernel: Any
    bias: Any
    patches_gamma: Any
    patches_beta: Any


def shapes_of_weights(norm: tuple, dim: int, hidden: int) -> Weights:
    """The shapes of a transformer's weights, of norms of this shape."""
    return Weights(
        *(norm, norm, (dim, 3 * dim), (3 * dim,), (dim, dim), (dim,)),
        *(norm, norm, (dim, hidden), (hidden,), (hidden, dim), (dim,)),
    )


class InnerSizes(NamedTuple):
    """What inner_forward.h wants defined: a program for each.

    Attributes:
        words: of a patch; a multiple of `LANES`.
        dim: of a word.
        heads: of the attention.
        hidden: dimension of the MLP.
        across_words: whether norms run over all words of a patch.
        half: whether to multiply in bfloat16, for which there is no gradient and no `keep`, and
            which `takes_half` has to allow.
    """

    words: int
    dim: int
    heads: int
    hidden: int
    across_words: bool
    half: bool = False

    part, weights = "inner", Weights

    def arguments(self) -> list[str]:
        """What the compiler is told of them."""
        defined = [f"-D{name.upper()}={int(value)}" for name, value in self._asdict().items()]
        return [*defined, "-include", str(HEADER)]

    def name(self, prefix: str = "keras_tnt") -> str:
        return "_".join([prefix, *(str(int(value)) for value in self)])

    def fits_stack(self) -> bool:
        """Whether what a thread computes of a patch has room on its stack."""
        numbers = 9 * self.dim + 2 * self.hidden + 3 * LANES
        return 4 * self.words * numbers <= STACK_BYTES

    def result(self, shape: tuple) -> tuple:
        """The shape of what becomes of words of a shape."""
        return shape

    def kept(self, shape: tuple) -> list[tuple]:
        """The shapes of what its gradient needs of the forward pass beside the words."""
        return []

    def weight_shapes(self, shape: tuple) -> Weights:
        """The shapes of the weights for words of a shape."""
        return shapes_of_weights((self.dim, self.words), self.dim, self.hidden)

    def takes(self, shape: tuple) -> bool:
        """Whether words of a shape, which may come from anywhere, are what the C++ is for."""
        fits = self.words % LANES == 0 and self.fits_stack() and min(self[:4]) > 0
        return fits and len(shape) == 4 and shape[2:] == self[:2] and self.dim % self.heads == 0

    def numbers(self, shape: tuple) -> tuple:
        """The integers that torch's entry takes, for words of a shape."""
        return (shape[0] * shape[1],)

    def attributes(self) -> dict[str, str | int]:
        """What an XLA custom call is told of them beside its operands."""
        return {"kernel": self.name()}


class OuterSizes(NamedTuple):
    """What outer_transformer.h cannot read off the shapes of the tokens.

    Attributes:
        heads: of the attention.
        hidden: dimension of the MLP.
        half: as of `InnerSizes`.
    """

    heads: int
    hidden: int
    half: bool = False

    weights = Weights

    @property
    def part(self) -> str:
        return "outer_half" if self.half else "outer"

    # As those of `InnerSizes`, for tokens of a shape.

    def name(self, prefix: str = "keras_tnt") -> str:
        return f"{prefix}_{self.part}"

    def result(self, shape: tuple) -> tuple:
        return shape

    def kept(self, shape: tuple) -> list[tuple]:
        return [] if self.half else [(*shape[:2], 5 * shape[2] + self.hidden)]

    def weight_shapes(self, shape: tuple) -> Weights:
        return shapes_of_weights((shape[2],), shape[2], self.hidden)

    def takes(self, shape: tuple) -> bool:
        return len(shape) == 3 and self.heads > 0 and shape[2] > 0 and shape[2] % self.heads == 0

    def numbers(self, shape: tuple) -> tuple:
        return *shape, self.heads, self.hidden

    def attributes(self) -> dict[str, str | int]:
        return {"heads": self.heads}


class PatchSizes(NamedTuple):
    """What patches.h cannot read off the shape of the patches' words.

    Attributes:
        dim: of a patch.
        half: as of `OuterSizes`.
    """

    dim: int
    half: bool = False

    weights = PatchWeights

    @property
    def part(self) -> str:
        return "patches_half" if self.half else "patches"

    # As those of `InnerSizes`, for `(batch, patches, inputs)`.

    def name(self, prefix: str = "keras_tnt") -> str:
        return f"{prefix}_{self.part}"

    def result(self, shape: tuple) -> tuple:
        return *shape[:2], self.dim

    def kept(self, shape: tuple) -> list[tuple]:
        return [] if self.half else [self.result(shape)]

    def weight_shapes(self, shape: tuple) -> PatchWeights:
        inputs, dim = (shape[2],), (self.dim,)
        return PatchWeights(inputs, inputs, inputs + dim, dim, dim, dim)

    def takes(self, shape: tuple) -> bool:
        return len(shape) == 3 and shape[2] > 0

    def numbers(self, shape: tuple) -> tuple:
        return *shape, self.dim

    def attributes(self) -> dict[str, str | int]:
        return {}


Sizes = InnerSizes | OuterSizes | PatchSizes


def takes_half(*inputs: int) -> bool:
    """Whether C++ multiplies so many inputs in bfloat16, and as this processor does best."""
    if any(count % 2 for count in inputs) or not processor.has_pairs():
        return False
    try:
        return "__AVX512BF16__" in defined(*compiler())
    except CompilerError:
        return False


@functools.cache
def warn_slower(reason: str) -> None:
    """Say, once for each reason, why a transformer is not C++."""
    warnings.warn(
        f"The transformer is not C++ here; what takes its place is slower. {reason}",
        stacklevel=3,
    )


def library(entry: str | Path, sizes: InnerSizes | None, *settings: str) -> ctypes.CDLL | None:
    """A transformer as a shared library, compiled for this very processor.

    It is kept in the folder `keras_tnt` of the user's caches (XDG_CACHE_HOME), by compiler,
    processor and source, so that only the first process compiles it. Its checksum is compared
    before it is loaded: one that is damaged, or does not load, is compiled anew.

    Args:
        entry: file of this folder by which it is called.
        sizes: `InnerSizes`; None for what is the same for all.
        settings: further arguments for the compiler.

    Returns:
        The library, which stays loaded; None, with a warning, where it cannot be had.
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
    """Loads a library from the cache, where it is compiled to if it is not there or damaged.

    Args:
        name: of its file.
        command: compiles it, but for where to.

    Raises:
        CompilerError: if it cannot be compiled.
        OSError: if it can be loaded from nowhere.
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
        except OSError:  # no place to keep it, or one that nothing may be loaded from
            if not os.path.exists(temporary):
                run([*command, "-o", temporary])
            return ctypes.CDLL(temporary)


cache_folder = cache.folder


def compiler() -> list[str]:
    """The command of the machine's C++ compiler."""
    return command_of_environment()


@functools.cache
def defined(*compiler: str) -> str:
    """What a compiler defines: it tells its version, and what the processor can do."""
    arguments = ["-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    return execute([*compiler, *arguments], PROBE_SECONDS)


def fingerprint(command: list[str]) -> str:
    """Of all that a library depends on: compiler, processor, sources and settings."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.[hc]*"))]
    parts = [defined(*compiler()), *sources, *command]
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def run(command: list[str]) -> str:
    return execute(command, COMPILE_SECONDS)
