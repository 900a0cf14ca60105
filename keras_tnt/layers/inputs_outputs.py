"""Input normalization, token selection and the predictions layer of a classifier."""

import keras
import numpy as np
from keras import ops

from keras_tnt.layers.base import ConfiguredLayer

CHANNELS_AXIS = {"channels_first": 1, "channels_last": -1}


def scale_and_offset(
    mean: tuple[float, ...], std: tuple[float, ...], channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns scale and offset for which `pixels * scale + offset` normalizes pixels in [0, 255].

    The result is `(pixels / 255 - mean) / std`.

    Args:
        mean: mean of pixels in [0, 1], one value per channel. Images with another number of
            channels use the average.
        std: standard deviation of pixels in [0, 1], one value per channel, averaged in the same
            way.
        channels: number of channels of the images.

    Returns:
        Two float64 arrays `(scale, offset)`, each of one value, or of one value per channel.
    """
    means, stds = np.asarray(mean, "float64"), np.asarray(std, "float64")
    if channels != len(means):
        means, stds = means.mean(keepdims=True), stds.mean(keepdims=True)
    scale, offset = 1 / (255 * stds), -means / stds
    if len(set(scale)) == len(set(offset)) == 1:
        scale, offset = scale[:1], offset[:1]
    return scale, offset


def along_channels(values: np.ndarray, data_format: str) -> np.ndarray:
    """Reshapes per-channel values so that they broadcast over a batch of images."""
    return np.reshape(values, (-1, 1, 1) if data_format == "channels_first" else (-1,))


@keras.saving.register_keras_serializable(package="keras_tnt")
class ImageNormalization(ConfiguredLayer):
    """Input layer of every model: validates and normalizes images, and stores the input metadata.

    Args:
        family: name of the model's family.
        mean: mean of pixels in [0, 1], one value per channel.
        std: standard deviation of pixels in [0, 1], one value per channel.
        normalises: whether the layer normalizes pixels in [0, 255]. If `False`, images that are
            already normalized pass through. Defaults to `True`.
        crop: fraction of the side that the center crop of evaluation shows. If `None`, the family's
            default applies.
        interpolation: interpolation method for resizing images. Defaults to "bicubic".
        data_format: `"channels_last"` or `"channels_first"`. Defaults to Keras's image data format.
        architecture: non-default arguments of the family's builder that affect the weights.
            Defaults to none.
        class_names: names of the classes of a classifier around the model, which has no layer to
            store them. If `None`, they are unknown.

    Call arguments:
        images: `(batch, height, width, channels)`, or channels first.

    Returns:
        The same shape, in the layer's compute dtype.
    """

    def __init__(
        self,
        family: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        normalises: bool = True,
        crop: float | None = None,
        interpolation: str = "bicubic",
        data_format: str | None = None,
        architecture: dict | None = None,
        class_names: list[str] | None = None,
        **kwargs,
    ):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(**kwargs)
        self.family = family
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.normalises = normalises
        self.crop = crop
        self.interpolation = interpolation
        self.data_format = data_format or keras.config.image_data_format()
        self.architecture = dict(architecture or {})
        self.class_names = None if class_names is None else list(class_names)

    def build(self, input_shape):
        """Stores the shape of an image, without the batch axis, for `check_shape`."""
        self.image_shape = tuple(input_shape[1:])

    def check_shape(self, shape):
        """Checks that images have the shape that the model was built for.

        Args:
            shape: shape of the images, `(batch, ...)`; unknown sizes are accepted.

        Raises:
            ValueError: if the rank or a known size differs.
        """
        wanted = self.image_shape
        sizes = [(own, side) for own, side in zip(wanted, shape[1:], strict=False) if own]
        known = [(own, side) for own, side in sizes if isinstance(side, int)]
        if len(shape) == len(wanted) + 1 and all(own == side for own, side in known):
            return
        channels_first = self.data_format == "channels_first"
        layout = "channels first" if channels_first else "channels last"
        any_size = (wanted[0], None, None) if channels_first else (None, None, wanted[2])
        raise ValueError(
            f"Images must have the shape (batch, {', '.join(map(str, wanted))}), {layout}, for "
            f"which the model was built. Received images of shape {tuple(shape)}. Resize them, as "
            "keras_tnt.load_image(path, model) does, or build the model with "
            f"input_shape={tuple(shape[1:])} for this size or input_shape={any_size} for any size; "
            "position tables are resampled as weights load."
        )

    def call(self, images):
        """Checks and normalizes images; preserves the shape."""
        self.check_shape(images.shape)
        if not self.normalises:
            return images
        channels = images.shape[CHANNELS_AXIS[self.data_format]]
        scale, offset = (
            ops.convert_to_tensor(along_channels(values, self.data_format), self.compute_dtype)
            for values in scale_and_offset(self.mean, self.std, channels)
        )
        return ops.cast(images, self.compute_dtype) * scale + offset

    def compute_output_shape(self, input_shape):
        """Returns `input_shape`, after checking it if the layer is built."""
        if self.built:
            self.check_shape(input_shape)
        return input_shape


@keras.saving.register_keras_serializable(package="keras_tnt")
class SelectTokens(ConfiguredLayer):
    """Slice of a token sequence: `(batch, tokens, dim)` to `(batch, stop - start, dim)`.

    Args:
        start: start index, counted from 0. Defaults to 0.
        stop: end index (exclusive). If `None`, the slice extends to the last token.
    """

    def __init__(self, start: int = 0, stop: int | None = None, **kwargs):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(**kwargs)
        self.start = start
        self.stop = stop

    def call(self, x):
        """Maps `(batch, tokens, dim)` to `(batch, stop - start, dim)`."""
        return x[:, self.start : self.stop]

    def compute_output_shape(self, input_shape):
        """Returns `(batch, stop - start, dim)`, clipped to the number of tokens if known."""
        batch, tokens, dim = input_shape
        if tokens is not None:
            tokens = len(range(tokens)[self.start : self.stop])
        elif self.stop is not None:
            tokens = self.stop - self.start
        return (batch, tokens, dim)


@keras.saving.register_keras_serializable(package="keras_tnt")
class SelectToken(ConfiguredLayer):
    """Selection of one token of a sequence: `(batch, tokens, dim)` to `(batch, dim)`.

    Args:
        index: index of the token, counted from 0. Defaults to 0.
    """

    def __init__(self, index: int = 0, **kwargs):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(**kwargs)
        self.index = index

    def call(self, x):
        """Maps `(batch, tokens, dim)` to `(batch, dim)`."""
        return x[:, self.index]

    def compute_output_shape(self, input_shape):
        """Returns `(batch, dim)`."""
        return (input_shape[0], input_shape[-1])


@keras.saving.register_keras_serializable(package="keras_tnt")
class Predictions(keras.layers.Activation):
    """Last layer of a classifier: activation of its logits, and the class names.

    Args:
        activation: as for `keras.layers.Activation`. If `None`, the outputs are logits.
        class_names: list of names, one per class. If `None`, the classes are unnamed.

    Call arguments:
        logits: `(batch, classes)`.
    """

    def __init__(self, activation=None, class_names: list[str] | None = None, **kwargs):
        """Initializes the layer; the class docstring lists the arguments."""
        super().__init__(activation, **kwargs)
        self.class_names = None if class_names is None else list(class_names)

    def get_config(self):
        """Returns `activation` and `class_names`."""
        return {**super().get_config(), "class_names": self.class_names}
