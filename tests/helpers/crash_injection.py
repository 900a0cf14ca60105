"""Crash injection: kills processes at random times.

Times are CPU times, so that the load of the machine does not shift them.
"""

import atexit
import os
import signal
import sys
import time
import traceback
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
OWN_AND_CHILDRENS = slice(11, 15)  # utime, stime, cutime and cstime in /proc/<id>/stat


def forked(work, log):
    """Runs `work` in a forked process that leads a session, and returns the process id.

    Args:
        work: function that returns the exit status, or `None` for success.
        log: path to which the process's output is appended.
    """
    process = os.fork()
    if process:
        return process
    try:
        os.setsid()
        sys.stdout = sys.stderr = open(log, "a")
        status = work() or 0
        atexit._run_exitfuncs()  # os._exit skips handlers; TensorFlow's remove temporary files.
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)


def is_killed(process, seconds, log, begun=None):
    """Kills a process after `seconds` of CPU time, and returns whether it was killed.

    Args:
        process: process id.
        seconds: CPU time in seconds.
        log: path of the process's output, named in errors.
        begun: function that returns whether the CPU time starts to count. If `None`, it counts from
            the start.

    Returns:
        False if the process exited successfully before.

    Raises:
        SystemExit: if the process failed.
    """
    found, before = 0, 0.0
    while not found and (begun or spent(process) < before + seconds):
        found, status = os.waitpid(process, os.WNOHANG)
        if begun and begun():
            begun, before = None, spent(process)
        time.sleep(0.002)
    if not found:
        os.kill(process, signal.SIGKILL)
        # The process may have exited just before: only its status says whether it was killed.
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return True
    if status:
        raise SystemExit(f"a process ended with status {status}: see {log}")
    return False


def finish(process, log):
    """Waits for a process to exit and returns the CPU time that it used, in seconds.

    Args:
        process: process id.
        log: path of the process's output, named in errors.

    Raises:
        SystemExit: if the process failed.
    """
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"a process ended with status {status}: see {log}")
    return usage.ru_utime + usage.ru_stime


def spent(session):
    """Returns the CPU time in seconds of a session's processes and their reaped children."""
    return sum(float(sum(map(int, stat[OWN_AND_CHILDRENS]))) for stat in members(session)) / TICKS


def members(session):
    """Returns the fields of /proc/<id>/stat, after the name, for each process of a session."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            stat = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # the process exited meanwhile
            continue
        if int(stat[3]) == session and stat[0] != "Z":
            found.append(stat)
    return found


def wait_for_end_of(session):
    """Exits with an error if processes of a session are still running after 30 seconds."""
    deadline = time.monotonic() + 30
    while members(session):
        if time.monotonic() > deadline:
            raise SystemExit(f"processes of session {session} still run")
        time.sleep(0.05)
