"""The floors of the house: every import goes down, none goes round."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.one_backend

# From the ground up: a module or package imports only what stands on a floor below, or on its own.
FLOORS = (
    ("files", "text", "imagenet", "native", "registry"),
    ("layers",),
    ("weights",),
    ("anatomy",),
    ("pretrained",),
    ("building",),
    ("tnt", "pyramid_tnt", "deit", "cait"),
    ("images", "preprocessing", "inference", "teacher", "distillation", "inspection", "export"),
    ("finetuning", "bundle", "classifier"),
    ("command", "__main__"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports():
    """The modules of the package that each module imports, also within functions."""
    found = {}
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "keras_tnt").rglob("*.py")
    }
    for module, path in files.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        # The package itself is asked for its version and for what users call, at run time.
        names &= set(files) - {"keras_tnt", module}
        # A package is no module of its own: importing one of its modules is no import of it.
        found[module] = {n for n in names if not module.startswith(n + ".")}
    del found["keras_tnt"]
    return found


def test_no_import_goes_round():
    graphlib.TopologicalSorter(imports()).prepare()  # raises a CycleError


def test_no_import_goes_up():
    def floor(module):
        return FLOOR[module.split(".")[1]]

    upward = [
        (module, imported)
        for module, names in imports().items()
        for imported in names
        if floor(imported) > floor(module)
    ]
    assert upward == []


def test_the_library_does_not_import_the_trainer():
    for path in (ROOT / "keras_tnt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")]
            modules = [getattr(node, "module", None) or "", *names]
            assert not any(m.split(".")[0] in ("training", "savedmodels") for m in modules), path


def test_one_module_writes_aside_and_asks_for_free_space():
    files = [path for room in ("keras_tnt", "training", "savedmodels") for path in walk(room)]
    told = ("mkdtemp", "mkstemp", "NamedTemporaryFile", "disk_usage", "statvfs")
    assert [
        path.relative_to(ROOT).as_posix()
        for path in files
        if any(word in path.read_text(encoding="utf-8") for word in told)
    ] == ["keras_tnt/files.py"]


def walk(room):
    return sorted((ROOT / room).rglob("*.py"))
