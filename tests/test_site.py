"""What the site takes from the code. The site itself is built by `make docs`, strictly."""

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
from tests.floors import FLOOR, room_imports
from training import configuration

DOCS = Path(__file__).parent.parent / "docs"
pytestmark = pytest.mark.one_backend


@pytest.fixture(scope="module")
def made():
    """The module that makes tables and entries."""
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module("made_of_code")
    finally:
        sys.path.remove(str(DOCS))


def test_every_flag_stands_in_the_page_of_flags_once(made):
    listed = re.findall(r"^\| `--(\w+)`", made.flags(), re.MULTILINE)
    assert sorted(listed) == sorted(configuration.FIELDS)
    assert "## Devices" in made.flags()


def test_every_variant_and_checkpoint_stands_in_the_tables(made):
    assert re.findall(r"`(\w+)` \| \d+x\d+ \|", made.models()) == keras_tnt.list_models()
    assert all(f"`{row.name}`" in made.weights() for row in keras_tnt.list_weights())


def test_a_public_name_without_an_entry_is_named(made):
    names = made.public_names()
    assert {"keras_tnt.TNTSmall", "keras_tnt.export.onnx", "keras_tnt.layers.TNTBlock"} <= {*names}
    assert made.missing(dict.fromkeys(names)) == []
    assert made.missing(dict.fromkeys(names[1:])) == names[:1]


def test_the_picture_of_the_floors_has_every_room_and_every_import_and_no_other(made):
    picture = made.MADE["floors"]()
    assert set(re.findall(r">(\w+)</text>", picture)) == set(FLOOR)
    drawn = set(re.findall(r"<title>(\w+) imports (\w+)</title>", picture))
    assert drawn == {(room, used) for room, all_used in room_imports().items() for used in all_used}


def test_the_picture_of_the_floors_stays_as_it_is_in_markdown(made):
    picture = made.MADE["floors"]()
    assert "__main__" in picture and MarkdownIt().render(picture).strip() == picture


def test_the_lines_that_stand_out_are_those_that_no_way_round_replaces(made):
    chain = {"roof": {"hall", "ground"}, "hall": {"ground"}, "ground": set()}
    assert made.floors_picture.needed(chain) == {("roof", "hall"), ("hall", "ground")}


def test_the_page_that_why_shows_is_explores_own_with_all_that_it_draws(made):
    page = made.explored().decode()
    template = resources.files("keras_tnt.inspection").joinpath("explore.html").read_text()
    assert page.endswith(template.partition("%%ARRAYS%%")[2]) and "%%PAGE%%" not in page
    kept = json.loads((DOCS / "explored.json").read_text(encoding="utf-8"))
    last = max(kept["page"]["layout"].values(), key=lambda array: array["at"])
    size = last["at"] + np.dtype(last["type"]).itemsize * math.prod(last["shape"])
    assert [-(-size // 4) * 4] * len(kept["page"]["images"]) == [
        len(base64.b64decode(data)) for data in kept["data"]
    ]


def test_marks_in_pages_name_what_is_made(made):
    for page in DOCS.rglob("*.md"):
        assert set(made.MARK.findall(page.read_text(encoding="utf-8"))) <= set(made.MADE)
