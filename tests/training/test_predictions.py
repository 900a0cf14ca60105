"""Predictions of a model, the tables and plots made of them, and the learning rate finder."""

import contextlib
import csv
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_tnt import figures
from training import configuration, data, find_rate, loop, models, pictures, predictions, sources


def test_expected_calibration_error_matches_a_manual_calculation():
    certainty = np.array([0.95, 0.97, 0.55, 0.55, 0.58, 0.1])
    right = np.array([True, True, True, False, False, False])
    # 15 bins: the first two (0.04 off on average), the next three (0.56 - 1/3), and the last.
    expected = (2 * 0.04 + 3 * (0.56 - 1 / 3) + 0.1) / 6
    assert predictions.calibration_error(certainty, right) == pytest.approx(expected)
    assert predictions.calibration_error(np.array([1.0]), np.array([True])) == 0


@pytest.mark.parametrize("upper", range(1, 15))
def test_errors_of_neighboring_bins_do_not_cancel(upper):
    """One prediction is overconfident and one underconfident, in adjacent bins."""
    certainty = np.array([upper + 0.5, upper - 0.5]) / 15
    right = np.array([False, True])
    expected = (certainty[0] + 1 - certainty[1]) / 2
    assert predictions.calibration_error(certainty, right) == pytest.approx(expected)


def test_last_bin_includes_confidence_1():
    certainty, right = np.array([1.0, 0.95]), np.array([True, False])
    assert predictions.calibration_error(certainty, right) == pytest.approx(0.95 / 2)


def test_confusion_matrix_has_labels_in_rows():
    matrix = predictions.confusion_matrix(np.array([0, 0, 2, 1]), np.array([0, 2, 2, 0]), 3)
    assert matrix.tolist() == [[1, 0, 1], [1, 0, 0], [0, 0, 1]]


@keras.saving.register_keras_serializable(package="tests")
class Corner(keras.layers.Layer):
    """A layer whose logits select the class in an image's first pixel."""

    def call(self, images):
        return 8.0 * tf.one_hot(tf.cast(images[:, 0, 0, 0], tf.int32), 3)


@pytest.fixture
def telling(monkeypatch):
    """Returns (model, source) of 7 images with classes 0, 1, 2, 0, ... The last label differs."""
    said = np.arange(7) % 3
    labels = np.where(np.arange(7) == 6, 2, said)
    images = np.tile(said.astype("uint8")[:, None, None, None], (1, 4, 4, 3))
    source = sources.in_memory(images, labels, 3, "image", ("one", "two", "three"))
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(inputs, Corner()(inputs))
    monkeypatch.setattr(models, "logits_model", lambda model: model)
    monkeypatch.setattr(predictions.keras_tnt, "class_names", lambda model: None)
    return model, source


def table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("devices", ["one_device", "mirrored"])
def test_predictions_are_in_image_order_for_any_number_of_devices(
    devices, telling, tmp_path, request
):
    strategy = request.getfixturevalue(devices)
    model, source = telling
    values = configuration.make("digits", batch_size=4, crop=1.0)
    share = data.WorkerShare(0, 1, strategy.num_replicas_in_sync)
    unreadable = data.UnreadableImages(source, 0.0)
    batches = data.evaluation_batches(source, values, (4, 4), share, unreadable)
    found = predictions.predict(strategy, model, batches, source.size)
    assert found.classes[:, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert found.right.tolist() == [True] * 6 + [False]
    assert [place for place, _ in found.mistakes] == [6]
    error, files = predictions.write_report(found, source, model, tmp_path)
    certainty = np.exp(8) / (np.exp(8) + 2)
    assert error == pytest.approx(abs(certainty - 6 / 7), abs=1e-6)
    rows = table(files["predictions.csv"])
    assert rows[7] == ["image 6", "three", "one", f"{certainty:.6f}", "0"] and len(rows) == 8
    classes = table(files["classes.csv"])
    assert classes[1:] == [["one", "2", "1.000000"], ["two", "2", "1.000000"]] + [
        ["three", "3", "0.666667"]
    ]


@pytest.mark.parametrize("classes", [2, 5, 31])
def test_confusion_plot_for_few_and_many_classes(classes, tmp_path):
    names = [f"a class with a long name {i}" for i in range(classes)]
    matrix = np.eye(classes, dtype=int) + np.eye(classes, k=1, dtype=int)
    pictures.confusion(matrix, names, tmp_path / "confusion.png")
    pictures.confusion(np.eye(classes, dtype=int), names, tmp_path / "right.png")
    for name in ("confusion.png", "right.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 400


@pytest.fixture
def figure(monkeypatch):
    """Returns a function that returns the last figure that was drawn."""
    drawn = []

    def keep(figure, path):
        figure.canvas.draw()
        drawn.append(figure)

    monkeypatch.setattr(pictures, "save", keep)
    yield lambda: drawn[-1]
    for each in drawn:
        pictures.pyplot().close(each)


def texts(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize("classes", [2, 3, 10, 20, 100])
def test_confusion_plot_has_labels_and_accuracy(classes, figure):
    draw = np.random.default_rng(classes)
    matrix = draw.integers(0, 9, (classes, classes)) + 90 * np.eye(classes, dtype=int)
    pictures.confusion(matrix, [f"name {i}" for i in range(classes)], "unused.png")
    axes = figure().axes[0]
    assert axes.get_xlabel().startswith("predicted") and axes.get_ylabel().startswith("true")
    accuracy = np.trace(matrix) / matrix.sum()
    assert f"accuracy {accuracy:.2%}" in figure().get_suptitle()
    assert f"{matrix.sum():,} images" in figure().get_suptitle()
    if classes <= 30:
        assert len(axes.texts) == np.count_nonzero(matrix)
        boxes = [text.get_window_extent() for text in axes.texts]
        cell = abs(np.diff(axes.transData.transform([(0, 0), (1, 1)])[:, 0]))[0]
        assert max(box.width for box in boxes) < cell  # numbers do not exceed their cells
        assert min(text.get_fontsize() for text in axes.texts) >= 7
    else:
        assert "class index, from 0" in axes.get_xlabel()


def test_confusion_numbers_have_contrast_with_their_cells(figure):
    for share in (0, 15, 30, 45):
        matrix = np.array([[share, 100 - share], [100 - share, share]])
        pictures.confusion(matrix, ["a", "b"], "unused.png")
        axes = figure().axes[0]
        image = axes.images[0]
        for text in axes.texts:
            column, row = (round(x) for x in text.get_position())
            cell = luminance(image.cmap(image.norm(matrix[row, column] / 100)))
            ink = luminance((1, 1, 1) if text.get_color() == "white" else (0, 0, 0))
            high, low = max(cell, ink), min(cell, ink)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (share, text.get_color())


def luminance(color):
    parts = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in color[:3]]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("count", [1, 2, 5, 7, 13, 16])
def test_mistakes_plot_fills_its_grid_with_titled_images(count, figure):
    image = np.zeros((8, 8, 3), "uint8")
    shown = [(image, "West Highland white terrier", f"owl {i}", 0.9) for i in range(count)]
    pictures.mistakes(shown, count, 100, "unused.png")
    axes = figure().axes
    assert len(axes) == count and all(each.images for each in axes)
    titles = [each.get_title() for each in axes]
    assert all(title.startswith("predicted: West") for title in titles)
    assert [title.split("true: ")[1] for title in titles] == [f"owl {i}" for i in range(count)]
    rows = {round(each.get_position().y0, 3) for each in axes}
    for row in rows:  # each row is centered, also an incomplete last one
        inside = [a for a in axes if round(a.get_position().y0, 3) == row]
        middle = np.mean([[a.get_position().x0, a.get_position().x1] for a in inside])
        assert middle == pytest.approx(0.5, abs=0.02)
    boxes = [each.title.get_window_extent() for each in axes]
    for left, right in zip(boxes, boxes[1:], strict=False):
        if left.y0 != right.y0:
            continue
        assert left.x1 < right.x0  # titles do not overlap


def test_mistakes_plot_without_mistakes_is_a_sentence(figure):
    pictures.mistakes([], 0, 1234, "unused.png")
    assert not figure().axes
    assert texts(figure()) == ["None of 1,234 images is misclassified."]


def test_curves_show_every_epoch_and_label_every_line(figure):
    reports = [{"epoch": e, "loss": 3 / e, "learning_rate": 0.01 / e} for e in range(1, 9)]
    reports += [{"epoch": e, "accuracy": 0.1 * e, "ema_accuracy": 0.08 * e} for e in (0.5, 1, 4, 8)]
    pictures.curves(reports, "unused.png", target=0.7)
    loss, rate, accuracy = figure().axes  # no twin axes
    assert [axes.get_xlabel() for axes in (loss, rate, accuracy)] == ["epoch"] * 3
    for axes in (loss, rate, accuracy):
        for line in axes.lines[:2]:
            x, y = line.get_data()
            low, high = axes.get_ylim()
            assert min(y) >= low and max(y) <= high
            assert axes.get_xlim()[0] <= min(x) and axes.get_xlim()[1] >= max(x)
    labels = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert labels == [
        "weights: 80.0% after epoch 8",
        "moving average of weights: 64.0% after epoch 8",
        "target: 70%",
    ]


def test_names_in_any_script_are_drawn_or_escaped(tmp_path):
    """A warning of matplotlib about a missing glyph is an error here."""
    names = ["猫", "big dog", "птица", "\U0010fffd", "$1"]
    pictures.confusion(np.eye(5, k=1, dtype=int), names, tmp_path / "confusion.png")
    image = np.zeros((8, 8, 3), "uint8")
    pictures.mistakes([(image, *names[:2], 0.5)], 1, 1, tmp_path / "mistakes.png")
    assert figures.drawable("a\U0010fffd") == r"a\U0010fffd"
    assert figures.drawable("猫") in ("猫", r"\u732b")
    assert figures.drawable("$1, птица\n") == r"\$1, птица\n"


def test_long_names_are_shortened_in_the_middle():
    assert pictures.shortened("n02123045_tabby_cat_with_stripes", 12) == "n0212…tripes"
    assert pictures.shortened("West Highland white terrier", 16) == "West Hi…terrier"
    assert pictures.shortened("just as long", 12) == "just as long"


def test_find_learning_rate_plots_and_starts_no_run(tiny, tmp_path):
    values = {"batch_size": 8, "tensorboard": False, "deterministic": False}
    config = configuration.make(
        "digits", workdir=str(tmp_path), find_learning_rate=True, seed=1, **values
    )
    result = loop.train(config)
    assert 1e-7 < result["learning_rate"] < 1
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "learning_rate.png"}


def ramp(losses, tmp_path, *during):
    """Returns the rate that the finder suggests if the updates have these losses."""
    values = iter(losses)
    run = SimpleNamespace(
        config=configuration.make("digits", mixup=0.0, cutmix=0.0),
        size=(32, 32),
        groups=1,
        train_step=lambda *arguments: (next(values),),
        strategy=SimpleNamespace(distribute_datasets_from_function=lambda make: make(None)),
        workdir=tmp_path,
        chief=True,
    )
    found = find_rate.find_learning_rate(run, lambda epoch, step: range(7), *during)
    return found["learning_rate"]


def test_rate_finder_marks_its_phases(tmp_path):
    phases = []

    @contextlib.contextmanager
    def during(phase):
        phases.append(phase)
        yield

    ramp(np.linspace(3.0, 1.0, 100), tmp_path, during)
    assert phases.count("update") == 100 and phases[:4] == ["input", "input", "update", "input"]
    assert set(phases) == {"input", "update"}


def test_low_first_loss_does_not_mislead_the_rate_finder(tmp_path):
    """The loss falls from 2 to 1 around a rate of 0.01, and is 100 from 0.1 on."""
    rates = np.geomspace(1e-6, 10, 100)
    losses = np.where(rates < 0.1, 2 - np.exp(-(np.log10(rates / 0.01) ** 2)), 100.0)
    losses[:3] = 0.5
    named = ramp(losses, tmp_path)
    assert 1e-3 < named < 1e-2


def test_loss_that_never_falls_raises(tmp_path):
    with pytest.raises(ValueError, match="the loss never fell between"):
        ramp(np.linspace(1.0, 3.0, 100), tmp_path)
