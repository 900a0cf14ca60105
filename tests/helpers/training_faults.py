"""Faults in multi-worker runs.

    python -m tests.helpers.training_faults DIRECTORY WORKERS nan|service

    nan      a loss is NaN, checkpoints are time-based, and a worker is killed
    service  images come from a tf.data service, which is killed

The other workers must exit by themselves within a minute, each with a one-line error. The restarted
run must be bit-identical to one with the same NaN, or none, and without a kill. Prints the seconds
until all workers had exited.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from tests.helpers import training_workers
from tests.helpers.crash_injection import forked
from tests.helpers.training_crashes import outcome
from training import loop
from training.cluster import data_service

SLOW = 0.2  # seconds per update, so that a fault happens between two updates
NAN_AT = 5
MAX_SECONDS = 60  # within which all workers must exit after a kill


def slow_updates(nan_at):
    """Slows down updates and makes the loss of one step NaN, in this process and its forks."""
    update = loop.Run.update

    def slow(self, batch, step):
        time.sleep(SLOW)
        decision = update(self, batch, step)
        if step == nan_at and step not in self.notes["skipped"]:
            self.pending[-1] = (step, float("nan"), 1.0)
        return decision

    loop.Run.update = slow


def ends(cluster):
    """Waits for all processes of a cluster to exit, and returns (seconds, exit statuses)."""
    began, statuses = time.monotonic(), []
    for process in cluster.processes.values():
        _, status = os.waitpid(process, 0)
        statuses.append(os.waitstatus_to_exitcode(status))
    return round(time.monotonic() - began, 1), statuses


def wait_for(cluster, step):
    deadline = time.monotonic() + training_workers.PATIENCE
    while cluster.reached() < step:
        if time.monotonic() > deadline:
            raise SystemExit(f"no step {step} within {training_workers.PATIENCE} s")
        time.sleep(0.02)


def finish(cluster):
    _, statuses = ends(cluster)
    assert not any(statuses), f"{cluster.workdir}: {statuses}"
    return outcome(cluster.workdir)


def logs(cluster):
    return [cluster.log(index).read_text() for index in range(len(cluster.addresses))]


def assert_one_line_errors(cluster, survivors, seconds, *expected):
    """Asserts that the survivors of a kill have exited in time, each with a one-line error.

    Args:
        cluster: the cluster, not yet restarted: its logs end with the exits.
        survivors: indices of the workers that were not killed.
        seconds: seconds until all workers had exited.
        *expected: texts, one of which each error must contain.
    """
    assert seconds < MAX_SECONDS, f"the workers exited after {seconds} s"
    for index in survivors:
        log = cluster.log(index).read_text()
        errors = [line for line in log.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in log, log[-2000:]
        assert any(text in errors[0] for text in expected), errors


def assert_identical(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def nan_and_kill(directory, number):
    slow_updates(NAN_AT)
    expected = finish(training_workers.Cluster(directory / "undisturbed", number))
    # Each worker's own clock would request a checkpoint after every update.
    clock = {"checkpoint_steps": 0, "checkpoint_minutes": 1e-5, "report_steps": 4}
    cluster = training_workers.Cluster(directory / "disturbed", number, **clock)
    wait_for(cluster, NAN_AT + 1)  # after the rollback
    os.kill(cluster.processes[number - 1], signal.SIGKILL)
    seconds, statuses = ends(cluster)
    assert statuses == [1] * (number - 1) + [-signal.SIGKILL], statuses
    assert_one_line_errors(cluster, range(number - 1), seconds, "has lost another one")
    again = training_workers.Cluster(directory / "disturbed", number, **clock)
    found = finish(again)
    del found["losses"], expected["losses"]  # reported at other steps
    assert_identical(found, expected)
    rolled_back = f"the loss of step {NAN_AT} was nan"
    assert rolled_back in logs(cluster)[0]
    return seconds


def service_killed(directory, number):
    slow_updates(None)
    address, processes = start_service(directory, 0, 0)
    service = {"data_service": f"grpc://{address}"}
    expected = finish(training_workers.Cluster(directory / "undisturbed", number, **service))
    cluster = training_workers.Cluster(directory / "disturbed", number, **service)
    wait_for(cluster, 2)
    stop(processes)
    seconds, statuses = ends(cluster)
    assert all(statuses), statuses
    line = f"--data_service=grpc://{address} is gone"
    # A worker that exits first takes the others with it.
    assert_one_line_errors(cluster, range(number), seconds, line, "has lost another one")
    assert any(line in log for log in logs(cluster)), logs(cluster)[0][-2000:]
    _, processes = start_service(directory, *map(int, ports(directory)))
    try:
        assert_identical(
            finish(training_workers.Cluster(directory / "disturbed", number, **service)), expected
        )
    finally:
        stop(processes)
    return seconds


def start_service(directory, *at):
    """Starts a dispatcher and a worker; returns (dispatcher's host:port, process ids)."""
    at = [
        port or int(free.split(":")[1])
        for port, free in zip(at, training_workers.free_addresses(2), strict=True)
    ]
    (directory / "ports").write_text(" ".join(map(str, at)))
    address = f"127.0.0.1:{at[0]}"

    def serve(*arguments):
        server = data_service.start(*arguments)
        server.join()

    log = directory / "service.log"
    dispatcher = forked(lambda: serve(at[0]), log)
    worker = forked(lambda: serve(at[1], address, "127.0.0.1"), log)
    return address, (dispatcher, worker)


def ports(directory):
    return (directory / "ports").read_text().split()


def stop(processes):
    for process in processes:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


FAULTS = {"nan": nan_and_kill, "service": service_killed}


def main(directory, number, fault):
    seconds = FAULTS[fault](Path(directory), int(number))
    print(json.dumps({"seconds_until_all_had_ended": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
