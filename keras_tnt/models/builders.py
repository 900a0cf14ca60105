"""Shared parts of the family builders: inputs, heads, argument checks, weights, registration.

A family defines a function from arguments to (inputs, outputs). The decorator `builder` turns it
into the public function, which checks the arguments that all families share, builds the
`keras.Model` and loads its weights. `register_family` registers a family and the functions of its
variants.
"""

import collections
import contextlib
import contextvars
import difflib
import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from keras_tnt.layers import (
    ImageNormalization,
    PatchGrid,
    PatchMap,
    Predictions,
    SelectToken,
    SelectTokens,
)
from keras_tnt.layers.base import (
    at_least_float32,
    context_value,
    projection,
    skip_weight_init,
)
from keras_tnt.layers.grid import ceil_divide, nearest_multiple
from keras_tnt.layers.inputs_outputs import along_channels, scale_and_offset
from keras_tnt.models import pretrained, registry
from keras_tnt.models.anatomy import NORMALIZATION
from keras_tnt.models.registry import Checkpoint, Family, ImageTransform, Variant
from keras_tnt.text import is_encodable, is_line
from keras_tnt.weights.names import HEADS

POOLINGS = (None, "avg", "max", "token")
# Tensors that mark a distilled checkpoint, for `register_family`.
DISTILLATION_TENSORS = (
    r"dist_token|head_dist\.weight",
    "distilled",
    "a distillation token",
)
# Arguments that do not affect the weights.
ARGUMENTS_WITHOUT_WEIGHTS = (
    "dropout",
    "attention_dropout",
    "stochastic_depth",
    "dtype",
    "class_names",
)


# === Input ===


# Size of the position tables: (height, width) in pixels, or (rows, columns) of patches.
_table_size = contextvars.ContextVar("table_size", default=None)
_table_grid = contextvars.ContextVar("table_grid", default=None)


def image_input(input_tensor, input_shape, default_size: int, divisor: int, any_size: bool = False):
    """Returns the model's input and its image size, after checking them.

    Args:
        input_tensor: Keras tensor or array to use as the input. If `None`, a new input is created.
        input_shape: (height, width, channels), or channels first if that is Keras's image data
            format. If `None`, the images are square RGB of side `default_size`.
        default_size: side in pixels without `input_shape`.
        divisor: number that height and width must be multiples of.
        any_size: whether the family supports images of any size, for which height, width or both
            are `None`. Defaults to `False`.

    Returns:
        `(tensor, (height, width))`. For images of any size, (height, width) is the size of the
        position
        tables: that of the weights or of the variant.

    Raises:
        ValueError: for a shape that is not an image's or that `divisor` does not divide.
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
    sides, channels = (shape[1:], shape[:1]) if channels_first else (shape[:2], shape[2:])
    known = [*(side for side in sides if not (any_size and side is None)), *channels]
    if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in known):
        free = ", of which height and width may be None" if any_size else ""
        raise ValueError(f"`input_shape` must be three sizes {layout}{free}. Received: {shape}")
    if any(side is not None and side % divisor for side in sides):
        fitting = "x".join(
            "any" if side is None else str(nearest_multiple(side, divisor)) for side in sides
        )
        raise ValueError(
            f"Height and width must be multiples of {divisor}. Received: input_shape={shape}, read "
            f"as {layout}. The nearest size that fits is {fitting}."
        )
    inputs = keras.Input(shape, name="images") if input_tensor is None else input_tensor
    if None not in sides:
        return inputs, tuple(sides)
    grid = _table_grid.get()
    if grid is not None:
        return inputs, tuple(divisor * side for side in grid)
    return inputs, tuple(_table_size.get() or (default_size, default_size))


def table_size(size: tuple[int, int]) -> contextlib.AbstractContextManager:
    """Context manager that sets the size of position tables in models of images of any size."""
    return context_value(_table_size, size)


def patch_grid(images, size: tuple[int, int], patch_size: int, dtype=None, name="grid"):
    """Returns the patch grid, and the keyword arguments that pass it to layers.

    Args:
        images: the model's normalized images.
        size: (height, width) from `image_input`.
        patch_size: side of a patch in pixels.
        dtype: dtype or policy of the model. Defaults to Keras's global policy.
        name: name of the `PatchGrid` layer, if there is one. Defaults to "grid".

    Returns:
        `(grid, grid_kwargs)`: (rows, columns) for `size`, and the keyword arguments for layers that
        need the grid: `{"grid": tensor}` for images of any size, otherwise `{}`.
    """
    grid = tuple(ceil_divide(side, patch_size) for side in size)
    if None not in images.shape[1:]:
        return grid, {}
    return grid, {"grid": PatchGrid(patch_size, dtype=dtype, name=name)(images)}


def normalize(images, family: str, transform: ImageTransform, inside: bool, dtype=None):
    """Applies the model's `ImageNormalization`.

    Args:
        images: the model's input.
        family: name of the family.
        transform: the family's `ImageTransform`.
        inside: whether the model takes pixels in [0, 255] and normalizes them.
        dtype: dtype or policy of the model. Defaults to Keras's global policy.
    """
    return ImageNormalization(
        family,
        transform.mean,
        transform.std,
        inside,
        interpolation=transform.interpolation,
        dtype=dtype,
        name=NORMALIZATION,
    )(images)


normalise = normalize  # codespell:ignore normalise: the name that plugins of release 0.1 call


def preprocessor(transform: ImageTransform) -> Callable:
    """Returns a family's `preprocess_input`, for models without built-in normalization."""

    def preprocess_input(x, data_format: str | None = None):
        """Normalizes pixels in [0, 255], for models built with `include_preprocessing=False`.

        Args:
            x: array or tensor of images, `(batch, height, width, channels)` or one image, or
                channels first.
            data_format: `"channels_last"` or `"channels_first"`. Defaults to Keras's image data
                format.

        Returns:
            (x / 255 - mean) / std, array or tensor of the same shape, in floating point.
        """
        data_format = data_format or keras.config.image_data_format()
        if isinstance(x, np.ndarray) and not np.issubdtype(x.dtype, np.floating):
            x = x.astype(keras.config.floatx())
        is_tensor = keras.ops.is_tensor(x)
        if is_tensor and not keras.backend.is_float_dtype(x.dtype):
            x = keras.ops.cast(x, keras.config.floatx())
        channels = x.shape[-3 if data_format == "channels_first" else -1]
        values = scale_and_offset(transform.mean, transform.std, channels)
        scale, offset = (along_channels(value, data_format) for value in values)
        if is_tensor:
            scale, offset = (keras.ops.convert_to_tensor(v, x.dtype) for v in (scale, offset))
            return x * scale + offset
        return x * scale.astype(x.dtype) + offset.astype(x.dtype)

    return preprocess_input


# === Output ===


def read_tokens(tokens, count: int, dtype=None) -> list:
    """Returns the first `count` tokens as vectors `(batch, dim)`, the inputs of the heads."""
    names = ("class_vector", "distillation_vector")[:count]
    return [SelectToken(i, dtype=dtype, name=name)(tokens) for i, name in enumerate(names)]


def classify(vectors, classes, classifier_activation, class_names=None, dtype=None):
    """Builds the heads: `head` on the first vector, `head_distillation` on the second, if any.

    With two heads, the prediction is the mean of their logits (as in DeiT's released code),
    followed by the activation, in float32 or float64.

    Args:
        vectors: one or two tensors `(batch, dim)`.
        classes: number of classes.
        classifier_activation: activation of layer `predictions`. If `None`, the outputs are logits.
        class_names: names of the classes, stored in the model. If `None`, the classes are unnamed.
        dtype: dtype or policy of the model. Defaults to Keras's global policy.

    Returns:
        Predictions `(batch, classes)`.
    """
    logits = [
        projection(classes, dtype=dtype, name=name)(vector)
        for name, vector in zip(HEADS, vectors, strict=False)
    ]
    x = logits[0]
    if len(logits) > 1:
        x = keras.layers.Average(dtype=dtype, name="logits")(logits)
    dtype = at_least_float32(x.dtype)
    return Predictions(classifier_activation, class_names, dtype=dtype, name="predictions")(x)


def pool(tokens, grid, prefix_tokens: int, pooling: str | None, dtype=None, grid_kwargs=None):
    """Builds the features of a model without its top.

    Args:
        tokens: the last tokens, `(batch, prefix_tokens + rows * columns, dim)`.
        grid: (rows, columns) from `patch_grid`.
        prefix_tokens: number of tokens before the patches.
        pooling: the builders' argument.
        dtype: dtype or policy of the model. Defaults to Keras's global policy.
        grid_kwargs: keyword arguments from `patch_grid`. Defaults to none.

    Returns:
        A feature map `(batch, rows, columns, dim)`, or a vector `(batch, dim)` if `pooling` is
        given.
    """
    common = {"data_format": "channels_last", "dtype": dtype}
    if pooling == "token":
        tokens = SelectTokens(0, prefix_tokens, dtype=dtype, name="class_tokens")(tokens)
        return keras.layers.GlobalAveragePooling1D(name="token", **common)(tokens)
    if prefix_tokens:
        tokens = SelectTokens(prefix_tokens, dtype=dtype, name="patches")(tokens)
    if pooling is None and grid_kwargs:
        return PatchMap(dtype=dtype, name="feature_map")(tokens, **grid_kwargs)
    if pooling is None:
        shape = (*grid, tokens.shape[-1])
        return keras.layers.Reshape(shape, dtype=dtype, name="feature_map")(tokens)
    layer = {
        "avg": keras.layers.GlobalAveragePooling1D,
        "max": keras.layers.GlobalMaxPooling1D,
    }[pooling]
    return layer(name=f"{pooling}_pool", **common)(tokens)


# === Checks ===


def check_sizes(**sizes) -> None:
    """Raises a `ValueError` that names the first of `sizes` that is not a positive integer."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"`{name}` must be a positive integer. Received: {size!r}")


def check_pooling(pooling, allowed=POOLINGS) -> None:
    """Raises a `ValueError` on an unknown pooling, as `keras.applications` does."""
    if pooling not in allowed:
        raise ValueError(
            f"`pooling` must be one of {', '.join(map(repr, allowed))}. Received: {pooling!r}"
        )


def check_class_names(class_names) -> list[str] | None:
    """Returns the names of classes as a list, or `None` if they are `None`.

    Raises:
        ValueError: if they are not a list of distinct names, each one line of text.
    """
    if class_names is None:
        return None
    if isinstance(class_names, str) or not hasattr(class_names, "__iter__"):
        raise ValueError(f"`class_names` must be a list of names. Received: {class_names!r}")
    names = list(class_names)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"Each of `class_names` must be a string. Received: {wrong[0]!r}")
    wrong = [name for name in names if not is_line(name)]
    if wrong:
        raise ValueError(f"A class name must be one line that is not blank. Received: {wrong[0]!r}")
    wrong = [name for name in names if not is_encodable(name)]
    if wrong:
        raise ValueError(f"A class name is no text that UTF-8 can hold: {wrong[0]!r}")
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"`class_names` must differ from each other. Received twice: {twice[0]!r}")
    if not names:
        raise ValueError("`class_names` must name at least one class. Received: []")
    return names


def resolve_classes(classes, class_names, given: bool) -> int:
    """Returns the number of classes given by number, by names, or by both.

    Args:
        classes: number of classes.
        class_names: names of the classes, or `None`.
        given: whether `classes` was passed explicitly, and so has to agree with `class_names`.

    Raises:
        ValueError: if both are given and differ.
    """
    if class_names is None:
        return classes
    if given and classes != len(class_names):
        raise ValueError(
            f"`class_names` must name each class. Received: {len(class_names)} names for "
            f"classes={classes}. Leave `classes` out."
        )
    return len(class_names)


# === The public functions ===


def builder(function: Callable) -> Callable:
    """Decorator that turns a function from arguments to (inputs, outputs) into a public builder.

    All arguments are forwarded to the function, but `weights` and `name` are handled by the
    builder. The function skips the random initialization if weights are loaded afterwards.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def build(*args, **kwargs):
        given = bind(function.__name__, signature, args, kwargs)
        class_names = check_class_names(given.arguments.get("class_names"))
        is_given = "classes" in given.arguments
        given.apply_defaults()
        arguments = given.arguments
        arguments["class_names"] = class_names
        classes = resolve_classes(arguments["classes"], class_names, is_given)
        check_sizes(classes=classes)
        arguments["classes"] = classes
        check_pooling(arguments["pooling"])
        keras.activations.get(arguments["classifier_activation"])
        source = pretrained.find_source(arguments["weights"])
        if source is not None:
            pretrained.check_classes(source, classes if arguments["include_top"] else None)
            arguments["class_names"] = class_names or source.class_names
        with contextlib.ExitStack() as settings:
            if source is not None:
                settings.enter_context(skip_weight_init())
                if is_of_any_size(arguments["input_tensor"], arguments["input_shape"]):
                    settings.enter_context(weights_table_size(source, build))
            inputs, outputs = function(*given.args, **given.kwargs)
        model = make_model(inputs, outputs, arguments["name"])
        find_input_normalization(model).architecture = non_default_arguments(signature, arguments)
        if source is not None:
            pretrained.load_source(model, source)
        return model

    build.__signature__ = signature.replace(return_annotation=keras.Model)
    return build


def is_of_any_size(input_tensor, input_shape) -> bool:
    """Returns whether a model accepts images of any height or width."""
    shape = input_shape if input_tensor is None else input_tensor.shape[1:]
    return shape is not None and None in tuple(shape)


def weights_table_size(source, builder: Callable) -> contextlib.AbstractContextManager:
    """Context manager that creates position tables for the grid of the weights."""
    if source.size is not None:
        return table_size(source.size)
    names = [family.tensor_names for family in registry.families() if family.builder is builder]
    grid = pretrained.table_grid(source, names[0] if names else ())
    return contextlib.nullcontext() if grid is None else context_value(_table_grid, grid)


def bind(name: str, signature: inspect.Signature, args, kwargs) -> inspect.BoundArguments:
    """Returns the arguments of a call by name.

    Args:
        name: name of the function, for error messages.
        signature: signature of the function.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Raises:
        TypeError: if the function does not accept them; the message suggests what to pass instead.
    """
    unknown = [key for key in kwargs if key not in signature.parameters]
    if unknown:
        raise TypeError(
            f"{name}() got an unexpected keyword argument '{unknown[0]}'. "
            f"{suggest_argument(name, unknown[0], kwargs[unknown[0]], signature.parameters)}"
        )
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}() {error}") from None


def suggest_argument(function: str, argument: str, value, known) -> str:
    """Returns a sentence that suggests one of our arguments for an unknown one.

    Args:
        function: name of the builder or variant.
        argument: name of the unknown argument, such as one of timm's.
        value: its value.
        known: names of the existing arguments.
    """
    if argument == "pretrained":
        return pretrained_advice(function) if value else "Pass weights=None for random weights."
    names = [name for name in TIMM_ARGUMENTS.get(argument, ()) if name in known]
    if names:
        return f"Pass `{names[0]}`{TIMM_NOTES.get(names[0], '')}."
    found = difflib.get_close_matches(argument, list(known), n=3)
    if found:
        return f"Did you mean {' or '.join(f'`{name}`' for name in found)}?"
    return f"There are: {', '.join(known)}."


def pretrained_advice(function: str) -> str:
    """Returns a sentence that replaces `pretrained=True` of a builder or variant."""
    if any(row.model == function for row in registry.checkpoints()):
        return "Pass weights='imagenet': 'imagenet' for public weights, None for random ones."
    for family in registry.families():
        names = [family.builder.__name__, *map(family.function_name, family.variants)]
        if function in names and family.checkpoints:
            return (
                f"{function} has no public weights of its own: call a variant that has some, "
                f"keras_tnt.{family.checkpoints[0].model}(weights='imagenet'), or pass "
                "weights=None for random weights or weights='<path>' for a file."
            )
    return (
        f"There are no public weights of {function}: pass weights=None for random weights or "
        "weights='<path>' for a file."
    )


# Our names by timm's name of an argument. The first that the builder accepts is suggested.
TIMM_ARGUMENTS = {
    "num_classes": ("classes",),
    "n_classes": ("classes",),
    "in_chans": ("input_shape",),
    "in_channels": ("input_shape",),
    "img_size": ("input_shape",),
    "image_size": ("input_shape",),
    "input_size": ("input_shape",),
    "drop_path_rate": ("stochastic_depth",),
    "drop_path": ("stochastic_depth",),
    "drop_rate": ("dropout",),
    "drop": ("dropout",),
    "proj_drop_rate": ("dropout",),
    "attn_drop_rate": ("attention_dropout",),
    "global_pool": ("pooling",),
    "checkpoint_path": ("weights",),
    "pretrained_cfg": ("weights",),
    "act_layer": ("activation",),
    "init_values": ("layer_scale",),
    "depth_token_only": ("class_attention_depth",),
    "first_stride": ("inner_stride",),
    "embed_dim": ("outer_dim",),
    "outer_dim": ("embed_dim",),
    "hidden_dim": ("embed_dim", "outer_dim"),
    "num_layers": ("depth",),
    "num_heads": ("outer_heads",),
    "num_heads_outer": ("outer_heads",),
    "num_heads_inner": ("inner_heads",),
    "label_names": ("class_names",),
}
# Notes that complete a suggestion.
TIMM_NOTES = {
    "input_shape": ", (height, width, channels)",
    "classes": ", or `class_names`",
    "pooling": ": None, 'avg', 'max' or 'token', with include_top=False",
}


def find_input_normalization(model: keras.Model) -> ImageNormalization:
    """Returns the model's `ImageNormalization`, the last one if it is built upon another model."""
    return [layer for layer in model.layers if isinstance(layer, ImageNormalization)][-1]


def non_default_arguments(signature: inspect.Signature, arguments: Mapping[str, Any]) -> dict:
    """Returns non-default arguments that affect the weights, as JSON-serializable values.

    Args:
        signature: signature of a family's builder.
        arguments: its arguments, or some of them.
    """
    changed = {
        p.name: arguments[p.name]
        for p in signature.parameters.values()
        if p.kind is p.KEYWORD_ONLY
        and p.name not in ARGUMENTS_WITHOUT_WEIGHTS
        and arguments.get(p.name, p.default) != p.default
    }
    return {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}


@keras.saving.register_keras_serializable(package="keras_tnt")
class ImageModel(keras.Model):
    """Functional model whose dtype policy is that of its layers, also when loaded or cloned.

    Keras neither accepts a policy for a functional model nor saves one, and `compile` reads the
    model's policy to decide about loss scaling, which `"mixed_float16"` needs.

    The first layer, `ImageNormalization`, checks the size of images on every backend.
    """

    def __init__(self, inputs, outputs, name=None, **kwargs):
        """Initializes a functional model; `ImageNormalization` determines its dtype policy."""
        super().__init__(inputs, outputs, name=name, **kwargs)
        input_layers = [layer for layer in self.layers if isinstance(layer, ImageNormalization)]
        if input_layers:
            self.dtype_policy = input_layers[-1].dtype_policy
        layers = [layer for layer in self.layers if not isinstance(layer, keras.layers.InputLayer)]
        if len(self.inputs) == 1 and isinstance(layers[0], ImageNormalization):
            self.input_spec = None  # The error of `ImageNormalization` is more helpful.

    def make_train_function(self, *args, **kwargs):
        """Returns Keras's train function; on JAX, errors do not lose the model's state."""
        return self._recovering("train_function", super().make_train_function, *args, **kwargs)

    def make_test_function(self, *args, **kwargs):
        """Returns Keras's test function; on JAX, errors do not lose the model's state."""
        return self._recovering("test_function", super().make_test_function, *args, **kwargs)

    def make_predict_function(self, *args, **kwargs):
        """Returns Keras's predict function; on JAX, errors do not lose the model's state."""
        return self._recovering("predict_function", super().make_predict_function, *args, **kwargs)

    def _recovering(self, name, make, *args, **kwargs):
        """Returns a step function that restores the model's state if it raises an error."""
        before = getattr(self, name)
        result = make(*args, **kwargs)
        made = getattr(self, name)
        if keras.backend.backend() != "jax" or made is before:
            return result
        setattr(self, name, recovering(self, made))
        return result and getattr(self, name)


def recovering(model: keras.Model, step: Callable) -> Callable:
    """Returns a JAX step function that restores the model's variables if it raises an error.

    Keras detaches the variables' values from the model during a step, and loses them if the first
    batch cannot be computed.

    Args:
        model: the model that is trained, evaluated or used for prediction.
        step: function from (values, iterator of batches) to the step's results and new values.
    """

    @functools.wraps(step)
    def step_or_recover(state, iterator):
        try:
            return step(state, iterator)
        except Exception:
            groups = [model.trainable_variables, model.non_trainable_variables]
            if len(state) > 3:
                groups.append(model.optimizer.variables)
            if len(state) > 2:
                groups.append(model.metrics_variables)
            for variables, values in zip(groups, state, strict=True):
                for variable, value in zip(variables, values, strict=True):
                    if not value.is_deleted():
                        variable.assign(value)
            model._jax_state_synced = True
            raise

    return step_or_recover


# Names of the layers of this package's models, by the input tensor that they are built upon.
_names_upon = weakref.WeakKeyDictionary()


def make_model(inputs, outputs, name: str) -> keras.Model:
    """Builds the model from its input, which may be the output of other layers.

    If a layer name is already used upstream of `inputs`, or by another model on the same input,
    every layer name is prefixed with the model's name.

    Args:
        inputs: Keras tensor of images.
        outputs: predictions or features.
        name: name of the model.
    """
    sources = keras.utils.get_source_inputs(inputs)
    ours = keras.Model(inputs, outputs).operations
    ours = [each for each in ours if not isinstance(each, keras.layers.InputLayer)]
    taken = set().union(*(_names_upon.get(source, ()) for source in sources))
    if not any(inputs is source for source in sources):
        taken |= {operation.name for operation in keras.Model(sources, inputs).operations}
    prefix, number = "", 0
    while taken & {prefix + each.name for each in ours}:
        prefix = f"{name}_{number}_" if number else f"{name}_"
        number += 1
    for each in ours if prefix else ():
        each.name = prefix + each.name
    for source in sources:
        _names_upon.setdefault(source, set()).update(each.name for each in ours)
    return ImageModel(sources[0] if len(sources) == 1 else sources, outputs, name=name)


def register_family(
    name: str,
    builder: Callable,
    variants: Mapping[str, Variant],
    image: ImageTransform,
    tensor_names: tuple[tuple[str, ...], ...] = (),
    checkpoints: tuple[Checkpoint, ...] = (),
    marker_tensors: tuple[tuple[str, str, str], ...] = (),
    source: str = "",
) -> Family:
    """Registers a model family, like the families of this package.

    Its models are then listed by `list_models`, built by `create_model` and `keras_tnt.<Function>`,
    and supported by every function and command of this package.

    Args:
        name: name such as "tnt"; the names of its variants begin with it and an underscore.
        builder: the family's function, decorated with `keras_tnt.models.builders.builder`.
        variants: dict from a name to a `keras_tnt.registry.Variant`: its architecture (keyword
            arguments of the builder) and the side of its images.
        image: `keras_tnt.registry.ImageTransform`: mean, standard deviation, crop.
        tensor_names: rows of (path of a variable or layer, name of the tensor in timm's
            checkpoints, name in the original release), as documented in `keras_tnt.weights.names`.
            Defaults to none.
        checkpoints: the public checkpoints, each a `keras_tnt.registry.Checkpoint`. Variants with
            one default to `weights="imagenet"`, others to `None`.
        marker_tensors: rows of (pattern of a tensor's name, argument of the builder, description
            of the tensor): a checkpoint contains such tensors if and only if the argument is true.
            Defaults to none.
        source: publication of the variants, for their docstrings. Defaults to none.

    Returns:
        The `keras_tnt.registry.Family`.

    Raises:
        ValueError: if a name is taken or is not a lower-case identifier.

    Example:
        >>> keras_tnt.register_family(
        ...     "toynet",
        ...     ToyNet,
        ...     variants={"toynet_tiny": Variant({"depth": 2}, image_size=64)},
        ...     image=ImageTransform(mean=(0.5,) * 3, std=(0.5,) * 3),
        ... )
        >>> keras_tnt.create_model("toynet_tiny")
    """
    family = Family(
        name=name,
        builder=builder,
        variants=variants,
        image=image,
        tensor_names=tuple(tensor_names),
        checkpoints=tuple(checkpoints),
        marker_tensors=tuple(marker_tensors),
        source=source,
        make_variant=variant_function,
    )
    registry.add(family)
    return family


def variant_function(family: Family, variant: str) -> Callable:
    """Returns the function of a variant, in the style of `keras.applications`."""
    row, function_name = family.variants[variant], family.function_name(variant)
    parameters = inspect.signature(family.builder).parameters
    unknown = set(row.architecture) - set(parameters)
    if unknown:
        raise ValueError(
            f"Variant '{variant}' has the argument {unknown.pop()!r}, which "
            f"{family.builder.__name__} has not."
        )
    public = any(checkpoint.model == function_name for checkpoint in family.checkpoints)
    own = {**row.architecture, "name": variant, "weights": "imagenet" if public else None}
    signature = inspect.Signature(
        [p.replace(default=own.get(p.name, p.default)) for p in parameters.values()],
        return_annotation=keras.Model,
    )
    common = [p.name for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    architecture = {
        p.name: p.default for p in signature.parameters.values() if p.name not in common
    }

    def build(*args, **kwargs):
        given = bind(function_name, signature, args, kwargs).arguments
        requested = {
            k: v
            for k, v in given.items()
            if k in architecture and k not in ARGUMENTS_WITHOUT_WEIGHTS
        }
        shape, tensor = given.get("input_shape"), given.get("input_tensor")
        size = (row.image_size, row.image_size)
        found = pretrained.find_variant_source(
            given.get("weights", own["weights"]),
            function_name,
            requested,
            architecture,
            image_sides(tensor, shape) or size,
        )
        arguments = {**row.architecture, "name": variant, **given, "weights": found}
        if found is not None:
            size = found.size or size
            arguments = {**found.arguments, **arguments}
            if found.classes and "classes" not in given and given.get("class_names") is None:
                if given.get("include_top", True):
                    arguments["classes"] = found.classes
        if shape is None and tensor is None:
            channels_first = keras.config.image_data_format() == "channels_first"
            arguments["input_shape"] = (3, *size) if channels_first else (*size, 3)
        with table_size(size):
            return family.builder(**arguments)

    build.__name__ = build.__qualname__ = function_name
    build.__module__ = family.builder.__module__
    build.__signature__ = signature
    build.__doc__ = variant_docstring(family, row)
    return build


def variant_docstring(family: Family, row: Variant) -> str:
    """Returns the docstring of a variant's function."""
    name = family.builder.__name__
    listed = ", ".join(f"{key}={value!r}" for key, value in row.architecture.items())
    where = f"{family.source}. " if family.source else ""
    return f"""`keras_tnt.{name}` with {listed}.

    {where}Takes {row.image_size}x{row.image_size} images by default.

    Args:
        weights: `"imagenet"`, for the public weights that fit the arguments and the image size; a
            name of `keras_tnt.list_weights()`; `"hf://owner/repository"` for a checkpoint of timm's
            on the Hugging Face hub, whose number and names of classes and image size become the
            defaults; a folder of that form, as `keras_tnt.save_pretrained` writes it; the path of
            a file (`.safetensors`, `.pth`, `.weights.h5`, `.keras`); or None (random).

    All other arguments are those of `keras_tnt.{name}`, which explains them.

    Returns:
        A `keras.Model`.

    Raises:
        ValueError: for sizes that do not fit each other, unknown values, and weights of another
            model.
        OSError: if weights cannot be downloaded.
    """


def image_sides(input_tensor, input_shape) -> tuple[int, int] | None:
    """Returns the (height, width) in a variant's arguments; `None` if they do not determine it."""
    shape = input_shape if input_tensor is None else input_tensor.shape[1:]
    if shape is None or len(shape) != 3 or not all(isinstance(side, int) for side in shape):
        return None
    channels_first = keras.config.image_data_format() == "channels_first"
    return tuple(shape[1:]) if channels_first else tuple(shape[:2])


def checkpoints_from_rows(rows: tuple[tuple[Any, ...], ...]) -> tuple[Checkpoint, ...]:
    """Returns `Checkpoint`s from rows of their leading attributes."""
    return tuple(Checkpoint(*row) for row in rows)
