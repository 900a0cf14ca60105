"""Cluster configuration from a worker's environment variables."""

import json

import pytest

from training import configuration, strategies


def test_tf_config_is_used_unchanged():
    cluster = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}
    assert strategies.cluster({"TF_CONFIG": json.dumps(cluster)}) == cluster


@pytest.mark.parametrize(("task", "index"), [("chief", 0), ("master", 0), ("worker", 2)])
def test_tfjob_chief_is_the_first_worker(task, index):
    kind = "chief" if task == "worker" else task
    tf_config = {
        "cluster": {kind: ["c:1"], "worker": ["a:1", "b:1"]},
        "task": {"type": task, "index": 1 if task == "worker" else 0},
        "environment": "cloud",
    }
    assert strategies.cluster({"TF_CONFIG": json.dumps(tf_config)}) == {
        "cluster": {"worker": ["c:1", "a:1", "b:1"]},
        "task": {"type": "worker", "index": index},
    }


def test_slurm_tasks_have_separate_ports():
    environment = {
        "SLURM_PROCID": "3",
        "SLURM_STEP_NODELIST": "gpu[09-10]",
        "SLURM_STEP_NUM_TASKS": "4",
    }
    assert strategies.cluster(environment) == {
        "cluster": {"worker": ["gpu09:12345", "gpu09:12346", "gpu10:12345", "gpu10:12346"]},
        "task": {"type": "worker", "index": 3},
    }


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("login", ["login"]),
        ("a,b", ["a", "b"]),
        ("n[1-3,7]", ["n1", "n2", "n3", "n7"]),
        ("gpu[098-101]-ib,x2", ["gpu098-ib", "gpu099-ib", "gpu100-ib", "gpu101-ib", "x2"]),
    ],
)
def test_slurm_host_lists_are_expanded(short, full):
    assert strategies.expand_hosts(short) == full


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "finds no cluster: set TF_CONFIG"),
        ({"TF_CONFIG": "{}"}, "must list workers"),
        (
            {"TF_CONFIG": '{"cluster":{"worker":["a:1"]},"task":{"type":"worker","index":1}}'},
            "index 1 of 1",
        ),
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a,b", "SLURM_STEP_NUM_TASKS": "3"},
            "as many tasks on each node",
        ),
    ],
)
def test_incomplete_cluster_raises(environment, message):
    with pytest.raises(ValueError, match=message):
        strategies.cluster(environment)


@pytest.mark.parametrize(
    ("values", "on_gpu", "message"),
    [
        ({"cross_device_ops": "nccl"}, True, "is of --strategy=mirrored"),
        ({"communication": "ring"}, True, "is of --strategy=multi_worker"),
        ({"strategy": "mirrored", "cross_device_ops": "nccl"}, False, "needs GPUs"),
        ({"strategy": "multi_worker", "communication": "nccl"}, False, "needs GPUs"),
        ({"strategy": "mirrored", "cross_device_ops": "nccl", "cpu_devices": 2}, True, "needs GPU"),
    ],
)
def test_collectives_that_do_not_match_the_devices_raise(values, on_gpu, message):
    with pytest.raises(ValueError, match=message):
        strategies.check_collectives(configuration.make("digits", **values), on_gpu)


def test_valid_collectives_are_accepted():
    for values in ({"strategy": "mirrored", "cross_device_ops": "nccl"}, {}):
        strategies.check_collectives(configuration.make("digits", **values), True)
    each = configuration.make("digits", strategy="multi_worker", communication="ring")
    strategies.check_collectives(each, False)
    assert set(strategies.CROSS_DEVICE_OPS) == set(configuration.CROSS_DEVICE_OPS)
    assert set(strategies.COMMUNICATION) == set(configuration.COMMUNICATION)


def test_single_worker_collects_only_its_own_numbers(one_device, mirrored):
    for strategy in (one_device, mirrored):
        assert strategies.of_each_worker(strategy, [3, -1]).tolist() == [[3, -1]]
        assert strategies.total(strategy, 3) == 3
