"""Generated parts of the documentation site. `make docs` builds the site in strict mode."""

import base64
import importlib
import json
import math
import re
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt

import keras_tnt
from tests.helpers.import_layers import LAYERS, imports_between_modules
from training import configuration

DOCS = Path(__file__).parent.parent / "docs"
pytestmark = pytest.mark.one_backend


@pytest.fixture(scope="module")
def made():
    """Returns the module that generates tables and API entries."""
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module("made_of_code")
    finally:
        sys.path.remove(str(DOCS))


def test_flags_page_lists_every_flag_once(made):
    listed = re.findall(r"^\| `--(\w+)`", made.flags(), re.MULTILINE)
    assert sorted(listed) == sorted(configuration.FIELDS)
    assert "## Devices" in made.flags()


def test_tables_list_every_variant_and_checkpoint(made):
    assert re.findall(r"`(\w+)` \| \d+x\d+ \|", made.models()) == keras_tnt.list_models()
    assert all(f"`{row.name}`" in made.weights() for row in keras_tnt.list_weights())


def test_public_name_without_an_api_entry_is_reported(made):
    names = made.public_names()
    assert {"keras_tnt.TNTSmall", "keras_tnt.export.onnx", "keras_tnt.layers.TNTBlock"} <= {*names}
    assert made.missing(dict.fromkeys(names)) == []
    assert made.missing(dict.fromkeys(names[1:])) == names[:1]


def test_layer_diagram_has_exactly_the_actual_imports(made):
    picture = made.MADE["import_layers"]()
    assert set(re.findall(r">(\w+)</text>", picture)) == set(sum(LAYERS, ()))
    drawn = set(re.findall(r"<title>(\w+) imports (\w+)</title>", picture))
    assert drawn == {
        (room, used) for room, all_used in imports_between_modules().items() for used in all_used
    }


def test_layer_diagram_survives_markdown(made):
    picture = made.MADE["import_layers"]()
    assert "__main__" in picture and MarkdownIt().render(picture).strip() == picture


def test_bold_edges_are_not_implied_transitively(made):
    chain = {"roof": {"hall", "ground"}, "hall": {"ground"}, "ground": set()}
    assert made.import_layers_picture.needed(chain) == {("roof", "hall"), ("hall", "ground")}


def test_embedded_explore_page_is_complete(made):
    page = made.explored().decode()
    template = resources.files("keras_tnt.inspection").joinpath("explore.html").read_text()
    assert page.endswith(template.partition("%%ARRAYS%%")[2]) and "%%PAGE%%" not in page
    kept = json.loads((DOCS / "explored.json").read_text(encoding="utf-8"))
    last = max(kept["page"]["layout"].values(), key=lambda array: array["at"])
    size = last["at"] + np.dtype(last["type"]).itemsize * math.prod(last["shape"])
    assert [-(-size // 4) * 4] * len(kept["page"]["images"]) == [
        len(base64.b64decode(data)) for data in kept["data"]
    ]


def test_marks_in_pages_name_generated_parts(made):
    for page in DOCS.rglob("*.md"):
        assert set(made.MARK.findall(page.read_text(encoding="utf-8"))) <= set(made.MADE)
