"""Knowledge distillation: losses, metrics, teachers, saving and errors."""

import json

import keras
import numpy as np
import pytest
from keras import ops

import keras_tnt
from keras_tnt.distillation import DistillationLoss
from tests.helpers import golden

pytestmark = pytest.mark.filterwarnings("ignore:Cannot tell how the images of")

TINY = {
    "patch_size": 8,
    "inner_stride": 2,
    "depth": 1,
    "outer_dim": 12,
    "inner_dim": 8,
    "outer_heads": 3,
    "inner_heads": 2,
    "classes": 5,
}
LABELS = np.arange(8) % 5
# JAX compiles every eager operation.
QUICKER_EAGERLY = keras.backend.backend() != "jax"


def tnt(**arguments):
    return keras_tnt.TNT(**{"input_shape": (16, 16, 3), **TINY, **arguments})


def dense(activation="softmax", size=(16, 16, 3), classes=5, **arguments):
    inputs = keras.Input(size)
    x = keras.layers.Flatten()(inputs)
    return keras.Model(inputs, keras.layers.Dense(classes, activation, **arguments)(x))


def pixels(*shape):
    return np.random.default_rng(0).uniform(0, 255, shape).astype("float32")


def distil(student, teacher, loss="crossentropy", images=None, **arguments):
    """Returns a distiller and its metrics on 8 images."""
    distiller = keras_tnt.Distiller(student, teacher, **arguments)
    distiller.compile("sgd", loss, metrics=["accuracy"], run_eagerly=QUICKER_EAGERLY)
    images = pixels(8, *student.input_shape[1:]) if images is None else images
    return distiller, distiller.evaluate(images, LABELS, verbose=0, return_dict=True)


class Subclassed(keras.Model):
    """A subclassed model, without a graph of layers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, images, training=False):
        assert not training
        return self.model(images)


# === Losses ===


def given_logits():
    """Returns a student and a teacher that take their logits from the input."""
    inputs = keras.Input((30,))
    head = keras.layers.Activation("linear", name="head")(inputs[:, :10])
    distillation = keras.layers.Activation("linear", name="head_distillation")(inputs[:, 10:20])
    logits = keras.layers.Average()([head, distillation])
    student = keras.Model(inputs, keras.layers.Activation("softmax", name="predictions")(logits))
    teacher = keras.layers.Activation("linear")(inputs[:, 20:])
    return student, keras.Model(inputs, teacher)


def test_losses_match_the_reference():
    arrays, metadata = golden.read("distillation_loss")
    names = ("class_logits", "distillation_logits", "teacher_logits")
    inputs = np.concatenate([arrays[name] for name in names], axis=1)
    expected = json.loads(metadata["expected"])
    assert len(expected) == 5
    for case, value in expected.items():
        kind, alpha, temperature = case.split("_")
        alpha, temperature = float(alpha.removeprefix("alpha")), float(temperature[3:])
        distiller = keras_tnt.Distiller(
            *given_logits(),
            kind="hard" if kind == "none" else kind,
            alpha=0 if kind == "none" else alpha,
            temperature=temperature,
        )
        distiller.compile(loss=keras.losses.CategoricalCrossentropy(from_logits=True))
        loss = distiller.evaluate(inputs, arrays["soft_labels"], verbose=0, return_dict=True)
        np.testing.assert_allclose(loss["loss"], value, rtol=1e-6, err_msg=case)


def test_batchmean_is_the_kl_divergence():
    teacher, student = np.random.default_rng(0).normal(size=(2, 6, 10)).astype("float32")
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum(-1, keepdims=True) for x in (teacher, student))
    divergence = 4 * np.mean(np.sum(p * np.log(p / q), axis=-1))
    textbook = DistillationLoss("soft", 2.0, kl_reduction="batchmean")(teacher, student)
    released = DistillationLoss("soft", 2.0)(teacher, student)
    np.testing.assert_allclose(float(textbook), divergence, rtol=1e-5)
    np.testing.assert_allclose(float(released), divergence / 10, rtol=1e-5)


def test_temperature_defaults_to_1():
    assert DistillationLoss().get_config()["temperature"] == 1.0


def test_loss_config_round_trip():
    loss = DistillationLoss("soft", 3.0, kl_reduction="batchmean")
    serialized = json.loads(json.dumps(keras.saving.serialize_keras_object(loss)))
    copy = keras.saving.deserialize_keras_object(serialized)
    assert copy.get_config() == loss.get_config()


def test_loss_is_the_weighted_sum_of_its_parts():
    _, logs = distil(tnt(distilled=True), dense(), kind="soft", alpha=0.3)
    expected = 0.7 * logs["class_loss"] + 0.3 * logs["distillation_loss"]
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)


def test_regularization_loss_is_not_weighted():
    student = dense(kernel_regularizer=keras.regularizers.L2(1.0))
    penalty = float(ops.convert_to_numpy(student.losses[0]))
    _, logs = distil(student, dense(), alpha=0.3)
    expected = 0.7 * logs["class_loss"] + 0.3 * logs["distillation_loss"] + penalty
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        "crossentropy",
        "sparse_categorical_crossentropy",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    ],
)
def test_base_loss_is_computed_from_the_class_head(loss):
    student = tnt(distilled=True)
    distiller, logs = distil(student, dense(), loss, alpha=0)
    logits = ops.convert_to_numpy(distiller(pixels(8, 16, 16, 3))["head"])
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -log_softmax[np.arange(8), LABELS].mean()
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-4)


def test_default_loss_supports_a_student_without_activation():
    student = tnt(classifier_activation=None)
    _, logs = distil(student, dense(), alpha=0)
    expected = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(
        LABELS, student(pixels(8, 16, 16, 3))
    )
    np.testing.assert_allclose(logs["loss"], ops.convert_to_numpy(expected), rtol=1e-4)


def test_other_losses_use_the_output_of_the_student():
    student = tnt(classifier_activation=None)
    images = pixels(8, 16, 16, 3)
    distiller = keras_tnt.Distiller(student, dense(), alpha=0)
    distiller.compile("sgd", "mean_squared_error", run_eagerly=QUICKER_EAGERLY)
    wanted = np.eye(5, dtype="float32")[LABELS]
    logs = distiller.evaluate(images, wanted, verbose=0, return_dict=True)
    expected = np.mean((ops.convert_to_numpy(student(images)) - wanted) ** 2)
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-4)


def test_alpha_1_uses_only_the_teacher():
    _, logs = distil(dense(), dense(), alpha=1)
    np.testing.assert_allclose(logs["loss"], logs["distillation_loss"], rtol=1e-6)


def test_call_applies_no_dropout():
    student = tnt(dropout=0.5)
    images = pixels(2, 16, 16, 3)
    found = keras_tnt.Distiller(student, dense())(images)["predictions"]
    golden.assert_close(found, student(images, training=False))


def test_sample_weights_apply_to_both_losses():
    student, teacher = tnt(distilled=True), dense()
    images = pixels(8, 16, 16, 3)
    distiller, _ = distil(student, teacher)

    def losses(rows, weights=None):
        logs = distiller.evaluate(
            images[rows], LABELS[rows], sample_weight=weights, verbose=0, return_dict=True
        )
        return np.array([logs[key] for key in ("class_loss", "distillation_loss", "loss")])

    first = slice(0, 4)
    weights = np.array([2.0] * 4 + [0.0] * 4)
    np.testing.assert_allclose(losses(slice(None), weights), losses(first), rtol=1e-5)


def test_sample_weights_apply_to_agreement_and_accuracies():
    student, teacher = tnt(distilled=True), dense()
    images = pixels(8, 16, 16, 3)
    distiller, _ = distil(student, teacher)
    outputs = distiller(images)
    classes = {key: np.argmax(ops.convert_to_numpy(x), -1) for key, x in outputs.items()}
    taught = np.argmax(ops.convert_to_numpy(teacher(images)), -1)
    weights = np.where(classes["head_distillation"] == taught, 3.0, 0.5) * np.linspace(1, 2, 8)
    labels = np.where(np.arange(8) < 4, classes["head"], (classes["head"] + 1) % 5)
    logs = distiller.evaluate(images, labels, sample_weight=weights, verbose=0, return_dict=True)
    for name, right in (
        ("teacher_agreement", classes["head_distillation"] == taught),
        ("head_accuracy", classes["head"] == labels),
        ("head_distillation_accuracy", classes["head_distillation"] == labels),
    ):
        assert logs[name] == pytest.approx(np.average(right, weights=weights), rel=1e-5), name


# === Training ===


@pytest.mark.slow
def test_fit_trains_all_student_weights_and_no_teacher_weight():
    # BatchNormalization and Dropout in the teacher reveal if it runs in training mode.
    inputs = keras.Input((24, 24, 3))
    x = keras.layers.BatchNormalization()(inputs)
    x = keras.layers.Dropout(0.9)(keras.layers.Flatten()(x))
    teacher = keras.Model(inputs, keras.layers.Dense(5, "softmax")(x))
    student = tnt(distilled=True)
    images = pixels(8, 16, 16, 3)
    before = [np.array(w) for w in student.get_weights()]
    teacher_before = [np.array(w) for w in teacher.get_weights()]

    distiller = keras_tnt.Distiller(student, teacher, kind="soft")
    distiller.compile(keras.optimizers.Adam(1e-2), metrics=["accuracy"])
    assert len(distiller.trainable_variables) == len(student.trainable_variables)
    history = distiller.fit(
        images, LABELS, epochs=3, batch_size=4, validation_data=(images, LABELS), verbose=0
    ).history

    for variable, old in zip(student.weights, before, strict=True):
        assert not np.array_equal(variable.numpy(), old), variable.path
    for variable, old in zip(teacher.weights, teacher_before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), old, err_msg=variable.path)
    assert teacher.trainable
    assert history["class_loss"][-1] < history["class_loss"][0]
    heads = {"accuracy", "head_accuracy", "head_distillation_accuracy", "teacher_agreement"}
    assert heads | {f"val_{name}" for name in heads} <= set(history)


def test_student_follows_the_teacher_not_the_labels():
    distiller = keras_tnt.Distiller(dense(), dense(), alpha=1.0)
    distiller.compile(keras.optimizers.Adam(1e-2))
    images = pixels(8, 16, 16, 3) / 255
    distiller.fit(images, LABELS, epochs=50, verbose=0)
    logs = distiller.evaluate(images, LABELS, verbose=0, return_dict=True)
    assert logs["teacher_agreement"] == 1.0
    assert logs["head_accuracy"] < 1.0


def test_metrics_are_computed_per_head():
    student, teacher = tnt(distilled=True), dense()
    distiller, logs = distil(student, teacher)
    outputs = distiller(pixels(8, 16, 16, 3))
    classes = {key: np.argmax(ops.convert_to_numpy(x), -1) for key, x in outputs.items()}
    taught = np.argmax(ops.convert_to_numpy(teacher(pixels(8, 16, 16, 3))), -1)
    assert logs["accuracy"] == np.mean(classes["predictions"] == LABELS)
    assert logs["head_accuracy"] == np.mean(classes["head"] == LABELS)
    assert logs["head_distillation_accuracy"] == np.mean(classes["head_distillation"] == LABELS)
    assert logs["teacher_agreement"] == np.mean(classes["head_distillation"] == taught)


def test_single_head_learns_from_labels_and_teacher():
    student, teacher = tnt(), dense()
    images = pixels(8, 16, 16, 3) / 255
    _, logs = distil(student, teacher, images=images, kind="soft", temperature=2.0)
    logits = [np.log(ops.convert_to_numpy(model(images))) for model in (teacher, student)]
    expected = DistillationLoss("soft", 2.0)(*logits)
    np.testing.assert_allclose(logs["distillation_loss"], ops.convert_to_numpy(expected), rtol=1e-3)
    assert "head_distillation_accuracy" not in logs


def test_soft_labels_are_supported():
    distiller = keras_tnt.Distiller(tnt(distilled=True), dense())
    distiller.compile("sgd", "categorical_crossentropy", run_eagerly=QUICKER_EAGERLY)
    images, labels = pixels(8, 16, 16, 3), np.eye(5, dtype="float32")[LABELS]
    soft = distiller.evaluate(images, 0.9 * labels + 0.02, verbose=0, return_dict=True)
    hard = distiller.evaluate(images, labels, verbose=0, return_dict=True)
    assert soft["class_loss"] != hard["class_loss"]
    assert soft["head_accuracy"] == hard["head_accuracy"]


def test_mixed_float16_student_trains():
    keras.config.set_dtype_policy("mixed_float16")
    distiller, _ = distil(tnt(distilled=True), dense(), kind="soft")
    logs = distiller.fit(pixels(8, 16, 16, 3), LABELS, verbose=0).history
    assert np.isfinite(logs["loss"][0])


# === Teachers ===


@pytest.mark.slow
def test_teachers_with_any_output_activation_agree():
    softmax = dense()
    weights = softmax.get_weights()
    linear = dense(activation=None)
    linear.set_weights(weights)
    activation = keras.Model(linear.inputs, keras.layers.Activation("softmax")(linear.outputs[0]))
    operation = keras.Model(linear.inputs, ops.softmax(linear.outputs[0]))
    teachers = [
        softmax,
        linear,
        activation,
        operation,
        keras.Sequential([linear, keras.layers.Softmax()]),
        keras.Sequential([softmax]),
        Subclassed(softmax),
        Subclassed(linear),
    ]
    student = tnt()
    # Small pixel values keep the teacher's probabilities away from 0 and 1.
    images = pixels(8, 16, 16, 3) / 255
    losses = [
        distil(student, teacher, images=images, kind="soft")[1]["distillation_loss"]
        for teacher in teachers
    ]
    assert losses[0] > 1e-3
    np.testing.assert_allclose(losses, losses[0], rtol=1e-3)


def test_teacher_from_logits_can_be_set():
    linear = dense(activation=None)
    images = pixels(2, 16, 16, 3)
    read = keras_tnt.Distiller(tnt(), linear).teacher(images)
    said = keras_tnt.Distiller(tnt(), Subclassed(linear), teacher_from_logits=True).teacher(images)
    np.testing.assert_allclose(ops.convert_to_numpy(read), ops.convert_to_numpy(said), rtol=1e-5)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_images_are_resized_for_the_teacher(data_format):
    keras.config.set_image_data_format(data_format)

    def shape(height, width):
        return (3, height, width) if data_format == "channels_first" else (height, width, 3)

    # A linear ramp stays linear when it is resampled, except near the edges.
    ramp = np.arange(16, dtype="float32")[:, None, None] + 10 * np.arange(24)[None, :, None]
    images = np.broadcast_to(ramp, (1, 16, 24, 3))
    if data_format == "channels_first":
        images = np.moveaxis(images, -1, 1)
    distiller = keras_tnt.Distiller(
        tnt(input_shape=shape(16, 24)), dense(None, shape(8, 48)), teacher_preprocessing=lambda x: x
    )
    resized = ops.convert_to_numpy(distiller.teacher.resize(ops.cast(images, "float32")))
    assert resized.shape == (1, *shape(8, 48))
    channel = resized[0, 0] if data_format == "channels_first" else resized[0, ..., 0]
    expected = (2 * np.arange(8) + 0.5)[:, None] + 10 * (np.arange(48) / 2 - 0.25)[None, :]
    np.testing.assert_allclose(channel[2:-2, 4:-4], expected[2:-2, 4:-4], atol=0.02)


@pytest.mark.parametrize("student_takes_pixels", [True, False])
@pytest.mark.parametrize("teacher_takes_pixels", [True, False])
@pytest.mark.parametrize("channels", [3, 1])
def test_images_are_converted_to_the_teacher_preprocessing(
    student_takes_pixels, teacher_takes_pixels, channels
):
    shape = (16, 16, channels)
    student = tnt(input_shape=shape, include_preprocessing=student_takes_pixels)
    teacher = keras_tnt.DeiT(
        input_shape=shape,
        patch_size=8,
        embed_dim=12,
        depth=1,
        num_heads=3,
        classes=5,
        classifier_activation=None,
        include_preprocessing=teacher_takes_pixels,
    )
    with_preprocessing = keras_tnt.DeiT(
        input_shape=shape,
        patch_size=8,
        embed_dim=12,
        depth=1,
        num_heads=3,
        classes=5,
        classifier_activation=None,
    )
    with_preprocessing.set_weights(teacher.get_weights())
    images = pixels(2, *shape)
    given = images if student_takes_pixels else images / 127.5 - 1
    logits = keras_tnt.Distiller(student, teacher).teacher(given)
    golden.assert_close(logits, with_preprocessing(images))


def test_teacher_preprocessing_can_be_a_function():
    teacher = dense(None)
    images = pixels(2, 16, 16, 3)
    distiller = keras_tnt.Distiller(tnt(), teacher, teacher_preprocessing=lambda x: x / 255 - 0.5)
    golden.assert_close(distiller.teacher(images), teacher(images / 255 - 0.5))


def test_uint8_images_are_supported():
    images = pixels(2, 16, 16, 3).astype("uint8")
    teacher = keras_tnt.Distiller(tnt(), dense(None, (24, 24, 3))).teacher
    golden.assert_close(teacher(images), teacher(images.astype("float32")))


# === Files ===


def test_only_the_student_is_saved(tmp_path):
    student, teacher = tnt(distilled=True), dense()
    distiller, _ = distil(student, teacher)
    checkpoint = keras.callbacks.ModelCheckpoint(str(tmp_path / "best.keras"), verbose=0)
    images = pixels(8, 16, 16, 3)
    distiller.fit(images, LABELS, verbose=0, callbacks=[checkpoint])
    expected = student(images)

    distiller.save(tmp_path / "saved.keras")
    for path in ("saved.keras", "best.keras"):
        loaded = keras.models.load_model(tmp_path / path)
        assert loaded.name == student.name
        golden.assert_close(loaded(images), expected)
    golden.assert_close(distiller.predict(images, verbose=0), expected)


def test_distiller_weights_exclude_the_teacher(tmp_path):
    path = str(tmp_path / "distiller.weights.h5")
    distiller = keras_tnt.Distiller(tnt(distilled=True), dense())
    distiller.save_weights(path)
    other = keras_tnt.Distiller(tnt(distilled=True), dense())
    kept = [np.array(w) for w in other.teacher.model.get_weights()]
    other.load_weights(path)
    images = pixels(8, 16, 16, 3)
    golden.assert_close(other.student(images), distiller.student(images))
    for old, new in zip(kept, other.teacher.model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


# === Errors ===


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kind": "firm"}, "`kind` must be one of 'hard', 'soft'. Received: 'firm'"),
        ({"alpha": 1.5}, r"`alpha` must lie in \[0, 1\]"),
        ({"alpha": -0.5}, r"`alpha` must lie in \[0, 1\]"),
        ({"temperature": 0}, "`temperature` must be positive"),
        ({"kl_reduction": "sum"}, "`kl_reduction` must be one of"),
        ({"teacher": dense(classes=4)}, "must know the same classes"),
        ({"teacher": dense(size=(16, 16, 1))}, "images of as many channels"),
        ({"teacher": "deit"}, "`teacher` must be a Keras model"),
        ({"student": "wrapped"}, "Distill that model itself"),
        ({"student": "sigmoid"}, "gives logits or probabilities"),
        ({"student": "subclassed"}, "must be a functional or Sequential model"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    students = {
        "wrapped": lambda: keras.Sequential([keras.Input((16, 16, 3)), tnt(distilled=True)]),
        "sigmoid": lambda: dense("sigmoid"),
        "subclassed": lambda: Subclassed(dense()),
    }
    arguments = {"teacher": dense(), **arguments}
    student = students.get(arguments.pop("student", None), tnt)()
    with pytest.raises(ValueError, match=message):
        keras_tnt.Distiller(student, **arguments)
