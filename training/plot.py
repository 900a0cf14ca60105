"""Plots the curves of several runs in one picture.

python training/plot.py RUN... --output=comparison.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags  # noqa: E402

from training import commands  # noqa: E402

flags.DEFINE_string("output", "runs/comparison.png", "where the picture goes")

# Panels: (title, keys of metrics.jsonl).
PANELS = (
    ("training loss", ("loss",)),
    ("held-out accuracy", ("accuracy", "ema_accuracy")),
    ("learning rate", ("learning_rate",)),
    ("images per second", ("images_per_second",)),
)


def plot(runs, output):
    """Plots loss, accuracy, learning rate and speed of runs.

    Args:
        runs: Directories with a `metrics.jsonl`.
        output: Path of the picture.

    Returns:
        The path.

    Raises:
        ValueError: If a directory holds no run.
    """
    from training import regular
    from training.checkpoint import read_metrics

    reports = {}
    for run in runs:
        path = Path(run).expanduser() / "metrics.jsonl"
        if not regular.exists(path):
            raise ValueError(f"{run} is no directory of a run: it holds no metrics.jsonl")
        reports[str(run)] = read_metrics(path)
    import matplotlib

    from keras_tnt import figures

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, PANELS, strict=True):
        for number, (run, lines) in enumerate(reports.items()):
            for key, style in zip(keys, ("-", "--"), strict=False):
                points = [(line["epoch"], line[key]) for line in lines if key in line]
                if points:
                    name = figures.drawable(run)
                    label = name if key == keys[0] else f"{name}, moving average"
                    marker = "o" if len(points) < 2 else None  # a line needs two points
                    color = f"C{number % 10}"
                    points = zip(*points, strict=True)
                    axis.plot(*points, style, color=color, marker=marker, label=label)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize="small")
    output = Path(output).expanduser()
    figures.save(figure, output, dpi=120)
    pyplot.close(figure)
    return output


def main(runs):
    """Plots the runs given as arguments, and prints the path of the picture."""
    if not runs:
        raise ValueError("name one or more directories of runs")
    print(plot(runs, flags.FLAGS.output))


if __name__ == "__main__":
    commands.run(main)
