"""Multi-worker training with killed workers, compared with a single process.

    python -m tests.helpers.training_workers DIRECTORY WORKERS KILLS

A worker that dies is restarted, as by a cluster manager. The run must reach the weights of one
process to 1e-5, and give the same report, with each image once. Prints the counts.
"""

import csv
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np

from tests.helpers.training_crashes import STEPS, fork, outcome

PATIENCE = 900  # seconds within which the trainer must make progress


def free_addresses(number):
    """Returns unused loopback addresses."""
    listening = [socket.socket() for _ in range(number)]
    for each in listening:
        each.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in listening]
    for each in listening:
        each.close()
    return addresses


def batch(workers):
    """Returns the global batch size, of which each worker has the same share."""
    return {"batch_size": 4 * workers}


class Cluster:
    """The workers of one run, each of which is restarted when it dies.

    Args:
        workdir: directory of the run.
        number: number of workers.
        **values: further values of the configuration.
    """

    def __init__(self, workdir, number, **values):
        self.workdir, self.addresses = workdir, free_addresses(number)
        self.values = {"strategy": "multi_worker", "report": True, **batch(number), **values}
        self.started = 0
        self.processes = {index: self.start(index) for index in range(number)}

    def start(self, index):
        self.started += 1
        task = {"cluster": {"worker": self.addresses}, "task": {"type": "worker", "index": index}}
        environment = {"TF_CONFIG": json.dumps(task)}
        return fork(self.workdir, self.log(index), environment, **self.values)

    def log(self, index):
        return self.workdir.with_name(f"{self.workdir.name}_{index}.log")

    def reached(self):
        """Returns the step of the newest checkpoint. -1 if there is none."""
        found = [int(p.stem.split("_")[1]) for p in self.workdir.glob("checkpoints/step_*.s*")]
        return max(found, default=-1)

    def run(self, until):
        """Restarts dead workers until a checkpoint of step `until` exists or all have exited."""
        deadline = time.monotonic() + PATIENCE
        while self.processes and self.reached() < until:
            if time.monotonic() > deadline:
                raise SystemExit(f"no step {until} within {PATIENCE} s: see {self.workdir}_*.log")
            for index, process in list(self.processes.items()):
                found, status = os.waitpid(process, os.WNOHANG)
                if found and status:
                    self.processes[index] = self.start(index)
                elif found:
                    del self.processes[index]
            time.sleep(0.02)

    def kill(self, index):
        os.kill(self.processes[index], signal.SIGKILL)


def answers(workdir):
    """Returns image, label and prediction of each row of a run's report."""
    with open(workdir / "report" / "predictions.csv", encoding="utf-8", newline="") as file:
        return [row[:3] for row in csv.reader(file)]


def main(directory, workers, kills):
    directory, workers, kills = Path(directory), int(workers), int(kills)
    one = directory / "one"
    alone = {"strategy": "one_device", "report": True, **batch(workers)}
    os.waitpid(fork(one, directory / "one.log", {}, **alone), 0)
    cluster = Cluster(directory / "several", workers)
    killed = []
    for number in range(kills):
        cluster.run(until=1 + number * (STEPS - 2) // kills)
        killed.append((cluster.reached(), (workers - 1 + number) % workers))
        cluster.kill(killed[-1][1])
    cluster.run(until=STEPS + 1)
    expected, found = outcome(one), outcome(cluster.workdir)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)
    assert answers(cluster.workdir) == answers(one)
    results = [json.loads((run / "results.json").read_text()) for run in (one, cluster.workdir)]
    assert results[0]["images"] == results[1]["images"] == len(answers(one)) - 1
    print(json.dumps({"killed": killed, "started": cluster.started}))


if __name__ == "__main__":
    main(*sys.argv[1:])
