"""Test modules share helpers (tests/helpers) and fixtures (conftest.py), not each other's code."""

import grimp
import pytest

pytestmark = pytest.mark.one_backend


def is_test_module(name):
    return name.rpartition(".")[2].startswith("test_")


def test_no_module_imports_a_test_module():
    graph = grimp.build_graph("tests", cache_dir=None)
    imports = {
        (importer, imported)
        for imported in graph.modules
        if is_test_module(imported)
        for importer in graph.find_modules_that_directly_import(imported)
    }
    assert imports == set()
