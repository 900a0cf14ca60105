"""Names and files that a stranger made, in whatever comes out: terminals, tables, pages."""

import csv
import io
import json
import os
import sys
import zipfile

import keras
import numpy as np
import pytest
from PIL import Image

import keras_tnt
from keras_tnt import inspection
from keras_tnt.command import cards, main
from keras_tnt.weights import load_keras_model

pytestmark = pytest.mark.one_backend
ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202e"
NAMES = [f"a{ESCAPES}", "=1+1", "<img src=x onerror=alert(1)>", 'b", "c', "$\\frac$"]
ARCHITECTURE = {"embed_dim": 16, "depth": 1, "num_heads": 2, "input_shape": (32, 32, 3)}


@pytest.fixture(scope="module")
def model():
    return keras_tnt.DeiT(**ARCHITECTURE, class_names=NAMES)


@pytest.fixture(scope="module")
def model_file(model, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model") / "model.keras")
    model.save(path)
    return path


@pytest.fixture
def odd_file(tmp_path):
    """An image whose name is no UTF-8, and holds escapes."""
    name = os.fsencode(f"{tmp_path}/<b>{ESCAPES}") + b"\xff.png"
    with open(name, "wb") as file:
        Image.new("RGB", (40, 40), "red").save(file, "PNG")
    return os.fsdecode(name)


# === Terminals and tables ===


def test_the_command_prints_neither_a_models_nor_a_files_escapes(
    model_file, odd_file, tmp_path, capsys
):
    broken = tmp_path / f"{ESCAPES}.png"
    broken.write_bytes(b"no image")
    assert main([odd_file, str(broken), f"--model={model_file}"]) == 1
    assert main(["info", model_file]) == 0
    assert main([str(tmp_path / f"{ESCAPES}none.png"), f"--model={model_file}"]) == 2
    assert main([odd_file, f"--model={ESCAPES}.keras"]) == 2
    printed = "".join(capsys.readouterr())
    assert "\\xff.png" in printed and "a\\x1b[2J" in printed
    assert all(c.isprintable() or c == "\n" for c in printed)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables_take_files_whose_names_are_no_text(model_file, odd_file, tmp_path, kind):
    path = tmp_path / f"table.{kind}"
    arguments = [odd_file, f"--model={model_file}", f"--out={path}", "--top=5"]
    assert main(arguments) == 0
    if kind == "csv":
        (row,) = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
    elif kind == "jsonl":
        row = json.loads(path.read_text(encoding="utf-8"))
        row |= {f"name_{i}": found["name"] for i, found in enumerate(row["predictions"], 1)}
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        (row,) = parquet.read_table(path).to_pylist()
    assert row["file"].endswith(f"<b>{ESCAPES}\\xff.png")
    assert {row[f"name_{i}"] for i in range(1, 6)} == set(NAMES)


def test_class_names_that_no_file_can_hold_are_refused():
    with pytest.raises(ValueError, match=r"no text that UTF-8 can hold.*'caf\\udce9'"):
        keras_tnt.DeiT(**ARCHITECTURE, class_names=["caf\udce9", "bar"])


# === Pages and pictures ===


def test_a_page_takes_titles_that_are_no_text(model, tmp_path):
    path = tmp_path / "page.html"
    inspection.explore(model, np.zeros((1, 32, 32, 3)), path, titles=[f"\udcff</script>{ESCAPES}"])
    text = path.read_text(encoding="utf-8")
    start = text.index('id="page"')
    page = json.loads(text[text.index(">", start) + 1 : text.index("</script>", start)])
    assert page["images"][0]["title"] == f"\udcff</script>{ESCAPES}"
    assert "<img" not in text[start:]


def test_a_picture_draws_names_with_dollars(model, tmp_path):
    model = keras_tnt.DeiT(**ARCHITECTURE, class_names=["$\\frac$", "$\\nonsense{$"])
    inspection.plot_attention(model, np.zeros((32, 32, 3)), tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert min(picture.size) > 100


# === Files of models ===


def rewritten(path, target, change):
    """A .keras file whose config.json is another."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "config.json":
                config = json.loads(data)
                change(config)
                data = json.dumps(config).encode()
            new.writestr(name, data)
    return str(target)


def as_layer(layer):
    def change(config):
        layers = config["config"]["layers"]
        layers[1] |= layer
        layers[1]["registered_name"] = layer.get("registered_name")

    return change


LAMBDA = keras.layers.Lambda(lambda x: x)
STRANGE = {
    "a module of one's own": {"module": "strange_module", "class_name": "Layer"},
    "a submodule": {"module": "strange_module.inner", "class_name": "Layer"},
    "a program": {"module": "os", "class_name": "system"},
    "a function": {"module": "builtins", "class_name": "function", "config": "exec"},
    "a Lambda": {
        "module": "keras.layers",
        "class_name": "Lambda",
        "config": keras.saving.serialize_keras_object(LAMBDA)["config"],
    },
    "a download": {"module": "keras.utils", "class_name": "get_file", "config": {}},
    "another loader": {"module": "keras.models", "class_name": "load_model", "config": {}},
    "a file that is read": {
        "module": "keras.layers",
        "class_name": "StringLookup",
        "config": {"name": "x", "vocabulary": "/etc/passwd"},
    },
    "a module of an extension": {"module": "keras_hub.strange", "class_name": "Layer"},
    "no text": {"module": ["os"], "class_name": {"a": 1}},
}


@pytest.mark.parametrize("case", STRANGE)
def test_no_module_that_a_keras_file_names_is_imported_and_nothing_runs(
    case, model_file, tmp_path, monkeypatch, capsys
):
    (tmp_path / "strange_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    path = rewritten(model_file, tmp_path / "strange.keras", as_layer(STRANGE[case]))
    before = set(sys.modules)
    with pytest.raises(ValueError, match=r"strange\.keras'"):
        load_keras_model(path)
    assert main(["info", path]) == 2
    assert "strange.keras" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not [name for name in set(sys.modules) - before if "strange" in name]


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_the_command_tells_that_a_keras_file_is_damaged(model_file, tmp_path, size, capsys):
    path = tmp_path / "cut.keras"
    with open(model_file, "rb") as file:
        path.write_bytes(file.read()[:size])
    assert main(["info", str(path)]) == 2
    assert "truncated or damaged" in capsys.readouterr().err


HUGE = {
    "classes": {"classes": 10**9},
    "depth": {"depth": 10**9},
    "width": {"embed_dim": 10**12},
    "patches": {"patch_size": 1e-9},
    "another builder": {"weights": "/etc/passwd"},
    "a function": {
        "classifier_activation": {
            "module": "builtins",
            "class_name": "function",
            "config": "exec",
            "registered_name": "function",
        }
    },
    "a list": [1],
    "positions": {"name": ["a"]},
    "no argument": {"nonsense": 3},
}


@pytest.mark.parametrize("case", [*HUGE, "family", "image", "not JSON", "deep", "UTF-16", "text"])
def test_a_bundle_of_a_stranger_is_refused_in_one_error(case, model, tmp_path):
    folder = tmp_path / "bundle"
    keras_tnt.save_pretrained(model, folder)
    config = json.loads((folder / "config.json").read_text())
    own = config["keras_tnt"]
    if case in HUGE:
        own["arguments"] = {**own["arguments"], **HUGE[case]} if case != "a list" else HUGE[case]
    own["family"] = ["tnt"] if case == "family" else own["family"]
    own["input_shape"] = [160_000, 160_000, 3] if case == "image" else own["input_shape"]
    config["keras_tnt"] = "text" if case == "text" else own
    data = json.dumps(config).encode("utf-16" if case == "UTF-16" else "utf-8")
    data = {"not JSON": b"{", "deep": b"[" * 100_000}.get(case, data)
    (folder / "config.json").write_bytes(data)
    with pytest.raises(ValueError, match="bundle"):
        keras_tnt.load_pretrained(folder)


CARD = {
    "name": "tnt",
    "weights": None,
    "input": "pixels in [0, 255]",
    "image_size": [32, 32],
    "resized_to_cover": [32, 32],
    "channels": 3,
    "data_format": "channels_last",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "labels": ["a", "b"],
    "made_with": "keras_tnt",
}


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": [10**9, 10**9]},
        {"image_size": "32"},
        {"image_size": [0, -1]},
        {"resized_to_cover": [10**6, 10**6]},
        {"resized_to_cover": None},
        {"channels": 10**9},
        {"channels": "3"},
        {"labels": 7},
        {"labels": [1, 2]},
        {"mean": ["a"]},
        {"std": [0, 0, 0], "input": "normalised"},
        {"name": None},
        {"labels": None, "mean": None},
    ],
)
def test_an_exports_card_of_a_stranger_is_refused_in_one_error(change, tmp_path):
    folder = tmp_path / "1" / "assets.extra"
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps(CARD | change))
    with pytest.raises(ValueError, match=r"model\.json"):
        cards.saved_model_card(str(tmp_path / "1"))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 100_000, b"\xff\xfe{}"])
def test_a_card_that_is_none_is_refused_in_one_error(content, tmp_path):
    folder = tmp_path / "1" / "assets.extra"
    folder.mkdir(parents=True)
    (folder / "model.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.json"):
        cards.saved_model_card(str(tmp_path / "1"))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", ".hidden", "os.", "a b", "x\x1b[2J", "a/b"]
)
def test_plugins_that_are_no_names_of_modules(name, capsys):
    assert main(["list", f"--plugins={name},"]) == (0 if not name else 2)
    if name:
        assert "module" in capsys.readouterr().err
