"""Measures a forward pass by batch, image size and depth, for keras_tnt and timm.

    python benchmarks/curves.py                        # JAX and timm, eager
    python benchmarks/curves.py --runtimes="torch,timm compiled"

The rows of a point take turns, as in speed.py. Writes results/curves.json and curves.png.
"""

import argparse
import statistics
from pathlib import Path

import speed
from speed import BASE

from keras_tnt.files import replacing

AXES = {
    "batch": (1, 4, 8, 16, 64),
    "image_size": (112, 224, 320, 448),
    "depth": (6, 12, 24),
}
LABELS = {"batch": "batch", "image_size": "side of the images in pixels", "depth": "blocks"}


def main():
    """Measures every point, and writes the results and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--models", type=words, default=list(speed.MODELS))
    parser.add_argument("--runtimes", type=words, default=["jax", "timm"])
    parser.add_argument("--precision", choices=speed.PRECISIONS, default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=speed.RESULTS / "curves.json")
    options = parser.parse_args()
    points = [BASE]  # the point that all axes share
    points += [
        {**BASE, axis: value}
        for axis, values in AXES.items()
        for value in values
        if value != BASE[axis]
    ]
    rows = []
    for number, point in enumerate(points):
        speed.say(f"point {number + 1}/{len(points)}: {point}")
        rows += measure(point, options)
    speed.write(options.out, {"rows": rows})
    draw(rows, options.out.with_suffix(".png"))
    print(f"{options.out}\n{options.out.with_suffix('.png')}")


def measure(point, options):
    """Returns rows with the median milliseconds of a point, by model and installed runtime."""
    tasks = [
        {**point, "model": model, "runtime": runtime, "precision": options.precision}
        for model in options.models
        for runtime in options.runtimes
        if speed.installed(runtime)
    ]
    found = speed.race([{"mode": "inference", **task} for task in tasks], options.rounds)
    return [{**row, "milliseconds": 1000 * statistics.median(row.pop("seconds"))} for row in found]


def draw(rows, path):
    """Plots milliseconds per image along each axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(AXES), figsize=(13, 4.2), layout="constrained")
    lines = dict.fromkeys((row["model"], row["runtime"]) for row in rows)
    colors = dict(zip(dict.fromkeys(model for model, _ in lines), ("C0", "C1"), strict=False))
    styles = dict(zip(dict.fromkeys(runtime for _, runtime in lines), ("-o", "--s"), strict=False))
    for panel, (axis, values) in zip(panels, AXES.items(), strict=True):
        rest = {key: value for key, value in BASE.items() if key != axis}
        on_axis = [row for row in rows if all(row[key] == value for key, value in rest.items())]
        for model, runtime in lines:
            line = {
                row[axis]: row["milliseconds"] / row["batch"]
                for row in on_axis
                if (row["model"], row["runtime"]) == (model, runtime)
            }
            label = f"{speed.MODELS[model].title}, {speed.title(runtime)}"
            xs = sorted(line)
            panel.plot(xs, [line[x] for x in xs], styles[runtime], color=colors[model], label=label)
        panel.set_xlabel(LABELS[axis])
        panel.set_xscale("log", base=2)
        panel.set_xticks(values, [str(value) for value in values])
        panel.minorticks_off()
        panel.set_ylim(0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds an image")
    panels[1].legend(loc="upper left")
    figure.suptitle(
        "Cost of a forward pass; where nothing else is said: batch {batch}, "
        "{image_size}x{image_size}, {depth} blocks".format(**BASE)
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


if __name__ == "__main__":
    main()
