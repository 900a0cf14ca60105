"""`keras-tnt rename`, which replaces class names."""

import json
import zipfile

import keras
import numpy as np
import pytest

import keras_tnt
from keras_tnt.cli import main
from tests.helpers.checks import compute

pytestmark = pytest.mark.one_backend
OLD, NEW = ["a", "b", "c"], ["Katze", "Hund", "Vögel"]


def tiny(**arguments):
    return keras_tnt.DeiT(
        **{
            "input_shape": (16, 16, 3),
            "patch_size": 8,
            "embed_dim": 8,
            "depth": 1,
            "num_heads": 1,
            "class_names": OLD,
            **arguments,
        }
    )


@pytest.fixture
def names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\ufeffKatze\r\nHund\r\nVögel\r\n\r\n", encoding="utf-8")
    return path


def test_rename_preserves_weights_and_optimizer_of_a_keras_file(tmp_path, names, capsys):
    model, path = tiny(), tmp_path / "model.keras"
    model.compile("adam", "sparse_categorical_crossentropy", jit_compile=False)
    images = np.random.default_rng(0).uniform(0, 255, (3, 16, 16, 3)).astype("float32")
    model.fit(images, np.arange(3), verbose=0)
    model.save(path)
    out = tmp_path / "out" / "renamed.keras"
    assert main(["rename", str(path), f"--classes={names}", f"--out={out}"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert keras_tnt.class_names(keras.models.load_model(path)) == OLD
    assert main(["rename", str(path), f"--classes={names}"]) == 0
    with zipfile.ZipFile(out) as one, zipfile.ZipFile(path) as other:
        assert one.namelist() == other.namelist()
        assert one.read("model.weights.h5") == other.read("model.weights.h5")
    loaded = keras.models.load_model(path)
    assert keras_tnt.class_names(loaded) == NEW
    assert int(loaded.optimizer.iterations.numpy()) == 1
    np.testing.assert_array_equal(compute(loaded, images), compute(model, images))


def test_rename_in_a_run_directory_of_a_wrapped_model(tmp_path, names):
    inner = tiny(include_top=False, pooling="token", class_names=None)
    model = keras.Sequential([inner, keras.layers.Dense(3, activation="softmax")])
    model.save(tmp_path / "final.keras")
    assert main(["rename", str(tmp_path), f"--classes={names}"]) == 0
    found = keras.models.load_model(tmp_path / "final.keras")
    assert keras_tnt.class_names(found) == NEW


@pytest.mark.parametrize("elsewhere", [False, True])
def test_rename_preserves_weights_of_a_bundle(tmp_path, names, elsewhere):
    model, folder, out = tiny(distilled=True), tmp_path / "bundle", tmp_path / "other"
    keras_tnt.save_pretrained(model, folder)
    before = (folder / "model.safetensors").read_bytes()
    arguments = [f"--out={out}"] if elsewhere else []
    assert main(["rename", str(folder), f"--classes={names}", *arguments]) == 0
    written = out if elsewhere else folder
    assert (written / "model.safetensors").read_bytes() == before
    assert json.loads((written / "config.json").read_text())["label_names"] == NEW
    assert keras_tnt.class_names(keras_tnt.load_pretrained(written)) == NEW
    assert keras_tnt.class_names(keras_tnt.load_pretrained(folder)) == (OLD if elsewhere else NEW)


def test_invalid_names_change_no_file(tmp_path, capsys):
    path, folder = tmp_path / "model.keras", tmp_path / "bundle"
    tiny().save(path)
    keras_tnt.save_pretrained(tiny(), folder)
    kept = path.read_bytes(), (folder / "config.json").read_bytes()
    cases = {
        "two.txt": (b"x\ny\n", "Received: 2 names for the 3 classes of"),
        "twice.txt": (b"x\nx\ny\n", "twice"),
        "blank.txt": (b"x\n\ny\n", "blank"),
        "empty.txt": (b"", "at least one"),
        "bytes.txt": (b"\xff\xfe\x00", "no UTF-8"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        for model in (path, folder):
            assert main(["rename", str(model), f"--classes={tmp_path / name}"]) == 2
            assert message in capsys.readouterr().err, (name, model)
    good = tmp_path / "good.txt"
    good.write_text("x\ny\nz\n")
    for model, options, message in (
        (path, [f"--classes={tmp_path / 'none.txt'}"], "--classes: there is no file"),
        (path, [f"--classes={tmp_path}"], "is a folder or a device"),
        (path, [f"--classes={good}", "--out=x.onnx"], "--out must end in .keras"),
        (tmp_path / "none.keras", [f"--classes={good}"], "There is no file"),
        (tmp_path / "none", [f"--classes={good}"], "There is no model"),
        (good, [f"--classes={good}"], "exported again"),
        (tmp_path, [f"--classes={good}"], "holds no model"),
    ):
        assert main(["rename", str(model), *options]) == 2
        assert message in capsys.readouterr().err, message
    assert (path.read_bytes(), (folder / "config.json").read_bytes()) == kept


@pytest.mark.parametrize(
    ("model", "out", "message"),
    [
        ("x.keras", "folder.keras", "path of a file. Received: '{0}/folder.keras', which is a dir"),
        ("x.keras", "file/x.keras", "'{0}/file' is no directory"),
        ("run", "file/x.keras", "'{0}/file' is no directory"),
        ("run", "x", "--out must end in .keras"),
        ("bundle", "file", "path of a directory. Received: '{0}/file', which is a file"),
        ("bundle", "file/x", "'{0}/file' is no directory"),
    ],
)
def test_destination_is_checked_before_any_work(model, out, message, tmp_path, names, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.keras").mkdir()
    for path in ("x.keras", "run/final.keras", "bundle/config.json"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("no model")
    arguments = [f"--classes={names}", f"--out={tmp_path / out}"]
    assert main(["rename", str(tmp_path / model), *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --out must ") and message.format(tmp_path) in line
