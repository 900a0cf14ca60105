"""Import layering: no upward imports, no cycles."""

import ast
import graphlib

import pytest

from tests.floors import FLOOR, ROOT, SCRIPTS, imports

pytestmark = pytest.mark.one_backend


def test_imports_have_no_cycles():
    graphlib.TopologicalSorter(imports()).prepare()  # raises CycleError


def test_imports_do_not_go_to_higher_layers():
    def floor(module):
        return FLOOR[module.split(".")[1]]

    upward = [
        (module, imported)
        for module, names in imports().items()
        for imported in names
        if floor(imported) > floor(module)
    ]
    assert upward == []


def test_library_does_not_import_the_scripts():
    for path in (ROOT / "keras_tnt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")]
            modules = [getattr(node, "module", None) or "", *names]
            assert not any(m.split(".")[0] in SCRIPTS for m in modules), path


def test_only_one_module_creates_temporary_files_and_checks_disk_space():
    files = [path for room in ("keras_tnt", "training", "savedmodels") for path in walk(room)]
    told = ("mkdtemp", "mkstemp", "NamedTemporaryFile", "disk_usage", "statvfs")
    assert [
        path.relative_to(ROOT).as_posix()
        for path in files
        if any(word in path.read_text(encoding="utf-8") for word in told)
    ] == ["keras_tnt/files.py"]


def walk(room):
    return sorted((ROOT / room).rglob("*.py"))
