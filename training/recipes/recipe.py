"""What a recipe is."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Values for the trainer's configuration, and what they are for.

    Args:
        command: how to run it, on what the result was published for.
        source: where the values stand.
        result: what it aims for.
        values: of flags, by their names.
    """

    command: str
    source: str
    result: str
    values: dict
