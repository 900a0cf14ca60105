"""Smallest run of benchmarks/input_pipeline.py."""

import pytest

from benchmarks import input_pipeline

pytestmark = pytest.mark.slow


def test_benchmark_measures_each_stage_in_both_modes(capsys):
    arguments = ["--seconds=0.05", "--rounds=1", "--images=4", "--image_size=32"]
    medians = input_pipeline.main([*arguments, "--batch_size=4", "--gpu=1000"])
    assert list(medians) == list(input_pipeline.STAGES)
    assert all(rate > 0 for modes in medians.values() for rate in modes.values())
    assert all(set(modes) == {0, 1} for modes in medians.values())
    printed = capsys.readouterr().out
    assert "per core" in printed and "a GPU of 1000 images/s needs" in printed
