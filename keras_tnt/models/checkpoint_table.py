"""List of the public checkpoints, printed as a table."""

import fnmatch

from keras_tnt.models import registry


class CheckpointTable(list):
    """List of `Checkpoint` with a table as its representation."""

    columns = ("weights", "model", "image", "parameters", "top-1", "top-5")

    def cells(self):
        """Yields the table cells of each row."""
        for row in self:
            yield (
                row.name,
                row.call,
                f"{row.size}x{row.size}",
                f"{row.parameters / 1e6:.1f}M",
                f"{row.top1:.1f}",
                f"{row.top5:.1f}",
            )

    def __repr__(self):
        """Returns the table with aligned columns."""
        rows = [self.columns, *self.cells()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.columns))]
        lines = []
        for row in rows:
            left = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
            right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
            lines.append("  ".join(left + right))
        return "\n".join(lines)

    def markdown(self):
        """Returns the table in Markdown, as in the README."""
        rows = [self.columns, ("---", "---", "--:", "--:", "--:", "--:")]
        rows += [(f"`{name}`", f"`{model}`", *rest) for name, model, *rest in self.cells()]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def list_weights(pattern: str | None = None) -> CheckpointTable:
    """Returns the public checkpoints that `weights=` accepts by name.

    Args:
        pattern: shell pattern of a checkpoint's name or of its model's name in either spelling:
            `"deit*384*"`, `"TNTSmall"`, `"tnt_small"`. Defaults to all.

    Returns:
        A list of rows with a table as its representation. A row has `name`, `model`, `arguments`,
        `size`, `parameters`, `top1`, `top5` (published, in percent), `source`, `repository`,
        `file`, `license` and `sha256`.

    Raises:
        ValueError: if there is no such checkpoint.

    Example:
        >>> keras_tnt.list_weights("tnt_base")
        weights                 model      image  parameters  top-1  top-5
        tnt_b_patch16_224.in1k  TNTBase  224x224       65.4M   82.9   96.3
    """
    found = CheckpointTable()
    for family in registry.families():
        spelt = {family.function_name(variant): variant for variant in family.variants}
        for row in family.checkpoints:
            names = row.name, row.architecture, row.model, spelt.get(row.model, row.model)
            if pattern is None or any(fnmatch.fnmatchcase(name, pattern) for name in names):
                found.append(row)
    if not found:
        known = ", ".join(dict.fromkeys(row.model for row in registry.checkpoints()))
        raise ValueError(f"There are no public weights of {pattern!r}. There are some of: {known}.")
    return found
