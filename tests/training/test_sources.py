"""Data sets selected by --dataset: reading, splits, and errors before any work."""

import csv
import dataclasses
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_tnt
from tests.helpers.image_datasets import jpeg, prepare
from training import configuration, data, evaluate, loop, models, sources
from training.sources import kinds, registry

ROOT = Path(__file__).parent.parent.parent


def settings(dataset, root="", **values):
    return configuration.make(
        "digits", **{"dataset": dataset, "data_dir": str(root), "batch_size": 4, **values}
    )


def read(dataset, root="", held_out=True, **values):
    """Returns (source, its labels of positive weight in order) for one split."""
    config = settings(dataset, root, **values)
    source = sources.open_split(config, held_out)
    batches = data.evaluation_batches(
        source,
        dataclasses.replace(config, crop=1.0),
        (32, 32),
        data.WorkerShare(0, 1, 1),
        data.UnreadableImages(source, 0.0),
    )
    batches = list(batches.as_numpy_iterator())
    labels, weights = (np.concatenate([b[key] for b in batches]) for key in ("label", "weight"))
    return source, labels[weights > 0]


def write_images(root, *paths):
    for i, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(jpeg(i))


def refused(message, dataset, root="", **values):
    """Asserts that opening the splits raises a one-line error."""
    with pytest.raises(ValueError, match=message) as caught:
        sources.open_sources(settings(dataset, root, **values))
    assert "\n" not in str(caught.value)


# === The registry ===


def test_unknown_data_set_error_suggests_the_nearest():
    with pytest.raises(ValueError, match="'foldr'. Did you mean folder\\? There are: digits, "):
        settings("foldr")
    for name in ("tfds", "folder:images"):
        with pytest.raises(ValueError, match="there is no"):
            settings(name)


@pytest.mark.parametrize("dataset", ["folder", "table", "tfrecord"])
def test_missing_data_dir_error_shows_the_layout(dataset):
    layout = sources.DATASETS[dataset].layout
    with pytest.raises(ValueError) as caught:
        settings(dataset)
    assert "--data_dir" in str(caught.value) and layout in str(caught.value)
    assert layout in configuration.FIELDS["dataset"].metadata["help"]


PLUGIN = """
import numpy as np
from training import sources

def stripes(config, held_out):
    images = np.zeros((16 if held_out else 48, 32, 32, 3), "uint8")
    images[1::2, ::4] = 255
    labels = np.arange(len(images)) % 2
    return sources.in_memory(images, labels, 2, "stripes", ("plain", "striped"))

sources.register_dataset("stripes", stripes, "black images, every other one striped")
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Yields the name of a module that registers a data set when it is imported."""
    (tmp_path / "stripes_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "stripes_plugin"
    sys.modules.pop("stripes_plugin", None)
    registry.DATASETS.pop("stripes", None)


def test_registered_data_set_is_opened_by_name(plugin):
    importlib.import_module(plugin)
    training, held_out = sources.open_sources(settings("stripes"))
    assert (training.size, held_out.size, training.label_names) == (48, 16, ("plain", "striped"))
    assert "stripes: black images" in sources.describe()
    with pytest.raises(ValueError, match="the name is taken"):
        sources.register_dataset("stripes", None)


def test_options_of_other_data_sets_raise():
    refused("--dataset=digits takes no --train_split", "digits", train_split="train")
    refused(
        "--dataset=tfds:cifar10 takes no --validation_share", "tfds:cifar10", validation_share=0.1
    )


# === Folders ===


def test_file_names_may_be_any_bytes_but_class_names_must_be_text(tmp_path):
    write_images(tmp_path, "a/0.jpg", "a/1.jpg", "b/0.jpg", "b/1.jpg")
    os.rename(tmp_path / "a" / "0.jpg", os.fsencode(tmp_path / "a") + b"/\xff.jpg")
    source, labels = read("folder", tmp_path, validation_share=0.5)
    assert sorted(labels) == [0, 1] and source.label_names == ["a", "b"]
    for name in (b"caf\xe9", b"two\nlines"):
        os.rename(tmp_path / "b", os.fsencode(tmp_path) + b"/" + name)
        refused("which can name no class: rename it", "folder", tmp_path, validation_share=0.5)
        os.rename(os.fsencode(tmp_path) + b"/" + name, tmp_path / "b")


def test_flat_folder_is_split_by_class_and_seed(tmp_path):
    write_images(
        tmp_path, *(f"cat/{i}.jpg" for i in range(10)), *(f"dog/{i}.png" for i in range(20))
    )
    write_images(tmp_path, ".cache/0.jpg")
    splits = sources.open_sources(settings("folder", tmp_path, validation_share=0.2))
    assert [np.bincount(s.labels).tolist() for s in splits] == [[8, 16], [2, 4]]
    paths = [set(s.paths) for s in splits]
    assert len(paths[0] | paths[1]) == 30 and not paths[0] & paths[1]
    assert splits[0].label_names == ["cat", "dog"]
    again = sources.open_sources(settings("folder", tmp_path, validation_share=0.2))
    other = sources.open_sources(settings("folder", tmp_path, validation_share=0.2, seed=1))
    assert again[1].paths == splits[1].paths != other[1].paths


def test_validation_share_leaves_an_image_of_each_class_in_both_splits():
    names = ["few", "many"]
    mask = kinds.held_out_mask([0, 0, 1, 1, 1, 1, 1, 1], names, 0.01, 0)
    assert mask[:2].sum() == 1 and mask[2:].sum() == 1
    mask = kinds.held_out_mask([0, 0, 1, 1, 1, 1, 1, 1], names, 0.99, 0)
    assert mask[:2].sum() == 1 and mask[2:].sum() == 5
    with pytest.raises(ValueError, match="class 'few' has one image"):
        kinds.held_out_mask([0, 1, 1], names, 0.5, 0)


def test_held_out_images_are_drawn_independently_per_class():
    mask = kinds.held_out_mask([0] * 40 + [1] * 40, ["a", "b"], 0.5, 3)
    assert mask[:40].sum() == mask[40:].sum() == 20
    assert (mask[:40] != mask[40:]).any()


def test_webp_is_read(tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        write_images(tmp_path, f"{split}/a/0.jpg")
        (tmp_path / split / "b").mkdir()
        picture = Image.fromarray(np.full((40, 40, 3), 200, "uint8"))
        picture.save(tmp_path / split / "b" / "1.webp", lossless=True)
    assert read("folder", tmp_path)[1].tolist() == [0, 1]


def test_eval_split_selects_the_held_out_folder(tmp_path):
    write_images(tmp_path, *(f"{s}/{c}/{s}.jpg" for s in ("train", "val", "test") for c in "ab"))
    assert "/val/" in sources.open_split(settings("folder", tmp_path), True).paths[0]
    named = settings("folder", tmp_path, eval_split="test")
    assert "/test/" in sources.open_split(named, True).paths[0]


@pytest.mark.parametrize(
    ("files", "values", "message"),
    [
        ([], {}, "holds no images in folders of classes"),
        (["cat/1.jpg", "dog/1.jpg"], {}, "Give --validation_share=0.1 to hold out a tenth"),
        (["cat/1.jpg", "dog/1.jpg"], {"validation_share": 0.1}, "class 'cat' has one image"),
        (["train/a/1.jpg", "val/a/2.jpg"], {}, "has a single class, 'a'"),
        (
            ["train/a/1.jpg", "train/b/1.jpg", "val/a/2.jpg"],
            {},
            "1 of 2 classes are in the training split alone, the first of them 'b'",
        ),
        (
            ["train/a/1.jpg", "train/b/1.jpg", "val/a/2.jpg", "val/b/2.jpg", "val/c/1.jpg"],
            {},
            "val has classes that .*train has not: c",
        ),
        (
            ["train/a/1.jpg", "train/b/2.tiff", "train/b/1.tiff", "val/a/2.jpg"],
            {},
            r"train/b holds no images \(.jpg, .*\): the first of its 2 files is 1.tiff",
        ),
        (
            ["train/a/1.jpg", "train/b/1.jpg"],
            {},
            "has no folder val or validation or valid or dev or test",
        ),
        (
            ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/b/1.jpg"],
            {"classes": 1},
            "--classes=1 is less than the 2 classes",
        ),
        (
            ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/b/1.jpg"],
            {"validation_share": 0.1},
            "--validation_share is for",
        ),
        (
            ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/b/1.jpg"],
            {"eval_split": "train"},
            "the splits overlap: 2 files are in both, the first of them .*train/a/1.jpg",
        ),
    ],
)
def test_invalid_folder_raises(tmp_path, files, values, message):
    write_images(tmp_path, *files)
    refused(message, "folder", tmp_path, **values)


def layout(root, *splits):
    write_images(root, *(f"{split}/{name}/{split}.jpg" for split in splits for name in "ab"))


@pytest.mark.parametrize(
    ("splits", "taken"),
    [
        (("train", "valid", "test"), "valid"),
        (("Train", "DEV", "Test"), "DEV"),
        (("train", "Validation", "valid", "test"), "Validation"),
        (("TRAIN", "val", "validation"), "val"),
        (("train", "Test"), "Test"),
    ],
)
def test_validation_split_is_found_by_any_of_its_names(tmp_path, capsys, splits, taken):
    layout(tmp_path, *splits)
    training, held_out = sources.open_sources(settings("folder", tmp_path))
    assert {Path(path).parent.parent.name for path in held_out.paths} == {taken}
    assert {Path(path).parent.parent.name for path in training.paths} == {splits[0]}
    printed = capsys.readouterr().out
    assert f"held-out split {tmp_path / taken}: 2 images in 2 classes" in printed
    assert ("falling back to" in printed) == (taken == "Test")


def test_splits_that_differ_only_in_case_raise(tmp_path):
    layout(tmp_path, "train", "Valid", "VALID")
    refused("'VALID' and 'Valid' differ in upper and lower case alone", "folder", tmp_path)
    source = sources.open_split(settings("folder", tmp_path, eval_split="VALID"), True)
    assert "/VALID/" in source.paths[0]


def test_non_image_files_are_skipped_and_counted(tmp_path, capsys):
    layout(tmp_path, "train", "val")
    write_images(tmp_path, "__MACOSX/train/a/._x.jpg", "train/__MACOSX/._train.jpg")
    write_images(tmp_path, "train/a/._train.jpg", "train/a/.ipynb_checkpoints/c.jpg")
    write_images(tmp_path, "train/b/2.JFIF", "train/b/3.jpe", "train/b/deep/4.JPG")
    (tmp_path / "train/a/Thumbs.db").touch()
    os.mkfifo(tmp_path / "train/a/pipe.jpg")
    training = sources.open_split(settings("folder", tmp_path), False)
    assert training.label_names == ["a", "b"] and training.labels.tolist() == [0, 1, 1, 1, 1]
    printed = capsys.readouterr().out
    for reason in (
        "1 system folders",
        "1 AppleDouble files",
        "1 hidden folders",
        "1 FIFOs, sockets and devices",
        "1 files without the suffix of an image",
    ):
        assert reason in printed


def test_linked_folders_are_read_once_and_under_one_label(tmp_path):
    layout(tmp_path / "images", "train", "val")
    write_images(tmp_path, "elsewhere/x.jpg", "elsewhere/deep/y.jpg")
    train = tmp_path / "images" / "train"
    (train / "c").symlink_to(tmp_path / "elsewhere")
    (train / "a" / "up").symlink_to(train)
    (train / "a" / "other").symlink_to(train / "b")
    (train / "c" / "loop").symlink_to(tmp_path / "elsewhere" / "deep")
    source = sources.open_split(settings("folder", tmp_path / "images"), False)
    assert source.labels.tolist() == [0, 1, 2, 2] and source.label_names == ["a", "b", "c"]
    (train / "d").symlink_to(train / "a")
    with pytest.raises(ValueError, match="the classes 'a' and 'd' are links to the same folder"):
        sources.open_split(settings("folder", tmp_path / "images"), False)


def test_split_that_links_to_the_other_raises(tmp_path):
    layout(tmp_path, "train")
    (tmp_path / "val").symlink_to(tmp_path / "train")
    refused("the splits overlap: 2 files are in both", "folder", tmp_path)


# === Tables ===


ROWS = [
    {"path": "x/1.jpg", "label": "10", "split": "train"},
    {"path": "x/2.jpg", "label": "9", "split": "train"},
    {"path": "x/3.jpg", "label": "9", "split": "val"},
    {"path": "x/4.jpg", "label": "10", "split": "val"},
    {"path": "x/4.jpg", "label": "10", "split": "test"},
]


def write_table(root, rows, suffix=".csv"):
    path = root / f"images{suffix}"
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ["path", "label"])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_table_lists_files_labels_and_splits(tmp_path, suffix):
    write_images(tmp_path, *(row["path"] for row in ROWS))
    path = write_table(tmp_path, ROWS, suffix)
    source, labels = read("table", path)
    assert source.label_names == ["9", "10"] and labels.tolist() == [0, 1]
    assert source.paths[0] == str(tmp_path / "x/3.jpg")
    assert read("table", path, eval_split="test")[1].tolist() == [1]
    assert read("table", path, held_out=False)[1].tolist() == [1, 0]


def test_table_with_one_split_is_divided_by_the_seed(tmp_path):
    rows = [{"path": f"{i}.jpg", "label": ("ape", "bee")[i % 2]} for i in range(12)]
    write_images(tmp_path, *(row["path"] for row in rows))
    path = write_table(tmp_path, rows)
    splits = sources.open_sources(settings("table", path, validation_share=0.34))
    assert [np.bincount(s.labels).tolist() for s in splits] == [[4, 4], [2, 2]]
    refused("has no column split. Give --validation_share", "table", path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([{"file": "1.jpg", "label": "a"}], "has no column 'path'; it has file, label"),
        ([{"path": "1.jpg", "label": "", "split": "train"}], "row 1 has no label"),
        ([{**row, "split": "dev"} for row in ROWS], "has no rows of split train; it has 'dev'"),
        (
            [*ROWS, {"path": "x/1.jpg", "label": "9", "split": "val"}],
            "the splits overlap: 1 files are in both, the first of them .*x/1.jpg",
        ),
        (
            [*ROWS, {"path": "y/5.jpg", "label": "9", "split": "train"}],
            "1 of 3 files are missing, the first of them .*y/5.jpg",
        ),
        (
            [*ROWS, {"path": "x/1.jpg", "label": "8", "split": "train"}],
            "1 of 3 classes are in the training split alone, the first of them '8'",
        ),
    ],
)
def test_invalid_table_raises(tmp_path, rows, message):
    write_images(tmp_path, *(row["path"] for row in ROWS))
    refused(message, "table", write_table(tmp_path, rows))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["10", "9", "9.5"], ["9", "9.5", "10"]),
        (["10.0", "2.0", "-1"], ["-1", "2.0", "10.0"]),
        (["1", "01", "0"], ["0", "01", "1"]),
        (["1e2", "20", ".5"], [".5", "20", "1e2"]),
        (["10", "9", "a"], ["10", "9", "a"]),
        (["1_0", "9"], ["1_0", "9"]),
        (["1", "1e99999999999999999999"], ["1", "1e99999999999999999999"]),
    ],
)
def test_labels_are_sorted_by_value_if_all_are_numbers(labels, expected):
    for order in (labels, labels[::-1]):
        assert kinds.sorted_labels(order) == expected


def test_spaces_around_labels_are_ignored(tmp_path):
    rows = [
        {"path": f"{i}.jpg", "label": label, "split": split}
        for i, (label, split) in enumerate(
            [("cat", "Train"), ("cat ", "Train"), (" dog", "Train"), ("dog", "dev"), ("cat", "dev")]
        )
    ]
    write_images(tmp_path, *(row["path"] for row in rows))
    training, held_out = sources.open_sources(settings("table", write_table(tmp_path, rows)))
    assert training.label_names == ["cat", "dog"] and training.labels.tolist() == [0, 0, 1]
    assert held_out.labels.tolist() == [1, 0]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("label", "message"),
    [
        (float("nan"), "row 2 has (the label nan|no label)"),
        (None, "row 2 has no label"),
    ],
)
def test_row_without_a_label_raises_with_its_number(tmp_path, suffix, label, message):
    rows = [
        {"path": "1.jpg", "label": 1.0, "split": "train"},
        {"path": "2.jpg", "label": label, "split": "train"},
    ]
    refused(message, "table", write_table(tmp_path, rows, suffix))


@pytest.mark.parametrize("label", [" ", "NaN", "two\nlines"])
def test_invalid_label_raises_with_its_row(tmp_path, label):
    rows = [{"path": f"{i}.jpg", "label": "a", "split": "train"} for i in range(3)]
    rows[1]["label"] = label
    refused("row 2 has (no label|the label)", "table", write_table(tmp_path, rows))


def test_table_that_falls_back_to_the_test_split_prints_it(tmp_path, capsys):
    rows = [row for row in ROWS if row["split"] != "val"]
    write_images(tmp_path, *(row["path"] for row in rows))
    sources.open_split(settings("table", write_table(tmp_path, rows)), True)
    assert "falling back to 'test'" in capsys.readouterr().out


def test_file_that_is_not_a_table_raises(tmp_path):
    refused("is no file. It must be", "table", tmp_path / "images.csv")
    for name, message in (("a.parquet", "is no Parquet file"), ("a.txt", "must end in .csv")):
        (tmp_path / name).write_bytes(b"\xff\xfe nothing")
        refused(message, "table", tmp_path / name)
    (tmp_path / "a.csv").write_bytes(b"path,label\n\xff\xfe,1\n")
    refused("is no table of comma-separated values", "table", tmp_path / "a.csv")


# === TFRecord files ===


def write_records(root, labels, name="train-0"):
    path = root / name
    with tf.io.TFRecordWriter(str(path)) as writer:
        for i, label in enumerate(labels):
            image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[jpeg(i)]))
            number = tf.train.Feature(int64_list=tf.train.Int64List(value=[label]))
            feature = {"image/encoded": image, "image/class/label": number}
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            writer.write(example.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("labels", "values", "message"),
    [
        (
            [1, 2, 3, 4],
            {},
            "train-0 record 3 has the label 4.* that start at 1 need --label_offset=1",
        ),
        (
            [0, 1, 2, 7],
            {},
            "train-0 record 3 has the label 7, outside of 0 to 3 .*--classes as many",
        ),
        ([0, 1, 2, 3], {"label_offset": 1}, "record 0 has the label 0.* need --label_offset=0"),
    ],
)
def test_labels_outside_of_the_classes_raise(tmp_path, labels, values, message):
    write_records(tmp_path, labels)
    refused(message, "tfrecord", tmp_path, classes=4, **values)


def test_unchecked_label_raises_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.records, "LABELS_CHECKED", 2)
    write_records(tmp_path, [0, 1, 2, 5], "val-0")
    config = settings("tfrecord", tmp_path, classes=4)
    source = sources.open_split(config, True)
    unreadable = data.UnreadableImages(source, 0.0)
    share = data.WorkerShare(0, 1, 1)
    batches = data.evaluation_batches(source, config, (32, 32), share, unreadable)
    with pytest.raises(ValueError, match="val-0 record 3 has the label 5, outside of 0 to 3"):
        with unreadable.reading():
            list(batches)


def test_damaged_records_raise_with_the_file_name(tmp_path, monkeypatch):
    path = write_records(tmp_path, [0, 1, 2, 3])
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    refused("train-0 is damaged: it breaks off in record 3", "tfrecord", tmp_path, classes=4)
    changed = bytearray(whole)
    changed[len(whole) // 2 + 300] ^= 255
    path.write_bytes(changed)
    refused("train-0 is damaged near record [23]", "tfrecord", tmp_path, classes=4)
    monkeypatch.setattr(sources.records, "LABELS_CHECKED", 1)
    config = settings("tfrecord", tmp_path, classes=4)
    source = sources.open_split(config, False)
    with pytest.raises(ValueError, match="train-0 is damaged"):
        with data.UnreadableImages(source, 0.0).reading():
            list(source.stream(None, 0, 1))


@pytest.mark.parametrize(("files", "by_file"), [(4, True), (3, True), (2, False)])
def test_workers_divide_files_if_there_are_enough(tmp_path, files, by_file):
    for number in range(files):
        write_records(tmp_path, [0, 1], f"train-{number}")
    source = sources.open_split(settings("tfrecord", tmp_path, classes=2), False)
    names = [
        [name.decode() for name, _, _ in source.stream(5, worker, 3).as_numpy_iterator()]
        for worker in range(3)
    ]
    assert len({name for each in names for name in each}) == 2 * files == len(sum(names, []))
    held = [{Path(name.split(" record")[0]).name for name in each} for each in names]
    assert (sum(map(len, held)) == files) == by_file


# === tensorflow-datasets ===

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """Writes small data sets with the names and features of the real ones."""
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("tfds")
    random = np.random.default_rng(0)

    def file(i):
        return io.BytesIO(jpeg(i))

    def cifar(number, start):
        return [
            {
                "id": f"image_{start + i}",
                "image": random.integers(0, 256, (32, 32, 3), "uint8"),
                "label": i % 10,
            }
            for i in range(number)
        ]

    prepare(root, "cifar10", {"train": cifar(40, 0), "test": cifar(20, 40)}, CIFAR)
    flowers = {
        split: [{"image": file(i), "label": i % 102, "file_name": f"{i}.jpg"} for i in range(n)]
        for split, n in (("train", 13), ("validation", 7), ("test", 11))
    }
    prepare(root, "oxford_flowers102", flowers)
    mask = np.ones((40, 60, 1), "uint8")
    pets = {
        split: [
            {
                "image": file(i),
                "label": i % 37,
                "species": i % 2,
                "file_name": f"{i}.jpg",
                "segmentation_mask": mask,
                "head_bbox": tfds.features.BBox(0.1, 0.1, 0.9, 0.9),
            }
            for i in range(n)
        ]
        for split, n in (("train", 9), ("test", 5))
    }
    prepare(root, "oxford_iiit_pet", pets)
    v2 = [{"image": file(i), "label": 100 * i, "file_name": f"{i}.jpg"} for i in range(10)]
    prepare(root, "imagenet_v2/matched-frequency", {"test": v2})
    real = [
        {"image": file(i), "original_label": i, "real_label": right, "file_name": f"{i}.JPEG"}
        for i, right in enumerate(REAL)
    ]
    prepare(root, "imagenet2012_real", {"validation": real})
    return root


# The correct labels of the images of imagenet2012_real.
REAL = [[0], [7, 1, 3], [], [2], [900, 901], [], [5, 6, 7, 8, 9, 10]]


@pytest.mark.parametrize(
    ("name", "training", "held_out", "classes", "first"),
    [
        ("cifar10", 40, 20, 10, "airplane"),
        ("oxford_flowers102", 13, 7, 102, "pink primrose"),
        ("oxford_iiit_pet", 9, 5, 37, "Abyssinian"),
    ],
)
def test_prepared_data_sets_are_read(tfds_dir, name, training, held_out, classes, first):
    splits = sources.open_sources(settings(f"tfds:{name}", tfds_dir))
    assert [s.size for s in splits] == [training, held_out]
    assert all(s.classes == classes and s.label_names[0] == first for s in splits)
    assert read(f"tfds:{name}", tfds_dir)[1].tolist() == [i % classes for i in range(held_out)]


def test_order_of_prepared_files_depends_on_the_seed(tfds_dir):
    source = sources.open_split(settings("tfds:cifar10", tfds_dir), False)

    def order(seed):
        return [name for name, _, _ in source.stream(seed, 0, 1).as_numpy_iterator()]

    assert len(source.stretches) > 1
    shuffled = [order(seed) for seed in (1, 1, 2)]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    # Files are shuffled too: the first image does not always come from the first file.
    firsts = {order(seed)[0] for seed in range(6)}
    assert len(firsts) > 1 and sorted(shuffled[0]) == sorted(order(None))


def test_splits_accept_tensorflow_datasets_syntax(tfds_dir):
    splits = {"train_split": "train[:75%]", "eval_split": "train[75%:]"}
    training, held_out = sources.open_sources(settings("tfds:cifar10:3.0.2", tfds_dir, **splits))
    assert (training.size, held_out.size) == (30, 10)
    labels = [read("tfds:cifar10", tfds_dir, part, **splits)[1].tolist() for part in (False, True)]
    assert sum(labels, []) == [i % 10 for i in range(40)]
    assert read("tfds:cifar10", tfds_dir, eval_split="train+test")[0].size == 60


@pytest.mark.parametrize(
    ("dataset", "values", "message"),
    [
        ("tfds:cifar1", {}, "has no 'cifar1'. Did you mean cifar10 "),
        ("tfds:cifar10/gray", {}, "cifar10 has the version 3.0.2 and the configurations none"),
        ("tfds:imagenet_v2/no", {}, "configurations matched-frequency, threshold-0.7, topimages"),
        ("tfds:", {}, "must be tfds:<name>"),
        ("tfds:hub:x", {}, "must be tfds:<name>"),
        ("tfds:mnist", {}, "not prepared in .*mnist/3.0.1. `tfds build mnist --data_dir=.*` prep"),
        ("imagenet2012", {}, "not prepared in .* `tfds build imagenet2012 --data_dir=.*` prepares"),
        (
            "tfds:cifar10",
            {"train_split": "dev"},
            "no split 'dev'; it has train, test, and --train_s",
        ),
        (
            "tfds:cifar10",
            {"eval_split": "test[:0]"},
            "--eval_split=test\\[:0\\] .* holds no images",
        ),
        (
            "tfds:cifar10",
            {"eval_split": "train[30:]"},
            "the splits overlap: 10 images are in both, the first of them in cifar10-train",
        ),
        (
            "tfds:cifar10",
            {"train_split": "train[:50%]", "eval_split": "train[40%:]"},
            "the splits overlap: 4 images",
        ),
        ("tfds:cifar10", {"classes": 9}, "--classes=9 is less than the 10 classes"),
        ("imagenet_v2", {}, "is for evaluation alone: it goes with evaluate.py"),
        (
            "tfds:imagenet2012_real",
            {"train_split": "validation[:50%]", "eval_split": "validation[50%:]"},
            "several labels an image: it is for evaluation alone",
        ),
    ],
)
def test_invalid_prepared_data_set_raises(tfds_dir, dataset, values, message):
    refused(message, dataset, tfds_dir, **values)


def test_data_set_without_a_label_raises(tmp_path):
    images = [{"image": np.zeros((8, 8, 3), "uint8"), "id": str(i)} for i in range(2)]
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "id": tfds.features.Text()}
    )
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="unlabeled",
        version=tfds.core.Version("1.0.0"),
        data_dir=str(tmp_path / "unlabeled/1.0.0"),
        module_name="",
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    (tmp_path / "unlabeled/1.0.0").mkdir(parents=True)
    info.features.save_config(info.data_dir)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=8)
    writer.initialize_splits(["train", "test"])
    writer.add_examples({"train": images, "test": images})
    writer.close_all()
    refused(
        "has no feature for the label of named classes; its features are",
        "tfds:unlabeled",
        tmp_path,
    )


# === End to end ===


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_run_on_a_prepared_data_set_records_class_names(tfds_dir, tmp_path):
    flags = {"train_split": "train[:80%]", "eval_split": "train[80%:]+test", "classes": 0}
    short = {"epochs": 1, "deterministic": False, "tensorboard": False, "workdir": str(tmp_path)}
    result = loop.train(settings("tfds:cifar10", tfds_dir, **flags, **short))
    assert result["step"] == 8 and result["images"] == 28
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["label_names"] == CIFAR and record["classes"] == 10
    assert keras_tnt.class_names(keras.models.load_model(tmp_path / "final.keras")) == CIFAR
    assert evaluate.evaluate({"eval_split": "test"}, run=str(tmp_path))["images"] == 20
    with pytest.raises(ValueError, match="class 0 is '0' here, and was 'airplane'"):
        evaluate.evaluate({"dataset": "digits"}, run=str(tmp_path))


@pytest.fixture(scope="module")
def opinionated(tmp_path_factory):
    """Returns (model of 1,000 classes that always ranks 900, 2, 7, 4, 6 highest, its logits)."""
    logits = np.zeros(1000, "float32")
    logits[[900, 2, 7, 4, 6]] = [5, 4, 3, 2, 1]
    model = models.tnt_digits(classes=1000, depth=1)
    model.get_layer("head").kernel.assign(np.zeros(model.get_layer("head").kernel.shape))
    model.get_layer("head").bias.assign(logits)
    path = tmp_path_factory.mktemp("model") / "opinionated.keras"
    model.save(path)
    return str(path), logits


def test_imagenet_v2_evaluation_counts_each_image(tfds_dir, opinionated):
    weights, logits = opinionated
    found = evaluate.evaluate(
        {"dataset": "imagenet_v2", "data_dir": str(tfds_dir), "batch_size": 4}, weights=weights
    )
    assert found["images"] == 10 and found["accuracy"] == found["top5_accuracy"] == 0.1
    # Of the labels 0, 100, ... 900 the model gives the last a logit of 5 and the others 0.
    expected = np.log(np.exp(logits).sum()) - 0.5
    assert found["evaluation_loss"] == pytest.approx(expected, rel=1e-5)


def test_imagenet_real_accepts_any_of_several_labels(tfds_dir, opinionated):
    weights, logits = opinionated
    found = evaluate.evaluate(
        {"dataset": "imagenet2012_real", "data_dir": str(tfds_dir), "batch_size": 4},
        weights=weights,
    )
    # Five of seven images have labels. 900 is correct for one of them; 900, 2, 7, 4 or 6 for four.
    assert found["images"] == 5
    assert found["accuracy"] == pytest.approx(1 / 5)
    assert found["top5_accuracy"] == pytest.approx(4 / 5)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    expected = np.mean([-np.log(probabilities[right].sum()) for right in REAL if right])
    assert found["evaluation_loss"] == pytest.approx(expected, rel=1e-5)


def test_model_with_fewer_classes_than_the_data_set_raises(tfds_dir, tmp_path):
    models.tnt_digits(classes=12, depth=1).save(tmp_path / "twelve.keras")
    with pytest.raises(ValueError, match="tells 12 classes apart, and .*imagenet_v2 has 1000"):
        evaluate.evaluate(
            {"dataset": "imagenet_v2", "data_dir": str(tfds_dir)},
            weights=str(tmp_path / "twelve.keras"),
        )


def command(script, *flags, **environment):
    """Runs a command of the trainer and returns the completed process."""
    return subprocess.run(
        [sys.executable, f"training/{script}.py", *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
def test_data_set_of_a_plugin_can_be_trained_on(plugin, tmp_path):
    flags = ["--dataset=stripes", "--epochs=1", "--batch_size=16", "--notensorboard"]
    flags += [f"--plugins={plugin}", f"--workdir={tmp_path / 'run'}"]
    result = command("train", *flags, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0 and "held out (16 images)" in result.stdout, result.stderr[-2000:]
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["label_names"] == ["plain", "striped"]


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_unknown_data_set_is_a_one_line_command_error(script):
    result = command(script, "--dataset=foldr", "--model=tnt_digits", "--weights=any.keras")
    assert result.returncode == 2 and "Did you mean folder?" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
