"""Dataclass of a recipe."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Values of the trainer's configuration, with their source and the published result.

    Args:
        command: Command that runs it, on the data of the published result.
        source: Source of the values.
        result: Published result.
        values: Dict from flag name to value.
    """

    command: str
    source: str
    result: str
    values: dict
