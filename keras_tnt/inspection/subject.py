"""Classifier to explain, with its logits, classes and patch grids."""

import difflib
import functools
import math

import keras
import numpy as np

from keras_tnt.inspection.links import gate_gradient_of, gradient_of, sum_of_targets
from keras_tnt.inspection.maps import check_images
from keras_tnt.layers import WordsToPatches
from keras_tnt.models.anatomy import anatomy, class_names

MOST_NAMED = 3


class Subject:
    """Classifier to explain, and the images that it receives.

    Args:
        model: a classifier of this package, or one built on such a model.
        images: images as the model takes them.

    Attributes:
        found: the model's `Anatomy`.
        logits: model from images to the mean of the heads' logits, `(batch, classes)`.
        activation: activation of the logits: `"softmax"`, `"sigmoid"`, `"linear"` or the name of
            another function of `keras.activations`.
        sides: (height, width) of the images in pixels.
        grids: list of (rows, columns) of the patches of each stage.
        word_side: number of words along a side of a patch; 0 if the model has no words.
        patch_embedding: the layer that embeds words as the first patches, or `None`.

    Raises:
        ValueError: if there is no class to explain, or the images do not match the model.
    """

    def __init__(self, model, images):
        """Checks the model and the images, and builds the model of the logits."""
        self.model, self.found = model, anatomy(model)
        heads = self.found.heads
        if not heads:
            raise ValueError(f"Model '{model.name}' has no head, and so no class to explain.")
        if heads[0] not in model.layers:
            inside = self.found.model.name
            raise ValueError(f"Model '{model.name}' wraps a classifier. Pass its layer '{inside}'.")
        check_images(model, images)
        outputs = [logits_of(head) for head in heads]
        mean = keras.layers.Average()(outputs) if len(outputs) > 1 else outputs[0]
        self.logits = keras.Model(model.inputs[0], mean)

        self.activate = self.found.predictions or heads[0].activation
        self.activation = activation_name(self.activate)
        self.channels_first = self.found.image.data_format == "channels_first"
        shape = np.shape(images)
        self.sides = tuple(shape[2:] if self.channels_first else shape[1:3])
        self.grids = [tuple(side // self.found.patch_size for side in self.sides)]
        for _ in self.found.stages[1:]:
            self.grids.append(tuple(-(-side // 2) for side in self.grids[-1]))
        self.word_side = 0
        for block in self.found.blocks:
            if block.inner is not None:
                self.word_side = math.isqrt(keras.tree.flatten(block.layer.input)[1].shape[-2])
        layers = self.found.model.layers
        self.patch_embedding = next((x for x in layers if isinstance(x, WordsToPatches)), None)

    @functools.cached_property
    def gate_gradient(self):
        """Returns the function of `gate_gradient_of` for the logits."""
        return gate_gradient_of(self.logits)

    @functools.cached_property
    def pixel_gradient(self):
        """Returns a function (images, chosen) to the gradient of target logits by the images."""

        def target_logits(images, chosen):
            return sum_of_targets(self.logits(images, training=False), chosen)

        return gradient_of(target_logits, self.logits.variables)

    def chosen(self, classes):
        """Returns the one-hot rows of class indices, (batch, classes)."""
        return np.eye(self.logits.output_shape[-1], dtype="float32")[classes]

    def predict(self, images):
        """Returns the mean of the heads' logits, as an array (batch, classes)."""
        return keras.ops.convert_to_numpy(self.logits(images, training=False))

    def check_finite(self, logits, names=None):
        """Raises a `ValueError` if the logits of an image are not finite.

        Args:
            logits: `(batch, classes)`.
            names: a name for each image. If `None`, images are numbered from 1.
        """
        finite = np.isfinite(np.asarray(logits, "float32")).all(axis=-1)
        if finite.all():
            return
        i = int(np.argmin(finite))
        name = f"image {i + 1} of {len(finite)}" if names is None else names[i]
        raise ValueError(
            f"Model '{self.model.name}' returns logits that are not finite (NaN or infinity) for "
            f"{name}, which cannot be explained. {cause_of_nonfinite(self.model)}"
        )

    def probabilities(self, logits):
        """Returns the model's own activation of logits, (batch, classes)."""
        logits = keras.ops.convert_to_tensor(np.asarray(logits, "float32"))
        return keras.ops.convert_to_numpy(self.activate(logits)).astype("float32")

    def class_indices(self, targets, count):
        """Returns the class index of each image, as an array.

        Args:
            targets: indices or names of classes, one per image or one for all.
            count: number of images.
        """
        if isinstance(targets, str) or np.ndim(targets) == 0:
            targets = [targets] * count
        if len(targets) != count:
            raise ValueError(
                f"`targets` are one class for each of {count} images. Received: {len(targets)}"
            )
        return np.array([self.class_index(target) for target in targets])

    def class_index(self, target):
        """Returns the index of a class, given by index or name."""
        classes = self.logits.output_shape[-1]
        if not isinstance(target, str):
            if not 0 <= target < classes:
                raise ValueError(f"There is no class {target}: they are 0 to {classes - 1}.")
            return int(target)
        names = class_names(self.model) or []
        if target not in names:
            near = difflib.get_close_matches(target, names)
            told = f"The nearest are {', '.join(near)}" if near else f"Or give 0 to {classes - 1}"
            raise ValueError(f"There is no class {target!r}. {told}.")
        return names.index(target)

    def baseline(self, value=None):
        """Returns the baseline pixel: `value`, or the one that is normalized to zero."""
        image = self.found.image
        if value is None:
            value = 255 * np.array(image.mean) if image.normalizes else 0.0
        pixel = np.broadcast_to(np.asarray(value, "float32"), (image.channels,))
        return pixel[:, None, None] if self.channels_first else pixel

    def to_pixels(self, maps):
        """Returns maps (batch, rows, columns) enlarged to the images' size, with a channel axis."""
        for axis, side in enumerate(self.sides, start=1):
            maps = np.repeat(maps, side // maps.shape[axis], axis=axis)
        return np.expand_dims(maps, 1 if self.channels_first else -1)


def check_finite_images(images, names=None):
    """Raises a `ValueError` for images with values that are NaN or infinite.

    Args:
        images: `(batch, ...)`.
        names: a name for each image. If `None`, images are numbered from 1.
    """
    for i, image in enumerate(images):
        image = keras.ops.convert_to_numpy(image)
        count = int(np.sum(~np.isfinite(image)))
        if count:
            name = f"Image {i + 1} of {len(images)}" if names is None else names[i]
            raise ValueError(
                f"`images` must have finite values. {name} has {count:,} of {image.size:,} that "
                "are NaN or infinite. Replace them, for instance by np.nan_to_num(images)."
            )


def cause_of_nonfinite(model):
    """Returns a sentence with the cause of a model's non-finite activations, and a fix."""
    broken = [
        weight.path
        for weight in model.weights
        if not np.isfinite(keras.ops.convert_to_numpy(weight).astype("float32")).all()
    ]
    if not broken:
        policy = model.dtype_policy.name
        return (
            f"Its weights are finite: its activations overflow (dtype policy {policy}). Build the "
            "model with dtype='float32'."
        )
    more = f" and {len(broken) - MOST_NAMED} more" if len(broken) > MOST_NAMED else ""
    return (
        f"Some of its weights are not finite either: {', '.join(broken[:MOST_NAMED])}{more}. Load "
        "a checkpoint from before training diverged."
    )


class DenseLogits(keras.layers.Layer):
    """Layer that computes the output of a `Dense` layer before its activation, from its weights."""

    def __init__(self, dense, **kwargs):
        """Takes the `Dense` layer, whose variables it shares."""
        super().__init__(dtype=dense.dtype_policy, **kwargs)
        self.dense = dense
        self.built = True

    def call(self, x):
        """Returns logits (..., units) of x (..., dim)."""
        x = keras.ops.matmul(x, keras.ops.cast(self.dense.kernel, x.dtype))
        if self.dense.use_bias:
            x = keras.ops.add(x, keras.ops.cast(self.dense.bias, x.dtype))
        return x

    def compute_output_shape(self, input_shape):
        """Returns the input shape with the last axis replaced by `units`."""
        return (*input_shape[:-1], self.dense.units)


def logits_of(head):
    """Returns the symbolic logits of a head: its output before its activation."""
    if activation_name(head.activation) == "linear":
        return head.output
    if getattr(head, "quantization_mode", None):
        raise ValueError(
            f"The logits of head '{head.name}' cannot be separated from its activation once it is "
            "quantized. Explain the model before `quantize`, or end it with a "
            "keras.layers.Activation."
        )
    return DenseLogits(head)(head.input)


def activation_name(activation):
    """Returns the name of an activation, which is a layer, a function or `None`."""
    if isinstance(activation, keras.layers.Softmax):
        return "softmax"
    activation = getattr(activation, "activation", activation)
    if activation is None:
        return "linear"
    name = getattr(activation, "__name__", getattr(activation, "name", type(activation).__name__))
    return str(name)
