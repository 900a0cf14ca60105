"""The notebooks of examples/: what they keep, and that they run from clean."""

import tempfile
from pathlib import Path

import nbformat
import pytest

from tests import notebooks
from tests.checks import ROOT

LARGEST = 400_000  # bytes of a notebook with its outputs

pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.parametrize("path", notebooks.PATHS, ids=lambda path: path.stem),
]


def kinds(notebook):
    """Of each cell what its outputs are, whatever they say."""
    return [
        {(x.output_type, x.get("name"), *sorted(x.get("data", ()))) for x in cell.outputs}
        for cell in notebooks.code(notebook)
    ]


def test_it_keeps_the_outputs_of_one_whole_run(path):
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
def test_it_runs_from_clean(path):
    notebook = notebooks.read(path)
    kept = kinds(notebook)
    notebooks.run(notebook)
    assert kinds(notebook) == kept
