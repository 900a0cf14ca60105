"""The inner transformer in C++, compiled on the machine where it is to run."""

import os
import subprocess
import warnings
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
HEADER = FOLDER / "inner_transformer.h"
# Words lie along the lanes of vectors, of which AVX-512 has the most.
LANES = 16


class Sizes(NamedTuple):
    """What inner_transformer.h wants defined: a program for each.

    Attributes:
        words: of a patch; a multiple of `LANES`.
        dim: of a word.
        heads: of the attention.
        hidden: dimension of the MLP.
        across_words: whether norms run over all words of a patch.
    """

    words: int
    dim: int
    heads: int
    hidden: int
    across_words: bool

    def definitions(self):
        return {name.upper(): int(value) for name, value in self._asdict().items()}

    def name(self, prefix="keras_tnt"):
        return "_".join([prefix, *(str(int(value)) for value in self)])


def build(folder, entry, sizes, *settings):
    """Compile the inner transformer as a shared library, for this very processor.

    Args:
        folder: where the library goes.
        entry: file of this folder by which it is called.
        sizes: `Sizes`.
        settings: further arguments for the compiler.

    Returns:
        The library's path; None, with a warning, where it cannot be compiled.
    """
    path = os.path.join(folder, f"{sizes.name()}.so")
    command = [
        os.environ.get("CXX", "c++"),
        *("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno"),
        *("-shared", "-fPIC", "-w", "-o", path),
        *(f"-D{name}={value}" for name, value in sizes.definitions().items()),
        *("-include", str(HEADER), str(FOLDER / entry)),
        *settings,
    ]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        warnings.warn(
            "The inner transformer in C++ could not be compiled; what takes its place is slower. "
            "The environment variable CXX names the compiler to use. "
            f"`{command[0]}` said: {getattr(error, 'stderr', None) or error}",
            stacklevel=2,
        )
        return None
    return path
