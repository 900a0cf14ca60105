"""What the processor of this machine can do."""

import functools
import platform
import subprocess
import warnings

# The instructions that multiply bfloat16, by the names that Linux and macOS have for them.
BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16", "FEAT_BF16"})

CPUINFO = "/proc/cpuinfo"


@functools.cache
def features() -> frozenset[str]:
    """Names of the instructions that the system tells of; none where it does not tell."""
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
    """Whether the processor multiplies in bfloat16; warns where it does not, or is not known to."""
    if features() & BFLOAT16:
        return True
    warnings.warn(
        "This processor has no instructions for bfloat16 (avx512_bf16, amx_bf16 or ARM's bf16): "
        "float32 is computed instead.",
        stacklevel=3,
    )
    return False


def has_pairs() -> bool:
    """Whether what is here in bfloat16 is the best for the processor.

    AMX multiplies tiles, several times as fast; libraries know it, and the C++ here does not.
    """
    return "avx512_bf16" in features() and "amx_bf16" not in features()
