"""Docstrings begin with a verb or a noun phrase, not with a clause (CONTRIBUTING.md)."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_backend

ROOT = Path(__file__).parent.parent
FOLDERS = ("keras_tnt", "training", "savedmodels", "benchmarks", "examples", "tests", "docs")
CLAUSES = {"what", "whether", "which", "how", "where", "who", "whose", "that", "when", "why"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def first_words(source):
    """Yields (line, first word, lower case) of each docstring of a source."""
    for node in ast.walk(ast.parse(source)):
        docstring = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if docstring:
            yield getattr(node, "lineno", 1), docstring.split()[0].strip(",.:`").lower()


def test_clauses_are_found():
    source = '"""How it works."""\ndef f():\n    """Returns 1."""\nclass C:\n    """What."""'
    assert [word for _, word in first_words(source) if word in CLAUSES] == ["how", "what"]


def test_no_docstring_begins_with_a_clause():
    clauses = [
        f"{path.relative_to(ROOT)}:{line}: {word}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "node_modules" not in path.parts
        for line, word in first_words(path.read_text(encoding="utf-8"))
        if word in CLAUSES
    ]
    assert clauses == []
