"""Measures a training step on 1, 2 and 4 processes, and models the scaling to clusters.

    python benchmarks/scaling.py --model=tnt_digits --batch_size=16 --processes=1,2,4

Each process is a worker of --strategy=multi_worker with its own batch (weak scaling). Three timings
take turns in each: the trainer's full step; the all-reduce of the gradients alone; and the step of
a single device without collectives, while the other processes run the same. The difference between
the first and the last is the cost of the collectives. Results are written to
benchmarks/results/scaling.json.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "scaling.json"
sys.path.insert(0, str(ROOT))

# === Performance model ===

# Bandwidth per device, full duplex, and latency per message, as stated by the manufacturers: NVLink
# of an H100 within a node of eight, and one network card per device between nodes.
NVLINK = {"bytes_per_second": 450e9, "seconds_per_message": 3e-6}
NETWORKS = {
    "400 Gb/s InfiniBand": {"bytes_per_second": 50e9, "seconds_per_message": 5e-6},
    "100 Gb/s Ethernet": {"bytes_per_second": 12.5e9, "seconds_per_message": 20e-6},
    "25 Gb/s Ethernet": {"bytes_per_second": 3.125e9, "seconds_per_message": 30e-6},
}
NODE = 8


def ring_seconds(devices, size, link):
    """Returns the time of a ring all-reduce: 2 (n - 1) sequential messages of 1/n of the bytes."""
    messages = 2 * (devices - 1)
    return messages * (size / devices / link["bytes_per_second"] + link["seconds_per_message"])


def all_reduce_seconds(devices, size, network):
    """Returns the time of a hierarchical all-reduce.

    Within a node, it is a ring over NVLink; between nodes, rings of an eighth each over the
    network.
    """
    inside = ring_seconds(min(devices, NODE), size, NVLINK)
    nodes = -(-devices // NODE)
    return inside + (ring_seconds(nodes, size / NODE, network) if nodes > 1 else 0.0)


def predict(parameters, flops, batch, peak, utilisation):
    """Returns rows of a table, assuming that all-reduce does not overlap with computation.

    Args:
        parameters: number of parameters, whose gradients are summed in float32.
        flops: FLOPs of a forward pass of an image; a training step costs three times as many.
        batch: images per device and step.
        peak: peak FLOP/s of a device.
        utilisation: assumed fraction of the peak that the computation reaches.
    """
    computing = 3 * flops * batch / (peak * utilisation)
    return [
        {
            "network": name,
            "devices": devices,
            "computing_ms": 1e3 * computing,
            "all_reduce_ms": 1e3 * (reducing := all_reduce_seconds(devices, 4 * parameters, link)),
            "efficiency": computing / (computing + reducing),
        }
        for name, link in NETWORKS.items()
        for devices in (8, 64, 512)
    ]


# === Measurement ===


def worker(options):
    """Runs a worker: times the three in turn, and prints medians as JSON."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import numpy as np
    import tensorflow as tf

    from training import configuration, models, optimization, step_functions, strategies

    processes = options["processes"]
    values = {"model": options["model"], "dataset": "synthetic", "mixup": 0.0, "cutmix": 0.0}
    batch = options["batch_size"]
    config = configuration.make(
        "digits", strategy="multi_worker", batch_size=batch * processes, classes=10, **values
    )
    alone = configuration.make("digits", batch_size=batch, classes=10, **values)
    several = strategies.make(config)
    one = tf.distribute.OneDeviceStrategy("CPU:0")
    steps, gradients = {}, None
    for name, strategy, values in (("step", several, config), ("computing", one, alone)):
        with strategy.scope():
            model = models.build(values, 10)
            optimizer = optimization.Optimizer(model, values)
        height, width = models.image_size(model)
        data = {
            "image": np.zeros((batch, height, width, 3), "uint8"),
            "label": np.arange(batch) % 10,
            "weight": np.ones(batch, "float32"),
            "erase": np.zeros((batch, 4), "int32"),
        }
        dataset = tf.data.Dataset.from_tensors(data)
        (given,) = strategy.distribute_datasets_from_function(lambda context, d=dataset: d)
        train = step_functions.make_train_step(strategy, model, optimizer, values, 10)
        groups = step_functions.count_groups(values, strategy.num_replicas_in_sync)
        mixing = step_functions.draw_mixing(values, 0, (height, width), 0, groups)
        arguments = [tf.constant(x) for x in (1.0, 1e-4, 0.0, mixing)]
        steps[name] = lambda t=train, g=given, a=arguments: t(g, *a)[0].numpy()
        gradients = [tf.zeros(v.shape) for v in model.trainable_variables]

    @tf.function(autograph=False)
    def reduce():
        def replica():
            context = tf.distribute.get_replica_context()
            summed = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
            return tf.add_n([tf.reduce_sum(each) for each in summed])

        return several.reduce(tf.distribute.ReduceOp.SUM, several.run(replica), axis=None)

    steps["all_reduce"] = lambda: reduce().numpy()
    seconds = {name: [] for name in steps}
    for turn in range(options["warm_up"] + options["rounds"]):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if turn >= options["warm_up"]:
                seconds[name].append(time.perf_counter() - began)
    result = {f"{name}_ms": 1e3 * statistics.median(each) for name, each in seconds.items()}
    result["parameters"] = int(sum(np.prod(g.shape) for g in gradients))
    result["tensors"] = len(gradients)
    print(json.dumps(result))


def measure(options, processes):
    """Returns the medians of worker 0 of `processes` workers."""
    listening = [socket.socket() for _ in range(processes)]
    for each in listening:
        each.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in listening]
    for each in listening:
        each.close()
    told = json.dumps({**options, "processes": processes})
    workers = []
    for index in range(processes):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        workers.append(
            subprocess.Popen(
                [sys.executable, __file__, "--worker", told],
                env={**os.environ, "TF_CONFIG": json.dumps(task), "TF_CPP_MIN_LOG_LEVEL": "2"},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [each.communicate()[0] for each in workers]
    if any(each.returncode for each in workers):
        raise SystemExit(f"a worker of {processes} ended with an error")
    return {"processes": processes, **json.loads(outputs[0].splitlines()[-1])}


def main():
    """Measures every number of processes, and prints the predicted table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tnt_digits")
    parser.add_argument("--batch_size", type=int, default=16, help="images a process and step")
    parser.add_argument("--processes", default="1,2,4", help="how many, by commas")
    parser.add_argument("--rounds", type=int, default=20, help="of the three, in turn")
    parser.add_argument("--warm_up", type=int, default=3)
    parser.add_argument("--parameters", type=float, default=23.8e6, help="predicted: TNT-S")
    parser.add_argument("--flops", type=float, default=10.4e9, help="of a forward pass: TNT-S")
    parser.add_argument("--batch", type=int, default=128, help="predicted: images a device")
    parser.add_argument("--peak", type=float, default=989e12, help="predicted: H100, bfloat16")
    parser.add_argument("--utilisation", type=float, default=0.2, help="assumed, not measured")
    parser.add_argument("--predict", action="store_true", help="leave the measurement out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(json.loads(options.worker))
    told = {n: getattr(options, n) for n in ("model", "batch_size", "rounds", "warm_up")}
    counts = [] if options.predict else [int(each) for each in options.processes.split(",")]
    result = {
        "measured": {**told, "cores": os.cpu_count(), "rows": []},
        "predicted": {
            n: getattr(options, n) for n in ("parameters", "flops", "batch", "peak", "utilisation")
        },
    }
    for processes in counts:
        row = measure(told, processes)
        print(json.dumps(row), flush=True)
        result["measured"]["rows"].append({**row, "load": os.getloadavg()[0]})
    result["predicted"]["rows"] = predict(**result["predicted"])
    for row in result["predicted"]["rows"]:
        print(
            f"{row['network']:>20} {row['devices']:4} devices: computing "
            f"{row['computing_ms']:.1f} ms, all-reduce {row['all_reduce_ms']:.2f} ms, "
            f"efficiency {row['efficiency']:.1%}"
        )
    if counts:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
