"""A teacher of any make, as a function from a student's images to logits."""

import contextlib

import keras
from keras import ops

from keras_tnt.anatomy import anatomy, is_ours
from keras_tnt.layers.base import at_least_float32
from keras_tnt.layers.ends import along_channels, scale_and_offset
from keras_tnt.layers.grid import resampling_matrix, shape_of

# What models take: images with this mean and deviation taken off, of pixels in [0, 1].
PIXELS = ((0.0,) * 3, (1 / 255,) * 3)
# The matrix products that resample rows and columns, by axis.
RESAMPLE = {
    "channels_last": {1: "ij,bjwc->biwc", 2: "ij,bhjc->bhic"},
    "channels_first": {2: "ij,bcjw->bciw", 3: "ij,bchj->bchi"},
}


class Teacher:
    """The teacher as a function from the student's images to logits, `(batch, classes)`.

    In inference mode and without gradient. Not a layer, so that no model trains or saves its
    weights.

    Args:
        model: any Keras model with the student's classes.
        student: the model that will learn from it.
        preprocessing, from_logits: `keras_tnt.Distiller`'s `teacher_preprocessing` and
            `teacher_from_logits`.

    Raises:
        ValueError: if teacher and student do not fit each other.
    """

    def __init__(self, model, student, preprocessing=None, from_logits=None):
        if not isinstance(model, keras.Model):
            raise ValueError(f"`teacher` must be a Keras model. Received: {model!r}")
        classes = student.output_shape[-1]
        if getattr(model, "outputs", None) and model.output_shape[-1] != classes:
            raise ValueError(
                f"Student and teacher must know the same classes. Received: a student with outputs "
                f"{student.output_shape}, a teacher with outputs {model.output_shape}"
            )
        self.model = model
        self.preprocessing = preprocessing or conversion(student, model)
        self.resize = resizing(student, model)
        self.from_logits = from_logits
        self.network = model
        last = last_layer(model)
        if from_logits is None and is_standalone_activation(last) and last in model.layers:
            self.network = keras.Model(model.inputs[0], last.input)
            self.from_logits = True
        elif from_logits is None and activation_of(last) is keras.activations.linear:
            self.from_logits = True

    def __call__(self, images):
        images = self.preprocessing(self.resize(ops.cast(images, "float32")))
        with gradient_off():
            outputs = self.network(images, training=False)
        outputs = as_float32(ops.stop_gradient(outputs))
        if self.from_logits is None:
            return ops.where(are_probabilities(outputs), log(outputs), outputs)
        return outputs if self.from_logits else log(outputs)


def gradient_off():
    """Keeps torch from recording what `stop_gradient` would only throw away later."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


# === What a model takes ===


def conversion(student, teacher):
    """The function from the images that the student takes to those that the teacher takes."""
    given, wanted = normalisation(student), normalisation(teacher)
    if given is None or wanted is None or given == wanted:
        return lambda images: images
    layout = keras.config.image_data_format()
    channels = student.input_shape[channels_axis()]
    (scale, offset), (new_scale, new_offset) = (
        [along_channels(x, layout) for x in scale_and_offset(*taken, channels)]
        for taken in (given, wanted)
    )
    # Back to pixels in [0, 255], and from there to what the teacher takes.
    factor = new_scale / scale
    shift = new_offset - offset * factor

    def convert(images):
        return images * ops.cast(factor, images.dtype) + ops.cast(shift, images.dtype)

    return convert


def normalisation(model):
    """(mean, std) by which a model's input is pixels in [0, 1] normalised; None: unknown."""
    if is_ours(model):
        image = anatomy(model).image
        return PIXELS if image.normalises else (image.mean, image.std)
    if any(isinstance(layer, keras.layers.Rescaling) for layer in model._flatten_layers()):
        return PIXELS
    return None


def resizing(student, teacher):
    """The function that resamples the student's images to the teacher's input size."""
    if not getattr(teacher, "inputs", None):
        return lambda images: images
    given, wanted = student.input_shape, teacher.input_shape
    if given == wanted:
        return lambda images: images
    channels = channels_axis()
    if len(given) != 4 or len(wanted) != 4 or wanted[channels] not in (None, given[channels]):
        raise ValueError(
            "Student and teacher must take images of as many channels. Received: a student for "
            f"{given}, a teacher for {wanted}."
        )
    products = []
    for axis, equation in RESAMPLE[keras.config.image_data_format()].items():
        if wanted[axis] not in (None, given[axis]):
            products.append((axis, equation, wanted[axis]))

    def resize(images):
        for axis, equation, side in products:
            matrix = resampling_matrix(shape_of(images)[axis], side)
            images = ops.einsum(equation, ops.cast(matrix, images.dtype), images)
        return images

    return resize


def channels_axis():
    return 1 if keras.config.image_data_format() == "channels_first" else 3


# === What a model gives ===


def last_layer(model):
    """The layer or operation that makes a model's output, within nested models too."""
    while isinstance(model, keras.Model) and getattr(model, "outputs", None):
        model = getattr(model, "operations", model.layers)[-1]
    return model


def activation_of(layer):
    """The function that a layer ends in; None: unknown."""
    if isinstance(layer, keras.layers.Softmax):
        return keras.activations.softmax
    return getattr(layer, "activation", None)


def is_standalone_activation(layer):
    return isinstance(layer, (keras.layers.Activation, keras.layers.Softmax))


def are_probabilities(outputs):
    """Whether every row is non-negative and sums to one, to what float16 allows."""
    sums = ops.sum(outputs, axis=-1)
    return ops.all(outputs >= 0) & ops.all(ops.abs(sums - 1) < 1e-2)


def log(probabilities):
    """Logits whose softmax are these: their logarithm, finite for 0."""
    return ops.log(ops.maximum(as_float32(probabilities), 1e-37))


def as_float32(x):
    return ops.cast(x, at_least_float32(keras.backend.standardize_dtype(x.dtype)))
