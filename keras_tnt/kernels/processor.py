"""CPU feature detection: the instruction set extensions of this machine."""

import functools
import platform
import subprocess
import warnings

# CPU flags of the instructions that multiply in bfloat16, as Linux and macOS name them.
BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16", "FEAT_BF16"})

CPUINFO = "/proc/cpuinfo"


@functools.cache
def features() -> frozenset[str]:
    """Returns the CPU flags that Linux or macOS reports; empty if they cannot be determined."""
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "hw.optional.arm"]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            pairs = (line.split(":") for line in told.splitlines())
            return frozenset(
                name.rpartition(".")[2] for name, value in pairs if value.strip() == "1"
            )
        with open(CPUINFO, encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):  # on x86, on ARM
                    return frozenset(value.split())
    except (OSError, ValueError, subprocess.CalledProcessError):
        pass
    return frozenset()


def takes_bfloat16() -> bool:
    """Returns whether the CPU multiplies in bfloat16, and warns if it is not known to."""
    if features() & BFLOAT16:
        return True
    warnings.warn(
        "This processor has no instructions for bfloat16 (avx512_bf16, amx_bf16 or ARM's bf16): "
        "float32 is computed instead.",
        stacklevel=3,
    )
    return False


def has_pairs() -> bool:
    """Returns whether the bfloat16 kernels of this package are the fastest choice for the CPU.

    They use AVX512-BF16. Where the CPU also has AMX, which multiplies tiles and is several times as
    fast, libraries such as oneDNN are the better choice, as the kernels here do not use it.
    """
    return "avx512_bf16" in features() and "amx_bf16" not in features()
