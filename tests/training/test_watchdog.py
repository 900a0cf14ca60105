"""A main thread that runs no Python any more: signals, stalls and a silent data service end it."""

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

# A mutex that is locked twice: neither a signal nor an exception gets a thread out of that.
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
    ],
)
def test_a_signal_ends_a_process_that_is_stuck_in_one_line(phase, where, kept, number):
    process = stuck(phase)
    process.send_signal(number)
    assert end_of(process) == (
        128 + number,
        f"error: ended, for {where} when {number.name} came; {kept}. The same command resumes the "
        "run\n",
    )


def test_a_second_signal_ends_it_at_once():
    process = stuck("update", graces=(1000, 1000))
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    # By the watchdog, or by the system if the handler of the first one has run.
    assert end_of(process)[0] in (128 + signal.SIGTERM, -signal.SIGTERM)


def test_a_stall_ends_it_with_status_1():
    status, error = end_of(stuck("input", stall=0.3))
    assert status == 1 and "(--stall_minutes); a checkpoint of step 7 is written" in error
    assert error.count("\n") == 1


def test_a_silent_data_service_ends_it():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"grpc://127.0.0.1:{unused.getsockname()[1]}"
        status, error = end_of(stuck("input", address=address))
    assert status == 1 and f"--data_service={address} is gone (no dispatcher answers" in error


def test_a_main_thread_that_gets_on_is_left_alone(monkeypatch):
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


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_ends_a_start(number, error):
    before = signal.getsignal(number)
    with pytest.raises(error), watchdog.starting(0):
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


# === The service ===


@pytest.mark.parametrize(
    "address", ["localhost:5050", "grpc://localhost", "grpc://:1", "grpc://a:0", "http://a:1", "x"]
)
def test_what_is_no_address_is_named_with_the_form_of_one(address):
    with pytest.raises(ValueError, match="is written grpc://HOST:PORT"):
        service.wait_for(address)


def test_an_address_where_nobody_or_somebody_else_listens_is_an_error():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        address = f"grpc://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(service.NoAnswer, match="no dispatcher answers there"):
            service.wait_for(address, seconds=0.1)
        other.listen()
        with pytest.raises(service.NoAnswer, match="no dispatcher answers there"):
            service.wait_for(address, seconds=0.1)


def test_a_host_that_has_no_address_is_an_error():
    with pytest.raises(service.NoAnswer, match="--data_service=grpc://no.such.host.invalid:5 can"):
        service.wait_for("grpc://no.such.host.invalid:5", seconds=0)


def test_a_service_answers_once_it_has_a_worker_that_listens():
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
