"""ImageNet's class names."""

import functools
from pathlib import Path

CLASSES = Path(__file__).parent / "imagenet_classes.txt"


@functools.cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """Returns the 1,000 ImageNet classes as (WordNet id, name), in the models' output order."""
    lines = CLASSES.read_text(encoding="utf-8").splitlines()
    return tuple(tuple(line.split(" ", 1)) for line in lines)
