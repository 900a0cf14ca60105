"""Ends the process when its main thread cannot: on a signal, a stall, or a dead data service.

A thread that waits in TensorFlow, for images or in a collective, runs no Python: neither a signal
handler nor an exception reaches it. A second thread receives signals through Python's wakeup file
descriptor, and measures how long the main thread has been in its current phase.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time

from training import service

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOOK_SECONDS = 0.5
INPUT_GRACE = 5.0  # grace period in seconds after a signal while the main thread waits for images
UPDATE_GRACE = 20.0  # grace period in an update or an evaluation
SERVICE_WAIT = 10.0  # seconds without images after which the data service is probed
SERVICE_DEAD = 10.0  # seconds without an answer after which it is considered dead
SAVE_SECONDS = 30.0  # timeout for a last checkpoint
PHASES = {
    "start": "it had not begun to train",
    "input": "it waited for images",
    "update": "it was in an update",
    "evaluation": "it was in an evaluation",
    "report": "it was writing the final report",
}


class Watchdog:
    """Watchdog of the main thread within a `with` block.

    Args:
        on_signal: Function that is called with a signal's number in the main thread, once it runs
            Python.
        save: Function of whether the state is consistent (between two updates), called from a
            thread: writes a checkpoint if it is, waits for writes in flight, and returns the step
                of
            the checkpoint, or `None`.
        stall_seconds: Timeout for a phase, in an evaluation for a batch. Defaults to 0, no timeout.
        data_service: Address of a tf.data service. Defaults to "", none.
        name: Name of this process for messages, with a trailing space. Defaults to "".
    """

    def __init__(self, on_signal, save, stall_seconds=0.0, data_service="", name=""):
        """Stores the arguments; watching starts in `__enter__`."""
        self.on_signal = on_signal
        self.save = save
        self.stall_seconds = stall_seconds
        self.data_service = data_service
        self.name = name
        self.phase, self.since = "", time.monotonic()
        self.slowest = 0.0
        self.signals = []  # (number, time)
        self.silent_since = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def during(self, phase):
        """Marks the phase of the main thread within the context, which may lie within another.

        Args:
            phase: A key of `PHASES`.
        """
        with self._lock:  # never released by a watchdog that ends the process
            outer = self.phase
            self.phase, self.since = phase, time.monotonic()
        try:
            yield
        finally:
            now = time.monotonic()
            if phase in ("update", "evaluation"):
                self.slowest = max(self.slowest, now - self.since)
            with self._lock:
                self.phase, self.since = outer, now

    def tick(self):
        """Restarts the timeout of the current phase; called when the main thread progresses."""
        now = time.monotonic()
        self.slowest = max(self.slowest, now - self.since)
        self.since = now

    def __enter__(self):
        """Starts the thread and, in the main thread, installs the signal handlers."""
        self._stop = threading.Event()
        self._restore = []
        reader, writer = socket.socketpair()
        self._sockets = reader, writer
        if threading.current_thread() is threading.main_thread():
            writer.setblocking(False)
            old = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            self._restore.append(lambda: signal.set_wakeup_fd(old))
            for number in SIGNALS:
                handler = signal.signal(number, self._handle) or signal.SIG_DFL
                self._restore.append(lambda n=number, h=handler: signal.signal(n, h))
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        """Stops the thread and restores the signal handlers."""
        self._stop.set()
        self._sockets[1].setblocking(True)
        self._sockets[1].send(b"\0")
        self._thread.join()
        for restore in self._restore:
            restore()
        for each in self._sockets:
            each.close()

    def _handle(self, number, frame):
        signal.signal(number, signal.SIG_DFL)
        self.on_signal(number)

    def _watch(self):
        while not self._stop.is_set():
            ready, _, _ = select.select([self._sockets[0]], [], [], LOOK_SECONDS)
            if ready:
                for number in self._sockets[0].recv(64):
                    if number in SIGNALS:
                        self.signals.append((number, time.monotonic()))
            if not self._stop.is_set():
                self._look()

    def _look(self):
        phase, since, now = self.phase, self.since, time.monotonic()
        if not phase:
            self.silent_since = None
        elif self.signals and self._is_overdue(phase, since, now):
            number, _ = self.signals[0]
            reason = f"{PHASES[phase]} when {signal.Signals(number).name} came"
            self._end(128 + number, phase, since, reason)
        elif self.stall_seconds and now - since > self.stall_seconds:
            minutes = (now - since) / 60
            reason = f"{PHASES[phase]} for {minutes:.2g} minutes (--stall_minutes)"
            self._end(1, phase, since, reason)
        elif self.data_service and phase == "input" and now - since > SERVICE_WAIT:
            self._ask_service(since, now)

    def _is_overdue(self, phase, since, now):
        """Returns whether the grace period after a signal is over; a second signal ends it."""
        waits = phase in ("start", "input", "report")
        grace = INPUT_GRACE if waits else UPDATE_GRACE + 2 * self.slowest
        return len(self.signals) > 1 or now - max(self.signals[0][1], since) > grace

    def _ask_service(self, since, now):
        try:
            service.probe(self.data_service)
            self.silent_since = None
        except service.NoAnswer as error:
            self.silent_since = now if self.silent_since is None else self.silent_since
            if now - self.silent_since > SERVICE_DEAD:
                self._end(
                    1, "input", since, f"--data_service={self.data_service} is gone ({error})"
                )

    def _end(self, status, phase, since, reason):
        """Ends the process, after a checkpoint if the main thread waits between two updates."""
        self._lock.acquire()
        if (self.phase, self.since) != (phase, since):
            # The main thread progressed in the meantime.
            self._lock.release()
            return
        saved = self._save(phase == "input")
        kept = "the last checkpoint counts"
        if saved is not None:
            kept = f"a checkpoint of step {saved} is written"
        sys.stdout.flush()
        print(
            f"error: {self.name}ended, for {reason}; {kept}. The same command resumes the run",
            file=sys.stderr,
            flush=True,
        )
        os._exit(status)

    def _save(self, between_updates):
        """Returns the step of the checkpoint that was written in time, or `None`."""
        saved = [None]

        def save():
            with contextlib.suppress(Exception):
                saved[0] = self.save(between_updates)

        # In a thread with a timeout, because reading variables from a hung device never returns.
        thread = threading.Thread(target=save, daemon=True)
        thread.start()
        thread.join(SAVE_SECONDS)
        return saved[0]


@contextlib.contextmanager
def watch(phase, stall_seconds=0.0, data_service="", name=""):
    """Watches a phase before or after training, which may wait for other processes.

    A signal ends the phase with an exception, and no checkpoint is written.

    Args:
        phase: A key of `PHASES`.
        stall_seconds: As for `Watchdog`.
        data_service: As for `Watchdog`.
        name: As for `Watchdog`.

    Yields:
        The `Watchdog`, whose `tick` restarts the timeout.
    """

    def end(number):
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    with Watchdog(end, lambda between_updates: None, stall_seconds, data_service, name) as watchdog:
        with watchdog.during(phase):
            yield watchdog
