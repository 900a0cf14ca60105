"""Serving metadata of an exported model: classes, preprocessing and provenance."""

import keras

import keras_tnt
from keras_tnt.models.anatomy import anatomy, class_names
from keras_tnt.text import is_encodable, is_line


def describe(model, network, labels=None, weights=None):
    """Returns a model's metadata in JSON-serializable values.

    Args:
        model: the model that the user passed.
        network: its `serving_network`.
        labels: class names. Defaults to the model's own names, or numbers if it has none.
        weights: description of the weights' origin. Defaults to None.

    Returns:
        A dict. `mean` and `std` are those of pixels in [0, 1]: the caller has to normalize with
        them if `input` is "normalised", otherwise the model does. For a model of any image size,
        `image_size` is the size of encoded images; other sizes must be multiples of `multiple_of`.

    Raises:
        ValueError: if the number of labels is not the number of classes, or a label is not a line
            of text.
    """
    image = anatomy(model).image
    any_size = {"multiple_of": image.multiple_of} if image.multiple_of else {}
    return {
        "name": model.name,
        "weights": weights,
        "input": "pixels in [0, 255]" if image.normalizes else "normalised",
        "image_size": list(image.native_size),
        **any_size,
        "resized_to_cover": list(image.covered_size()),
        "channels": image.channels,
        "data_format": image.data_format,
        "mean": list(image.mean),
        "std": list(image.std),
        "labels": label_names(model, network, labels),
        "made_with": f"keras_tnt {keras_tnt.__version__}, keras {keras.__version__}",
    }


def label_names(model, network, labels):
    """Returns one name per class, or `None` for a model without a classifier."""
    if "probabilities" not in network.output:
        if labels is not None:
            raise ValueError(f"`labels` were given, but model '{network.name}' has no classifier.")
        return None
    classes = network.output["probabilities"].shape[-1]
    if labels is None:
        return class_names(model) or [str(number) for number in range(classes)]
    if isinstance(labels, str):
        raise ValueError(f"`labels` must be a list of names. Received: {labels!r}")
    labels = [str(label) for label in labels]
    if len(labels) != classes:
        raise ValueError(
            f"`labels` must name each of the model's {classes} classes. Received: {len(labels)} "
            "labels."
        )
    unfit = [label for label in labels if not is_line(label) or not is_encodable(label)]
    if unfit:
        raise ValueError(
            f"A label must be one line of text that is not blank. Received: {unfit[0]!r}"
        )
    return labels
