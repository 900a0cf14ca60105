"""Packaging: setup.py, constraints.txt, the Makefile, and the imports of keras_tnt."""

import ast
import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import keras
import pytest

import keras_tnt

ROOT = Path(__file__).parent.parent
BACKENDS = ("tensorflow", "jax", "torch")
PARTS = ("keras_tnt", "training", "savedmodels", "examples", "benchmarks", "tests")
# Optional packages that are used if installed, and that no extra installs.
NOT_BROUGHT = {"timm", "triton_python_backend_utils", "mlserver", "tritonclient"}


@pytest.fixture(scope="module")
def metadata():
    """Returns the arguments that setup.py passes to setuptools."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def distribution(requirement):
    name = re.match(r"[\w.-]+", requirement).group()
    return re.sub(r"[-_.]+", "-", name).lower()


def distributions(requirements):
    return {distribution(requirement) for requirement in requirements}


def run_python(code, *args, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend(), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


# === Importing ===

WITHOUT_OTHER_BACKENDS = '''
import importlib.util, pkgutil, sys
absent = set(sys.argv[1:])

class Without:
    """A finder that does not find `absent`, for `import` and `find_spec` alike."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in absent:
            return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
assert not any(map(importlib.util.find_spec, absent))
import numpy as np
import keras_tnt
# What is a backend's own is a module named after it, and imported where that backend runs.
others = tuple(f"{name}_" for name in absent)
for module in pkgutil.walk_packages(keras_tnt.__path__, "keras_tnt."):
    if not module.name.rpartition(".")[2].startswith(others):
        importlib.import_module(module.name)
model = keras_tnt.TNT(
    input_shape=(32, 32, 3), classes=3, depth=1,
    outer_dim=8, inner_dim=4, outer_heads=2, inner_heads=2,
)
print(model.predict(np.zeros((2, 32, 32, 3), "float32"), verbose=0).shape)
'''


@pytest.mark.slow
def test_package_works_without_the_other_backends():
    others = [backend for backend in BACKENDS if backend != keras.backend.backend()]
    result = run_python(WITHOUT_OTHER_BACKENDS, *others)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(2, 3)"


def test_import_loads_no_backend_and_no_extra_beyond_keras(metadata):
    optional = {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if distributions(owners) & distributions(sum(metadata["extras_require"].values(), []))
    }
    code = """
import sys
import keras
before = set(sys.modules)
import keras_tnt
print(*sorted(set(sys.modules) - before))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert "keras_tnt" in loaded
    assert not loaded & (optional | set(BACKENDS))


# === setup.py ===


def third_party_imports(path):
    """Yields (name, whether it is imported at module level) for third-party imports of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_import = {id(node) for node in module_level(tree)}
    siblings = {sibling.stem for sibling in path.parent.iterdir() if sibling.suffix in (".py", "")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        else:
            continue
        for name in {name.partition(".")[0] for name in names}:
            if name not in {*sys.stdlib_module_names, *PARTS, *siblings}:
                yield name, id(node) in at_import


def module_level(tree):
    """Yields all nodes that run when the module is imported: those outside of functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from module_level(node)


@pytest.mark.one_backend
@pytest.mark.parametrize("part", PARTS)
def test_every_import_is_declared(part, metadata):
    required = distributions(metadata["install_requires"])
    extras = metadata["extras_require"]
    allowed = {
        "keras_tnt": distributions(sum(extras.values(), [])),
        "training": distributions(
            sum((extras[e] for e in ("train", "export", "huggingface", "wandb", "mlflow")), [])
        ),
        "savedmodels": distributions(extras["export"] + extras["plots"]),
        "examples": distributions(extras["dense"]),
    }.get(part, distributions(extras["test"]))
    owners = importlib.metadata.packages_distributions()
    undeclared = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / part).rglob("*.py"))
        for name, at_import in third_party_imports(path)
        if name not in NOT_BROUGHT
        and not distributions(owners.get(name, [name]))
        & (required if part == "keras_tnt" and at_import else required | allowed)
        # A backend-specific module is imported only with that backend.
        and not path.stem.startswith(f"{name}_")
    ]
    assert not undeclared


@pytest.mark.one_backend
def test_version_matches_the_package(metadata):
    assert metadata["version"] == keras_tnt.__version__


@pytest.mark.one_backend
def test_every_data_file_is_shipped(metadata):
    package = ROOT / "keras_tnt"
    shipped = {
        path for pattern in metadata["package_data"]["keras_tnt"] for path in package.glob(pattern)
    }
    data = {
        path
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert data <= shipped


@pytest.mark.one_backend
def test_test_extra_contains_every_other_extra(metadata):
    extras = metadata["extras_require"]
    trackers = {*extras["wandb"], *extras["mlflow"]}  # which pin older packages
    assert set(sum(extras.values(), [])) - trackers == set(extras["test"])


@pytest.mark.one_backend
def test_constraints_pin_every_requirement_to_one_version(metadata):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []
    wanted = distributions(metadata["install_requires"] + metadata["extras_require"]["test"])
    assert wanted <= distributions(pins)


# === The Makefile ===

# A fake Python that logs its calls, creates the environment, and fails on request.
FAKE_PYTHON = """#!/bin/sh
echo "$KERAS_BACKEND $*" >> calls
case "$*" in
    *venv*) rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
esac
if [ -e broken ]; then case "$KERAS_BACKEND $*" in *"$(cat broken)"*) exit 1 ;; esac; fi
"""


@pytest.fixture
def checkout(tmp_path):
    """Copies the files of `make setup`, and returns a function that runs make on them."""
    for name in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "fake_python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}

    def make(*arguments):
        (tmp_path / "calls").write_text("")
        result = subprocess.run(
            ["make", "PYTHON=./fake_python", *arguments],
            cwd=tmp_path,
            env=clean,
            capture_output=True,
            text=True,
        )
        return result, (tmp_path / "calls").read_text().splitlines()

    make.root = tmp_path
    return make


@pytest.mark.one_backend
def test_make_lists_every_target_and_installs_nothing(checkout):
    result, calls = checkout()
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    listed = re.findall(r"^  make ([\w-]+)", result.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(phony.split())
    assert calls == []


@pytest.mark.one_backend
def test_setup_runs_once_and_again_after_a_change(checkout):
    _, first = checkout("setup")
    assert any("pip install" in call and "constraints.txt" in call for call in first)
    for target in ("setup", "lint"):
        _, again = checkout(target)
        assert not any("pip install" in call for call in again)
    for name in ("setup.py", "constraints.txt"):
        later = (checkout.root / ".venv" / "ready").stat().st_mtime + 10
        os.utime(checkout.root / name, (later, later))
        _, changed = checkout("setup")
        assert any("venv" in call for call in changed)
        os.utime(checkout.root / name, (later - 60, later - 60))


@pytest.mark.one_backend
def test_interrupted_setup_is_repeated(checkout):
    checkout("setup")
    os.utime(checkout.root / ".venv" / "ready", (0, 0))
    (checkout.root / "broken").write_text("pip install")
    result, _ = checkout("demo")
    assert result.returncode != 0
    (checkout.root / "broken").unlink()
    _, calls = checkout("demo")
    assert any("pip install" in call for call in calls)
    assert calls[-1].endswith("training/demo.py")


@pytest.mark.one_backend
@pytest.mark.parametrize("broken", ["ruff check", *(f"{name} -m pytest" for name in BACKENDS)])
def test_make_test_runs_lint_and_all_backends_and_fails_on_any_failure(checkout, broken):
    result, calls = checkout("test")
    assert result.returncode == 0, result.stderr
    (checkout.root / "broken").write_text(broken)
    result, calls = checkout("test")
    assert result.returncode != 0
    assert [call.split()[0] for call in calls if "pytest" in call] == list(BACKENDS)
