"""The README's Python runs as printed."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_backend
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def python_blocks():
    """The README's Python, but for what needs the network or a longer run, as it says itself."""
    found = re.findall(r"(<!-- needs [^>]*-->\n)?```python\n(.*?)```", README, re.DOTALL)
    return [code for needs, code in found if not needs]


def test_quick_start_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks()
    assert len(blocks) >= 2
    names = {}
    for code in blocks:
        exec(compile(code, "README.md", "exec"), names)  # one session, as a reader types it


def test_commands_of_the_readme_exist():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in set(re.findall(r"python ((?:training|savedmodels|benchmarks)/\w+\.py)", README)):
        assert (Path(__file__).parent.parent / script).is_file(), script
