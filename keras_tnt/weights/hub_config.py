"""The config.json of a repository of the hub, in timm's form, read without trust."""

import dataclasses
import json

from keras_tnt.text import is_encodable, printable

# What lies beyond these is taken for an attack or a mistake, before anything is allocated.
LARGEST_FILE = 16 * 2**20  # bytes
MOST_CLASSES = 200_000
LARGEST_SIDE = 4096  # pixels
CHANNELS = (1, 3)
LARGEST_STATISTIC = 1000.0
SMALLEST_CROP = 1e-3
SMALLEST_STD = 1e-4


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """What a config.json tells of a model; None where it tells nothing.

    Attributes:
        architecture: timm's name of it, without the name of the weights behind a dot.
        classes: number of classes; 0 for a model without a classifier.
        size: (height, width) of its images in pixels.
        mean, std: of its images' channels, for pixels in [0, 1].
        crop: share of the image that the centre crop keeps, in (0, 1].
        interpolation: name of the filter that resizes its images.
        label_names: the names of the classes, in their order.
        label_descriptions: dict from names to what they mean, for some or all of them.
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
        """What people call the classes: their descriptions where there are any; or None."""
        if self.label_names is None:
            return None
        return tuple((self.label_descriptions or {}).get(name, name) for name in self.label_names)


def parse_config(data: bytes, origin: str) -> HubConfig:
    """Read a config.json.

    Args:
        data: its bytes.
        origin: where it comes from, for messages.

    Raises:
        ValueError: if it is not UTF-8, not JSON, not an object, or if one of the values that
            `HubConfig` has is of another kind or out of bounds.
    """
    try:
        return read_fields(parse_json(data))
    except ValueError as error:
        raise ValueError(
            f"The config.json of {printable(origin)} cannot be used: {error}"
        ) from error


def parse_json(data):
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
    raise ValueError(f"it holds {name}, which is no JSON.")


def read_fields(config):
    arguments = told(config, "model_args", as_object) or {}
    # timm once wrote the fields of `pretrained_cfg` beside the others.
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
    """The value of a name, read as one of the kinds below; None where there is none."""
    value = config.get(name)
    return None if value is None else read(name, value, *bounds)


# === Values of one kind ===


def wrong(name, kind, value):
    return ValueError(f"`{name}` must be {kind}. It is {printable(value)}.")


def as_object(name, value):
    if not isinstance(value, dict):
        raise wrong(name, "an object", value)
    return value


def as_text(name, value):
    # JSON may hold halves of characters, which no file can.
    if not isinstance(value, str) or not is_encodable(value) or not value.strip():
        raise wrong(name, "a text", value)
    return value


def as_texts(name, value):
    return {key: as_text(name, text) for key, text in as_object(name, value).items()}


def as_names(name, value):
    """Names from a list, or from an object whose keys are the numbers of the classes."""
    if isinstance(value, dict):
        numbers = [str(number) for number in range(len(value))]
        if set(value) != set(numbers):
            raise ValueError(f"the keys of `{name}` must be the numbers 0 to {len(value) - 1}.")
        value = [value[number] for number in numbers]
    if not isinstance(value, list):
        raise wrong(name, "a list of texts", value)
    return tuple(as_text(name, text) for text in value)


def as_whole(name, value, least, most):
    if type(value) is not int or not least <= value <= most:
        raise wrong(name, f"a whole number from {least:,} to {most:,}", value)
    return value


def as_size(name, value):
    """(height, width) from a side, two of them, or (channels, height, width)."""
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) not in (2, 3):
        raise wrong(name, "two sides, or channels and two sides", value)
    return tuple(as_whole(name, side, 1, LARGEST_SIDE) for side in sides[-2:])


def as_number(name, value, least, most):
    # NaN is not between any two numbers.
    if type(value) not in (int, float) or not least <= value <= most:
        raise wrong(name, f"a number from {least:g} to {most:g}", value)
    return float(value)


def as_statistics(name, value, least):
    if not isinstance(value, list) or len(value) not in CHANNELS:
        raise wrong(name, "a list of 3 numbers, one a channel, or of 1", value)
    return tuple(as_number(name, number, least, LARGEST_STATISTIC) for number in value)
