"""Runs the machine's C++ compiler with a timeout; it may be missing, fail, or hang."""

import os
import shlex
import signal
import subprocess

# Timeouts in seconds: for printing predefined macros, and for compiling one library.
PROBE_SECONDS, COMPILE_SECONDS = 20, 600

# Error messages of compilers that timed out, which are not tried again.
_stopped = {}


class CompilerError(RuntimeError):
    """Error of a compiler that could not be started, failed, or timed out."""


def command() -> list[str]:
    """Returns the command of the environment variable CXX, or `c++` if it is not set.

    Raises:
        CompilerError: if CXX cannot be parsed, for example for unbalanced quotes.
    """
    value = os.environ.get("CXX", "")
    try:
        return shlex.split(value) or ["c++"]
    except ValueError as error:
        raise CompilerError(
            f"The environment variable CXX is not a command: {error}. Received: CXX={value!r}. Set "
            "it to a C++ compiler, such as CXX=g++, and quote spaces in its path."
        ) from error


def execute(arguments: list[str], seconds: float) -> str:
    """Runs a compiler and returns its standard output.

    Args:
        arguments: the command and its arguments.
        seconds: timeout, after which the compiler and its child processes are killed.

    Raises:
        CompilerError: if the compiler cannot be started, fails, or times out.
    """
    name = arguments[0]
    if name in _stopped:
        raise CompilerError(_stopped[name])
    try:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise CompilerError(
            f"The compiler `{name}` could not be started: {error}. Install one, or set CXX."
        ) from error
    try:
        printed, complaints = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        end(process)
        _stopped[name] = (
            f"The compiler `{name}` did not end within {seconds:g} seconds and was stopped."
        )
        raise CompilerError(_stopped[name]) from error
    except BaseException:
        end(process)
        raise
    if process.returncode:
        said = complaints.decode("utf-8", "replace").strip()
        raise CompilerError(
            f"The compiler `{name}` ended with {process.returncode}: {said or 'it printed nothing'}"
        )
    return printed.decode("utf-8", "replace")


def end(process: subprocess.Popen) -> None:
    """Kills a process and its process group, whose other members may hold its pipes open."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, OSError):  # Windows has no killpg; or the process has ended.
        process.kill()
    for pipe in (process.stdout, process.stderr):
        pipe.close()
    process.wait()
