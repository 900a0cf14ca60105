"""Plots of a run: confusion matrix, most confident errors, learning curves, rate finder."""

import numpy as np

from keras_tnt import figures

# Up to NAMED classes, each has a labeled row with counts in its cells.
NAMED = 30
CELL = 0.45  # inches
PAIRS = 25
GROUPS = 100
MOST_COLUMNS = 6
SHADE = "Blues"


def confusion(matrix, names, path):
    """Plots the confusion matrix and the pairs of classes that are confused most often.

    Args:
        matrix: Integers (n, n), rows the true classes, columns the predicted ones.
        names: Names of the n classes.
        path: Path of the PNG.
    """
    plt = pyplot()
    number = len(names)
    width = height = 10
    if number <= NAMED:
        cells, longest = max(CELL * number, 3.5), max(len(shortened(name, 24)) for name in names)
        width, height = cells + 0.085 * longest + 2.4, cells + 0.08 * longest + 1.6
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(width + 7, height), width_ratios=(width, 6.5), layout="constrained"
    )
    total, right_answers = int(matrix.sum()), int(np.trace(matrix))
    accuracy = f"{right_answers / total:.2%}" if total else "none"
    figure.suptitle(
        f"Confusion matrix: accuracy {accuracy} ({right_answers:,} of {total:,} images, "
        f"{number:,} classes)"
    )
    if number > NAMED:
        confusion_of_many(left, matrix)
    else:
        confusion_of_few(left, matrix, names)
    most_often(right, matrix, names)
    save(figure, path)


def confusion_of_few(axes, matrix, names):
    """Plots a confusion matrix with the names of all classes and all counts."""
    number = len(names)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share, cmap=SHADE, norm=square_root(1), interpolation="nearest")
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.6, label="share of the true class")
    bar.set_ticks([0, 0.01, 0.05, 0.2, 0.5, 1], labels=["0", "1%", "5%", "20%", "50%", "100%"])
    axes.set(xlabel="predicted", ylabel="true")
    short = [shortened(name, 24) for name in names]
    upright = max(map(len, short)) <= 2
    turned = {} if upright else {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(number), short, **turned)
    axes.set_yticks(range(number), short)
    axes.set_xticks(np.arange(number - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(number - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="0.88", lw=0.6)
    axes.tick_params(which="minor", length=0)
    points = 72 * max(CELL, 3.5 / number)
    size = min(13, points / (0.75 * len(str(matrix.max()))))
    for (row, column), count in np.ndenumerate(matrix):
        if count:
            ink = ink_on(image.cmap(image.norm(share[row, column])))
            text = axes.text(column, row, count, ha="center", va="center", color=ink, fontsize=size)
            text.set_in_layout(False)  # it is inside its cell


def square_root(most):
    """Returns a square-root color norm, which makes rare confusions visible."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, 0, most)


def ink_on(color):
    """Returns black or white, whichever contrasts more with an RGB color (WCAG luminance)."""
    parts = np.array(color[:3])
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ (0.2126, 0.7152, 0.0722))
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"


def confusion_of_many(axes, matrix):
    """Plots wrong predictions only, summed over blocks of neighboring classes."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import NullLocator

    number, size = len(matrix), -(-len(matrix) // GROUPS)
    apart = np.pad(matrix - np.diag(np.diag(matrix)), (0, -number % size))
    count = len(apart) // size
    together = apart.reshape(count, size, count, size).sum(axis=(1, 3))
    image = axes.imshow(
        np.where(together, together, np.nan),
        cmap="viridis_r",
        norm=LogNorm(1, max(2, together.max())),
        interpolation="nearest",
        extent=(-0.5, count * size - 0.5, count * size - 0.5, -0.5),
    )
    axes.plot([-0.5, number - 0.5], [-0.5, number - 0.5], color="0.8", lw=0.8, zorder=0)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.6, label="wrong predictions (logarithmic)")
    steps = [digit * 10**power for power in range(10) for digit in (1, 2, 5)]
    steps = [step for step in steps if step <= max(2, together.max())]
    bar.set_ticks(steps, labels=[f"{step:,}" for step in steps])
    bar.ax.yaxis.set_minor_locator(NullLocator())
    squares = "" if size == 1 else f"; a square stands for {size}×{size} classes"
    axes.set_title(f"Wrong predictions only{squares}", fontsize=10)
    axes.set(xlabel="predicted (class index, from 0)", ylabel="true (class index, from 0)")


def most_often(axes, matrix, names):
    """Plots the pairs of classes that are confused most often, as bars."""
    apart = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-apart, axis=None, kind="stable")[:PAIRS]
    pairs = [divmod(int(place), len(names)) for place in order if apart.flat[place]]
    axes.spines[["top", "right"]].set_visible(False)
    if not pairs:
        axes.axis("off")
        axes.text(0.5, 0.5, "No image is misclassified.", ha="center", va="center")
        return
    bars = axes.barh(range(len(pairs)), [apart[pair] for pair in pairs], color="C3")
    axes.bar_label(bars, padding=3, fontsize=8)
    labels = [" → ".join(shortened(names[each], 22) for each in pair) for pair in pairs]
    axes.set_yticks(range(len(pairs)), labels, fontsize=8)
    axes.set_ylim(max(len(pairs), 5) - 0.4, -0.6)
    axes.margins(x=0.1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("images")
    axes.set_title("Most often confused: true → predicted", fontsize=10)


def mistakes(shown, wrong, total, path):
    """Plots the most confident errors.

    Args:
        shown: List of (uint8 image, predicted class, true class, probability).
        wrong: Number of wrong predictions.
        total: Number of images.
        path: Path of the PNG.
    """
    plt = pyplot()
    if not shown:
        figure = plt.figure(figsize=(6, 1.5))
        text = (
            f"None of {total:,} images is misclassified."
            if not wrong
            else (f"{wrong:,} of {total:,} images are misclassified; none of them was kept.")
        )
        figure.text(0.5, 0.5, text, ha="center", va="center")
        return save(figure, path)
    columns = grid_columns(len(shown))
    rows = -(-len(shown) // columns)
    size = (max(2.5 * columns, 5.5), 2.85 * rows + 0.4)
    figure = plt.figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(rows, 2 * columns)
    for i, (image, answer, label, probability) in enumerate(shown):
        row, column = divmod(i, columns)
        lacking = columns - min(columns, len(shown) - row * columns)  # the last row is centered
        axes = figure.add_subplot(grid[row, 2 * column + lacking : 2 * column + lacking + 2])
        axes.axis("off")
        image = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        answer, label = shortened(answer, 18), shortened(label, 22)
        axes.set_title(f"predicted: {answer}, {probability:.0%}\ntrue: {label}", fontsize=9)
    most = "" if wrong == len(shown) else f"; the {len(shown)} most certain"
    are = "is" if wrong == 1 else "are"
    figure.suptitle(f"{wrong:,} of {total:,} images {are} misclassified{most}")
    save(figure, path)


def grid_columns(count):
    """Returns the number of columns, at most `MOST_COLUMNS`, with the fewest empty cells."""
    if count <= MOST_COLUMNS - 1:
        return count
    return min(range(MOST_COLUMNS, 3, -1), key=lambda columns: -count % columns)


def curves(reports, path, target=None, title="Held-out images"):
    """Plots loss, learning rate and held-out accuracy over the epochs.

    Args:
        reports: Lines of `metrics.jsonl`, as dicts.
        path: Path of the picture.
        target: Accuracy in [0, 1] that is drawn as a labeled line. Defaults to `None`.
        title: Title of the plot of accuracies. Defaults to "Held-out images".

    Returns:
        The path.
    """
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for axes, key, color in ((left, "loss", "C0"), (middle, "learning_rate", "C2")):
        points = [(report["epoch"], report[key]) for report in reports if key in report]
        axes.plot(*zip(*points, strict=True), color=color, marker="o", ms=3)
    left.set(ylabel="training loss", title="Training loss")
    middle.set(ylabel="learning rate", title="Learning rate")
    middle.set_ylim(bottom=0)
    middle.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    labels = {"accuracy": "weights", "ema_accuracy": "moving average of weights"}
    for key, style in (("accuracy", "C1-"), ("ema_accuracy", "C4--")):
        points = [(report["epoch"], 100 * report[key]) for report in reports if key in report]
        if points:
            label = f"{labels[key]}: {points[-1][1]:.1f}% after epoch {points[-1][0]:g}"
            right.plot(*zip(*points, strict=True), style, marker="o", ms=3, label=label)
    if target is not None:
        label = f"target: {100 * target:g}%"
        right.axhline(100 * target, color="0.45", lw=1, ls=":", label=label)
    right.set(ylabel="accuracy (%)", title=title, ylim=(None, 101))
    right.legend(loc="lower right", fontsize=9)
    for axes in (left, middle, right):
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    save(figure, path)
    return path


def learning_rates(rates, losses, smooth, chosen, path):
    """Plots the loss over a ramp of learning rates, and the suggested rate.

    Args:
        rates: Learning rates.
        losses: Loss at each rate.
        smooth: Smoothed losses.
        chosen: Suggested learning rate.
        path: Path of the picture.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(rates, losses, color="0.8", lw=1, label="loss of each update")
    axes.plot(rates, smooth, color="C0", label="smoothed")
    axes.axvline(chosen, color="C3", ls="--", label=f"--learning_rate={chosen:.1e}")
    low, high = min(smooth), max(smooth[0], min(smooth))
    axes.set_ylim(low - 0.1 * (high - low) - 0.02, high + 0.6 * (high - low) + 0.02)
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path)


def shortened(name, longest):
    """Returns a drawable name of at most `longest` characters, its middle elided if needed."""
    if len(name) > longest:
        end = longest // 2
        name = f"{name[: longest - end - 1].rstrip()}…{name[-end:].lstrip()}"
    return figures.drawable(name)


def pyplot():
    """Returns `matplotlib.pyplot` with the Agg backend.

    Raises:
        ImportError: If matplotlib is not installed; the message names the extra.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "keras-tnt[train]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure, path):
    """Saves and closes a figure."""
    figures.save(figure, path, dpi=110)
    pyplot().close(figure)
