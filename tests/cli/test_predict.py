"""`keras-tnt predict` and `merge`: prediction tables for image folders."""

import csv
import dataclasses
import fcntl  # noqa: TID251
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from PIL import Image

import keras_tnt
from keras_tnt.cli import main, predict
from keras_tnt.cli.runtime import Runtime, Transform
from keras_tnt.cli.table import held, read_command, shard_path
from tests.helpers.checks import ROOT

pytestmark = pytest.mark.one_backend
NAMES = ["cat", "dog", "bird", "fish"]
COUNT = 30  # readable images


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
    model.set_weights([20 * w for w in model.get_weights()])  # distinct scores
    return model


@pytest.fixture(scope="module")
def model_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.keras"
    model.save(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes images in subfolders, a broken one, a text file, a hidden file and a link."""
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
    """Returns the image files in the order of the table's rows."""
    found = [
        os.path.join(top, name)
        for top, _, names in os.walk(folder)
        for name in names
        if name.endswith((".PNG", ".jpg"))
    ]
    return sorted(found)


@pytest.fixture(scope="module")
def undisturbed(folder, model_file, tmp_path_factory):
    """Returns the table of an uninterrupted run."""
    path = tmp_path_factory.mktemp("table") / "all.csv"
    assert run(folder, model_file, path) == 0
    return path.read_bytes()


def run(folder, model_file, out, *options):
    return main([folder, f"--model={model_file}", f"--out={out}", "--batch_size=4", *options])


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_table_has_a_row_per_image_with_its_top_classes(folder, model, undisturbed, tmp_path):
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
def test_formats_have_the_same_content(folder, model_file, undisturbed, tmp_path, kind):
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


def test_features_are_the_inputs_of_the_heads(folder, model, model_file, tmp_path):
    path = tmp_path / "features.csv"
    assert run(folder, model_file, path, "--features") == 0
    heads = keras_tnt.anatomy(model).heads
    vectors = keras.Model(model.inputs, [head.input for head in heads])
    for row in read(path)[:3]:
        image = keras_tnt.load_image(row["file"], model)[None]
        expected = np.mean([np.asarray(v)[0] for v in vectors.predict(image, verbose=0)], axis=0)
        found = [float(row[f"feature_{i}"]) for i in range(1, 9)]
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_gray_model_with_external_normalization(folder, tmp_path, capsys):
    model = keras_tnt.DeiT(
        input_shape=(16, 16, 1),
        patch_size=8,
        embed_dim=8,
        depth=1,
        num_heads=1,
        classes=3,
        include_preprocessing=False,
    )
    path = tmp_path / "gray.keras"
    model.save(path)
    image = files(folder)[0]
    assert main([image, f"--model={path}", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    pixels = keras_tnt.deit.preprocess_input(keras_tnt.load_image(image, model)[None])
    expected = model.predict(pixels, verbose=0)[0]
    found = {p["class"]: p["score"] for p in row["predictions"]}
    np.testing.assert_allclose([found[i] for i in range(3)], expected, atol=1e-5)


# === Interrupted runs ===


def begin(folder, model_file, path, batches):
    """Interrupts a run after `batches` batches, and leaves the files of a killed process."""
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


def test_interrupted_run_resumes_from_its_journal(
    folder, model_file, undisturbed, tmp_path, capsys
):
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


def test_rows_of_a_partial_batch_are_recomputed(folder, model_file, undisturbed, tmp_path):
    """Batches stay the same, so that the results are bit-identical."""
    path = tmp_path / "all.csv"
    begin(folder, model_file, path, 3)
    rows = tmp_path / "all.csv.rows"
    rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:6]))
    assert run(folder, model_file, path) == 0
    assert path.read_bytes() == undisturbed


@pytest.mark.slow
def test_run_resumes_after_a_killed_process(folder, model_file, undisturbed, tmp_path):
    path = tmp_path / "all.csv"
    code = """
import os, signal, sys
from keras_tnt.cli import main, predict

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


# === Tables of other commands ===


def test_table_of_another_command_is_not_changed(folder, model_file, model, tmp_path, capsys):
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


def test_lock_of_an_earlier_version_is_respected(folder, model_file, tmp_path, capsys):
    path = tmp_path / "all.csv"
    begin(folder, model_file, path, 1)
    with open(tmp_path / "all.csv.rows", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        capsys.readouterr()
        assert run(folder, model_file, path) == 2
        assert "Another process is writing" in capsys.readouterr().err
    assert run(folder, model_file, path) == 0


# === Untrusted state files ===


@pytest.mark.parametrize("kind", ["link", "dangling link", "directory", "FIFO", "device"])
@pytest.mark.parametrize("ending", ["", ".rows", ".command.json", ".lock"])
def test_state_path_that_is_not_a_regular_file_raises(
    folder, model_file, opened, tmp_path, capsys, kind, ending
):
    (tmp_path / "mine").write_text("mine")
    path = tmp_path / "all.csv"
    place = tmp_path / f"all.csv{ending}"
    if kind == "directory":
        place.mkdir()
    elif kind == "FIFO":
        os.mkfifo(place)
    else:
        target = {"link": "mine", "dangling link": "nothing", "device": "/dev/zero"}[kind]
        place.symlink_to(target)
    assert run(folder, model_file, path) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"all.csv{ending}' " in line and line.startswith("error: ")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "nothing").exists()
    assert opened == []


@pytest.fixture
def opened(monkeypatch):
    """Replaces the model by a fast function; returns the batch sizes of its calls."""
    calls = []

    def predict_batch(images):
        calls.append(len(images))
        means = images.mean(axis=(1, 2))
        return np.concatenate([means, means[:, :1] ** 2], axis=1)

    transform = Transform((4, 4), (4, 4), 3, False, None, None)
    found = Runtime(transform, predict_batch, 4, NAMES)
    monkeypatch.setattr(predict, "open_model", lambda options, count: found)
    return calls


@pytest.fixture
def whole(folder, model_file, opened, tmp_path):
    """Returns the bytes of the complete table of the fast model."""
    path = tmp_path / "whole" / "all.csv"
    assert run(folder, model_file, path) == 0
    opened.clear()
    return path.read_bytes()


def corrupted(data, how, rng):
    """Returns the journal as a power loss or a disk error could leave it."""
    start = int(rng.integers(0, len(data) - 200))
    if how == "zeros":
        return data[:start] + bytes(200) + data[start + 200 :]
    if how == "zeros at the end":
        return data[:-300] + bytes(300)
    if how == "a bit":
        return data[:start] + bytes([data[start] ^ 4]) + data[start + 1 :]
    if how == "a part":
        return data[:start] + data[start + 150 :]
    if how == "lines twice":
        lines = data.splitlines(keepends=True)
        return b"".join(lines[::-1] + lines[:3])
    if how == "other rows":
        return data.replace(b'"score"', b'"Score"')
    return data[: start + 100]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "how", ["zeros", "zeros at the end", "a bit", "a part", "lines twice", "a tail", "other rows"]
)
def test_only_damaged_rows_are_recomputed(
    folder, model_file, opened, whole, tmp_path, capsys, how, seed
):
    path = tmp_path / "all.csv"
    begin(folder, model_file, path, 6)
    rows = tmp_path / "all.csv.rows"
    data = corrupted(rows.read_bytes(), how, np.random.default_rng([seed, len(how)]))
    rows.write_bytes(data)
    opened.clear()
    capsys.readouterr()
    assert run(folder, model_file, path) == 0
    assert path.read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ["all.csv", "all.csv.command.json", "whole"]
    if how in ("zeros", "a bit", "a part"):
        assert "are made again" in capsys.readouterr().err
        assert 1 < len(opened) <= 5  # of 8 batches, 2 of which were missing
    elif how == "lines twice":
        assert len(opened) == 2


@pytest.mark.parametrize("zeros", [False, True])
def test_run_resumes_from_the_previous_state_format(
    folder, model_file, opened, whole, tmp_path, zeros
):
    """Its rows are JSON lines in order, without checksums."""
    path = tmp_path / "all.csv"
    begin(folder, model_file, path, 5)
    rows = tmp_path / "all.csv.rows"
    data = b"".join(line.split(b" ", 2)[2] for line in rows.read_bytes().splitlines(True))
    if zeros:
        place = len(data) // 2
        data = data[:place] + bytes(300) + data[place + 300 :]
    rows.write_bytes(data + b'{"file": "cut o')
    command = tmp_path / "all.csv.command.json"
    state = json.loads(command.read_text())
    del state["state"]
    command.write_text(json.dumps(state))
    opened.clear()
    assert run(folder, model_file, path) == 0
    assert path.read_bytes() == whole
    assert len(opened) in ((4, 5, 6, 7) if zeros else (3,))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"3", b"{", b"{}", b"\xff\xfe", b"[" * 200_000, b'{"number of images": "many"}',
     b'{"model": null}', bytes(4096)],
)  # fmt: skip
def test_invalid_command_file_is_a_one_line_error(
    folder, model_file, opened, tmp_path, capsys, content
):
    path = tmp_path / "all.csv"
    (tmp_path / "all.csv.command.json").write_bytes(content)
    assert run(folder, model_file, path) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "all.csv.command.json' is no file of `keras-tnt predict`" in line
    assert (tmp_path / "all.csv.command.json").read_bytes() == content


def test_unknown_state_files_are_not_changed(folder, model_file, opened, tmp_path, capsys):
    path = tmp_path / "all.csv"
    rows = tmp_path / "all.csv.rows"
    rows.write_text("my rows\n")
    assert run(folder, model_file, path) == 2
    assert "all.csv.rows' exists and is not of this command" in capsys.readouterr().err
    rows.unlink()
    begin(folder, model_file, path, 1)
    rows.write_text("my rows\n")
    assert run(folder, model_file, path) == 2
    assert "is no state of `keras-tnt predict`" in capsys.readouterr().err
    assert rows.read_text() == "my rows\n"
    command = tmp_path / "all.csv.command.json"
    command.write_text(json.dumps(json.loads(command.read_text()) | {"state": 99}))
    assert run(folder, model_file, path) == 2
    assert "was written by another version" in capsys.readouterr().err


# === Concurrent processes ===


def in_child(work):
    """Forks a process that exits with the status that `work()` returns, and returns its id."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = work()
        finally:
            os._exit(status)
    return child


def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("trial", range(8))
def test_concurrent_runs_write_one_table(
    folder, model_file, opened, whole, tmp_path, monkeypatch, trial
):
    path = tmp_path / "all.csv"
    wanted = predict.predictions

    def slow(*arguments):
        for rows in wanted(*arguments):
            time.sleep(0.03)
            yield rows

    monkeypatch.setattr(predict, "predictions", slow)

    def work(wait):
        time.sleep(wait)
        return run(folder, model_file, path)

    children = [in_child(lambda wait=wait: work(wait)) for wait in (0.0, 0.03 * trial)]
    statuses = sorted(map(status_of, children))
    assert statuses in (
        [0, 2],
        [0, 0],
    )  # [0, 0]: the second began later
    assert path.read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ["all.csv", "all.csv.command.json", "whole"]


def test_repeatedly_killed_runs_lose_no_row(
    folder, model_file, opened, whole, tmp_path, monkeypatch
):
    path = tmp_path / "all.csv"
    wanted = predict.predictions

    def killed_after_two(*arguments):
        yield from itertools.islice(wanted(*arguments), 2)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(predict, "predictions", killed_after_two)
    for _ in range(3):
        child = in_child(lambda: run(folder, model_file, path))
        assert status_of(child) == -signal.SIGKILL
    assert not path.exists()
    monkeypatch.setattr(predict, "predictions", wanted)
    assert run(folder, model_file, path) == 0
    assert path.read_bytes() == whole
    assert opened == [4, 3]  # the last two of eight batches


def test_merge_refuses_locked_and_foreign_files(folder, model_file, opened, tmp_path, capsys):
    path = tmp_path / "all.csv"
    for shard in (1, 2):
        assert run(folder, model_file, path, f"--shard={shard}/2") == 0
    for busy in (path, shard_path(str(path), 2, 2)):
        with held(str(busy)):
            assert main(["merge", str(path)]) == 2
        assert f"Another process is writing '{busy}'" in capsys.readouterr().err
    path.write_text("mine")
    assert main(["merge", str(path)]) == 2
    assert "was not made by keras-tnt" in capsys.readouterr().err
    path.unlink()
    assert main(["merge", str(path)]) == 0
    part = tmp_path / "all-00002-of-00002.csv"
    part.unlink()
    os.mkfifo(part)
    assert main(["merge", str(path)]) == 2
    assert "00002.csv' is a FIFO" in capsys.readouterr().err


# === Model outputs ===


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_nan_and_infinite_scores_are_written_as_missing(
    folder, model_file, opened, tmp_path, monkeypatch, capsys, kind
):
    runtime = predict.open_model(None, 1)

    def answer(images):
        return np.full((len(images), 4), [np.nan, 0.5, np.inf, -np.inf], "float32")

    runtime = dataclasses.replace(runtime, predict=answer)
    monkeypatch.setattr(predict, "open_model", lambda options, count: runtime)
    path = tmp_path / f"all.{kind}"
    image = files(folder)[0]
    assert main([image, f"--model={model_file}", f"--out={path}"]) == 0
    if kind == "jsonl":
        json.loads(path.read_text(), parse_constant=pytest.fail)
    assert main([image, f"--model={model_file}", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert {p["name"]: p["score"] for p in row["predictions"]}["dog"] == 0.5
    assert main([image, f"--model={model_file}"]) == 0
    assert "nan%" in capsys.readouterr().out


@pytest.mark.parametrize("shape", [(1, 4), (4,), (4, 3), (4, 4, 1), ()])
def test_output_of_a_wrong_shape_is_an_error(
    folder, model_file, opened, monkeypatch, capsys, shape
):
    runtime = predict.open_model(None, 1)
    runtime = dataclasses.replace(runtime, predict=lambda images: np.zeros(shape, "float32"))
    monkeypatch.setattr(predict, "open_model", lambda options, count: runtime)
    assert main([folder, f"--model={model_file}", "--batch_size=4"]) == 2
    assert f"results of shape {shape} for 4 images" in capsys.readouterr().err


# === Shards ===


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_merged_shards_equal_a_single_run(folder, model_file, undisturbed, tmp_path, kind, capsys):
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


def test_shards_of_different_commands_are_not_merged(folder, model_file, tmp_path, capsys):
    path = tmp_path / "all.csv"
    assert main(["merge", str(path)]) == 2
    assert "There are no parts" in capsys.readouterr().err
    assert run(folder, model_file, path, "--shard=1/2") == 0
    assert run(folder, model_file, path, "--shard=2/2", "--top=1") == 0
    assert main(["merge", str(path)]) == 2
    assert "different commands: top is 1 and 5" in capsys.readouterr().err


# === Invalid arguments ===


def test_invalid_arguments_are_one_line_errors(folder, model_file, tmp_path, capsys):
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


@pytest.mark.parametrize(
    ("options", "warned"), [([], False), (["--top=4"], False), (["--top=5"], True)]
)
@pytest.mark.parametrize("written", [False, True])
def test_given_top_beyond_the_classes_is_reported(
    options, warned, written, folder, model_file, tmp_path, capsys
):
    out = tmp_path / "all.csv"
    image = os.path.join(folder, "part_0", "00.PNG")
    options = [*options, f"--out={out}"] if written else options
    assert main([image, f"--model={model_file}", *options]) == 0
    printed = capsys.readouterr().err
    assert ("--top=5: the model has 4 classes, and all are given." in printed) == warned


def test_default_top_continues_a_table_of_top_5(folder, model_file, tmp_path, capsys):
    image, out = os.path.join(folder, "part_0", "00.PNG"), tmp_path / "all.csv"
    for options in ([], ["--top=5"]):
        assert main([image, f"--model={model_file}", f"--out={out}", *options]) == 0
    assert "is done" in capsys.readouterr().err
