"""Class names and replacement of a model's classifier."""

import warnings

import keras

from keras_tnt.layers import Predictions
from keras_tnt.models.anatomy import anatomy, count_outputs
from keras_tnt.models.arguments import check_class_names, check_sizes, resolve_classes


def set_class_names(model: keras.Model, names: list[str]) -> keras.Model:
    """Sets the names of the classes that a model predicts, without changing its weights.

    The names are saved with the model and used by `class_names`, `decode_predictions`,
    `save_pretrained`, exports and the command line. `reset_classifier`, in contrast, replaces the
    head.

    Args:
        model: a classifier of this package, or a functional or Sequential model around one.
        names: list of names, one per class, in the order of the model's outputs.

    Returns:
        The model.

    Raises:
        ValueError: for a model without a classifier of this package, and for names that are not one
            per class.

    Example:
        >>> model = keras_tnt.TNTTiny(classes=2)
        >>> keras_tnt.set_class_names(model, ["cat", "dog"])
        >>> keras_tnt.class_names(model)
        ['cat', 'dog']
    """
    checked_names = check_class_names(names)
    if checked_names is None:
        raise ValueError("`names` must be a list of names. Received: None")
    parts = anatomy(model)
    if not parts.heads:
        raise ValueError(
            f"Model '{model.name}' has no classifier whose classes could have names. Build one on "
            "it: keras.Sequential([model, keras.layers.Dense(classes)])."
        )
    classes, outputs = parts.heads[0].units, count_outputs(model)
    if outputs not in (None, classes):
        raise ValueError(
            f"Model '{model.name}' has {outputs} outputs, computed by layers of your own from the "
            f"{classes} classes of its classifier. Names are stored for the classifier only: build "
            "your layers on a model with include_top=False."
        )
    if len(checked_names) != classes:
        raise ValueError(
            f"`names` must name each class. Received: {len(checked_names)} names for the {classes} "
            f"classes of model '{model.name}'."
        )
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, Predictions)]
    for layer in layers:
        layer.class_names = checked_names
    if not layers:
        parts.input_normalization.class_names = checked_names
    return model


def reset_classifier(
    model: keras.Model,
    classes: int | None = None,
    class_names: list[str] | None = None,
    warn: bool = True,
) -> keras.Model:
    """Returns a model with new heads for other classes, which shares all other layers.

    Precision, activation, image size and frozen layers are preserved. A distilled model gets two
    new heads.

    Args:
        model: a classifier of this package, or a functional or Sequential model around one.
        classes: number of classes. Defaults to the number of names.
        class_names: names of the classes, stored in the model. If `None`, the classes are unnamed.
        warn: whether to warn if the number of classes stays the same, in which case
            `set_class_names` renames the classes of a trained head. Defaults to `True`.

    Returns:
        A new `keras.Model`. Training it also trains `model`, except for the heads.

    Raises:
        ValueError: for a model without a classifier, and for names that are not one per class.

    Example:
        >>> model = keras_tnt.TNTSmall()
        >>> model = keras_tnt.reset_classifier(model, class_names=["cat", "dog"])
    """
    class_names = check_class_names(class_names)
    classes = resolve_classes(classes, class_names, given=classes is not None)
    check_sizes(classes=classes)
    parts = anatomy(model)
    if not parts.heads:
        raise ValueError(
            f"Model '{model.name}' has no classifier to reset. Build one on it: keras.Sequential("
            "[model, keras.layers.Dense(classes)])."
        )
    if warn and classes == parts.heads[0].units:
        warnings.warn(
            f"`reset_classifier` replaces the head of model '{model.name}', which has {classes} "
            "classes already, by an untrained one. To name the classes and keep the head, call "
            "keras_tnt.set_class_names(model, names). To silence this warning, pass warn=False.",
            stacklevel=2,
        )
    owner = parts.model if parts.heads[0] in parts.model.layers else model
    if class_names and not isinstance(parts.predictions, Predictions):
        raise ValueError(
            f"The classifier of model '{model.name}' is a layer of your own, which keeps no names. "
            "Leave `class_names` out, and call keras_tnt.set_class_names on the result."
        )

    def renew(layer):
        if layer in parts.heads:
            return fresh_head(layer, classes)
        if layer is parts.predictions and isinstance(layer, Predictions):
            return Predictions.from_config(layer.get_config() | {"class_names": class_names})
        return rebuild(layer) if layer is owner else layer

    def rebuild(model):
        inputs = None if isinstance(model, keras.Sequential) else model.input
        return keras.models.clone_model(model, inputs, renew)

    return rebuild(model)


def fresh_head(head: keras.layers.Dense, classes: int) -> keras.layers.Dense:
    """Returns an untrained `Dense` layer like `head`, without LoRA and quantization."""
    policy = head.dtype_policy
    if isinstance(policy, keras.dtype_policies.QuantizedDTypePolicy):
        policy = policy.name.partition("_from_")[2]
    config = head.get_config() | {"units": classes, "dtype": policy}
    for trace in ("lora_rank", "lora_alpha", "quantization_config"):
        config.pop(trace, None)
    return keras.layers.Dense.from_config(config)
