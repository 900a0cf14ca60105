"""What whoever serves a model has to know about it: metadata beside the file or in it."""

import keras

import keras_tnt
from keras_tnt.anatomy import anatomy, class_names
from keras_tnt.text import is_encodable, is_line


def describe(model, network, labels=None, weights=None):
    """A model's card, in values that JSON can hold.

    Args:
        model: what the user handed over.
        network: its `serving_network`.
        labels: names of the classes; None: the model's own, else numbers.
        weights: where the weights come from, in words.

    Returns:
        A dict; `mean` and `std` are what the model normalises pixels in [0, 1] by, or what has to
        be done to them before where `input` says "normalised". Of a model of images of any size
        `image_size` is the one for encoded images, and others are those of `multiple_of`.

    Raises:
        ValueError: if there are not as many labels as classes.
    """
    image = anatomy(model).image
    any_size = {"multiple_of": image.multiple_of} if image.multiple_of else {}
    return {
        "name": model.name,
        "weights": weights,
        "input": "pixels in [0, 255]" if image.normalises else "normalised",
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
    """The names of the classes, one each; None for a model without a classifier."""
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
