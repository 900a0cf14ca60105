"""The notebooks of examples/: saved outputs, and execution from a clean kernel."""

import tempfile
from pathlib import Path

import nbformat
import pytest

from tests.helpers import notebooks
from tests.helpers.checks import ROOT

LARGEST = 400_000  # bytes of a notebook with its outputs

pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.parametrize("path", notebooks.PATHS, ids=lambda path: path.stem),
]


def kinds(notebook):
    """Returns the set of output types of each cell, ignoring their contents."""
    return [
        {(x.output_type, x.get("name"), *sorted(x.get("data", ()))) for x in cell.outputs}
        for cell in notebooks.code(notebook)
    ]


def test_notebook_has_outputs_of_one_complete_run(path):
    notebook = notebooks.read(path)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebooks.code(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    found = set().union(*kinds(notebook))
    assert any("image/png" in kind for kind in found)
    assert not any(kind[0] == "error" or "stderr" in kind for kind in found)
    text = path.read_text(encoding="utf-8")
    assert len(text) < LARGEST
    for place in (str(ROOT), str(Path.home()), tempfile.gettempdir()):
        assert f"{place}/" not in text, "a path of the machine that ran it"


@pytest.mark.slow
def test_notebook_runs_from_a_clean_kernel(path):
    notebook = notebooks.read(path)
    kept = kinds(notebook)
    notebooks.run(notebook)
    assert kinds(notebook) == kept
