"""What the families share: their input, their head, the errors of `keras.applications`."""

import functools
import inspect
import re

import keras
import numpy as np

from keras_tnt import weights as checkpoints
from keras_tnt.layers.base import at_least_float32, during, projection, values_follow

POOLINGS = (None, "avg", "max", "token")
# Arguments that change no weight.
WITHOUT_WEIGHTS = ("dropout", "attention_dropout", "stochastic_depth")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image_input(input_tensor, input_shape, default_size, divisor):
    """The model's input, checked.

    Args:
        input_tensor: Keras tensor or array to build upon; None: a new input.
        input_shape: (height, width, channels), or channels first by Keras's setting; None: square,
            of `default_size`, RGB.
        default_size: side in pixels without `input_shape`.
        divisor: what height and width must be multiples of.

    Returns:
        `(tensor, (height, width))`.
    """
    channels_first = keras.config.image_data_format() == "channels_first"
    if input_tensor is not None:
        if not keras.utils.is_keras_tensor(input_tensor):
            input_tensor = keras.Input(tensor=input_tensor)
        shape = tuple(input_tensor.shape[1:])
        if input_shape is not None and tuple(input_shape) != shape:
            raise ValueError(
                f"`input_shape` and `input_tensor` differ: {tuple(input_shape)} and {shape}. "
                "Leave `input_shape` out."
            )
    elif input_shape is None:
        size = (default_size, default_size)
        shape = (3, *size) if channels_first else (*size, 3)
    else:
        shape = tuple(input_shape)

    layout = "(channels, height, width)" if channels_first else "(height, width, channels)"
    if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
        raise ValueError(f"`input_shape` must be three sizes {layout}. Received: {shape}")
    size = shape[1:] if channels_first else shape[:2]
    if any(side % divisor for side in size):
        fitting = tuple(max(divisor, round(side / divisor) * divisor) for side in size)
        raise ValueError(
            f"Height and width must be multiples of {divisor}. Received: input_shape={shape}, read "
            f"as {layout}. The nearest size that fits is {fitting[0]}x{fitting[1]}."
        )
    return keras.Input(shape=shape) if input_tensor is None else input_tensor, size


def image_sides(input_tensor, input_shape):
    """(height, width) of the images as far as the arguments of a variant give it, or None."""
    shape = input_shape if input_tensor is None else input_tensor.shape[1:]
    if shape is None or len(shape) != 3 or not all(isinstance(side, int) for side in shape):
        return None
    channels_first = keras.config.image_data_format() == "channels_first"
    return tuple(shape[1:]) if channels_first else tuple(shape[:2])


def channel_statistics(channels, mean, std):
    """`mean` and `std` of RGB for images of so many channels: their averages where not three."""
    if channels == len(mean):
        return mean, std
    return tuple((sum(values) / len(values),) for values in (mean, std))


def normalise(images, mean, std):
    """Pixels in [0, 255] to (pixels / 255 - mean) / std, as a layer of the model.

    Images of other than three channels take the averages of `mean` and `std`.
    """
    channels = images.shape[1 if keras.config.image_data_format() == "channels_first" else -1]
    mean, std = channel_statistics(channels, mean, std)
    scale = [1 / (255 * s) for s in std]
    offset = [-m / s for m, s in zip(mean, std, strict=True)]
    if len(set(scale)) == len(set(offset)) == 1:
        scale, offset = scale[0], offset[0]
    return keras.layers.Rescaling(scale, offset, name="rescaling")(images)


def standardise(images, mean, std, data_format=None):
    """Pixels in [0, 255] to (pixels / 255 - mean) / std: `normalise` outside of a model."""
    channels_first = (data_format or keras.config.image_data_format()) == "channels_first"
    if isinstance(images, np.ndarray) and not np.issubdtype(images.dtype, np.floating):
        images = images.astype(keras.config.floatx())
    images = images / 255
    mean, std = channel_statistics(images.shape[-3 if channels_first else -1], mean, std)
    shape = (-1, 1, 1) if channels_first else (-1,)
    mean, std = (np.reshape(np.array(value, "float32"), shape) for value in (mean, std))
    if keras.ops.is_tensor(images):
        mean, std = (keras.ops.convert_to_tensor(value, images.dtype) for value in (mean, std))
    return (images - mean) / std


def check_sizes(**sizes):
    """Raise an error that names the first of `sizes` that is no positive integer."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"`{name}` must be a positive integer. Received: {size!r}")


def check_head(pooling, classes, classifier_activation, has_token=True):
    """Raise the errors of `keras.applications` on the arguments that every family has."""
    allowed = tuple(p for p in POOLINGS if p != "token" or has_token)
    if pooling not in allowed:
        raise ValueError(
            f"`pooling` must be one of {', '.join(map(repr, allowed))}. Received: {pooling!r}"
        )
    check_sizes(classes=classes)
    keras.activations.get(classifier_activation)


def classify(vectors, classes, classifier_activation):
    """The heads: `head` on the first vector, `head_distillation` on the second if there is one.

    The prediction of two heads is the mean of their logits (DeiT's released code), then the
    activation, in float32 or better.
    """
    names = ("head", "head_distillation")
    logits = [
        projection(classes, dtype=None, name=name)(vector)
        for name, vector in zip(names, vectors, strict=False)
    ]
    x = keras.layers.Average(name="logits")(logits) if len(logits) > 1 else logits[0]
    return keras.layers.Activation(
        classifier_activation, dtype=at_least_float32(x.dtype), name="predictions"
    )(x)


def pool(tokens, grid, prefix_tokens, pooling):
    """Features of a model without its top, from (batch, prefix_tokens + rows * columns, dim)."""
    if pooling == "token":
        return keras.layers.GlobalAveragePooling1D(data_format="channels_last", name="token")(
            tokens[:, :prefix_tokens]
        )
    patches = tokens[:, prefix_tokens:] if prefix_tokens else tokens
    if pooling is None:
        return keras.layers.Reshape((*grid, tokens.shape[-1]), name="feature_map")(patches)
    layer = {
        "avg": keras.layers.GlobalAveragePooling1D,
        "max": keras.layers.GlobalMaxPooling1D,
    }[pooling]
    return layer(data_format="channels_last", name=f"{pooling}_pool")(patches)


def builder(function):
    """A family's builder, which draws no random values once `fetch_weights` has found weights."""

    @functools.wraps(function)
    def build(*args, **kwargs):
        with during(values_follow, False):
            return function(*args, **kwargs)

    return build


def fetch_weights(weights, classes):
    """What `weights=` names, on this machine; `classes` is None for a model without its top."""
    source = checkpoints.fetch(weights, classes)
    values_follow.set(source is not None)
    return source


def finish(inputs, outputs, name, weights):
    """The model from its input, which may be the output of other layers, with its weights."""
    sources = keras.utils.get_source_inputs(inputs)
    model = keras.Model(sources[0] if len(sources) == 1 else sources, outputs, name=name)
    checkpoints.load_weights(model, weights)
    return model


def variant(builder, name, source, size=224, weights=None, **architecture):
    """A function in the manner of `keras.applications`: `builder` with an architecture given.

    Args:
        builder: the family's builder.
        name: default name of the models.
        source: where the architecture stands, for the docstring.
        size: side of the default input in pixels.
        weights: default of `weights`.
        architecture: keyword arguments of `builder`, which callers may override.
    """
    default_weights = weights
    defaults = {key: value.default for key, value in inspect.signature(builder).parameters.items()}
    defaults |= architecture

    def build(
        include_top=True,
        include_preprocessing=True,
        weights=default_weights,
        input_tensor=None,
        input_shape=None,
        pooling=None,
        classes=1000,
        classifier_activation="softmax",
        name=name,
        **overrides,
    ):
        if unknown := set(overrides) - set(defaults):
            raise TypeError(f"{build.__name__}() has no argument {', '.join(map(repr, unknown))}.")
        found = checkpoints.find_for(
            weights,
            build.__name__,
            {key: value for key, value in overrides.items() if key not in WITHOUT_WEIGHTS},
            defaults,
            image_sides(input_tensor, input_shape) or (size, size),
        )
        sides = (size, size)
        if found is not None:
            overrides = found.arguments | overrides
            sides = found.size or sides
            if include_top and classes == 1000:
                classes = found.classes or classes
        if input_tensor is None and input_shape is None:
            channels_first = keras.config.image_data_format() == "channels_first"
            input_shape = (3, *sides) if channels_first else (*sides, 3)
        return builder(
            include_top=include_top,
            include_preprocessing=include_preprocessing,
            weights=found,
            input_tensor=input_tensor,
            input_shape=input_shape,
            pooling=pooling,
            classes=classes,
            classifier_activation=classifier_activation,
            name=name,
            **(architecture | overrides),
        )

    suffix = name.rpartition("_")[-1]
    suffix = suffix.upper() if re.search(r"\d", suffix) else suffix.capitalize()
    build.__name__ = build.__qualname__ = builder.__name__ + suffix
    listed = ", ".join(f"{key}={value!r}" for key, value in architecture.items())
    build.__doc__ = f"""`keras_tnt.{builder.__name__}` with {listed}.

    {source}. Takes {size}x{size} images by default.

    Args:
        weights: `"imagenet"`, for the public weights that fit the arguments and the image size; a
            name of `keras_tnt.list_weights()`; `"hf://owner/repository"` for a checkpoint of timm's
            on the Hugging Face hub, whose number of classes and image size become the defaults;
            the path of a file (`.safetensors`, `.pth`, `.weights.h5`, `.keras`); or None (random).
        overrides: any other keyword of `keras_tnt.{builder.__name__}`, where all arguments are
            explained.

    Returns:
        A `keras.Model`.
    """
    return build
