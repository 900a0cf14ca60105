"""Teacher models of any kind, wrapped as functions from a student's images to logits."""

import contextlib
import dataclasses
import warnings

import keras
from keras import ops

from keras_tnt.layers.base import at_least_float32
from keras_tnt.layers.grid import resampling_matrix, shape_of
from keras_tnt.layers.inputs_outputs import along_channels, scale_and_offset
from keras_tnt.models.anatomy import anatomy, is_ours
from keras_tnt.models.registry import IMAGENET_MEAN, IMAGENET_STD


@dataclasses.dataclass(frozen=True)
class Range:
    """Value range and channel order of the images that a model takes.

    Attributes:
        mean: mean of pixels in [0, 1], one value per channel, as RGB.
        std: standard deviation of pixels in [0, 1], one value per channel, as RGB.
        bgr: whether the channels are in the order blue, green, red. Defaults to `False`.
    """

    mean: tuple
    std: tuple
    bgr: bool = False


PIXELS = Range((0.0,) * 3, (1 / 255,) * 3)
# Names that `teacher_preprocessing` accepts: pixels in [0, 255] or [0, 1], the modes of
# `keras.applications`, and the student's images unchanged.
PREPROCESSING = {
    "pixels": PIXELS,
    "unit": Range((0.0,) * 3, (1.0,) * 3),
    "caffe": Range((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3, bgr=True),
    "tf": Range((0.5,) * 3, (0.5,) * 3),
    "torch": Range(IMAGENET_MEAN, IMAGENET_STD),
    "same": None,
}
# Layer names that identify the models of keras.applications without built-in preprocessing, also
# inside other models.
APPLICATIONS = {
    "torch": (
        {"conv2_block1_concat", "conv2_block1_0_bn"},  # DenseNet
    ),
    "caffe": (
        {"block1_conv1", "block1_conv2", "block1_pool"},  # VGG
        {"conv1_bn", "conv2_block1_1_conv", "conv2_block1_add"},  # ResNet
    ),
    "tf": (
        {"conv1_conv", "conv2_block1_preact_bn"},  # ResNetV2
        {"conv_dw_1", "conv_pw_1"},  # MobileNet
        {"Conv1", "expanded_conv_depthwise_BN"},  # MobileNetV2
        {"conv", "expanded_conv_depthwise_bn"},  # MobileNetV3, include_preprocessing=False
        {"block1_conv1", "block2_sepconv1"},  # Xception
        {"mixed0"},  # InceptionV3
        {"mixed_5b"},  # InceptionResNetV2
        {"stem_conv1", "stem_bn1"},  # NASNet
    ),
}
# Operations that `preprocess_input(inputs)` adds to a functional model.
ARITHMETIC = ("Add", "Subtract", "Multiply", "Divide", "TrueDivide")
# Einsum equations that resample rows and columns, by axis.
RESAMPLE = {
    "channels_last": {1: "ij,bjwc->biwc", 2: "ij,bhjc->bhic"},
    "channels_first": {2: "ij,bcjw->bciw", 3: "ij,bchj->bchi"},
}


class Teacher:
    """Function from the student's images to the teacher's logits, `(batch, classes)`.

    The teacher runs in inference mode, without gradients. It is not a layer, so that no model
    trains or saves its weights.

    Args:
        model: any Keras model with the student's classes.
        student: the model that learns from it.
        preprocessing: `teacher_preprocessing` of `keras_tnt.Distiller`.
        from_logits: `teacher_from_logits` of `keras_tnt.Distiller`.

    Raises:
        ValueError: if teacher and student do not match.
    """

    def __init__(self, model, student, preprocessing=None, from_logits=None):
        """Initializes the teacher; the class docstring lists the arguments."""
        if not isinstance(model, keras.Model):
            raise ValueError(f"`teacher` must be a Keras model. Received: {model!r}")
        outputs = getattr(model, "outputs", None)
        given, known = (tuple(x[0].shape) if x else None for x in (student.outputs, outputs))
        if known and known[-1] != given[-1]:
            raise ValueError(
                f"Student and teacher must know the same classes. Received: a student with outputs "
                f"{given}, a teacher with outputs {known}"
            )
        self.model = model
        self.preprocessing = preprocessing_of(preprocessing, student, model)
        self.resize = resizing(student, model)
        self.from_logits = from_logits
        self.network = model
        if outputs and list in map(type, (model.input_shape, model.output_shape)):
            # keras.Model(base.inputs, ...) expects a list, and would warn about a single tensor.
            self.network = keras.Model(model.inputs[0], outputs[0])
        last = last_layer(model)
        if from_logits is None and is_standalone_activation(last) and last in model.layers:
            self.network = keras.Model(model.inputs[0], last.input)
            self.from_logits = True
        elif from_logits is None and activation_of(last) is keras.activations.linear:
            self.from_logits = True

    def __call__(self, images):
        """Returns the logits `(batch, classes)` for a batch of the student's images."""
        images = self.preprocessing(self.resize(ops.cast(images, "float32")))
        with gradient_off():
            outputs = self.network(images, training=False)
        outputs = as_float32(ops.stop_gradient(outputs))
        if self.from_logits is None:
            return ops.where(are_probabilities(outputs), log(outputs), outputs)
        return outputs if self.from_logits else log(outputs)


def gradient_off():
    """Returns a context manager that turns off autograd on torch.

    Otherwise torch would record a graph that `stop_gradient` discards.
    """
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


# === Inputs ===


def preprocessing_of(given, student, teacher):
    """Returns the function from the student's images to the teacher's inputs.

    Args:
        given: `teacher_preprocessing` of `keras_tnt.Distiller`.
        student: the model whose images are given.
        teacher: the model whose inputs are computed.

    Raises:
        ValueError: for an unknown name.
    """
    if callable(given):
        return given
    if given is not None and given not in PREPROCESSING:
        raise ValueError(
            f"`teacher_preprocessing` must be a function or one of "
            f"{', '.join(map(repr, PREPROCESSING))}. Received: {given!r}"
        )
    if given == "same" or (given is None and len(image_shape(student)) != 4):
        return unchanged
    taken = image_range(student)
    if given is not None:
        return conversion(taken or PIXELS, PREPROCESSING[given], student)
    wanted = image_range(teacher)
    if taken is None or wanted is None:
        which = ("teacher", teacher) if wanted is None else ("student", student)
        warnings.warn(
            f"Cannot tell how the images of {which[0]} '{which[1].name}' are preprocessed: the "
            "teacher is given the student's images as they are. Pass `teacher_preprocessing=`: a "
            "function from the student's images to the teacher's, or one of "
            f"{', '.join(map(repr, PREPROCESSING))}; 'same' silences this warning.",
            stacklevel=4,
        )
        return unchanged
    return conversion(taken, wanted, student)


def unchanged(images):
    """Returns `images`; the identity."""
    return images


def conversion(taken, wanted, student):
    """Returns the function from images of one `Range` to images of another."""
    if taken == wanted:
        return unchanged
    layout = keras.config.image_data_format()
    axis = channels_axis()
    channels = image_shape(student)[axis]
    (scale, offset), (new_scale, new_offset) = (
        [along_channels(x, layout) for x in scale_and_offset(each.mean, each.std, channels)]
        for each in (taken, wanted)
    )
    # Converts back to RGB pixels in [0, 255], and from there to the teacher's inputs.
    factor = new_scale / scale
    shift = new_offset - offset * factor

    def convert(images):
        if taken.bgr:
            images = ops.flip(images, axis)
        images = images * ops.cast(factor, images.dtype) + ops.cast(shift, images.dtype)
        return ops.flip(images, axis) if wanted.bgr else images

    return convert


def image_range(model):
    """Returns the `Range` of a model's images, or `None` if it is unknown."""
    if is_ours(model):
        image = anatomy(model).image
        return PIXELS if image.normalizes else Range(image.mean, image.std)
    first = first_operations(model)[0]
    if any(is_preprocessing(operation) for operation in first):
        return PIXELS
    names = {layer.name for layer in model._flatten_layers()}
    for kind, fingerprints in APPLICATIONS.items():
        if any(fingerprint <= names for fingerprint in fingerprints):
            return PREPROCESSING[kind]
    if any(name.endswith("_stage_0_block_0_layer_scale") for name in names):
        return PREPROCESSING["torch"]  # ConvNeXt with include_preprocessing=False
    return None


def first_operations(model):
    """Returns the operations between a model's input and its first weights, in nested models too.

    Returns:
        `(operations, reached)`: `reached` is whether weights follow the operations.
    """
    found = []
    for operation in getattr(model, "operations", None) or model.layers:
        if isinstance(operation, keras.Model):
            inner, reached = first_operations(operation)
            found += inner
            if reached:
                return found, True
        elif getattr(operation, "weights", ()) and not isinstance(
            operation, keras.layers.Normalization
        ):
            return found, True
        else:
            found.append(operation)
    return found, False


def is_preprocessing(operation):
    """Returns whether an operation before the first weights changes the values of pixels."""
    if isinstance(operation, keras.layers.Normalization):
        # For images in [0, 1], the mean is at most 1, and their scaling is unknown.
        mean = getattr(operation, "mean", None)
        return mean is not None and float(ops.max(ops.abs(mean))) > 1
    if isinstance(operation, keras.layers.Layer):
        return isinstance(operation, (keras.layers.Rescaling, keras.layers.Lambda))
    return type(operation).__name__ in ARITHMETIC


def resizing(student, teacher):
    """Returns the function that resamples the student's images to the teacher's input size.

    Raises:
        ValueError: if the numbers of channels differ.
    """
    if not getattr(teacher, "inputs", None):
        return lambda images: images
    given, wanted = image_shape(student), image_shape(teacher)
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


def image_shape(model):
    """Returns the shape of a batch of a model's images, also if its input is a list of one."""
    return tuple(model.inputs[0].shape)


def channels_axis():
    """Returns the channels axis of a batch of images, by Keras's image data format."""
    return 1 if keras.config.image_data_format() == "channels_first" else 3


# === Outputs ===


def last_layer(model):
    """Returns the layer or operation that computes a model's output, within nested models too."""
    while isinstance(model, keras.Model) and getattr(model, "outputs", None):
        model = getattr(model, "operations", model.layers)[-1]
    return model


def activation_of(layer):
    """Returns the activation function of a layer, or `None` if it is unknown."""
    if isinstance(layer, keras.layers.Softmax):
        return keras.activations.softmax
    return getattr(layer, "activation", None)


def is_standalone_activation(layer):
    """Returns whether a layer is an `Activation` or `Softmax` layer."""
    return isinstance(layer, (keras.layers.Activation, keras.layers.Softmax))


def are_probabilities(outputs):
    """Returns whether every row is non-negative and sums to one, within float16's precision."""
    sums = ops.sum(outputs, axis=-1)
    return ops.all(outputs >= 0) & ops.all(ops.abs(sums - 1) < 1e-2)


def log(probabilities):
    """Returns logits whose softmax is `probabilities`: their logarithm, finite for 0."""
    return ops.log(ops.maximum(as_float32(probabilities), 1e-37))


def as_float32(x):
    """Casts `x` to float32, unless it is float64."""
    return ops.cast(x, at_least_float32(keras.backend.standardize_dtype(x.dtype)))
