"""Data sets in tar files, Parquet files and Hugging Face datasets."""

import dataclasses
import io
import itertools
import json
import os
import tarfile
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.image_datasets import jpeg
from training import configuration, data, sources

CLASSES = 3


def sample(number):
    return jpeg(number, size=(20, 30)), (number * 2 + number // 4) % CLASSES


def write_tars(root, split, counts, first=0):
    """Writes shards with webdataset and returns the labels in order."""
    import webdataset

    labels = []
    for shard, count in enumerate(counts):
        with webdataset.TarWriter(str(root / f"some-{split}-{shard:04d}.tar")) as writer:
            for number in range(first, first + count):
                image, label = sample(number)
                key = f"../deep/n{number:05d}"
                writer.write({"__key__": key, "jpg": image, "cls": label, "json": {"id": number}})
                labels.append(label)
        first += count
    return labels


def write_parquets(root, split, counts, first=0):
    import pyarrow
    from pyarrow import parquet

    labels = []
    features = {"label": {"names": ["ape", "bee", "cow"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    (root / "data").mkdir(exist_ok=True)
    for number, count in enumerate(counts):
        rows = []
        for i in range(first, first + count):
            image, label = sample(i)
            rows.append({"image": {"bytes": image, "path": f"{i}.jpg"}, "label": label})
            labels.append(label)
        first += count
        table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(metadata)
        path = root / "data" / f"{split}-{number:05d}-of-{len(counts):05d}.parquet"
        parquet.write_table(table, path, row_group_size=3)
    return labels


def write_hugging_face(root, counts):
    import datasets

    labels = {}
    found, first = {}, 0
    for split, count in counts.items():
        rows = [sample(i) for i in range(first, first + count)]
        first += count
        labels[split] = [label for _, label in rows]
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ape", "bee", "cow"])}
        )
        columns = {
            "image": [{"bytes": image, "path": None} for image, _ in rows],
            "label": labels[split],
        }
        found[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(found).save_to_disk(str(root))
    return labels


@pytest.fixture(scope="module", params=["webdataset", "parquet", "huggingface"])
def archive(request, tmp_path_factory):
    """Returns (data set, directory, labels of the 20 training, and of the 11 held-out images)."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "huggingface":
        labels = write_hugging_face(root, {"train": 20, "validation": 11})
        return request.param, root, labels["train"], labels["validation"]
    write = write_tars if request.param == "webdataset" else write_parquets
    return request.param, root, write(root, "train", (9, 11)), write(root, "valid", (11,), 20)


def settings(dataset, root, **values):
    values = {"dataset": dataset, "data_dir": str(root), "batch_size": 6, **values}
    return configuration.make("digits", **{"classes": CLASSES} | values)


def collect(dataset):
    batches = list(dataset.as_numpy_iterator())
    return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


def evaluate(source, config, share=None, unreadable=None):
    share = share or data.WorkerShare(0, 1, 1)
    unreadable = unreadable or data.UnreadableImages(source, 0.0)
    config = dataclasses.replace(config, crop=1.0)
    return collect(data.evaluation_batches(source, config, (20, 30), share, unreadable))


def train(source, config, first=0, share=None, steps=3, epoch=1):
    share = share or data.WorkerShare(0, 1, 1)
    return collect(
        data.training_batches(
            source,
            config,
            (20, 30),
            (0, 0, 0),
            epoch,
            first,
            steps,
            share,
            data.UnreadableImages(source, 0.0),
        )
    )


def numbers(images, count=40):
    """Returns the indices of the samples that unscaled images show."""
    known = {
        tf.io.decode_jpeg(sample(i)[0], dct_method="INTEGER_ACCURATE").numpy().tobytes(): i
        for i in range(count)
    }
    return [known[image.tobytes()] for image in images]


def test_each_held_out_image_is_evaluated_once(archive):
    dataset, root, _, labels = archive
    config = settings(dataset, root)
    training, held_out = sources.open_sources(config)
    assert (training.size, held_out.size, held_out.classes) == (20, 11, CLASSES)
    if dataset != "webdataset":
        assert tuple(held_out.label_names) == ("ape", "bee", "cow")
    seen = evaluate(held_out, config)
    counted = seen["weight"] > 0
    assert seen["label"][counted].tolist() == labels
    assert numbers(seen["image"][counted]) == list(range(20, 31))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_partition_the_images(archive, workers):
    dataset, root, _, labels = archive
    config = settings(dataset, root)
    training, held_out = sources.open_sources(config)
    shares = [data.WorkerShare(i, workers, workers) for i in range(workers)]
    seen = [evaluate(held_out, config, share) for share in shares]
    places = np.concatenate([each["place"][each["weight"] > 0] for each in seen])
    found = np.concatenate([each["label"][each["weight"] > 0] for each in seen])
    assert found[np.argsort(places)].tolist() == labels
    plain = {"flip": False, "shift": 0, "rotate": 0.0, "min_crop": 1.0, "erasing": 0.0}
    plain |= {"randaugment": False, "color_jitter": 0.0, "crop": 1.0}
    config = settings(dataset, root, **plain)
    shown = [numbers(train(training, config, share=share)["image"]) for share in shares]
    shown = sum(shown, [])
    assert len(shown) == len(set(shown)) == 18 and max(shown) < 20


@pytest.mark.slow
def test_resumed_epoch_is_bit_identical(archive):
    dataset, root, _, _ = archive
    config = settings(dataset, root, min_crop=0.4, erasing=0.5)
    source = sources.open_split(config, held_out=False)
    whole, rest = train(source, config), train(source, config, first=1)
    for key in whole:
        np.testing.assert_array_equal(rest[key], whole[key][6:])
    again = train(sources.open_split(config, held_out=False), config)
    np.testing.assert_array_equal(again["image"], whole["image"])
    assert (train(source, config, epoch=2)["image"] != whole["image"]).any()


def test_data_service_raises_for_python_sources(archive):
    dataset, root, _, _ = archive
    with pytest.raises(ValueError, match="leave --data_service out"):
        sources.open_sources(settings(dataset, root, data_service="grpc://localhost:1"))


def test_overlapping_or_missing_splits_raise(archive):
    dataset, root, _, _ = archive
    with pytest.raises(ValueError, match="the splits overlap"):
        sources.open_sources(settings(dataset, root, eval_split="train"))
    with pytest.raises(ValueError, match="no .*split nowhere|has no split nowhere"):
        sources.open_sources(settings(dataset, root, eval_split="nowhere"))


def write_labels(dataset, root, splits, names=None):
    """Writes a data set of images with the given labels, and class names where it can hold them."""
    if dataset == "webdataset":
        first = 0
        for split, labels in splits.items():
            write_tar(root / f"{split}.tar", pairs(*labels, first=first))
            first += len(labels)
        return
    import datasets

    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    label = label if isinstance(splits["train"][0], int) else datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    tables, first = {}, 0
    for split, labels in splits.items():
        images = [{"bytes": jpeg(first + i), "path": None} for i in range(len(labels))]
        first += len(labels)
        columns = {"image": images, "label": labels}
        tables[split] = datasets.Dataset.from_dict(columns, features=features)
    if dataset == "huggingface":
        datasets.DatasetDict(tables).save_to_disk(str(root))
    for split, table in tables.items() if dataset == "parquet" else ():
        table.to_parquet(str(root / f"{split}.parquet"))


KINDS_OF_LABELS = [
    ("webdataset", "integers"),
    *itertools.product(("parquet", "huggingface"), ("integers", "names", "text")),
]


def write_splits(dataset, kind, root, train, held_out):
    """Writes splits of the given classes, and returns their configuration."""
    names = ["ape", "bee", "cow"]
    splits = {"train": train, "val": held_out}
    if kind == "text":
        splits = {split: [names[label] for label in labels] for split, labels in splits.items()}
    write_labels(dataset, root, splits, names if kind == "names" else None)
    return settings(dataset, root, classes=CLASSES if kind == "integers" else 0)


@pytest.mark.parametrize(("dataset", "kind"), KINDS_OF_LABELS)
def test_classes_without_held_out_images_warn(tmp_path, capsys, dataset, kind):
    config = write_splits(dataset, kind, tmp_path, [0, 1, 2, 2], [0])
    training, held_out = sources.open_sources(config)
    assert training.classes == held_out.classes == CLASSES
    first = 1 if kind == "integers" else "bee"
    assert (
        f"warning: --dataset={dataset}: 2 of 3 classes have no held-out image, the first of them "
        f"{first!r}" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("dataset", "kind"), KINDS_OF_LABELS)
def test_held_out_classes_without_training_images_raise(tmp_path, dataset, kind):
    config = write_splits(dataset, kind, tmp_path, [0, 1, 0], [0, 1, 2])
    with pytest.raises(ValueError, match="the held-out split alone, .* (2|'cow')|held-out.*'cow'"):
        sources.open_sources(config)


# === WebDataset ===


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pairs(*labels, first=0):
    return [
        (f"{i}.{suffix}", content)
        for i, label in enumerate(labels, first)
        for suffix, content in (("jpg", jpeg(i)), ("cls", b"%d" % label))
    ]


@pytest.mark.parametrize(
    ("members", "values", "message"),
    [
        ([], {}, "holds no samples"),
        ([("a.jpg", b"x")], {}, "sample 'a' has no label: cls or json. It has jpg"),
        ([("a.cls", b"1")], {}, "sample 'a' has 0 images"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"1")], {}, "sample 'a' has 2 images"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], {}, "'a.cls' holds no whole number: 'cat'"),
        ([("a.jpg", b"x"), ("a.cls", b"1_0")], {}, "'a.cls' holds no whole number: '1_0'"),
        ([("a.jpg", b"x"), ("a.cls", b"1.0")], {}, "'a.cls' holds no whole number: '1.0'"),
        ([("a.jpg", b"x"), ("a.cls", b"9" * 99)], {}, "'a.cls' holds no whole number"),
        ([("a.jpg", b"x"), ("a.json", b'{"label": 1.5}')], {}, "'a.json' holds no whole number"),
        ([("a.jpg", b"x"), ("a.json", b"[" * 9999)], {}, "'a.json' holds no whole number"),
        ([*pairs(0, 1), *pairs(1)], {}, "the sample '0' is there twice"),
        ([("a.jpg", b"x"), ("a.jpg", b"x"), ("a.cls", b"1")], {}, "'a.jpg' is there twice"),
        (pairs(0, 1, 3), {}, "train-0.tar 2 has the label 3, outside of 0 to 2"),
        (pairs(0, 1), {"label_offset": 1}, "train-0.tar 0 has the label 0, outside of 1 to 3"),
        (pairs(2, 3, 4), {"classes": 0}, "go from 2 to 4: --classes=3 --label_offset=2"),
    ],
)
def test_invalid_shard_raises(tmp_path, members, values, message):
    write_tar(tmp_path / "train-0.tar", members)
    with pytest.raises(ValueError, match=message) as caught:
        sources.open_split(settings("webdataset", tmp_path, **values), held_out=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"2", b"02", b"+2", b" 2\n", b"\t+02\r\n", b"\xef\xbb\xbf2"])
def test_class_number_is_read_as_by_int(tmp_path, text):
    write_tar(tmp_path / "train-0.tar", [*pairs(0), ("a.jpg", jpeg(0)), ("a.cls", text)])
    source = sources.open_split(settings("webdataset", tmp_path), held_out=False)
    assert source.labels.tolist() == [0, 2]


@pytest.mark.parametrize("left", [1, 513, 700, 1024 + 3])
def test_truncated_shard_raises_with_its_name(tmp_path, left):
    path = write_tar(tmp_path / "train-0.tar", pairs(0, 1, 2))
    path.write_bytes(path.read_bytes().rstrip(b"\0")[:-1][: -left or None])
    with pytest.raises(ValueError, match="train-0.tar (breaks off|is no whole)"):
        sources.open_split(settings("webdataset", tmp_path), held_out=False)


def test_shard_truncated_between_samples_raises(tmp_path):
    path = write_tar(tmp_path / "train-0.tar", pairs(0, 1, 2))
    with tarfile.open(path) as archive:
        end = archive.getmembers()[4].offset
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(ValueError, match="breaks off after .* without the mark of its end"):
        sources.open_split(settings("webdataset", tmp_path), held_out=False)


def test_concatenated_and_compressed_shards_raise(tmp_path):
    path = write_tar(tmp_path / "train-0.tar", pairs(0, 1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole)
    with pytest.raises(ValueError, match="goes on after its end, .* joined by cat"):
        sources.open_split(settings("webdataset", tmp_path), held_out=False)
    import gzip

    path.write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match="no whole, uncompressed tar file"):
        sources.open_split(settings("webdataset", tmp_path), held_out=False)


def test_absolute_paths_links_and_hidden_members_are_harmless(tmp_path):
    path = tmp_path / "train-0.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in [
            ("../../up.jpg", jpeg(0)),
            ("../../up.cls", b"0"),
            ("/etc/x.jpg", jpeg(1)),
            ("/etc/x.cls", b"1"),
            ("._x.jpg", b"AppleDouble"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("z.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(os.listdir(tmp_path.parent))
    source = sources.open_split(settings("webdataset", tmp_path), held_out=False)
    assert source.size == 2 and source.labels.tolist() == [0, 1]
    assert sorted(os.listdir(tmp_path.parent)) == before


def test_member_above_the_size_limit_raises(tmp_path):
    path = tmp_path / "train-0.tar"
    info = tarfile.TarInfo("a.jpg")
    info.size = 2**28 + 1
    with open(path, "wb") as file:
        file.write(info.tobuf())
        file.truncate(2**28 + 4096)
    tracemalloc.start()
    with pytest.raises(ValueError, match="'a.jpg' claims 268,435,457 bytes; an image has"):
        sources.open_split(settings("webdataset", tmp_path), held_out=False)
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def test_undecodable_image_is_black_counted_and_named(tmp_path, capsys):
    members = pairs(0, 1, 2)
    members[2] = ("1.jpg", b"no image")
    write_tar(tmp_path / "val-0.tar", members)
    config = settings("webdataset", tmp_path, batch_size=3)
    source = sources.open_split(config, held_out=True)
    unreadable = data.UnreadableImages(source, 1.0)
    seen = evaluate(source, config, unreadable=unreadable)
    assert seen["weight"].tolist() == [1, 0, 1] and not seen["image"][1].any()
    assert unreadable.names == {"val-0.tar 1"}
    assert capsys.readouterr().out.count("val-0.tar 1") == 1


# === Parquet ===


def write_parquet(path, columns, **options):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


IMAGES = [jpeg(i) for i in range(4)]


@pytest.mark.parametrize(
    ("columns", "values", "message"),
    [
        ({"picture": ["a"], "label": [0]}, {}, "has no column 'image'; it has picture, label"),
        ({"image": IMAGES, "class": [0, 1, 2, 0]}, {}, "has no column 'label'"),
        ({"image": IMAGES, "label": [0, 1, 2, 3]}, {}, "row 4 has the label 3, outside of 0 to 2"),
        ({"image": IMAGES, "label": [0, 1, 2, 1]}, {"classes": 0}, "from 0 to 2: --classes=3"),
        ({"image": IMAGES, "label": ["a", "b", None, "b"]}, {}, "row 3 has no label"),
        ({"image": IMAGES, "label": ["a", "b", " ", "b"]}, {}, "row 3 has no label"),
        ({"image": IMAGES, "label": [0.0, 1.0, float("nan"), 1.0]}, {}, "row 3 has the label nan"),
    ],
)
def test_invalid_parquet_file_raises(tmp_path, columns, values, message):
    write_parquet(tmp_path / "train-0.parquet", columns)
    with pytest.raises(ValueError, match=message) as caught:
        sources.open_split(settings("parquet", tmp_path, **values), held_out=False)
    assert "\n" not in str(caught.value)


def test_text_labels_are_the_classes_of_the_training_split(tmp_path):
    write_parquet(tmp_path / "train.parquet", {"image": IMAGES, "label": ["10", "9", "9", "10"]})
    write_parquet(tmp_path / "test.parquet", {"image": IMAGES[:1], "label": ["10"]})
    training, held_out = sources.open_sources(settings("parquet", tmp_path, classes=0))
    assert training.label_names == held_out.label_names == ("9", "10")


def test_damaged_parquet_file_and_large_row_group_raise(tmp_path, monkeypatch):
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ValueError, match="train.parquet is no whole Parquet file"):
        sources.open_split(settings("parquet", tmp_path), held_out=False)
    write_parquet(path, {"image": IMAGES, "label": [0, 1, 2, 0]})
    monkeypatch.setattr(sources.parquet, "MAX_GROUP_BYTES", 100)
    with pytest.raises(ValueError, match="row group 0 has .* row_group_size=1000"):
        sources.open_split(settings("parquet", tmp_path), held_out=False)


def test_damaged_row_group_is_a_set_of_unreadable_images(tmp_path):
    columns = {"image": IMAGES, "label": [0, 1, 2, 0]}
    path = write_parquet(tmp_path / "val.parquet", columns, row_group_size=2, compression="none")
    whole = path.read_bytes()
    at = whole.index(IMAGES[0])  # preceded by the page header
    path.write_bytes(whole[:4] + b"\xff" * (at - 8) + whole[at - 4 :])
    config = settings("parquet", tmp_path, batch_size=4)
    source = sources.open_split(config, held_out=True)
    unreadable = data.UnreadableImages(source, 1.0)
    seen = evaluate(source, config, unreadable=unreadable)
    assert seen["weight"].tolist() == [0, 0, 1, 1] and seen["label"].tolist() == [0, 1, 2, 0]
    assert unreadable.names == {f"{path} row 1", f"{path} row 2"}


# === Columns of images and labels ===


def write_table(dataset, root, features, columns):
    """Writes a training split with `datasets`; `plain` is a Parquet file without its metadata."""
    import datasets

    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    if dataset == "huggingface":
        datasets.DatasetDict(train=table).save_to_disk(str(root))
    else:
        table.to_parquet(str(root / "train.parquet"))
    return settings(dataset, root, classes=2)


def read_encoded(source):
    """Returns the encoded images of a source, in order."""
    if isinstance(source, sources.Streamed):
        return [image for _, image, _ in source.stream(None, 0, 1).as_numpy_iterator()]
    items = [source.item(tf.constant(index)) for index in range(source.size)]
    return [source.read(image).numpy() for _, image, _ in items]


def image_and_label_features():
    """Returns pairs of features that can be read: the images' and the labels'."""
    import datasets

    names = datasets.ClassLabel(names=["ape", "bee"])
    return {
        "bytes": {"image": datasets.Value("binary"), "label": datasets.Value("int64")},
        "large bytes": {"picture": datasets.Value("large_binary"), "label": names},
        "struct": {
            "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "label": names,
        },
        "CIFAR-100": {"img": datasets.Image(), "fine_label": names, "coarse_label": names},
        "single class label": {"image": datasets.Image(), "animal": names},
        "mask": {"image": datasets.Value("binary"), "mask": datasets.Image(), "label": names},
    }


@pytest.mark.parametrize("dataset", ["parquet", "huggingface"])
@pytest.mark.parametrize(
    "kind", ["bytes", "large bytes", "struct", "CIFAR-100", "single class label", "mask"]
)
def test_image_and_label_columns_are_found(tmp_path, dataset, kind):
    features = image_and_label_features()[kind]
    image, label = (list(features)[i] for i in (0, -1))
    if "fine_label" in features:
        label = "fine_label"
    columns = {name: [0, 0] for name in features} | {label: [1, 0]}
    for name in {image, "mask"} & set(features):
        encoded = IMAGES[:2] if name == image else [b"", b""]
        is_bytes = "binary" in str(getattr(features[name], "dtype", ""))
        columns[name] = encoded if is_bytes else [{"bytes": e, "path": None} for e in encoded]
    config = write_table(dataset, tmp_path, features, columns)
    source = sources.open_split(config, held_out=False)
    assert source.labels.tolist() == [1, 0]
    assert read_encoded(source) == IMAGES[:2]


def test_directory_of_plain_parquet_files_is_read_as_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_parquet(tmp_path / "train.parquet", {"image": IMAGES[:2], "label": [1, 0]})
    source = sources.open_split(settings("huggingface", tmp_path, classes=2), held_out=False)
    assert read_encoded(source) == IMAGES[:2]


@pytest.mark.parametrize("dataset", ["parquet", "huggingface"])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": "int64", "label": "int64"}, "column 'image' that is not an image column.*int64"),
        ({"a": "binary", "b": "binary", "label": "int64"}, "has several image columns: a, b. Ren"),
        ({"image": "binary", "a": "class", "b": "class"}, "has several label columns: a, b. Ren"),
        ({"image": "binary", "class": "int64"}, "has no column 'label'; it has image, class"),
    ],
)
def test_unclear_columns_raise(tmp_path, dataset, columns, message):
    import datasets

    features = {
        name: datasets.ClassLabel(names=["x", "y"]) if kind == "class" else datasets.Value(kind)
        for name, kind in columns.items()
    }
    values = {name: [b""] if kind == "binary" else [0] for name, kind in columns.items()}
    config = write_table(dataset, tmp_path, features, values)
    with pytest.raises(ValueError, match=message) as caught:
        sources.open_split(config, held_out=False)
    assert "\n" not in str(caught.value)


# === Hugging Face datasets ===


def test_directory_of_parquet_files_is_read_as_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ape", "bee"])}
    )
    columns = {"image": [{"bytes": IMAGES[i], "path": None} for i in (0, 1)], "label": [1, 0]}
    table = datasets.Dataset.from_dict(columns, features=features)
    (tmp_path / "data").mkdir()
    table.to_parquet(str(tmp_path / "data" / "train-00000-of-00001.parquet"))
    source = sources.open_split(settings("huggingface", tmp_path), held_out=False)
    assert source.labels.tolist() == [1, 0] and source.label_names == ("ape", "bee")


def test_directory_without_a_data_set_raises(tmp_path):
    with pytest.raises(ValueError, match="has no files .*parquet of a split train"):
        sources.open_split(settings("huggingface", tmp_path), held_out=False)
    (tmp_path / "dataset_dict.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read by datasets"):
        sources.open_split(settings("huggingface", tmp_path), held_out=False)


@pytest.mark.parametrize(
    ("dataset", "module"), [("huggingface", "datasets"), ("parquet", "pyarrow")]
)
def test_missing_package_error_names_the_extra(tmp_path, monkeypatch, dataset, module):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"keras-tnt\\[{dataset}\\]"):
        sources.open_split(settings(dataset, tmp_path), held_out=False)
