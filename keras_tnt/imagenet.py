"""ImageNet's classes."""

import functools
from pathlib import Path

CLASSES = Path(__file__).parent / "imagenet_classes.txt"


@functools.cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """The 1,000 classes of ImageNet in the order of the models: (WordNet id, name) each."""
    lines = CLASSES.read_text(encoding="utf-8").splitlines()
    return tuple(tuple(line.split(" ", 1)) for line in lines)
