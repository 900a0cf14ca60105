"""Picture of the import layers, drawn from the actual imports."""

from tests.helpers.import_layers import LAYERS, imports_between_modules

WIDTH, ROW, TOP = 860, 84, 30
BOX_HEIGHT, GAP, LETTER = 34, 14, 7.6


def places():
    """Returns {module: (left, top, width)} of each box, the lowest layer at the bottom."""
    found = {}
    for number, rooms in enumerate(LAYERS):
        widths = [max(64, LETTER * len(room) + 20) for room in rooms]
        left = (WIDTH - sum(widths) - GAP * (len(rooms) - 1)) / 2
        top = TOP + (len(LAYERS) - 1 - number) * ROW
        for room, width in zip(rooms, widths, strict=True):
            found[room] = (left, top, width)
            left += width + GAP
    return found


def needed(imports):
    """Returns the imports that no chain of other imports implies."""

    def reaches(room, goal, seen):
        if room == goal:
            return True
        seen.add(room)
        return any(
            reaches(other, goal, seen) for other in imports.get(room, ()) if other not in seen
        )

    return {
        (room, used)
        for room, all_used in imports.items()
        for used in all_used
        if not any(reaches(other, used, {room}) for other in all_used - {used})
    }


def draw():
    """Returns the picture, as SVG in one line of Markdown.

    Inside a `<div>`, Markdown does not interpret names such as `__main__`.
    """
    boxes, imports = places(), imports_between_modules()
    strong = needed(imports)
    height = TOP + len(LAYERS) * ROW
    parts = [
        f'<div><svg class="import-layers" viewBox="0 0 {WIDTH} {height}" role="img" '
        'aria-label="Modules of keras_tnt by layer; every line is an import.">'
    ]
    for number in range(len(LAYERS)):
        top = TOP + number * ROW - (ROW - BOX_HEIGHT) / 2
        parts.append(f'<rect class="layer" x="0" y="{top:.0f}" width="{WIDTH}" height="{ROW}"/>')
    edges = [(room, used) for room, all_used in imports.items() for used in sorted(all_used)]
    for room, used in sorted(edges, key=lambda edge: edge in strong):
        (left, top, width), (left_, top_, width_) = boxes[room], boxes[used]
        x, x_, y, y_ = left + width / 2, left_ + width_ / 2, top + BOX_HEIGHT, top_
        if top == top_:  # both in one layer: a curve below them
            y = y_ = top + BOX_HEIGHT
            bow = f"C{x:.0f} {y + 22:.0f} {x_:.0f} {y + 22:.0f} {x_:.0f} {y:.0f}"
        else:
            middle = (y + y_) / 2
            bow = f"C{x:.0f} {middle:.0f} {x_:.0f} {middle:.0f} {x_:.0f} {y_:.0f}"
        kind = "import" if (room, used) in strong else "import short"
        parts.append(
            f'<path class="{kind}" d="M{x:.0f} {y:.0f}{bow}">'
            f"<title>{room} imports {used}</title></path>"
        )
    for room, (left, top, width) in boxes.items():
        parts.append(
            f'<g class="room"><rect x="{left:.0f}" y="{top}" width="{width:.0f}" '
            f'height="{BOX_HEIGHT}" rx="6"/><text x="{left + width / 2:.0f}" '
            f'y="{top + BOX_HEIGHT / 2 + 5:.0f}">{room}</text></g>'
        )
    return "".join([*parts, "</svg></div>"])
