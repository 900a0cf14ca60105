"""Re-runs the notebooks of examples/ and saves their outputs: `make notebooks`."""

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"
PATHS = sorted(EXAMPLES.glob("*.ipynb"))
# Messages of TensorFlow's C++ at startup, before logging can be configured.
STARTING = re.compile(r"([IWE]\d{4} .*|WARNING: All log messages before absl::Initialize.*)?")


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def read(path):
    return nbformat.read(path, as_version=4)


def run(notebook):
    """Runs all cells in a new kernel and replaces their outputs."""
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    where = {"metadata": {"path": EXAMPLES}}
    NotebookClient(notebook, timeout=900, record_timing=False, resources=where).execute()
    for cell in code(notebook):
        cell.outputs = [output for output in cell.outputs if not is_starting(output)]


def is_starting(output):
    lines = output.text.splitlines() if output.get("name") == "stderr" else [None]
    return all(line is not None and STARTING.fullmatch(line) for line in lines)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or PATHS):
        print(path.name, flush=True)
        notebook = read(path)
        run(notebook)
        nbformat.write(notebook, path)
