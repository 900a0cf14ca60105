"""Names and files from untrusted sources in every output: terminals, tables, pages."""

import csv
import io
import json
import os
import socket
import sys
import zipfile

import keras
import numpy as np
import pytest
from PIL import Image

import keras_tnt
from keras_tnt import inspection
from keras_tnt.cli import cards, main, runtime
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
    """Writes an image with a file name that is not UTF-8 and has escape sequences."""
    name = os.fsencode(f"{tmp_path}/<b>{ESCAPES}") + b"\xff.png"
    with open(name, "wb") as file:
        Image.new("RGB", (40, 40), "red").save(file, "PNG")
    return os.fsdecode(name)


# === Terminals and tables ===


def test_command_escapes_control_characters_in_names(model_file, odd_file, tmp_path, capsys):
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
def test_tables_support_file_names_that_are_not_utf_8(model_file, odd_file, tmp_path, kind):
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


def test_class_names_that_are_not_utf_8_raise():
    with pytest.raises(ValueError, match=r"must be valid UTF-8.*'caf\\udce9'"):
        keras_tnt.DeiT(**ARCHITECTURE, class_names=["caf\udce9", "bar"])


# === Pages and plots ===


def test_page_supports_titles_that_are_not_utf_8(model, tmp_path):
    path = tmp_path / "page.html"
    inspection.explore(model, np.zeros((1, 32, 32, 3)), path, titles=[f"\udcff</script>{ESCAPES}"])
    text = path.read_text(encoding="utf-8")
    start = text.index('id="page"')
    page = json.loads(text[text.index(">", start) + 1 : text.index("</script>", start)])
    assert page["images"][0]["title"] == f"\udcff</script>{ESCAPES}"
    assert "<img" not in text[start:]


def test_plot_supports_names_with_dollar_signs(model, tmp_path):
    model = keras_tnt.DeiT(**ARCHITECTURE, class_names=["$\\frac$", "$\\nonsense{$"])
    inspection.plot_attention(model, np.zeros((32, 32, 3)), tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert min(picture.size) > 100


# === Model files ===


def rewritten(path, target, change):
    """Writes a copy of a .keras file with a changed config.json, and returns its path."""
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
def test_keras_file_cannot_import_modules_or_run_code(
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
def test_damaged_keras_file_is_reported(model_file, tmp_path, size, capsys):
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
def test_malicious_bundle_raises_one_error(case, model, tmp_path):
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
def test_malicious_export_card_raises_one_error(change, tmp_path):
    folder = tmp_path / "1" / "assets.extra"
    folder.mkdir(parents=True)
    (folder / "model.json").write_text(json.dumps(CARD | change))
    with pytest.raises(ValueError, match=r"model\.json"):
        cards.saved_model_card(str(tmp_path / "1"))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 100_000, b"\xff\xfe{}"])
def test_invalid_export_card_raises_one_error(content, tmp_path):
    folder = tmp_path / "1" / "assets.extra"
    folder.mkdir(parents=True)
    (folder / "model.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.json"):
        cards.saved_model_card(str(tmp_path / "1"))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", ".hidden", "os.", "a b", "x\x1b[2J", "a/b"]
)
def test_invalid_plugin_module_names_are_errors(name, capsys):
    assert main(["list", f"--plugins={name},"]) == (0 if not name else 2)
    if name:
        assert "module" in capsys.readouterr().err


# === Special files ===


def place_at(path, kind):
    """Creates a special file, a link to itself or an oversized file at a path."""
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "self-link":
        path.symlink_to(path.name)
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 30)


KINDS = ("FIFO", "directory", "socket", "device", "self-link", "gigabyte")


@pytest.mark.parametrize("kind", KINDS)
def test_bundle_config_that_is_not_a_regular_file_is_one_error(kind, model, tmp_path, capsys):
    folder = tmp_path / "bundle"
    keras_tnt.save_pretrained(model, folder)
    (folder / "config.json").unlink()
    place_at(folder / "config.json", kind)
    with pytest.raises(ValueError, match="bundle"):
        keras_tnt.load_pretrained(folder)
    with pytest.raises((ValueError, OSError), match="bundle"):
        keras_tnt.DeiT(**ARCHITECTURE, classes=5, weights=str(folder))
    assert main(["info", str(folder)]) == 2
    [*progress, error] = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and all(line.startswith("loading ") for line in progress)


@pytest.mark.parametrize("kind", KINDS)
def test_export_card_that_is_not_a_regular_file_is_one_error(kind, tmp_path, capsys):
    (tmp_path / "1" / "assets.extra").mkdir(parents=True)
    place_at(tmp_path / "1" / "assets.extra" / "model.json", kind)
    assert main(["info", str(tmp_path)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "model.json" in line or "holds no model" in line


@pytest.mark.parametrize("ending", [".keras", ".onnx", ""])
@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "self-link"])
def test_model_that_is_not_a_regular_file_is_one_error(kind, ending, odd_file, tmp_path, capsys):
    path = tmp_path / f"model{ending}"
    place_at(path, kind)
    assert main([odd_file, f"--model={path}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"model{ending}" in line


def test_special_files_among_images_do_not_stop_the_others(model_file, odd_file, tmp_path, capsys):
    names = [f"{kind}.png" for kind in ("FIFO", "socket", "device", "self-link", "gigabyte")]
    for name in names:
        place_at(tmp_path / name, name.removesuffix(".png"))
    names += ["x" * 300 + ".png", "y/" * 3000 + "z.png"]
    out = tmp_path / "table.csv"
    images = [str(tmp_path / name) for name in names]
    assert main([*images, odd_file, f"--model={model_file}", f"--out={out}"]) == 0
    with open(out, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(names) + 1
    assert all(row["error"] and not row["name_1"] for row in rows[:-1])
    assert rows[-1]["name_1"] and not rows[-1]["error"]
    assert main([*images, odd_file, f"--model={model_file}"]) == 1
    assert capsys.readouterr().err.count("error: ") == len(names)


def test_identity_of_a_folder_ignores_fifos_and_limits_the_number_of_files(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("x")
    before = runtime.identity(str(tmp_path))
    os.mkfifo(tmp_path / "a" / "pipe")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert runtime.identity(str(tmp_path)) == before
    nested = [tmp_path / "/".join("d" * depth) for depth in range(1, 1501)]
    for folder in nested:  # exceeds Python's recursion limit
        folder.mkdir()
    assert runtime.identity(str(tmp_path)) == before
    monkeypatch.setattr(runtime, "MOST_FILES", 10)
    with pytest.raises(ValueError, match="more than 10 files"):
        runtime.identity(str(tmp_path))
    for folder in reversed(nested):  # pytest's recursive removal of old runs would fail
        folder.rmdir()


# === Graphs that contradict their card ===


def onnx_file(path, images, result, card=CARD, names=("images", "probabilities")):
    """Writes an ONNX file that averages pixels, with the declared shapes; returns its path."""
    onnx = pytest.importorskip("onnx")
    helper, real = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("ReduceMean", [names[0]], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("Slice", ["mean", "start", "end", "axis"], [names[1]]),
    ]
    values = [
        onnx.numpy_helper.from_array(np.array([number], "int64"), name)
        for name, number in (("start", 0), ("end", 2), ("axis", 1))
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(names[0], real, images)],
        [helper.make_tensor_value_info(names[1], real, result)],
        values,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in card.items()}
    helper.set_model_props(made, {**texts, "name": "tnt"})
    onnx.save(made, path)
    return str(path)


def test_onnx_file_that_matches_its_card_is_used(odd_file, tmp_path, capsys):
    path = onnx_file(tmp_path / "m.onnx", ["batch", 32, 32, 3], ["batch", 2])
    assert main([odd_file, f"--model={path}", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert [found["name"] for found in row["predictions"]] == ["a", "b"]


@pytest.mark.parametrize(
    "images, result, change, message",
    [
        (None, ["batch", 2], {}, "4 axes are needed"),
        (["batch", 32, 32, 3], ["batch", 2, 1], {}, "m.onnx"),
        (["batch", 3], ["batch", 2], {}, "m.onnx"),
        (["batch", 16, 32, 3], ["batch", 2], {}, "its card describes images of [32, 32, 3]"),
        (["batch", 32, 32, 3], ["batch", 2], {"channels": 1}, "contradicts itself"),
        (["batch", 32, 32, 3], ["batch", 2], {"labels": ["a", "b", "c"]}, "names 3 classes"),
        (["batch", 32, 32, 3], ["batch", 2], {"std": [0.5]}, "`mean` has 3 numbers, `std` 1"),
        (["batch", 32, 32, 3], ["batch", 2], {"image_size": [10**9, 32]}, "image_size"),
        (["batch", None, None, 3], ["batch", 2], {"image_size": [60000, 60000],
            "resized_to_cover": [60000, 60000]}, "at most 4096 x 4096"),
        (["batch", 32, 32, 3], ["batch", 2], {"resized_to_cover": [8, 32]}, "must not be smaller"),
        (["batch", 32, 32, 3], ["batch", 2], {"mean": [float("nan")] * 3}, "mean"),
        (["batch", 32, 32, 3], ["batch", 2], {"data_format": "sideways"}, "data_format"),
    ],
)  # fmt: skip
def test_graph_that_contradicts_its_card_is_one_error(
    images, result, change, message, odd_file, tmp_path, capsys
):
    path = onnx_file(tmp_path / "m.onnx", images, result, CARD | change)
    assert main([odd_file, f"--model={path}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    "images, result, message",
    [
        ((), ("batch", 2), "4 axes are needed"),
        (None, ("batch", 2), "4 axes are needed"),
        (("batch", 32, 32, 3), (), "a number of values"),
        (("batch", 32, 32, 3), ("batch", "classes"), "a number of values"),
        (("batch", 32, 32, 3), ("batch", None), "a number of values"),
        (("batch", 32, 32, 3), ("batch", 0), "a number of values"),
        (("batch", "side", "side", 1), ("batch", 2), "contradicts itself"),
    ],
)
def test_incomplete_or_contradicting_shapes_raise(images, result, message):
    with pytest.raises(ValueError, match=message):
        runtime.check_graph("m.onnx", CARD, images, result, "probabilities")
    runtime.check_graph("m.onnx", CARD, ("batch", None, "side", 3), ("batch", 2), "probabilities")


def test_graph_with_other_tensor_names_is_one_error(odd_file, tmp_path, capsys):
    path = onnx_file(tmp_path / "m.onnx", ["batch", 32, 32, 3], ["batch", 2], names=("x", "y"))
    assert main([odd_file, f"--model={path}"]) == 2
    assert "gives y, not probabilities" in capsys.readouterr().err
    names = ("pictures", "probabilities")
    path = onnx_file(tmp_path / "m.onnx", ["batch", 32, 32, 3], ["batch", 2], names=names)
    assert main([odd_file, f"--model={path}"]) == 2
    assert "takes pictures, not images" in capsys.readouterr().err


# === Home directories and terminal encodings ===


def test_tilde_expands_to_the_home_directory_in_every_path(
    model, odd_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model.save(tmp_path / "m.keras")
    os.rename(odd_file, tmp_path / "image.png")
    keras_tnt.save_checkpoint(model, "~/w.safetensors")
    keras_tnt.load_checkpoint(model, "~/w.safetensors")
    keras_tnt.save_pretrained(model, "~/bundle")
    keras_tnt.load_pretrained("~/bundle")
    keras_tnt.load_image("~/image.png", model)
    keras_tnt.DeiT(**ARCHITECTURE, classes=5, weights="~/w.safetensors")
    keras_tnt.load_checkpoint(model, "~/m.keras")
    load_keras_model("~/m.keras")
    inspection.explore(model, np.zeros((1, 32, 32, 3)), "~/page.html")
    inspection.plot_attention(model, np.zeros((32, 32, 3)), "~/picture.png")
    assert main(["~/image.png", "--model=~/m.keras", "--out=~/table.csv"]) == 0
    assert main(["info", "~/bundle"]) == 0
    assert main(["explain", "~/image.png", "--model=~/m.keras", "--out=~/explained.html"]) == 0
    made = {"w.safetensors", "bundle", "page.html", "picture.png", "table.csv", "explained.html"}
    assert made <= set(os.listdir(tmp_path)) and "~" not in os.listdir(tmp_path)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_characters_outside_of_the_terminal_encoding_are_escaped(
    encoding, odd_file, tmp_path, monkeypatch
):
    model = keras_tnt.DeiT(**ARCHITECTURE, class_names=["猫", "é", "\U0001f431", "d", "e"])
    model.save(tmp_path / "m.keras")
    os.rename(odd_file, tmp_path / "鳥.png")
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding, write_through=True))
    arguments = [str(tmp_path / "鳥.png"), f"--model={tmp_path / 'm.keras'}"]
    assert main(arguments) == 0
    assert main(["info", str(tmp_path / "m.keras")]) == 0
    text = shown.getvalue().decode(encoding)
    assert ("猫" if encoding == "utf-8" else "\\u732b") in text
    assert ("\\xe9" if encoding == "ascii" else "é") in text
