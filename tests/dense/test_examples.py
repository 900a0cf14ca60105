"""Examples detection.py and segmentation.py: scenes, tfds and folder data sets, end-to-end runs."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import keras_tnt
from examples import dense_data, dense_task, detection, scenes, segmentation
from tests.helpers.checks import ROOT

pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]
TINY = '{"patch_size": 16, "depth": 2, "outer_dim": 16, "inner_dim": 4, "outer_heads": 2, "inner_heads": 2}'  # fmt: skip  # noqa: E501


# === Scenes ===


def test_scenes_are_reproducible_and_held_out_digits_disjoint():
    first, again, held_out = (scenes.scenes(4, out) for out in (False, False, True))
    assert np.array_equal(first.images, again.images)
    assert not np.array_equal(first.images, held_out.images)
    train, test = ({d.tobytes() for d in scenes.digits(out)[0]} for out in (False, True))
    assert len(train) > 1400 and len(test) > 300 and not train & test


def test_boxes_match_masks():
    found = scenes.scenes(20, held_out=True)
    for boxes, labels, mask in zip(found.boxes, found.labels, found.masks, strict=True):
        assert set(np.unique(mask)) - {0} == set(labels + 1)
        for (top, left, bottom, right), label in zip(boxes.astype(int), labels, strict=True):
            inside = mask[top:bottom, left:right] == label + 1
            assert inside[0].any() and inside[-1].any()
            assert inside[:, 0].any() and inside[:, -1].any()


# === Data sets ===


def options(dataset, **others):
    told = {"dataset": str(dataset), "data_dir": None, "image_size": 64, "classes": None}
    return SimpleNamespace(**told | others)


def picture(height=40, width=80):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype("uint8")


def folder_of_boxes(root):
    for part in ("train", "validation"):
        (root / part).mkdir()
        Image.fromarray(picture()).save(root / part / "a.png")
        told = {
            "images": [{"id": 7, "file_name": "a.png"}],
            "categories": [{"id": 5, "name": "dog"}, {"id": 2, "name": "cat"}],
            "annotations": [
                {"image_id": 7, "category_id": 5, "bbox": [10, 20, 30, 15]},
                {"image_id": 7, "category_id": 2, "bbox": [0, 0, 8, 8], "iscrowd": 1},
            ],
        }
        (root / part / "annotations.json").write_text(json.dumps(told))
    return root


def folder_of_masks(root, value=2):
    mask = np.full((40, 80), value, "uint8")
    mask[:10] = 255
    for part in ("train", "validation"):
        for name in ("images", "masks"):
            (root / part / name).mkdir(parents=True)
        Image.fromarray(picture()).save(root / part / "images" / "a.jpg")
        Image.fromarray(mask).save(root / part / "masks" / "a.png")
    return root


def test_folder_with_coco_annotations_is_loaded(tmp_path):
    items = dense_data.load("detection", options(folder_of_boxes(tmp_path)), held_out=True)
    assert items.classes == ("cat", "dog") and items.count == 1
    (item,) = items.read()
    assert item["boxes"].tolist() == [[20, 10, 35, 40], [0, 0, 8, 8]]
    assert item["labels"].tolist() == [1, 0] and item["crowd"].tolist() == [False, True]
    resized, scale = dense_data.resize(item, 64)
    assert scale == 0.8 and resized["image"].shape == (64, 64, 3)
    assert resized["boxes"][0].tolist() == pytest.approx([16, 8, 28, 32])
    assert detection.padded_boxes(resized)["labels"][:2].tolist() == [1, -1]


def test_folder_of_masks_is_loaded(tmp_path):
    root = folder_of_masks(tmp_path)
    (item,) = dense_data.load("segmentation", options(root, classes=3), held_out=False).read()
    resized, _ = dense_data.resize(item, 64)
    assert set(np.unique(resized["mask"])) == {2, 255}
    assert (resized["mask"][32:] == 255).all()
    cut = dense_data.augment(item, np.random.default_rng(1), options(root, flip=True, crop=True))
    assert cut["image"].shape == (64, 64, 3) and cut["mask"].shape == (64, 64)


def test_tfds_data_sets_are_loaded(tmp_path):
    import tensorflow_datasets as tfds

    def write(name, features, example):
        info = {"data_dir": str(tmp_path), "name": name, "version": "1.0.0"}
        tfds.dataset_builders.store_as_tfds_dataset(
            **info,
            features=tfds.features.FeaturesDict(features),
            split_datasets={"train": [(0, example)], "validation": [(0, example)]},
        )

    box = tfds.features.BBox(ymin=0.5, xmin=0.125, ymax=0.875, xmax=0.5)
    kinds = {"bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=["a"])}
    image = tfds.features.Image(shape=(None, None, 3))
    write(
        "boxes",
        {"image": image, "objects": tfds.features.Sequence(kinds)},
        {"image": picture(), "objects": [{"bbox": box, "label": 0}]},
    )
    mask = np.ones((40, 80, 1), "uint8")
    write(
        "masks",
        {"image": image, "annotation": tfds.features.Image(shape=(None, None, 1))},
        {"image": picture(), "annotation": mask},
    )
    told = {"data_dir": str(tmp_path), "classes": 2}
    boxes = dense_data.load("detection", options("tfds:boxes", **told), held_out=True)
    (item,) = boxes.read()
    assert item["boxes"].tolist() == [[20, 10, 35, 40]] and boxes.classes == ("a",)
    (item,) = dense_data.load("segmentation", options("tfds:masks", **told), False).read()
    assert (item["mask"] == 1).all()
    with pytest.raises(ValueError, match="sequence of bbox and label"):
        dense_data.load("detection", options("tfds:masks", **told), held_out=True)


@pytest.mark.parametrize(
    ("task", "prepare", "told"),
    [
        ("detection", lambda root: root / "none", "neither scenes, nor tfds:NAME, nor a folder"),
        ("detection", lambda root: root, "There is no .*annotations.json"),
        ("segmentation", folder_of_masks, "type --classes=N"),
    ],
)
def test_invalid_data_set_is_a_one_line_error(task, prepare, told, tmp_path):
    with pytest.raises(ValueError, match=told) as raised:
        dense_data.load(task, options(prepare(tmp_path)), held_out=False)
    assert "\n" not in str(raised.value)


def test_mask_value_outside_of_the_classes_raises(tmp_path):
    items = dense_data.load("segmentation", options(folder_of_masks(tmp_path), classes=2), False)
    with pytest.raises(ValueError, match="has the value 2, and there are 2 classes"):
        list(items.read())


# === Metrics ===


def test_average_precision_of_all_and_of_half_of_the_boxes():
    box = np.array([[4, 4, 24, 24], [30, 30, 60, 50]], "float32")
    truth = [
        {
            "boxes": box,
            "labels": np.array([0, 1]),
            "crowd": [False, False],
            "scale": 1,
            "classes": 2,
        }
    ]
    found = {
        "boxes": box[None],
        "labels": np.array([[0, 1]]),
        "confidence": np.array([[0.9, 0.8]]),
        "num_detections": np.array([2]),
    }
    assert detection.evaluate(found, truth)["AP"] == pytest.approx(1)
    assert detection.evaluate({**found, "num_detections": np.array([1])}, truth)[
        "AP50"
    ] == pytest.approx(0.5)


def test_mean_iou_ignores_the_void_label():
    mask = np.array([[[0, 0, 1, 255]]], "uint8")
    found = np.array([[[0, 1, 1, 0]]], "uint8")
    numbers = segmentation.evaluate(found, mask, 2)
    assert numbers["mean IoU"] == pytest.approx(0.5)
    assert numbers["pixel accuracy"] == pytest.approx(2 / 3)


# === End to end ===


def flags(workdir):
    return [
        f"--workdir={workdir}",
        f"--architecture={TINY}",
        *("--weights=none", "--steps=2", "--batch=2", "--scenes=4", "--held_out_scenes=3"),
    ]


def check_whole_way(module, tmp_path, name):
    """Checks that trained, reloaded and exported models agree, and a second call skips training."""
    results = module.main(flags(tmp_path))
    assert list(results) == ["trained", "reloaded", "exported"]
    assert results["trained"] == results["reloaded"]
    assert results["exported"] == pytest.approx(results["reloaded"], abs=1e-3)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "held_out.png").stat().st_size > 10_000
    command = [sys.executable, module.__file__, *flags(tmp_path), "--no_export"]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    told = json.loads((tmp_path / "results.json").read_text())
    assert told == {"reloaded": pytest.approx(results["reloaded"], abs=1e-3)}
    assert (tmp_path / name).exists()


@pytest.mark.slow
def test_detector_end_to_end(tmp_path):
    check_whole_way(detection, tmp_path, "detector.keras")


@pytest.mark.slow
def test_segmenter_end_to_end(tmp_path):
    check_whole_way(segmentation, tmp_path, "segmenter.keras")


@pytest.mark.slow
def test_digits_weights_are_trained_once(tmp_path):
    parsed = dense_task.parse("", segmentation.SETTINGS, [f"--workdir={tmp_path}"])
    parsed.architecture = json.loads(TINY)
    path = dense_task.digits_weights(parsed, count=64, epochs=1)
    written = Path(path).stat().st_mtime_ns
    parsed.weights = "digits"
    model = dense_task.make_model(parsed)
    assert Path(path).stat().st_mtime_ns == written
    trained = keras_tnt.create_model(
        "tnt", weights=path, input_shape=(32, 32, 3), classes=10, **parsed.architecture
    )
    kernels = [keras_tnt.anatomy(m).blocks[0].layer.get_weights()[0] for m in (model, trained)]
    assert np.array_equal(*kernels)


def test_segmenter_accepts_the_strides_of_pyramid_tnt():
    dims = '{"depths": [1, 1], "outer_dims": [16, 16], "inner_dims": [4, 4], "outer_heads": [2, 2], "inner_heads": [2, 2], "reductions": [2, 1]}'  # fmt: skip  # noqa: E501
    arguments = ["--model=pyramid_tnt", f"--architecture={dims}", "--weights=none"]
    parsed = dense_task.parse("", segmentation.SETTINGS, arguments)
    segmenter = segmentation.make_segmenter(parsed, 11)
    assert segmenter.output_shape == (None, 64, 64, 11)


# === The commands ===


@pytest.mark.parametrize("name", ["detection", "segmentation"])
def test_help_imports_no_keras_and_writes_nothing(name, tmp_path):
    command = [sys.executable, "-X", "importtime", str(ROOT / "examples" / f"{name}.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0 and "--dataset" in shown.stdout
    assert not {"keras", "numpy"} & {
        line.split("|")[-1].strip() for line in shown.stderr.split("\n")
    }
    assert not list(tmp_path.iterdir())


def test_missing_package_error_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(dense_task.importlib.util, "find_spec", lambda name: None)
    assert dense_task.run(detection.main, []) == 1
    assert 'pip install "keras-tnt[dense]"' in capsys.readouterr().err


def test_image_size_not_divisible_by_the_stride_is_an_error(capsys):
    with pytest.raises(SystemExit):
        detection.main(["--image_size=100"])
    assert "multiple of 32" in capsys.readouterr().err
