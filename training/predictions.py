"""Predictions on the held-out images, and tables and pictures of them."""

import csv
import dataclasses
import io
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_tnt
from keras_tnt.files import write_atomically
from training import models, pictures
from training.sources import Streamed

TOP = 5
BINS = 15


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predictions for n images, in the order of the data set.

    Args:
        labels: Integers (n,).
        classes: Integers (n, top): the most probable classes, in descending order.
        probabilities: float32 (n, top): their probabilities.
        readable: Booleans (n,): whether the image was readable; if not, its prediction does not
            count.
        mistakes: The most confident errors: a list of (place, uint8 image), most confident first.
    """

    labels: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray
    readable: np.ndarray
    mistakes: list

    @property
    def right(self):
        """Correctness of the top-1 predictions, booleans (n,)."""
        return self.classes[:, 0] == self.labels


def predict(strategy, model, dataset, size, mistakes=24, tick=None):
    """Returns the predictions for the images of `data.evaluation_batches`.

    Every worker must call it, and receives the predictions for the images of all workers.

    Args:
        strategy: A `tf.distribute.Strategy`.
        model: The `keras.Model`, on pixels.
        dataset: A `tf.data.Dataset` of batches for one replica each, this worker's part.
        size: Number of images of all workers.
        mistakes: Number of the most confident errors whose images are included. Defaults to 24.
        tick: Function that is called after each batch. If `None`, none is.

    Returns:
        A `Predictions`.
    """
    logits_model = models.logits_model(model)

    def replica_step(batch):
        logits = keras.tree.flatten(logits_model(tf.cast(batch["image"], tf.float32)))
        probabilities = tf.nn.softmax(tf.cast(tf.add_n(logits) / len(logits), tf.float32))
        best = tf.math.top_k(probabilities, min(TOP, probabilities.shape[-1]))
        answers = batch["place"], batch["label"], best.indices, best.values, batch["weight"]
        return answers, batch["image"]

    @tf.function(autograph=False)
    def step(batch):
        answers, images = strategy.run(replica_step, args=(batch,))
        return [strategy.gather(each, axis=0) for each in answers], answers, images

    parts, worst = [], []
    for batch in strategy.distribute_datasets_from_function(lambda context: dataset):
        gathered, *local = step(batch)
        parts.append([each.numpy() for each in gathered])
        answers, images = ([on_host(strategy, x) for x in tf.nest.flatten(each)] for each in local)
        worst = surest_mistakes([*worst, *wrong(*answers, *images)], mistakes)
        if tick:
            tick()
    place, *answers = (np.concatenate(each) for each in zip(*parts, strict=True))
    order = np.argsort(place, kind="stable")[np.sum(place < 0) :]
    labels, classes, probabilities, weight = (each[order] for each in answers)
    assert len(order) == size
    worst = gather_mistakes(strategy, worst, mistakes, images[0].shape[1:])
    pictured = [(number, image) for _, number, image in worst]
    return Predictions(labels, classes, probabilities, weight > 0, pictured)


def on_host(strategy, value):
    """Returns this worker's rows of a per-replica value, concatenated."""
    return np.concatenate([x.numpy() for x in strategy.experimental_local_results(value)])


def wrong(place, labels, classes, probabilities, weight, images):
    """Returns the wrong predictions of a batch, a list of (probability, place, uint8 image).

    Args:
        place: Integers (batch,), positions in the data set.
        labels: Integers (batch,).
        classes: Integers (batch, top).
        probabilities: float32 (batch, top).
        weight: float32 (batch,), 0 for images that do not count.
        images: (batch, height, width, channels).
    """
    return [
        (float(probabilities[i, 0]), int(place[i]), images[i].astype("uint8"))
        for i in np.flatnonzero((classes[:, 0] != labels) & (weight > 0))
    ]


def surest_mistakes(mistakes, number):
    """Returns the `number` most confident of some errors, most confident first."""
    return sorted(mistakes, key=lambda each: (-each[0], each[1]))[:number]


def gather_mistakes(strategy, mistakes, number, shape):
    """Returns the most confident errors of all workers, in the form of `surest_mistakes`.

    Args:
        strategy: A `tf.distribute.Strategy`.
        mistakes: This worker's errors, from `surest_mistakes`.
        number: Maximum number of errors.
        shape: (height, width, channels) of an image.
    """
    none = (-1.0, -1, np.zeros(shape))
    devices = len(strategy.extended.worker_devices)  # of this worker

    def rows(context):
        first = context.replica_id_in_sync_group % devices == 0
        return [*(mistakes if first else ()), *[none] * number][:number]

    columns = []
    # Images are gathered as int32, because not every collective supports uint8.
    for i, kind in enumerate((np.float32, np.int64, np.int32)):
        local = strategy.experimental_distribute_values_from_function(
            lambda context, i=i, kind=kind: tf.constant(
                np.array([row[i] for row in rows(context)], kind)
            )
        )
        columns.append(strategy.gather(local, axis=0).numpy())
    gathered = [
        (probability, place, image.astype("uint8"))
        for probability, place, image in zip(*columns, strict=True)
        if place >= 0
    ]
    return surest_mistakes(gathered, number)


def image_names(source):
    """Returns the names of a source's images, in its order."""
    if isinstance(source, Streamed):
        names = source.stream(None, 0, 1).map(lambda name, *rest: name)
    else:
        names = tf.data.Dataset.range(source.size).map(lambda index: source.item(index)[0])
    return [name.decode(errors="replace") for name in names.as_numpy_iterator()]


def calibration_error(certainty, right):
    """Returns the expected calibration error (arXiv 1706.04599, equation 5).

    Args:
        certainty: (n,) in [0, 1], the probability of each prediction.
        right: Booleans (n,).

    Returns:
        Absolute difference between confidence and accuracy, averaged over bins of equal width that
        are weighted by their counts, in [0, 1].
    """
    bins = np.minimum((certainty * BINS).astype(int), BINS - 1)
    sums = np.bincount(bins, certainty - right, BINS)
    return float(np.abs(sums).sum() / max(len(certainty), 1))


def confusion_matrix(labels, classes, number):
    """Returns the confusion matrix: counts (number, number), rows the true classes.

    Args:
        labels: Integers (n,).
        classes: Predicted classes, integers (n,).
        number: Number of classes.
    """
    return np.bincount(labels * number + classes, minlength=number**2).reshape(number, number)


def write_report(predictions, source, model, directory):
    """Writes `predictions.csv`, `classes.csv`, `confusion.png` and `mistakes.png`.

    Args:
        predictions: A `Predictions`.
        source: The `Indexed` or `Streamed` source of the images.
        model: The model that made them. Its class names are used, else the source's, else numbers.
        directory: Directory to write to, created if it does not exist.

    Returns:
        (calibration error, dict from file name to path).
    """
    number = model.output_shape[-1]
    names = keras_tnt.class_names(model) or source.label_names or range(number)
    names = [str(name) for name in names]
    counted = predictions.readable
    labels, answers = predictions.labels[counted], predictions.classes[counted, 0]
    matrix = confusion_matrix(labels, answers, number)
    right = np.diag(matrix)
    images = image_names(source)
    files = {
        name: Path(directory) / name
        for name in ("predictions.csv", "classes.csv", "confusion.png", "mistakes.png")
    }
    rows = zip(
        images,
        predictions.labels,
        predictions.classes[:, 0],
        predictions.probabilities[:, 0],
        predictions.readable,
        strict=True,
    )
    write_table(
        files["predictions.csv"],
        ("image", "label", "prediction", "probability", "right"),
        (
            (image, names[label], names[answer], f"{probability:.6f}", int(label == answer))
            if readable
            else (image, names[label], "", "", "")
            for image, label, answer, probability, readable in rows
        ),
    )
    write_table(
        files["classes.csv"],
        ("class", "images", "accuracy"),
        (
            (name, total, f"{hits / total:.6f}" if total else "")
            for name, total, hits in zip(names, matrix.sum(axis=1), right, strict=True)
        ),
    )
    pictures.confusion(matrix, names, files["confusion.png"])
    shown = [
        (
            image,
            names[predictions.classes[place, 0]],
            names[predictions.labels[place]],
            predictions.probabilities[place, 0],
        )
        for place, image in predictions.mistakes
    ]
    pictures.mistakes(shown, int(len(labels) - right.sum()), len(labels), files["mistakes.png"])
    certainty = predictions.probabilities[counted, 0]
    error = calibration_error(certainty, predictions.right[counted])
    return error, {name: str(path) for name, path in files.items()}


def write_table(path, header, rows):
    """Writes a CSV file atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_atomically(path, text.getvalue())
