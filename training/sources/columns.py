"""Columns of tables that hold an encoded image and its label."""

IMAGES = ("image", "img")
LABELS = ("label", "labels", "fine_label")


def choose_columns(place, types, images, class_labels, layout=""):
    """Returns (image column, label column).

    The image is the column `image` or `img`, else the only one that can hold images. The label is
    the column `label`, `labels` or `fine_label` (CIFAR-100), else the only one with class names.

    Args:
        place: Location of the table, for messages.
        types: Dict from the name of a column to a description of its type.
        images: Names of the columns that can hold images.
        class_labels: Names of the columns that have class names.
        layout: Layout of the data set, appended to messages. Defaults to "".

    Raises:
        ValueError: If there is no such column, or several to choose from.
    """
    found = []
    for what, usual, typed, fitting in (
        ("image", IMAGES, images, images),
        ("label", LABELS, class_labels, types),
    ):
        named = [name for name in usual if name in fitting]
        chosen = named[:1] or list(typed)
        if len(chosen) != 1:
            raise ValueError(f"{place} {describe_problem(what, usual, chosen, types)}{layout}")
        found += chosen
    return tuple(found)


def describe_problem(what, usual, chosen, types):
    """Returns the reason why no column is chosen.

    Args:
        what: Name that the column should have.
        usual: Names that are recognized.
        chosen: Names of the columns to choose from.
        types: Dict from the name of a column to a description of its type.
    """
    if chosen:
        return f"has several {what} columns: {', '.join(chosen)}. Rename one of them {what!r}"
    wrong = next((name for name in usual if name in types), None)
    if wrong:
        return f"has a column {wrong!r} that is not an {what} column: its type is {types[wrong]}"
    return f"has no column {what!r}; it has {', '.join(types)}"
