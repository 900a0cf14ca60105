"""Writes the table of public weights to the README.

Usage: `python tools/write_weights_table.py README.md`
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"


def with_table(text: str, table: str) -> str:
    """Returns a text with a table between its markers.

    Args:
        text: a text that contains the markers, such as the README.
        table: the table in Markdown.

    Raises:
        ValueError: if the text does not contain each marker exactly once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"The text must have {BEGIN} and {END} once each.")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main(paths: list[str]) -> None:
    """Rewrites the table in each of the files."""
    sys.path.insert(0, str(ROOT))
    import keras_tnt

    table = keras_tnt.list_weights().markdown()
    for path in map(Path, paths):
        path.write_text(with_table(path.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
