"""Published accuracies of the recipes.

They are in the library's table, `keras_tnt/models/published.csv`, which is read here without
importing the library, because Keras would delay `--help`.
"""

import csv
import functools
from pathlib import Path

TABLE = Path(__file__).resolve().parents[2] / "keras_tnt" / "models" / "published.csv"
DATASETS = {"imagenet": "", "cifar10": " on CIFAR-10", "cifar100": " on CIFAR-100"}
DATASETS |= {"flowers": " on Flowers", "pets": " on Pets", "inaturalist": " on iNaturalist 2019"}


@functools.cache
def rows():
    """Returns the rows of the table as dicts of strings."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def result(model, image_size, dataset="imagenet"):
    """Returns every published accuracy of a model at an image size, as text.

    Args:
        model: Name of the variant, with `_distilled` if it is distilled.
        image_size: Side of the images in pixels.
        dataset: Data set of the table. Defaults to "imagenet".
    """
    wanted = (dataset, model, str(image_size))
    found = [row for row in rows() if (row["dataset"], row["model"], row["image_size"]) == wanted]
    if not found:
        return f"no published result at {image_size}"
    return "; ".join(
        f"{row['top1']}% top-1{DATASETS[dataset]} at {image_size}"
        + (f", crop {row['crop']}" if row["crop"] else "")
        + f" ({row['evaluated_by']}: {row['source']})"
        for row in found
    )
