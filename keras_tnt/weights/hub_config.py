"""Parser of a hub repository's config.json in timm's format, as untrusted input."""

import dataclasses
import json

from keras_tnt.text import is_encodable, printable

# Values beyond these limits are rejected before anything is allocated.
LARGEST_FILE = 16 * 2**20  # bytes
MOST_CLASSES = 200_000
LARGEST_SIDE = 4096  # pixels
CHANNELS = (1, 3)
LARGEST_STATISTIC = 1000.0
SMALLEST_CROP = 1e-3
SMALLEST_STD = 1e-4


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """Description of a model by its config.json; absent fields are `None`.

    Attributes:
        architecture: timm's name, without the tag of the weights after a dot.
        classes: number of classes; 0 for a model without a classifier.
        size: (height, width) of the input images in pixels.
        mean, std: per-channel statistics of images, for pixels in [0, 1].
        crop: ratio of the center crop to the resized image, in (0, 1].
        interpolation: name of the resize filter.
        label_names: class names in order.
        label_descriptions: dict from label names to descriptions, for some or all of them.
    """

    architecture: str | None = None
    classes: int | None = None
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop: float | None = None
    interpolation: str | None = None
    label_names: tuple[str, ...] | None = None
    label_descriptions: dict[str, str] | None = None

    @property
    def class_names(self):
        """Returns the display names of the classes, descriptions where available; or `None`."""
        if self.label_names is None:
            return None
        return tuple((self.label_descriptions or {}).get(name, name) for name in self.label_names)


def parse_config(data: bytes, origin: str) -> HubConfig:
    """Parses a config.json.

    Args:
        data: content of the file.
        origin: source of the file, for messages.

    Returns:
        A `HubConfig`.

    Raises:
        ValueError: if the content is not UTF-8, not JSON or not an object, or if a field of
            `HubConfig` has the wrong type or is out of bounds.
    """
    try:
        return read_fields(parse_json(data))
    except ValueError as error:
        raise ValueError(
            f"The config.json of {printable(origin)} cannot be used: {error}"
        ) from error


def parse_json(data):
    """Returns the JSON object in `data`; raises a `ValueError` for other or too large content."""
    if len(data) > LARGEST_FILE:
        raise ValueError(f"it has {len(data):,} bytes, more than {LARGEST_FILE:,}.")
    try:
        config = json.loads(data.decode("utf-8"), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error}).") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply.") from error
    return as_object("the whole", config)


def refuse_constant(name):
    """Raises a `ValueError` for NaN and Infinity, which are not JSON."""
    raise ValueError(f"it holds {name}, which is no JSON.")


def read_fields(config):
    """Returns the `HubConfig` of a JSON object; raises a `ValueError` for invalid fields."""
    arguments = told(config, "model_args", as_object) or {}
    # Earlier versions of timm wrote the fields of `pretrained_cfg` at the top level.
    pretrained = told(config, "pretrained_cfg", as_object) or config
    everything = pretrained | config
    architecture = told(config, "architecture", as_text)
    size = told(arguments, "img_size", as_size)
    if size is None:
        size = told(pretrained, "input_size", as_size)
    classes = told(everything, "num_classes", as_whole, 0, MOST_CLASSES)
    mean = told(pretrained, "mean", as_statistics, -LARGEST_STATISTIC)
    std = told(pretrained, "std", as_statistics, SMALLEST_STD)
    if mean and std and len(mean) != len(std):
        raise ValueError(f"`mean` has {len(mean)} numbers, `std` {len(std)}.")
    names = told(everything, "label_names", as_names)
    if None not in (names, classes) and len(names) != classes:
        raise ValueError(f"`label_names` has {len(names)} names for {classes} classes.")
    return HubConfig(
        architecture=architecture and architecture.partition(".")[0],
        classes=classes,
        size=size,
        mean=mean,
        std=std,
        crop=told(pretrained, "crop_pct", as_number, SMALLEST_CROP, 1.0),
        interpolation=told(pretrained, "interpolation", as_text),
        label_names=names,
        label_descriptions=told(everything, "label_descriptions", as_texts),
    )


def told(config, name, read, *bounds):
    """Returns a field's value, parsed by one of the functions below; `None` if it is absent."""
    value = config.get(name)
    return None if value is None else read(name, value, *bounds)


# === Field parsers, which raise a ValueError for other values ===


def wrong(name, kind, value):
    """Returns the `ValueError` for a value of the wrong type or out of bounds."""
    return ValueError(f"`{name}` must be {kind}. It is {printable(value)}.")


def as_object(name, value):
    """Returns a dict."""
    if not isinstance(value, dict):
        raise wrong(name, "an object", value)
    return value


def as_text(name, value):
    """Returns a non-blank string that UTF-8 can encode."""
    # JSON may contain lone surrogates, which no file can.
    if not isinstance(value, str) or not is_encodable(value) or not value.strip():
        raise wrong(name, "a text", value)
    return value


def as_texts(name, value):
    """Returns a dict of non-blank strings."""
    return {key: as_text(name, text) for key, text in as_object(name, value).items()}


def as_names(name, value):
    """Returns a tuple of names, from a list or from an object with class indices as keys."""
    if isinstance(value, dict):
        numbers = [str(number) for number in range(len(value))]
        if set(value) != set(numbers):
            raise ValueError(f"the keys of `{name}` must be the numbers 0 to {len(value) - 1}.")
        value = [value[number] for number in numbers]
    if not isinstance(value, list):
        raise wrong(name, "a list of texts", value)
    return tuple(as_text(name, text) for text in value)


def as_whole(name, value, least, most):
    """Returns an integer in [least, most]; bools are rejected."""
    if type(value) is not int or not least <= value <= most:
        raise wrong(name, f"a whole number from {least:,} to {most:,}", value)
    return value


def as_size(name, value):
    """Returns (height, width) from one side, two sides, or (channels, height, width)."""
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) not in (2, 3):
        raise wrong(name, "two sides, or channels and two sides", value)
    return tuple(as_whole(name, side, 1, LARGEST_SIDE) for side in sides[-2:])


def as_number(name, value, least, most):
    """Returns a float in [least, most]; bools are rejected."""
    # The comparison rejects NaN too.
    if type(value) not in (int, float) or not least <= value <= most:
        raise wrong(name, f"a number from {least:g} to {most:g}", value)
    return float(value)


def as_statistics(name, value, least):
    """Returns a tuple of 1 or 3 floats, at least `least`."""
    if not isinstance(value, list) or len(value) not in CHANNELS:
        raise wrong(name, "a list of 3 numbers, one a channel, or of 1", value)
    return tuple(as_number(name, number, least, LARGEST_STATISTIC) for number in value)
