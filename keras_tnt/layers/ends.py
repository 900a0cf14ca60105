"""Where a model begins and ends: images in, tokens out of the sequence, predictions out."""

import keras
import numpy as np
from keras import ops

CHANNELS_AXIS = {"channels_first": 1, "channels_last": -1}


def scale_and_offset(
    mean: tuple[float, ...], std: tuple[float, ...], channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """What takes pixels in [0, 255] to (pixels / 255 - mean) / std: pixels * scale + offset.

    Args:
        mean, std: of pixels in [0, 1], a value a channel. Images of another number of channels
            take their averages.
        channels: of the images.

    Returns:
        Two float64 arrays of one value, or of one value a channel.
    """
    mean, std = (np.asarray(values, "float64") for values in (mean, std))
    if channels != len(mean):
        mean, std = (values.mean(keepdims=True) for values in (mean, std))
    scale, offset = 1 / (255 * std), -mean / std
    if len(set(scale)) == len(set(offset)) == 1:
        scale, offset = scale[:1], offset[:1]
    return scale, offset


def along_channels(values: np.ndarray, data_format: str) -> np.ndarray:
    """Values of one a channel in the shape that broadcasts over a batch of images."""
    return np.reshape(values, (-1, 1, 1) if data_format == "channels_first" else (-1,))


@keras.saving.register_keras_serializable(package="keras_tnt")
class ImageNormalization(keras.layers.Layer):
    """The first layer of every model: it normalises the images, and says what they have to be.

    Args:
        family: name of the family that the model belongs to.
        mean, std: by which pixels in [0, 1] are normalised, a value a channel.
        normalises: whether the layer takes pixels in [0, 255] and normalises them. False: images
            that were normalised outside pass through.
        crop: share of the side that evaluation shows; None: by the family's rule.
        interpolation: with which images are resized.
        data_format: `"channels_last"` or `"channels_first"`; None: Keras's setting.
        architecture: what the family's builder was told beside its defaults, of what decides on
            the model's weights.
        class_names: names of the classes of a classifier around the model, which has no layer of
            its own to hold them. If `None`, they are not known.

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
        self.image_shape = tuple(input_shape[1:])

    def check_shape(self, shape):
        """Raises an error for images that are not those which the model was built for.

        Args:
            shape: of the images, `(batch, ...)`; sizes that are not known fit.
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
        if self.built:
            self.check_shape(input_shape)
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "family": self.family,
            "mean": self.mean,
            "std": self.std,
            "normalises": self.normalises,
            "crop": self.crop,
            "interpolation": self.interpolation,
            "data_format": self.data_format,
            "architecture": dict(self.architecture),
            "class_names": self.class_names,
        }


@keras.saving.register_keras_serializable(package="keras_tnt")
class SelectTokens(keras.layers.Layer):
    """Some tokens of a sequence: `(batch, tokens, dim)` to `(batch, stop - start, dim)`.

    Args:
        start: the first token wanted, counted from 0.
        stop: the first token not wanted any more; None: all from `start` on.
    """

    def __init__(self, start: int = 0, stop: int | None = None, **kwargs):
        super().__init__(**kwargs)
        self.start = start
        self.stop = stop

    def call(self, x):
        return x[:, self.start : self.stop]

    def compute_output_shape(self, input_shape):
        batch, tokens, dim = input_shape
        if tokens is not None:
            tokens = len(range(tokens)[self.start : self.stop])
        elif self.stop is not None:
            tokens = self.stop - self.start
        return (batch, tokens, dim)

    def get_config(self):
        return {**super().get_config(), "start": self.start, "stop": self.stop}


@keras.saving.register_keras_serializable(package="keras_tnt")
class SelectToken(keras.layers.Layer):
    """One token of a sequence: `(batch, tokens, dim)` to `(batch, dim)`.

    Args:
        index: of the token, counted from 0.
    """

    def __init__(self, index: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.index = index

    def call(self, x):
        return x[:, self.index]

    def compute_output_shape(self, input_shape):
        return (input_shape[0], input_shape[-1])

    def get_config(self):
        return {**super().get_config(), "index": self.index}


@keras.saving.register_keras_serializable(package="keras_tnt")
class Predictions(keras.layers.Activation):
    """The last layer of a classifier: the activation of its logits, and the names of its classes.

    Args:
        activation: as `keras.layers.Activation` takes it; None: logits.
        class_names: list of names, one a class; None: they have none.

    Call arguments:
        logits: `(batch, classes)`.
    """

    def __init__(self, activation=None, class_names: list[str] | None = None, **kwargs):
        super().__init__(activation, **kwargs)
        self.class_names = None if class_names is None else list(class_names)

    def get_config(self):
        return {**super().get_config(), "class_names": self.class_names}
