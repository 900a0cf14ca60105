"""Published accuracies: the only table of them, read by weights, recipes and documents.

`published.csv` has a row for each measurement. `evaluated_by` is "authors" for the number in the
authors' paper or repository, or "timm" for timm's evaluation of the same weights. The two use
different crops: DeiT's authors 0.875, timm 0.9, or 1.0 for 384.
"""

import csv
import dataclasses
import functools
from pathlib import Path

TABLE = Path(__file__).parent / "published.csv"


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Published accuracy, in percent.

    Attributes:
        dataset: "imagenet", or the data set of a transfer.
        model: name of the variant, with the suffix `_distilled` or `_legacy` if it applies.
        image_size: side of the images in pixels.
        top1: top-1 accuracy.
        top5: top-5 accuracy, or `None` if it is not published.
        crop: ratio of the evaluation's center crop to the resized image's side, or `None` if it is
            not published.
        evaluated_by: "authors" or "timm".
        source: reference for the number.
    """

    dataset: str
    model: str
    image_size: int
    top1: float
    top5: float | None
    crop: float | None
    evaluated_by: str
    source: str


@functools.cache
def accuracies() -> tuple[Accuracy, ...]:
    """Returns the rows of the table."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(
            Accuracy(
                row["dataset"],
                row["model"],
                int(row["image_size"]),
                float(row["top1"]),
                float(row["top5"]) if row["top5"] else None,
                float(row["crop"]) if row["crop"] else None,
                row["evaluated_by"],
                row["source"],
            )
            for row in csv.DictReader(file)
        )


def accuracy(model: str, image_size: int, evaluated_by: str = "timm") -> Accuracy:
    """Returns the published ImageNet accuracy of a model.

    Args:
        model: name of the variant, with the suffix `_distilled` or `_legacy` if it applies.
        image_size: side of the images in pixels.
        evaluated_by: "timm" or "authors". Defaults to "timm".

    Raises:
        KeyError: if the table has none.
    """
    for row in accuracies():
        found = (row.dataset, row.model, row.image_size, row.evaluated_by)
        if found == ("imagenet", model, image_size, evaluated_by):
            return row
    raise KeyError(f"{TABLE.name} has no row for {model} at {image_size} by {evaluated_by}")


def accuracy_row(model: str, image_size: int, evaluated_by: str = "timm") -> tuple:
    """Returns (top-1, top-5, source), the last columns of a family's checkpoint table."""
    row = accuracy(model, image_size, evaluated_by)
    return row.top1, row.top5, row.source
