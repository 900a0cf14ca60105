"""`keras-tnt list`: lists the available models."""

import json

HELP = "the models of published sizes, what they cost, and their public weights"
# Columns of the table, by their names for --sort.
COLUMNS = {
    "name": "name",
    "image": "image_size",
    "parameters": "parameters",
    "macs": "multiply_accumulates",
    "top1": "top1",
}


def add_arguments(parser):
    """Adds the subcommand's arguments to a parser."""
    parser.add_argument(
        "pattern", nargs="?", metavar="PATTERN", help="of models or families, such as 'deit*'"
    )
    parser.add_argument(
        "--sort",
        metavar="COLUMN",
        choices=[sign + name for name in COLUMNS for sign in ("", "-")],
        help=f"sort by {', '.join(COLUMNS)}; with a minus before it, the largest first: "
        "--sort=-top1",
    )
    parser.add_argument(
        "--with_weights", action="store_true", help="leave out models without public weights"
    )
    parser.add_argument(
        "--max_parameters", type=float, metavar="MILLIONS", help="leave out larger models"
    )
    parser.add_argument(
        "--max_macs", type=float, metavar="BILLIONS", help="leave out models that compute more"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options):
    """Prints the table and returns exit status 0."""
    from keras_tnt.models import registry

    names = registry.list_models(options.pattern)
    if not names:
        raise ValueError(
            f"No model is called {options.pattern!r}. "
            f"{registry.nearest(options.pattern.strip('*'), registry.list_models())}"
        )
    found = [about(name) for name in names]
    found = [row for row in found if fits(row, options)]
    if options.sort:
        column = COLUMNS[options.sort.lstrip("-")]
        known = [row for row in found if row[column] is not None]
        unknown = [row for row in found if row[column] is None]
        known.sort(key=lambda row: row[column], reverse=options.sort.startswith("-"))
        found = known + unknown
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print(table(found))
    return 0


def fits(row, options):
    """Returns whether a row passes the filters; unknown costs pass."""
    parameters, macs = row["parameters"], row["multiply_accumulates"]
    return not (
        (options.with_weights and not row["weights"])
        or (options.max_parameters and parameters and parameters > 1e6 * options.max_parameters)
        or (options.max_macs and macs and macs > 1e9 * options.max_macs)
    )


def table(rows):
    """Returns rows as an aligned table in text."""
    cells = [("name", "image", "parameters", "GMACs", "top-1", "weights")]
    for row in rows:
        parameters, macs, top1 = row["parameters"], row["multiply_accumulates"], row["top1"]
        cells.append(
            (
                row["name"],
                f"{row['image_size']}x{row['image_size']}",
                f"{parameters / 1e6:.1f}M" if parameters else "-",
                f"{macs / 1e9:.2f}" if macs else "-",
                f"{top1:.1f}" if top1 else "-",
                ", ".join(row["weights"]) or "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *numbers, weights in cells:
        middle = [cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *middle, weights]))
    return "\n".join(lines)


def about(name):
    """Returns the description of a variant without building it.

    Args:
        name: name of the variant.

    Returns:
        A JSON-serializable dict. `top1` is that of the variant's default weights.
    """
    from keras_tnt.models import registry

    family = next(family for family in registry.families() if name in family.variants)
    function, row = family.function_name(name), family.variants[name]
    weights = [each for each in family.checkpoints if each.model == function]
    default = [each for each in weights if not each.arguments]
    default.sort(key=lambda each: abs(each.size - row.image_size))
    return {
        "name": name,
        "function": f"keras_tnt.{function}",
        "family": family.name,
        "image_size": row.image_size,
        "parameters": row.cost and row.cost.parameters,
        "multiply_accumulates": row.cost and row.cost.multiply_accumulates,
        "top1": default[0].top1 if default else None,
        "weights": [each.name for each in weights],
    }
