"""A classifier that is to be explained: what it is made of, its logits and its classes."""

import difflib
import functools
import math

import keras
import numpy as np

from keras_tnt.anatomy import anatomy, class_names
from keras_tnt.inspection.links import gate_gradient_of, gradient_of, sum_of_targets
from keras_tnt.inspection.maps import check_images
from keras_tnt.layers import WordsToPatches


class Subject:
    """A classifier that is to be explained, and the images that it sees.

    Args:
        model: a classifier of this package, or one built on such a model.
        images: as the model takes them.

    Attributes:
        found: its `Anatomy`.
        logits: a model from images to the mean of the heads' logits, `(batch, classes)`.
        sides: (height, width) of the images in pixels.
        grids: (rows, columns) of the patches of each stage.
        word_side: words along a side of a patch; 0: the model has patches alone.
        patch_embedding: the layer that makes the first patches of words, or None.

    Raises:
        ValueError: if there is no class to explain, or the images do not fit.
    """

    def __init__(self, model, images):
        self.model, self.found = model, anatomy(model)
        heads = self.found.heads
        if not heads:
            raise ValueError(f"Model '{model.name}' has no head, and so no class to explain.")
        if heads[0] not in model.layers:
            inside = self.found.model.name
            raise ValueError(f"Model '{model.name}' wraps a classifier. Pass its layer '{inside}'.")
        check_images(model, images)
        outputs = [head.output for head in heads]
        mean = keras.layers.Average()(outputs) if len(outputs) > 1 else outputs[0]
        self.logits = keras.Model(model.inputs[0], mean)

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
        """See `gate_gradient_of`."""
        return gate_gradient_of(self.logits)

    @functools.cached_property
    def pixel_gradient(self):
        """A function (images, chosen) to the gradient of the target logits by the images."""

        def target_logits(images, chosen):
            return sum_of_targets(self.logits(images, training=False), chosen)

        return gradient_of(target_logits, self.logits.variables)

    def chosen(self, classes):
        """A one for each image's class, (batch, classes)."""
        return np.eye(self.logits.output_shape[-1], dtype="float32")[classes]

    def predict(self, images):
        """The mean of the heads' logits, as an array (batch, classes)."""
        return keras.ops.convert_to_numpy(self.logits(images, training=False))

    def probabilities(self, logits):
        """What the model's last activation makes of logits, (batch, classes); else the softmax."""
        activate = self.found.predictions or keras.activations.softmax
        return keras.ops.convert_to_numpy(activate(keras.ops.convert_to_tensor(logits)))

    def class_indices(self, targets, count):
        """The index of each image's class, of indices or names, one an image or one for all."""
        if isinstance(targets, str) or np.ndim(targets) == 0:
            targets = [targets] * count
        if len(targets) != count:
            raise ValueError(
                f"`targets` are one class for each of {count} images. Received: {len(targets)}"
            )
        return np.array([self.class_index(target) for target in targets])

    def class_index(self, target):
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
        """The pixel of an image that says nothing, (channels,): `value`, or what becomes zero."""
        image = self.found.image
        if value is None:
            value = 255 * np.array(image.mean) if image.normalises else 0.0
        pixel = np.broadcast_to(np.asarray(value, "float32"), (image.channels,))
        return pixel[:, None, None] if self.channels_first else pixel

    def to_pixels(self, maps):
        """Maps (batch, rows, columns) as large as the images, with an axis of channels."""
        for axis, side in enumerate(self.sides, start=1):
            maps = np.repeat(maps, side // maps.shape[axis], axis=axis)
        return np.expand_dims(maps, 1 if self.channels_first else -1)
