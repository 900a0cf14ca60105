"""`--help` of every script in the repository."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_backend
ROOT = Path(__file__).parent.parent
FOLDERS = ("training", "benchmarks", "savedmodels", "examples")

# Runs a script with --help under an audit hook that forbids writing or removing files in the
# repository and starting this Python. Slow packages are replaced by mocks.
WATCHED = """
import importlib.abc, importlib.machinery, os, runpy, sys
from unittest import mock
root, script = sys.argv[1:3]
sys.dont_write_bytecode = True
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def watch(event, arguments):
    below = bool(arguments) and str(arguments[0]).startswith(root)
    if event == "open" and below and (arguments[2] or 0) & WRITES:
        raise AssertionError(f"{script} writes {arguments[0]}")
    if event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree") and below:
        raise AssertionError(f"{script}: {event} {arguments[0]}")
    if event == "subprocess.Popen" and arguments[0] == sys.executable:
        raise AssertionError(f"{script} starts {arguments[1]}")

class InNameAlone(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("keras", "tensorflow", "keras_tnt", "matplotlib", "sklearn"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return mock.MagicMock()

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, InNameAlone())
sys.addaudithook(watch)
sys.argv = [script, "--help"]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""


def scripts():
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
    return [
        str(path.relative_to(ROOT))
        for path in found
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("script", scripts())
def test_help_prints_usage_without_side_effects(script):
    result = subprocess.run(
        [sys.executable, "-c", WATCHED, str(ROOT), str(ROOT / script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "help" in result.stdout or "flags:" in result.stdout
