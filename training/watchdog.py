"""Ends the process when its main thread cannot: a signal, a stall, a data service that is gone.

A thread that waits in TensorFlow, for images or in a collective, runs no Python: neither a signal
handler nor an exception reaches it. A second thread sees signals through Python's wakeup
descriptor, and how long the first one has been where it is.
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
INPUT_GRACE = 5.0  # seconds that the main thread has after a signal while it waits for images
UPDATE_GRACE = 20.0  # the same in an update or an evaluation
SERVICE_WAIT = 10.0  # seconds without images after which the data service is asked
SERVICE_DEAD = 10.0  # seconds for which it has to be silent
SAVE_SECONDS = 30.0  # for a last checkpoint
PHASES = {
    "start": "it had not begun to train",
    "input": "it waited for images",
    "update": "it was in an update",
    "evaluation": "it was in an evaluation",
}


class Watchdog:
    """Watches the main thread within a `with` block.

    Args:
        on_signal: called in the main thread, as soon as it runs Python, with a signal's number.
        save: function of whether the state is that between two updates: writes a checkpoint if it
            is, waits for those in flight, and returns the step of the one it wrote, or None.
        stall_seconds: how long a wait for images, an update or a batch of an evaluation may take;
            0: for ever.
        data_service: address of a tf.data service; "": none.
        name: of this process, for the message, with a space behind it.
    """

    def __init__(self, on_signal, save, stall_seconds=0.0, data_service="", name=""):
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
        """Marks what the main thread does: one of `PHASES`."""
        with self._lock:  # held for good by a watchdog that ends the process
            self.phase, self.since = phase, time.monotonic()
        try:
            yield
        finally:
            if phase != "input":
                self.slowest = max(self.slowest, time.monotonic() - self.since)
            with self._lock:
                self.phase = ""

    def tick(self):
        """Marks that the main thread got on within its phase."""
        now = time.monotonic()
        self.slowest = max(self.slowest, now - self.since)
        self.since = now

    def __enter__(self):
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
        """Returns whether the main thread had its time to act on a signal; a second one ends it."""
        waits = phase in ("start", "input")
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
        """Ends the process, with a checkpoint if the main thread waits between two updates."""
        self._lock.acquire()
        if (self.phase, self.since) != (phase, since):
            # The main thread got on meanwhile.
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
        """Returns the step of the checkpoint that could be written, or `None`."""
        saved = [None]

        def save():
            with contextlib.suppress(Exception):
                saved[0] = self.save(between_updates)

        # A device that hangs never gives its variables.
        thread = threading.Thread(target=save, daemon=True)
        thread.start()
        thread.join(SAVE_SECONDS)
        return saved[0]


@contextlib.contextmanager
def starting(stall_seconds):
    """Watches what comes before training and may wait for other processes; a signal ends it."""

    def end(number):
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    with Watchdog(end, lambda between_updates: None, stall_seconds) as watchdog:
        with watchdog.during("start"):
            yield
