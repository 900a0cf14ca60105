"""Processes that are killed at random moments of their work, for the sweeps that do so.

Moments are counted in processor time, so that a busy machine does not move them.
"""

import atexit
import os
import signal
import sys
import time
import traceback
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
OWN_AND_CHILDRENS = slice(11, 15)  # the times in /proc/<id>/stat, behind the name


def forked(work, log):
    """Do some work in a process of its own, which leads a session; returns its id."""
    process = os.fork()
    if process:
        return process
    try:
        os.setsid()
        sys.stdout = sys.stderr = open(log, "a")
        work()
        atexit._run_exitfuncs()  # os._exit does not, and TensorFlow's remove temporary files.
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)


def is_killed(process, seconds, log, begun=None):
    """Whether a process is killed as it has spent so many seconds of processor time.

    Args:
        process: its id.
        seconds: how many.
        log: where its output stands.
        begun: function that says whether the seconds have begun to count; None: at the start.

    Returns:
        False if it ended by itself, and well, before.

    Raises:
        SystemExit: if it ended in any other way.
    """
    found, before = 0, 0.0
    while not found and (begun or spent(process) < before + seconds):
        found, status = os.waitpid(process, os.WNOHANG)
        if begun and begun():
            begun, before = None, spent(process)
        time.sleep(0.002)
    if not found:
        os.kill(process, signal.SIGKILL)
        # It may have ended in the moment before: only its status tells whether it was killed.
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return True
    if status:
        raise SystemExit(f"a process ended with status {status}: see {log}")
    return False


def finish(process, log):
    """Wait for a process to end; returns the seconds of processor time that it spent.

    Raises:
        SystemExit: if it does not end well.
    """
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"a process ended with status {status}: see {log}")
    return usage.ru_utime + usage.ru_stime


def spent(session):
    """Seconds of processor time of a session's processes, and of those that they waited for."""
    return sum(float(sum(map(int, stat[OWN_AND_CHILDRENS]))) for stat in members(session)) / TICKS


def members(session):
    """What /proc tells of each process of a session: the fields behind its name."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            stat = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(stat[3]) == session and stat[0] != "Z":
            found.append(stat)
    return found


def wait_for_end_of(session):
    """Exit if a process of a killed one's session outlives it by more than a while."""
    deadline = time.monotonic() + 30
    while members(session):
        if time.monotonic() > deadline:
            raise SystemExit(f"processes of session {session} still run")
        time.sleep(0.05)
