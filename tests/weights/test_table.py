"""The table of public weights matches the published data, and the README matches the table."""

import subprocess
import sys
from pathlib import Path

import pytest

import keras_tnt
from keras_tnt.models import registry
from tests.helpers import golden
from tools.write_weights_table import BEGIN, END, with_table

CHECKPOINTS = registry.checkpoints()
pytestmark = pytest.mark.one_backend
ROOT = Path(__file__).parents[2]
# Top-1 accuracy in percent, from the papers and timm's evaluation.
TOP1 = {
    "TNTSmall": 81.5,
    "TNTBase": 82.9,
    "DeiTTiny": 72.2,
    "DeiTSmall": 79.9,
    "DeiTBase": 82.0,
    "CaiTXXS24": 78.4,
    "CaiTXXS36": 79.8,
    "CaiTXS24": 84.1,
    "CaiTS24": 83.5,
    "CaiTS36": 85.5,
    "CaiTM36": 86.1,
    "CaiTM48": 86.5,
}


def test_every_hub_checkpoint_has_a_row_with_published_data():
    published = {k: v for k, v in golden.checkpoints().items() if "hub_repo" in v}
    assert {row.name for row in CHECKPOINTS} == set(published)
    for row in CHECKPOINTS:
        known = published[row.name]
        assert row.repository == known["hub_repo"]
        assert row.file == "model.safetensors"
        assert row.license.lower() == known["license"]
        assert row.parameters == known["params"]
        assert [3, row.size, row.size] == known["input_size"]
        assert row.arguments.get("distilled", False) == ("dist_token" in known["tensors"])
        assert row.arguments.get("legacy", False) == ("legacy" in row.name)


def test_accuracies_are_the_published_ones():
    for model, top1 in TOP1.items():
        assert keras_tnt.list_weights(model)[0].top1 == pytest.approx(top1, abs=0.11)
    for row in CHECKPOINTS:
        assert row.top1 < row.top5 < 100
        assert row.source


def test_rows_name_existing_variants():
    for row in CHECKPOINTS:
        assert callable(getattr(keras_tnt, row.model))
        assert getattr(keras_tnt, row.model).__name__ == row.model


def test_list_weights_is_formatted_as_a_table(capsys):
    rows = keras_tnt.list_weights()
    assert rows == list(CHECKPOINTS)
    assert capsys.readouterr().out == ""
    lines = repr(rows).splitlines()
    assert len(lines) == 1 + len(CHECKPOINTS)
    assert lines[0].split() == ["weights", "model", "image", "parameters", "top-1", "top-5"]
    assert lines[1].split() == [
        *("tnt_s_patch16_224.in1k", "TNTSmall", "224x224", "23.8M", "81.5", "95.7")
    ]
    assert len({len(line) for line in lines}) == 1


def test_list_weights_of_one_model():
    rows = keras_tnt.list_weights("DeiTBase")
    assert [row.name for row in rows] == [
        "deit_base_patch16_224.fb_in1k",
        "deit_base_distilled_patch16_224.fb_in1k",
        "deit_base_patch16_384.fb_in1k",
        "deit_base_distilled_patch16_384.fb_in1k",
    ]
    assert rows == keras_tnt.list_weights("deit_base") == keras_tnt.list_weights("deit_base_*")
    with pytest.raises(ValueError, match="no public weights of 'TNTTiny'. There are some of: TNTS"):
        keras_tnt.list_weights("TNTTiny")


def test_readme_has_the_current_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = keras_tnt.list_weights().markdown()
    assert readme == with_table(readme, table), "run tools/write_weights_table.py README.md"


def test_command_writes_the_table_between_the_markers(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    command = [sys.executable, "tools/write_weights_table.py"]
    subprocess.run([*command, file], check=True, cwd=ROOT)
    first, *table, last = file.read_text().splitlines()
    assert (first, last) == ("before", "after")
    assert table[0] == BEGIN and table[-1] == END
    assert len(table) == 2 + 2 + len(CHECKPOINTS)
    assert "| `tnt_b_patch16_224.in1k` | `TNTBase` | 224x224 | 65.4M | 82.9 | 96.3 |" in table


@pytest.mark.parametrize("text", ["", BEGIN, f"{BEGIN} {END} {BEGIN} {END}"])
def test_text_without_the_markers_raises(text):
    with pytest.raises(ValueError, match="once each"):
        with_table(text, "")
