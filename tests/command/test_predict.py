"""`keras-tnt predict` and `merge`: tables of folders."""

import csv
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from PIL import Image

import keras_tnt
from keras_tnt.command import main, predict
from keras_tnt.command.table import read_command
from tests.checks import ROOT

pytestmark = pytest.mark.one_backend
NAMES = ["cat", "dog", "bird", "fish"]
COUNT = 30  # images that can be read


@pytest.fixture(scope="module")
def model():
    model = keras_tnt.DeiT(
        input_shape=(16, 16, 3),
        patch_size=8,
        embed_dim=8,
        depth=1,
        num_heads=1,
        class_names=NAMES,
        distilled=True,
    )
    model.set_weights([20 * w for w in model.get_weights()])  # scores that differ
    return model


@pytest.fixture(scope="module")
def model_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.keras"
    model.save(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images in folders, one file that is broken, one that is no image and one that is hidden."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        place = folder / f"part_{i % 3}"
        place.mkdir(exist_ok=True)
        size = (20 + i, 30, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype="uint8")).save(place / f"{i:02d}.PNG")
    (folder / "part_1" / "broken.jpg").write_text("no image")
    (folder / "part_1" / "notes.txt").write_text("no image either")
    (folder / ".hidden.png").write_text("hidden")
    (folder / "part_0" / "again").symlink_to(folder)
    return str(folder)


def files(folder):
    """The image files in the order of the table."""
    found = [
        os.path.join(top, name)
        for top, _, names in os.walk(folder)
        for name in names
        if name.endswith((".PNG", ".jpg"))
    ]
    return sorted(found)


@pytest.fixture(scope="module")
def undisturbed(folder, model_file, tmp_path_factory):
    """The table of one run."""
    path = tmp_path_factory.mktemp("table") / "all.csv"
    assert run(folder, model_file, path) == 0
    return path.read_bytes()


def run(folder, model_file, out, *options):
    return main([folder, f"--model={model_file}", f"--out={out}", "--batch_size=4", *options])


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_each_image_of_a_folder_is_a_row_with_the_likeliest_classes(
    folder, model, undisturbed, tmp_path
):
    path = tmp_path / "all.csv"
    path.write_bytes(undisturbed)
    rows = read(path)
    assert [row["file"] for row in rows] == files(folder)
    for row in rows:
        if row["file"].endswith("broken.jpg"):
            assert "cannot be read as an image" in row["error"] and row["name_1"] == ""
            continue
        scores = model.predict(keras_tnt.load_image(row["file"], model)[None], verbose=0)
        expected = keras_tnt.decode_predictions(scores, 4, model)[0]
        assert row["error"] == ""
        assert [row[f"name_{i}"] for i in range(1, 5)] == [name for name, _, _ in expected]
        assert [NAMES[int(row[f"class_{i}"])] for i in range(1, 5)] == [n for n, _, _ in expected]
        found = [float(row[f"score_{i}"]) for i in range(1, 5)]
        np.testing.assert_allclose(found, [score for _, _, score in expected], atol=1e-5)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_formats_hold_the_same(folder, model_file, undisturbed, tmp_path, kind):
    path = tmp_path / f"all.{kind}"
    assert run(folder, model_file, path, "--top=2") == 0
    if kind == "jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found = [
            (r["file"], r.get("error"), *(p["name"] for p in r.get("predictions", [])))
            for r in rows
        ]
    else:
        from pyarrow import parquet

        rows = parquet.read_table(path).to_pylist()
        found = [(r["file"], r["error"], *filter(None, (r["name_1"], r["name_2"]))) for r in rows]
        assert set(rows[0]) == {"file", "error"} | {
            f"{name}_{i}" for name in ("class", "name", "score") for i in (1, 2)
        }
    (tmp_path / "all.csv").write_bytes(undisturbed)
    expected = [
        (r["file"], r["error"] or None, *filter(None, (r["name_1"], r["name_2"])))
        for r in read(tmp_path / "all.csv")
    ]
    assert found == expected


def test_features_are_what_the_heads_read(folder, model, model_file, tmp_path):
    path = tmp_path / "features.csv"
    assert run(folder, model_file, path, "--features") == 0
    heads = keras_tnt.anatomy(model).heads
    vectors = keras.Model(model.inputs, [head.input for head in heads])
    for row in read(path)[:3]:
        image = keras_tnt.load_image(row["file"], model)[None]
        expected = np.mean([np.asarray(v)[0] for v in vectors.predict(image, verbose=0)], axis=0)
        found = [float(row[f"feature_{i}"]) for i in range(1, 9)]
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_grey_images_that_are_normalised_outside_of_the_model(folder, tmp_path, capsys):
    model = keras_tnt.DeiT(
        input_shape=(16, 16, 1),
        patch_size=8,
        embed_dim=8,
        depth=1,
        num_heads=1,
        classes=3,
        include_preprocessing=False,
    )
    path = tmp_path / "grey.keras"
    model.save(path)
    image = files(folder)[0]
    assert main([image, f"--model={path}", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    pixels = keras_tnt.deit.preprocess_input(keras_tnt.load_image(image, model)[None])
    expected = model.predict(pixels, verbose=0)[0]
    found = {p["class"]: p["score"] for p in row["predictions"]}
    np.testing.assert_allclose([found[i] for i in range(3)], expected, atol=1e-5)


# === Killed ===


def begin(folder, model_file, path, batches):
    """A run that breaks off after so many batches, as a killed one leaves its files."""
    wanted = predict.predictions

    def some(*arguments):
        yield from itertools.islice(wanted(*arguments), batches)
        raise Killed

    predict.predictions = some
    try:
        with pytest.raises(Killed):
            run(folder, model_file, path)
    finally:
        predict.predictions = wanted


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_where_it_was(folder, model_file, undisturbed, tmp_path, capsys):
    path = tmp_path / "all.csv"
    for batches in (0, 3, 2):
        begin(folder, model_file, path, batches)
        assert not path.exists()
    assert "12 of 31 images are done" in capsys.readouterr().err
    rows = tmp_path / "all.csv.rows"
    assert rows.read_bytes().count(b"\n") == 20
    with open(rows, "ab") as file:
        file.write(b'{"file": "cut off in the mid')
    assert run(folder, model_file, path) == 0
    assert path.read_bytes() == undisturbed
    assert not rows.exists()
    capsys.readouterr()
    assert run(folder, model_file, path) == 0
    assert "is done" in capsys.readouterr().err


def test_rows_of_half_a_batch_are_made_again(folder, model_file, undisturbed, tmp_path):
    """So that the same images make a batch, and the results are the same to the last bit."""
    path = tmp_path / "all.csv"
    begin(folder, model_file, path, 3)
    rows = tmp_path / "all.csv.rows"
    rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:6]))
    assert run(folder, model_file, path) == 0
    assert path.read_bytes() == undisturbed


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_what_the_next_goes_on_with(
    folder, model_file, undisturbed, tmp_path
):
    path = tmp_path / "all.csv"
    code = """
import os, signal, sys
from keras_tnt.command import main, predict

def until_killed(*arguments, whole=predict.predictions):
    yield next(whole(*arguments))
    os.kill(os.getpid(), signal.SIGKILL)

predict.predictions = until_killed
main(sys.argv[1:])
"""
    arguments = [folder, f"--model={model_file}", f"--out={path}", "--batch_size=4"]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend()},
        capture_output=True,
        timeout=300,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (tmp_path / "all.csv.rows").read_bytes().count(b"\n") == 4
    assert run(folder, model_file, path) == 0
    assert path.read_bytes() == undisturbed


# === Tables of others ===


def test_a_table_of_another_command_is_left_alone(folder, model_file, model, tmp_path, capsys):
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("a,b\n")
    assert run(folder, model_file, foreign) == 2
    assert "not of this command" in capsys.readouterr().err
    assert foreign.read_text() == "a,b\n"

    path = tmp_path / "all.csv"
    begin(folder, model_file, path, 1)
    other = str(tmp_path / "other.keras")
    model.save(other)
    for arguments, what in (
        ([os.path.join(folder, "part_2"), model_file, path], "number of images"),
        ([folder, model_file, path, "--top=1"], "top"),
        ([folder, other, path], "model"),
    ):
        capsys.readouterr()
        assert run(*arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "belongs to another command" in line and f"its {what} was" in line


def test_two_processes_do_not_write_one_table(folder, model_file, tmp_path, capsys):
    path = tmp_path / "all.csv"
    begin(folder, model_file, path, 1)
    with open(tmp_path / "all.csv.rows", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        capsys.readouterr()
        assert run(folder, model_file, path) == 2
        assert "Another process is writing" in capsys.readouterr().err
    assert run(folder, model_file, path) == 0


# === Shards ===


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_shards_merged_are_one_run(folder, model_file, undisturbed, tmp_path, kind, capsys):
    path = tmp_path / f"all.{kind}"
    for shard in (3, 1):
        assert run(folder, model_file, path, f"--shard={shard}/4") == 0
    assert main(["merge", str(path)]) == 2
    assert "2 of 4 shards are missing: 2, 4" in capsys.readouterr().err
    for shard in (2, 4):
        assert run(folder, model_file, path, f"--shard={shard}/4") == 0
    assert main(["merge", str(path)]) == 0
    one = tmp_path / "one" / f"all.{kind}"
    assert run(folder, model_file, one) == 0
    if kind == "parquet":
        from pyarrow import parquet

        assert parquet.read_table(path).equals(parquet.read_table(one))
    else:
        assert path.read_bytes() == one.read_bytes()
    merged, command = read_command(path), read_command(one)
    assert merged == command
    capsys.readouterr()
    assert run(folder, model_file, path) == 0
    assert "is done" in capsys.readouterr().err


def test_parts_of_different_commands_are_not_joined(folder, model_file, tmp_path, capsys):
    path = tmp_path / "all.csv"
    assert main(["merge", str(path)]) == 2
    assert "There are no parts" in capsys.readouterr().err
    assert run(folder, model_file, path, "--shard=1/2") == 0
    assert run(folder, model_file, path, "--shard=2/2", "--top=1") == 0
    assert main(["merge", str(path)]) == 2
    assert "different commands: top is 1 and 5" in capsys.readouterr().err


# === Wrong arguments ===


def test_wrong_arguments_are_one_line_before_any_work(folder, model_file, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    text = tmp_path / "text.keras"
    text.write_text("no model")
    other = tmp_path / "other.keras"
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(other)
    out = tmp_path / "all.csv"
    for arguments, message in (
        ([str(empty)], "holds no image"),
        ([str(tmp_path / "none")], "There is no image file"),
        ([folder, "--out=all.xls"], "--out must end in"),
        ([folder, "--shard=17/16", f"--out={out}"], "--shard must be like 3/16"),
        ([folder, "--shard=1/2"], "--shard needs --out"),
        ([folder, "--batch_size=0"], "--batch_size must be"),
        ([folder, f"--model={tmp_path / 'none.keras'}"], "There is no file"),
        ([folder, f"--model={text}"], "cannot be read: File is not a zip file"),
        ([folder, f"--model={other}"], "is not built from one of keras_tnt's"),
        ([folder, f"--model={empty}"], "holds no model"),
        ([folder, "--model=tnt_smal"], "Did you mean tnt_small"),
        ([folder, f"--model={folder}/part_1/notes.txt"], "is no model"),
        ([folder, "--plugins=no.such.module"], "There is no module"),
    ):
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        [line] = printed.err.splitlines()
        assert line.startswith("error: ") and message in line
