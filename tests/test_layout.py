"""Test modules share helpers (tests/helpers) and fixtures (conftest.py), not each other's code."""

import pytest

from tests.helpers.checks import ROOT
from tests.helpers.import_layers import imported_names

pytestmark = pytest.mark.one_backend


def test_no_module_imports_a_test_module():
    imports = {
        f"{path.relative_to(ROOT)}: {name}"
        for folder in ("tests", "benchmarks", "docs")
        for path in (ROOT / folder).rglob("*.py")
        if "node_modules" not in path.parts
        for name in imported_names(path)
        if name.startswith("tests.") and ".test_" in name
    }
    assert imports == set()
