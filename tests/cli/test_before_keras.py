"""Commands that run without importing Keras; `list` and `info`."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import keras_tnt
from keras_tnt.cli import COMMANDS, main
from tests.helpers.checks import ROOT

pytestmark = pytest.mark.one_backend

# Runs `python -m keras_tnt` with an import hook that forbids Keras.
WITHOUT_KERAS = """
import runpy, sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name == "keras":
            raise AssertionError("Keras is imported")
sys.meta_path.insert(0, Without())
sys.orig_argv = ["python", "-m", "keras_tnt", *sys.argv[1:]]
sys.argv[0] = "-m"
runpy.run_module("keras_tnt", run_name="__main__", alter_sys=True)
"""


def without_keras(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_KERAS, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
def test_help_does_not_import_keras(arguments):
    result = without_keras(*arguments, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: keras-tnt") and result.stderr == ""


def test_usage_and_backend_errors_do_not_import_keras(tmp_path):
    result = without_keras("predict", "cat.jpg", "--topp=3")
    assert result.returncode == 2 and "--topp" in result.stderr
    result = without_keras("list", KERAS_BACKEND="mxnet")
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert "'mxnet', which is not installed" in line and "set KERAS_BACKEND=tensorflow" in line
    (tmp_path / "keras.json").write_text('{"backend": "theano"}')
    result = without_keras("list", KERAS_BACKEND="", KERAS_HOME=str(tmp_path))
    assert result.returncode == 2 and "'theano'" in result.stderr


def test_console_script_calls_command_main():
    (script,) = entry_points(group="console_scripts", name="keras-tnt")
    assert script.load() is main


def test_list_shows_every_model_and_its_weights(capsys):
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found] == keras_tnt.list_models()
    assert main(["list", "deit_s*"]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert line.split()[:2] == ["deit_small", "224x224"]
    assert "deit_small_distilled_patch16_224.fb_in1k" in line
    assert main(["list", "deit_smal"]) == 2
    assert "Did you mean" in capsys.readouterr().err


def test_info_shows_parameters_and_weights_of_a_model(capsys):
    assert main(["info", "DeiTTiny"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    found = {name.strip(): value.strip() for name, value in lines.items()}
    assert found["parameters"] == "5,717,416"
    assert found["family"] == "deit"
    assert found["class names"].startswith("tench, goldfish")
    assert "deit_tiny_patch16_224.fb_in1k" in found["public weights"]
