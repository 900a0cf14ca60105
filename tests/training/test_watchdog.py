"""The watchdog ends a run whose main thread is blocked: signals, stalls, a lost data service."""

import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from training import service, watchdog

ROOT = Path(__file__).parent.parent.parent

# Locks a mutex twice: neither a signal nor an exception interrupts that.
STUCK = """
import ctypes, sys
from training import watchdog
watchdog.LOOK_SECONDS, watchdog.SERVICE_WAIT, watchdog.SERVICE_DEAD = 0.05, 0.1, 0.2
watchdog.INPUT_GRACE, watchdog.UPDATE_GRACE = GRACES
watchdog.service.TRY_SECONDS = 0.2
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)

def save(between_updates):
    return 7 if between_updates else None

with watchdog.Watchdog(print, save, STALL, "SERVICE") as dog:
    with dog.during("PHASE"):
        print("stuck", flush=True)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
"""


def stuck(phase, stall=0, address="", graces=(0.2, 0.2)):
    code = (
        STUCK.replace("PHASE", phase)
        .replace("STALL", str(stall))
        .replace('SERVICE"', f'{address}"')
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code.replace("GRACES", str(graces))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "stuck\n"
    return process


def end_of(process):
    _, error = process.communicate(timeout=60)
    return process.returncode, error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("phase", "where", "kept"),
    [
        ("input", "it waited for images", "a checkpoint of step 7 is written"),
        ("start", "it had not begun to train", "the last checkpoint counts"),
        ("update", "it was in an update", "the last checkpoint counts"),
        ("evaluation", "it was in an evaluation", "the last checkpoint counts"),
        ("report", "it was writing the final report", "the last checkpoint counts"),
    ],
)
def test_signal_ends_a_blocked_process_with_one_line(phase, where, kept, number):
    process = stuck(phase)
    process.send_signal(number)
    assert end_of(process) == (
        128 + number,
        f"error: ended, for {where} when {number.name} came; {kept}. The same command resumes the "
        "run\n",
    )


def test_second_signal_ends_the_process_at_once():
    process = stuck("update", graces=(1000, 1000))
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    # Either the watchdog ends it, or the system if the first signal's handler has run.
    assert end_of(process)[0] in (128 + signal.SIGTERM, -signal.SIGTERM)


def test_stall_ends_the_process_with_status_1():
    status, error = end_of(stuck("input", stall=0.3))
    assert status == 1 and "(--stall_minutes); a checkpoint of step 7 is written" in error
    assert error.count("\n") == 1


def test_lost_data_service_ends_the_process():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"grpc://127.0.0.1:{unused.getsockname()[1]}"
        status, error = end_of(stuck("input", address=address))
    assert status == 1 and f"--data_service={address} is gone (no dispatcher answers" in error


def test_watchdog_does_not_end_a_process_that_makes_progress(monkeypatch):
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.01)
    told = []
    before = signal.getsignal(signal.SIGTERM)
    with watchdog.Watchdog(told.append, None, stall_seconds=0.5) as dog:
        signal.raise_signal(signal.SIGTERM)
        for _ in range(20):
            with dog.during("update"):
                time.sleep(0.05)
                dog.tick()
    assert told == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is before


def test_phase_within_another_returns_to_it():
    dog = watchdog.Watchdog(None, None)
    with dog.during("start"):
        with dog.during("input"):
            assert dog.phase == "input"
        assert dog.phase == "start" and time.monotonic() - dog.since < 1
    assert dog.phase == ""


@pytest.mark.parametrize("phase", ["start", "report"])
@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_signal_before_and_after_training_raises(number, error, phase):
    before = signal.getsignal(number)
    with pytest.raises(error), watchdog.watch(phase):
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


# === The service ===


@pytest.mark.parametrize(
    "address", ["localhost:5050", "grpc://localhost", "grpc://:1", "grpc://a:0", "http://a:1", "x"]
)
def test_invalid_address_error_shows_the_format(address):
    with pytest.raises(ValueError, match="is written grpc://HOST:PORT"):
        service.wait_for(address)


def test_address_without_a_dispatcher_raises():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        address = f"grpc://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(service.NoAnswer, match="no dispatcher answers there"):
            service.wait_for(address, seconds=0.1)
        other.listen()
        with pytest.raises(service.NoAnswer, match="no dispatcher answers there"):
            service.wait_for(address, seconds=0.1)


def test_unresolvable_host_raises():
    with pytest.raises(service.NoAnswer, match="--data_service=grpc://no.such.host.invalid:5 can"):
        service.wait_for("grpc://no.such.host.invalid:5", seconds=0)


def test_wait_for_returns_once_a_worker_listens():
    from training.cluster import data_service

    dispatcher = data_service.start(0)
    with pytest.raises(service.NoAnswer, match="its dispatcher has no workers"):
        service.wait_for(dispatcher.target, seconds=0.1)
    started = []
    later = threading.Timer(
        0.5,
        lambda: started.append(data_service.start(0, dispatcher.target.removeprefix("grpc://"))),
    )
    later.start()
    service.wait_for(dispatcher.target, seconds=60)
    later.join()
    del started[:]
