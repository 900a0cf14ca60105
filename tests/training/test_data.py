"""Sources and batches: contents, order, and unreadable images."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.image_datasets import class_folders, jpeg, prepare_imagenet
from training import configuration, data, sources
from training.sources import kinds

SIZE = (32, 32)
FILL = (128, 128, 128)
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns (root, {split: broken files}) of 7 classes, 37 training and 31 held-out images."""
    root = tmp_path_factory.mktemp("folder")
    broken = {split: class_folders(root, split, n) for split, n in (("train", 37), ("val", 31))}
    return root, broken


def folder_config(root, **values):
    return configuration.make(
        "digits",
        **{"dataset": "folder", "data_dir": str(root), "batch_size": 8, "max_corrupt": 0.2}
        | values,
    )


def collect(dataset):
    """Returns the values of all batches, concatenated by key."""
    batches = list(dataset.as_numpy_iterator())
    return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


def train(source, values, epoch=0, first=0, steps=4, share=None, unreadable=None):
    share = share or data.WorkerShare(0, 1, 1)
    unreadable = unreadable or data.UnreadableImages(source, 1.0)
    return data.training_batches(source, values, SIZE, FILL, epoch, first, steps, share, unreadable)


def evaluation(source, values, share=None, unreadable=None):
    share = share or data.WorkerShare(0, 1, 1)
    return data.evaluation_batches(
        source, values, SIZE, share, unreadable or data.UnreadableImages(source, 1.0)
    )


# === Sources ===


def test_digits_split_is_fixed_and_stratified():
    (train_images, train_labels), (test_images, test_labels) = sources.digits()
    assert train_images.shape == (1437, 32, 32, 3) and test_images.shape == (360, 32, 32, 3)
    assert train_images.dtype == "uint8" and test_images.max() == 255
    assert np.bincount(test_labels).min() >= 34
    assert test_labels[:8].tolist() == sources.digits()[1][1][:8].tolist()


def test_unreadable_images_are_logged_once_and_have_no_weight(folder, capsys):
    root, broken = folder
    source = sources.open_split(folder_config(root), held_out=True)
    assert (source.size, source.classes) == (31, 7)
    unreadable = data.UnreadableImages(source, 0.2)
    seen = collect(evaluation(source, folder_config(root), unreadable=unreadable))
    assert seen["weight"].sum() == 31 - 3
    assert sorted(unreadable.names) == sorted(broken["val"])
    printed = capsys.readouterr().out
    assert all(printed.count(name) == 1 for name in broken["val"])
    unreadable.check()


@pytest.mark.parametrize("replicas", [1, 2])
def test_evaluation_has_each_image_once_for_any_number_of_devices(folder, replicas):
    root, _ = folder
    values = folder_config(root, batch_size=8)
    source = sources.open_split(values, held_out=True)
    seen = collect(evaluation(source, values, data.WorkerShare(0, 1, replicas)))
    assert len(seen["weight"]) == 32
    counted = seen["label"][seen["weight"] > 0]
    expected = [label for i, label in enumerate(np.arange(31) % 7) if i not in (8, 13, 20)]
    assert np.bincount(counted).tolist() == np.bincount(expected).tolist()
    images = seen["image"][seen["weight"] > 0]
    assert len({image.tobytes() for image in images}) == 28


def test_gray_and_cmyk_images_are_converted_to_rgb(folder):
    root, _ = folder
    values = folder_config(root)
    seen = collect(evaluation(sources.open_split(values, held_out=True), values))
    assert seen["image"].shape[1:] == (32, 32, 3)
    gray = [(i[..., 0] == i[..., 1]).all() and i.any() for i in seen["image"]]
    assert sum(gray) == 1


def test_too_many_unreadable_images_raise(folder):
    root, _ = folder
    values = folder_config(root, max_corrupt=0.05)
    source = sources.open_split(values, held_out=True)
    unreadable = data.UnreadableImages(source, values.max_corrupt)
    collect(evaluation(source, values, unreadable=unreadable))
    with pytest.raises(ValueError, match="3 of 31 images cannot be read, more than --max_corrupt"):
        unreadable.check()


def test_held_out_class_without_training_images_raises(tmp_path):
    class_folders(tmp_path, "train", 3, classes=3)
    class_folders(tmp_path, "val", 4, classes=4)
    with pytest.raises(ValueError, match="class_3"):
        sources.open_split(folder_config(tmp_path), held_out=True)


@pytest.mark.parametrize("dataset", ["folder", "tfrecord"])
def test_directory_without_images_raises(tmp_path, dataset):
    with pytest.raises(ValueError, match=str(tmp_path)):
        sources.open_split(folder_config(tmp_path, dataset=dataset), held_out=False)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Writes three TFRecord files of 11 images per split; labels from 1, one broken image."""
    root = tmp_path_factory.mktemp("records")
    for split in ("train", "validation"):
        for shard in range(3):
            path = root / f"{split}-{shard:05d}-of-00003"
            with tf.io.TFRecordWriter(str(path)) as writer:
                for i in range(shard * 11, shard * 11 + 11):
                    image = jpeg(i) if i != 17 else jpeg(i)[:100]
                    writer.write(example(image, i % 4 + 1))
    return root


def example(image, label):
    features = {
        "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
        "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
    }
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def record_config(root, **values):
    return folder_config(root, **{"dataset": "tfrecord", "classes": 4, "label_offset": 1} | values)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_partition_the_held_out_records(records, workers):
    values = record_config(records)
    source = sources.open_split(values, held_out=True)
    assert source.size == 33
    unreadable = data.UnreadableImages(source, 1.0)
    shares = [data.WorkerShare(i, workers, workers) for i in range(workers)]
    seen = [collect(evaluation(source, values, share, unreadable)) for share in shares]
    assert len({len(s["weight"]) for s in seen}) == 1
    labels = np.concatenate([s["label"][s["weight"] > 0] for s in seen])
    expected = [i % 4 for i in range(33) if i != 17]
    assert np.bincount(labels).tolist() == np.bincount(expected).tolist()
    assert len(unreadable.names) == 1 and "record 6" in min(unreadable.names)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["records", "folder"])
@pytest.mark.parametrize("repeats", [1, 3])
def test_epoch_resumed_in_the_middle_has_the_same_images(request, kind, repeats):
    root = request.getfixturevalue(kind)
    root = root if kind == "records" else root[0]
    make = record_config if kind == "records" else folder_config
    values = make(root, repeats=repeats, min_crop=0.3, flip=True, erasing=0.5)
    source = sources.open_split(values, held_out=False)
    whole = collect(train(source, values, epoch=2))
    rest = collect(train(source, values, epoch=2, first=2))
    assert len(whole["label"]) == 32 and len(rest["label"]) == 16
    for key in whole:
        np.testing.assert_array_equal(rest[key], whole[key][16:])
    other = collect(train(source, values, epoch=3))
    assert (other["label"] != whole["label"]).any()


# === Order ===


def test_each_epoch_is_a_different_permutation():
    values = configuration.make("digits", batch_size=10)
    orders = [data.training_order(values, 100, 10, epoch) for epoch in (0, 1)]
    assert all(sorted(order.reshape(-1)) == list(range(100)) for order in orders)
    assert (orders[0] != orders[1]).any()
    np.testing.assert_array_equal(orders[0], data.training_order(values, 100, 10, 0))


def test_repeated_augmentation_has_all_copies_of_an_image_in_one_batch():
    values = configuration.make("digits", batch_size=12, repeats=3)
    order = data.training_order(values, 120, 10, 0)
    assert order.shape == (10, 12)
    assert len(set(order.reshape(-1))) == 40
    for row in order:
        assert set(np.unique(row, return_counts=True)[1]) == {3}
        # Mixing pairs the images of a group of two: never an image with itself.
        assert (row[::2] != row[1::2]).all()


def test_copies_of_an_image_are_augmented_differently(folder):
    root, _ = folder
    values = folder_config(root, repeats=2, min_crop=0.2, batch_size=8)
    source = sources.open_split(values, held_out=False)
    images = collect(train(source, values, steps=2))["image"][:8]
    assert all((images[i] != images[i + 4]).any() or not images[i].any() for i in range(4))


@pytest.mark.slow
def test_workers_and_replicas_see_the_batches_of_one_device(folder):
    root, _ = folder
    values = folder_config(root, min_crop=0.3)
    source = sources.open_split(values, held_out=False)
    whole = collect(train(source, values))["image"].reshape(4, 8, 32, 32, 3)
    halves = [
        collect(train(source, values, share=data.WorkerShare(i, 2, 4)))["image"] for i in (0, 1)
    ]
    halves = [half.reshape(4, 4, 32, 32, 3) for half in halves]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), whole)


def test_training_and_evaluation_order():
    values = configuration.make("digits", batch_size=5, repeats=2, seed=3)
    a = np.random.default_rng([3, 4]).permutation(7).tolist()
    # Three images per batch, and the first of them again up to the batch size.
    expected = [
        [a[0], a[1], a[2], a[0], a[1]],
        [a[3], a[4], a[5], a[3], a[4]],
        [a[6], a[0], a[1], a[6], a[0]],
    ]
    assert data.training_order(values, 7, 3, 4).tolist() == expected
    assert data.evaluation_order(3, 7).tolist() == [[0, 1, 2], [3, 4, 5], [6, -1, -1]]
    assert data.evaluation_order(3, 6).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Batches of 4 for two workers: each one's positions in the epoch from the second update on.
        ("indexed", [[4, 5, 8, 9], [6, 7, 10, 11]]),
        ("streamed", [[4, 6, 8, 10], [5, 7, 9, 11]]),
    ],
)
def test_image_position_in_the_epoch_does_not_depend_on_workers(monkeypatch, kind, expected):
    monkeypatch.setattr(data, "batches", lambda items, *_: items.map(lambda *item: item[3]))
    source = sources.in_memory(np.zeros((16, 8, 8, 3), "uint8"), np.arange(16) % 2, 2, "x")
    if kind == "streamed":
        source = streamed(16)
    values = configuration.make("digits", batch_size=4)
    shares = [data.WorkerShare(i, 2, 2) for i in (0, 1)]
    places = [train(source, values, first=1, steps=3, share=share) for share in shares]
    assert [[int(place) for place in each] for each in places] == expected


def streamed(count):
    """Returns a source of `count` images, labeled by their indices."""

    def stream(seed, worker, workers):
        return tf.data.Dataset.range(count).map(lambda i: ("", "", i)).shard(workers, worker)

    return kinds.Streamed(count, count, stream)


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_streamed_batch_has_the_given_number_of_repeats(monkeypatch, repeats):
    monkeypatch.setattr(data, "batches", lambda items, *_: items.map(lambda *item: item[2]))
    values = configuration.make("digits", batch_size=6, repeats=repeats)
    labels = [int(label) for label in train(streamed(24), values, steps=2)]
    for batch in (labels[:6], labels[6:]):
        distinct = batch[: 6 // repeats]
        assert len(set(distinct)) == 6 // repeats and batch == distinct * repeats
    assert set(labels[:6]).isdisjoint(labels[6:])


def test_streamed_epoch_longer_than_its_source_repeats_its_order(monkeypatch):
    monkeypatch.setattr(data, "batches", lambda items, *_: items.map(lambda *item: item[2]))
    labels = [int(x) for x in train(streamed(8), configuration.make("digits", batch_size=8))]
    assert labels == labels[:8] * 4 and labels[:8] != sorted(labels[:8])


def test_streamed_evaluation_positions_and_padding(monkeypatch):
    def places(items, *_):
        return items.map(lambda *item: item[3])

    monkeypatch.setattr(data, "batches", places)
    values = configuration.make("digits", batch_size=4)
    found = [
        [int(x) for x in evaluation(streamed(5), values, data.WorkerShare(i, 2, 2))] for i in (0, 1)
    ]
    assert found == [[0, 2, 4, -1], [1, 3, -1, -1]]


def test_batch_is_the_share_of_one_replica():
    source = sources.in_memory(np.zeros((16, 32, 32, 3), "uint8"), np.arange(16) % 2, 2, "x")
    values = configuration.make("digits", batch_size=8)
    batches = train(source, values, steps=2, share=data.WorkerShare(0, 1, 4))
    assert batches.element_spec["image"].shape[0] == 2 and len(list(batches)) == 8


def test_tensorflow_errors_of_records_become_one_line(tmp_path):
    path = tmp_path / "a.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(b"whole" * 20)
    path.write_bytes(path.read_bytes()[:-7] + b"damaged")
    source = kinds.Streamed(1, 2, lambda *_: None, stretches=[(str(path), 0, 1)])
    unreadable = data.UnreadableImages(source, 0.5)
    with pytest.raises(ValueError, match="a.tfrecord is damaged"), unreadable.reading():
        raise tf.errors.DataLossError(None, None, "corrupted record at 0")
    said = "assertion failed: [label 9 of 'b' is none of 4 classes] [Condition x < y]"
    with pytest.raises(ValueError, match="^label 9 of 'b' is none of 4 classes$"):
        with unreadable.reading():
            raise tf.errors.InvalidArgumentError(None, None, said)
    with pytest.raises(tf.errors.InvalidArgumentError), unreadable.reading():
        raise tf.errors.InvalidArgumentError(None, None, "shapes differ")


def test_each_image_is_erased_by_its_own_draw_if_enabled():
    source = sources.in_memory(np.zeros((16, 32, 32, 3), "uint8"), np.arange(16) % 2, 2, "x")

    def boxes(epoch=0, **values):
        values = configuration.make("digits", batch_size=8, min_crop=1.0, **values)
        batches = train(source, values, epoch, steps=2)
        assert batches.element_spec["erase"].shape == (8, 4)  # drawn before the images are decoded
        return collect(batches)["erase"].tolist()

    erased = boxes(erasing=1.0)
    assert len({tuple(box) for box in erased}) == 16 and all(box[1] > box[0] for box in erased)
    assert boxes(erasing=1.0, seed=1) != erased and boxes(1, erasing=1.0) != erased
    assert boxes(erasing=0.0) == [[0, 0, 0, 0]] * 16


def test_streamed_images_are_repeated_within_their_batch():
    items = tf.data.Dataset.range(7).map(lambda i: (i, -i))
    repeated = list(data.repeat_within(items, 2, 3, 5).as_numpy_iterator())
    firsts = [int(first) for first, _ in repeated]
    assert firsts == [0, 1, 0, 1, 0, 2, 3, 2, 3, 2, 4, 5, 4, 5, 4]
    assert all(first == -second for first, second in repeated)


def test_worker_feeds_its_columns_of_a_batch():
    batch = np.arange(12)
    columns = [batch[data.WorkerShare(i, 3, 6).columns(12)].tolist() for i in range(3)]
    assert columns == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_unreadable_images_are_counted_once_up_to_the_limit(capsys):
    source = sources.in_memory(np.zeros((1000, 1, 1, 3), "uint8"), np.zeros(1000), 2, "x")
    unreadable = data.UnreadableImages(source, 0.0029)
    for name in (b"one", b"one", b"two\xff"):
        assert unreadable.add(name) == 0
    unreadable.check()
    assert capsys.readouterr().out.count("corrupt image") == 2
    unreadable.add(b"three")
    with pytest.raises(ValueError, match=r"3 of 1000 images .* allows \(2\). Among them: one, thr"):
        unreadable.check()


# === ImageNet of tensorflow-datasets ===


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    root = tmp_path_factory.mktemp("tensorflow_datasets")
    prepare_imagenet(root, {"train": 40, "validation": 23})
    return root


def imagenet_config(root, **values):
    return folder_config(root, dataset="imagenet2012", **values)


@pytest.mark.parametrize("workers", [1, 2])
def test_imagenet_evaluation_has_each_image_once(imagenet, workers):
    values = imagenet_config(imagenet)
    source = sources.open_split(values, held_out=True)
    assert (source.size, source.classes) == (23, 1000)
    shares = [data.WorkerShare(i, workers, workers) for i in range(workers)]
    seen = [collect(evaluation(source, values, share)) for share in shares]
    labels = np.concatenate([s["label"][s["weight"] > 0] for s in seen])
    assert sorted(labels) == sorted(37 * i % 1000 for i in range(23))


@pytest.mark.slow
def test_imagenet_order_depends_on_seed_and_epoch(imagenet):
    values = imagenet_config(imagenet, min_crop=0.2)
    source = sources.open_split(values, held_out=False)
    epochs = [collect(train(source, values, epoch, steps=5)) for epoch in (0, 0, 1)]
    np.testing.assert_array_equal(epochs[0]["image"], epochs[1]["image"])
    assert (epochs[0]["label"] != epochs[2]["label"]).any()
    assert sorted(epochs[0]["label"]) == sorted(37 * i % 1000 for i in range(40))


def test_imagenet_that_is_not_prepared_raises(tmp_path):
    with pytest.raises(ValueError, match="tfds build imagenet2012"):
        sources.open_split(imagenet_config(tmp_path), held_out=False)


@pytest.mark.slow
def test_data_service_workers_have_each_image_once(folder):
    root, broken = folder
    service = tf.data.experimental.service
    dispatcher = service.DispatchServer()
    address = dispatcher.target.removeprefix("grpc://")
    workers = [
        service.WorkerServer(service.WorkerConfig(dispatcher_address=address)) for _ in range(2)
    ]
    values = folder_config(root, data_service=dispatcher.target)
    seen = collect(train(sources.open_split(values, held_out=False), values))
    alone = folder_config(root)
    expected = collect(train(sources.open_split(alone, held_out=False), alone))
    assert len(seen["image"]) == 32 and len(workers) == 2
    by_content = [sorted(map(bytes, batches["image"])) for batches in (seen, expected)]
    assert by_content[0] == by_content[1]
    assert seen["weight"].sum() == expected["weight"].sum() < 32


@pytest.mark.slow
def test_unreadable_images_of_a_data_service_are_counted(folder):
    root, broken = folder
    service = tf.data.experimental.service
    dispatcher = service.DispatchServer()
    address = dispatcher.target.removeprefix("grpc://")
    worker = service.WorkerServer(service.WorkerConfig(dispatcher_address=address))
    values = folder_config(root, data_service=dispatcher.target)
    source = sources.open_split(values, held_out=False)
    unreadable = data.UnreadableImages(source, 1.0)
    seen = collect(train(source, values, steps=4, unreadable=unreadable))
    order = data.training_order(values, source.size, 4, 0).reshape(-1)
    shown = {source.paths[i] for i in order} & set(broken["train"])
    assert unreadable.names == shown and (seen["weight"] == 0).sum() == len(shown)
    assert worker


# === Images in flight ===


@pytest.fixture
def threads(monkeypatch):
    """Returns a function that sets TensorFlow's inter-op parallelism as this module reads it."""
    read = tf.config.threading, "get_inter_op_parallelism_threads"

    def set_threads(number):
        monkeypatch.setattr(*read, lambda: number)

    set_threads(0)
    return set_threads


def test_images_in_flight_grow_with_the_usable_cores(threads, monkeypatch):
    counts = []
    for cores in (1, 2, 3, 4, 8, 64):
        monkeypatch.setattr(
            data.os, "sched_getaffinity", lambda pid, n=cores: set(range(n)), raising=False
        )
        counts.append(data.images_in_flight())
    assert counts == sorted(set(counts)) and counts[1] >= 16
    monkeypatch.delattr(data.os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(data.os, "cpu_count", lambda: 8)
    assert data.images_in_flight() == counts[4]
    monkeypatch.setattr(data.os, "cpu_count", lambda: None)
    assert data.images_in_flight() == counts[0]


def test_images_in_flight_follow_the_inter_op_threads_that_are_set(threads):
    counts = []
    for number in (1, 2, 3, 4, 8, 64):
        threads(number)
        counts.append(data.images_in_flight())
    assert counts == sorted(set(counts))


# Prints how many files the input pipeline of training reads at once. The files are FIFOs: a thread
# that opens one for reading waits for a writer, and a writer that does not wait succeeds only where
# a thread waits. A writer releases that thread to a later file, so the last files are tried first.
IN_FLIGHT = """
import os, sys, threading, time
threads, directory = int(sys.argv[1]), sys.argv[2]
import tensorflow as tf
tf.config.threading.set_inter_op_parallelism_threads(threads)
tf.random.set_seed(0)
tf.config.experimental.enable_op_determinism()
from training import configuration, data
from training.sources import kinds

paths = [f"{directory}/{i}.jpg" for i in range(64)]
for path in paths:
    os.mkfifo(path)
source = kinds.of_files(paths, [i % 2 for i in range(64)], ("a", "b"))
config = configuration.make("digits", dataset="folder", data_dir=directory, batch_size=64)
share, unreadable = data.WorkerShare(0, 1, 1), data.UnreadableImages(source, 1.0)
dataset = data.training_batches(source, config, (32, 32), (0, 0, 0), 0, 0, 1, share, unreadable)
batches = iter(dataset)
threading.Thread(target=lambda: next(batches), daemon=True).start()
used = -1.0
while time.process_time() - used > 0.05:  # until all threads wait
    used = time.process_time()
    time.sleep(2)
number = 0
for index in data.training_order(config, 64, 1, 0)[0, ::-1]:
    try:
        os.open(paths[index], os.O_WRONLY | os.O_NONBLOCK)
        number += 1
    except OSError:
        pass
print("in flight:", number, flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_files_in_flight_under_op_determinism_grow_with_the_threads(tmp_path):
    processes = []
    for threads in (2, 8):
        directory = tmp_path / str(threads)
        directory.mkdir()
        command = [sys.executable, "-c", IN_FLIGHT, str(threads), str(directory)]
        processes.append(
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    ends = [process.communicate(timeout=300) for process in processes]
    few, many = (int(re.search(rb"in flight: (\d+)", out)[1]) for out, _ in ends)
    assert few < many
    assert [few, many] == [
        data.BASE_IN_FLIGHT + data.IN_FLIGHT_PER_CORE * threads for threads in (2, 8)
    ]
