"""The machine's C++ compiler as a process that may be absent, fail, or never end."""

import os
import shlex
import signal
import subprocess

# Seconds that a compiler may take, to describe itself and to compile one library.
PROBE_SECONDS, COMPILE_SECONDS = 20, 600

# Commands that were stopped for taking too long, which are not waited for again.
_stopped = {}


class CompilerError(RuntimeError):
    """The compiler could not be started, failed, or was stopped."""


def command() -> list[str]:
    """Returns the command that the environment variable CXX names; `c++` if it names none.

    Raises:
        CompilerError: if it is not a command.
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
    """Runs a compiler and returns what it prints.

    Args:
        arguments: the command.
        seconds: after which the compiler and the processes that it started are ended.

    Raises:
        CompilerError: if it cannot be started, fails, or takes longer.
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
    """Ends a process and those of its session, which may hold its pipes open."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, OSError):  # on Windows, or it has ended
        process.kill()
    for pipe in (process.stdout, process.stderr):
        pipe.close()
    process.wait()
