"""Cluster setups of the trainer: SLURM script, Kubernetes objects, tf.data service."""

import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import tensorflow as tf
import yaml

from training import configuration, strategies
from training.cluster import data_service

CLUSTER = Path(data_service.__file__).parent
OBJECTS = list(yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("number", range(len(OBJECTS)))
def test_kubernetes_objects_match_the_schema(number):
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(OBJECTS[number], version, strict=True)


def named(kind, name):
    (found,) = (o for o in OBJECTS if (o["kind"], o["metadata"]["name"]) == (kind, name))
    return found


def test_job_pods_find_each_other():
    job = named("Job", "keras-tnt")["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    service = named("Service", pod["subdomain"])["spec"]
    assert service["selector"].items() <= job["template"]["metadata"]["labels"].items()
    assert job["completions"] == job["parallelism"]
    for index in range(job["completions"]):
        told = strategies.cluster({**environment, "JOB_COMPLETION_INDEX": str(index)})
        addresses = told["cluster"]["worker"]
        assert len(addresses) == job["completions"] and told["task"]["index"] == index
        assert addresses[index] == f"keras-tnt-{index}.keras-tnt:{strategies.PORT}"
    assert container["ports"] == [{"containerPort": strategies.PORT}]


def test_job_flags_are_valid_and_its_data_service_is_defined():
    (container,) = named("Job", "keras-tnt")["spec"]["template"]["spec"]["containers"]
    values = dict(flag.removeprefix("--").split("=") for flag in container["command"][2:])
    config = configuration.make(values.pop("recipe"), **values)
    host, port = config.data_service.removeprefix("grpc://").split(":")
    (listening,) = named("Service", host)["spec"]["ports"]
    assert listening["port"] == int(port)
    labels = named("Service", host)["spec"]["selector"]
    assert named("Deployment", labels["app"])["spec"]["selector"]["matchLabels"] == labels


def test_slurm_script_has_valid_syntax():
    subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sh")], check=True)


def test_data_service_with_one_worker_serves():
    dispatcher = data_service.start(0)
    address = dispatcher.target.removeprefix("grpc://")
    worker = data_service.start(0, address)
    distributed = tf.data.Dataset.range(8).apply(
        tf.data.experimental.service.distribute("parallel_epochs", dispatcher.target)
    )
    assert sorted(distributed.as_numpy_iterator()) == list(range(8))
    del worker
