"""The parts of TNT's block in C++, compiled for the machine where they are to run."""

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from keras_tnt.files import replacing
from keras_tnt.native import processor

FOLDER = Path(__file__).parent
HEADER = FOLDER / "inner_forward.h"
# Words lie along the lanes of vectors, of which AVX-512 has the most.
LANES = 16


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

    def result(self, shape: tuple) -> tuple:
        """The shape of what becomes of words of a shape."""
        return shape

    def kept(self, shape: tuple) -> list[tuple]:
        """The shapes of what its gradient needs of the forward pass beside the words."""
        return []

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
    except (OSError, subprocess.CalledProcessError):
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
    processor and source, so that only the first process compiles it.

    Args:
        entry: file of this folder by which it is called.
        sizes: `InnerSizes`; None for what is the same for all.
        settings: further arguments for the compiler.

    Returns:
        The library, which stays loaded; None, with a warning, where it cannot be had.
    """
    command = [
        *(*compiler(), "-std=c++17", "-O3", "-march=native", "-ffp-contract=fast"),
        *("-fno-math-errno", "-shared", "-fPIC", "-w"),
        *(() if sizes is None else sizes.arguments()),
        *(str(FOLDER / entry), *settings),
    ]
    try:
        stem = Path(entry).stem if sizes is None else sizes.name(Path(entry).stem)
        name = f"{stem}-{fingerprint(command)}.so"
        try:
            path = os.path.join(cache_folder(), name)
            if not os.path.exists(path):
                with replacing(path) as temporary:
                    run([*command, "-o", temporary])
            return ctypes.CDLL(path)
        except OSError:  # no place to keep it, or one that nothing may be loaded from
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, name)
                run([*command, "-o", path])
                return ctypes.CDLL(path)
    except (OSError, subprocess.CalledProcessError) as error:
        warn_slower(
            "It could not be compiled and loaded; the environment variable CXX names the compiler "
            f"to use. `{command[0]}` said: {getattr(error, 'stderr', None) or error}"
        )
        return None


def cache_folder() -> str:
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(caches, "keras_tnt")


def compiler() -> list[str]:
    """The command of the machine's C++ compiler."""
    return shlex.split(os.environ.get("CXX", "c++"))


@functools.cache
def defined(*compiler: str) -> str:
    """What a compiler defines: it tells its version, and what the processor can do."""
    return run([*compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull])


def fingerprint(command: list[str]) -> str:
    """Of all that a library depends on: compiler, processor, sources and settings."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.[hc]*"))]
    parts = [defined(*compiler()), *sources, *command]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
