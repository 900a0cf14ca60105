"""`tf.distribute` strategies and collectives over workers."""

import json
import os
import re

import numpy as np
import tensorflow as tf

PORT = 12345
# --cross_device_ops: all-reduce within one machine.
CROSS_DEVICE_OPS = {
    "auto": lambda: None,
    "nccl": tf.distribute.NcclAllReduce,
    "hierarchical_copy": tf.distribute.HierarchicalCopyAllReduce,
    "reduce_to_one": tf.distribute.ReductionToOneDevice,
}
# --communication: all-reduce between machines.
COMMUNICATION = {
    "auto": tf.distribute.experimental.CommunicationImplementation.AUTO,
    "ring": tf.distribute.experimental.CommunicationImplementation.RING,
    "nccl": tf.distribute.experimental.CommunicationImplementation.NCCL,
}


def make(config):
    """Sets up the devices and creates the strategy. Call it once per process.

    Args:
        config: A `training.configuration.Config`.

    Returns:
        A `tf.distribute.Strategy`.

    Raises:
        ValueError: If the devices do not exist, or the cluster's environment is incomplete.
    """
    if config.cpu_devices:
        cpu = tf.config.list_physical_devices("CPU")[0]
        parts = [tf.config.LogicalDeviceConfiguration()] * config.cpu_devices
        tf.config.set_logical_device_configuration(cpu, parts)
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.experimental.enable_tensor_float_32_execution(config.tf32)
    check_collectives(config, bool(tf.config.list_physical_devices("GPU")))
    if config.strategy == "multi_worker":
        os.environ["TF_CONFIG"] = json.dumps(cluster(os.environ))
        options = tf.distribute.experimental.CommunicationOptions(
            implementation=COMMUNICATION[config.communication]
        )
        return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    if config.strategy == "tpu":
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=config.tpu)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    on_gpu = tf.config.list_logical_devices("GPU") and not config.cpu_devices
    devices = [d.name for d in tf.config.list_logical_devices("GPU" if on_gpu else "CPU")]
    if config.strategy == "one_device":
        return tf.distribute.OneDeviceStrategy(devices[0])
    operations = CROSS_DEVICE_OPS[config.cross_device_ops]()
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=operations)


def check_collectives(config, on_gpu):
    """Raises a ValueError if the collectives do not fit the strategy or the devices."""
    for flag, strategy in (("cross_device_ops", "mirrored"), ("communication", "multi_worker")):
        value = getattr(config, flag)
        if value != "auto" and config.strategy != strategy:
            raise ValueError(
                f"--{flag}={value} is of --strategy={strategy}. Received: "
                f"--strategy={config.strategy}. Leave --{flag} out"
            )
        if value == "nccl" and (config.cpu_devices or not on_gpu):
            raise ValueError(f"--{flag}=nccl needs GPUs, and there are none: leave it out")


def cluster(environment):
    """Returns the TF_CONFIG of this worker.

    It is read from TF_CONFIG itself (set by a Kubernetes TFJob), from SLURM's variables, or from an
    Indexed Job of Kubernetes: the completion index and the list WORKER_HOSTS.

    Args:
        environment: A mapping like `os.environ`.

    Returns:
        `{"cluster": {"worker": [address, ...]}, "task": {"type": "worker", "index": i}}`.

    Raises:
        ValueError: If none is set, or this worker is not part of the cluster.
    """
    if "TF_CONFIG" in environment:
        return workers_only(json.loads(environment["TF_CONFIG"]))
    if "SLURM_PROCID" in environment:
        hosts = expand_hosts(environment["SLURM_STEP_NODELIST"])
        tasks = int(environment["SLURM_STEP_NUM_TASKS"])
        if tasks % len(hosts):
            raise ValueError(
                f"--strategy=multi_worker needs as many tasks on each node: SLURM gives {tasks} "
                f"tasks on {len(hosts)} nodes. Use srun --ntasks-per-node."
            )
        each = tasks // len(hosts)
        addresses = [f"{host}:{PORT + i}" for host in hosts for i in range(each)]
        index = int(environment["SLURM_PROCID"])
        return {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    if "JOB_COMPLETION_INDEX" in environment and environment.get("WORKER_HOSTS"):
        addresses = [f"{host}:{PORT}" for host in environment["WORKER_HOSTS"].split(",")]
        task = {"type": "worker", "index": int(environment["JOB_COMPLETION_INDEX"])}
        return workers_only({"cluster": {"worker": addresses}, "task": task})
    raise ValueError(
        "--strategy=multi_worker finds no cluster: set TF_CONFIG, or start it with srun or as "
        "training/cluster/kubernetes.yaml does."
    )


def workers_only(tf_config):
    """Returns a TF_CONFIG with the chief merged into the list of workers, as the first.

    Raises:
        ValueError: If it lists no workers, or this process is not one of them.
    """
    cluster, task = tf_config.get("cluster", {}), tf_config.get("task", {})
    chiefs = cluster.get("chief", []) + cluster.get("master", [])
    addresses = chiefs + cluster.get("worker", [])
    if not addresses or task.get("type") not in ("chief", "master", "worker"):
        raise ValueError(
            "TF_CONFIG must list workers and this process's task, of type chief or worker. "
            f"Received: {json.dumps(tf_config)}"
        )
    index = int(task.get("index", 0)) + (len(chiefs) if task["type"] == "worker" else 0)
    if index >= len(addresses):
        raise ValueError(f"TF_CONFIG gives this process index {index} of {len(addresses)} workers.")
    return {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}


def expand_hosts(hosts):
    """Expands SLURM's compressed host list: `gpu[01-03,7],login` to a list of names."""
    expanded = []
    for prefix, ranges, suffix in re.findall(r"([^,\[]+)(?:\[([^\]]*)\])?([^,\[]*)", hosts):
        if not ranges:
            expanded.append(prefix + suffix)
            continue
        for part in ranges.split(","):
            first, _, last = part.partition("-")
            for number in range(int(first), int(last or first) + 1):
                expanded.append(f"{prefix}{number:0{len(first)}d}{suffix}")
    return expanded


def worker(strategy):
    """Returns (index of this worker, number of workers)."""
    resolver = strategy.cluster_resolver
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return resolver.task_id or 0, max(
            1, len(resolver.cluster_spec().as_dict().get("worker", []))
        )
    return 0, 1


def total(strategy, number):
    """Returns the sum of an integer over all workers; every worker must call it."""
    return int(of_each_worker(strategy, [number])[:, 0].sum())


def of_each_worker(strategy, numbers):
    """All-gathers integers over the workers; every worker must call it with equally many.

    Args:
        strategy: A `tf.distribute.Strategy`.
        numbers: List of integers.

    Returns:
        int64 (workers, numbers): the same array in every worker.
    """
    index, workers = worker(strategy)
    if workers == 1:
        return np.array([numbers], "int64")
    devices = len(strategy.extended.worker_devices)  # of this worker; only the first sends
    mine = np.zeros((workers, len(numbers)), "int64")
    mine[index] = numbers

    def share(context):
        first = context.replica_id_in_sync_group % devices == 0
        return tf.constant(mine if first else np.zeros_like(mine))

    shares = strategy.experimental_distribute_values_from_function(share)
    return strategy.reduce(tf.distribute.ReduceOp.SUM, shares, axis=None).numpy()
