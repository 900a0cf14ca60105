"""Pictures: which class is taken for which, the surest mistakes, the loss over learning rates."""

import numpy as np

from keras_tnt import figures

# Up to so many classes each has its row with its name; up to so many, its counts written out.
NAMED = 30
COUNTED = 15
PAIRS = 25
GROUPS = 100


def confusion(matrix, names, path):
    """Which class (row) was taken for which (column), and the pairs that were most often.

    Args:
        matrix: integers (n, n).
        names: of the n classes.
        path: of the PNG.
    """
    plt = pyplot()
    number = len(names)
    side = min(max(0.34 * number + 2.5, 5), 12) if number <= NAMED else 10
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(side + 6, side), width_ratios=(side, 6), layout="constrained"
    )
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    title = f"{number:,} classes, {matrix.sum():,} images"
    if number > NAMED:
        title = groups(left, matrix, title)
    else:
        # The square root lets a class that is seldom taken for another show beside the diagonal.
        left.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    left.set(xlabel="taken for", ylabel="is", title=title)
    if number <= NAMED:
        short = [shortened(name, 24) for name in names]
        left.set_xticks(range(number), short, rotation=60, ha="right")
        left.set_yticks(range(number), short)
    if number <= COUNTED:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if share[row, column] > 0.4 else "0.2"
            left.text(column, row, matrix[row, column], ha="center", va="center", color=colour)
    most_often(right, matrix, names)
    save(figure, path)


def groups(axes, matrix, title):
    """Wrong answers alone, of classes taken together by their number; returns the title."""
    from matplotlib.colors import LogNorm

    number, size = len(matrix), -(-len(matrix) // GROUPS)
    apart = np.pad(matrix - np.diag(np.diag(matrix)), (0, -number % size))
    count = len(apart) // size
    together = apart.reshape(count, size, count, size).sum(axis=(1, 3))
    image = axes.imshow(
        np.where(together, together, np.nan),
        cmap="Reds",
        norm=LogNorm(1, max(2, together.max())),
        interpolation="nearest",
        extent=(0, count * size, count * size, 0),
    )
    axes.figure.colorbar(image, ax=axes, shrink=0.6, label="wrong answers")
    return title if size == 1 else f"{title}: wrong answers, {size} classes a square"


def most_often(axes, matrix, names):
    """The pairs of classes that were confused most often, as bars."""
    apart = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-apart, axis=None, kind="stable")[:PAIRS]
    pairs = [divmod(int(place), len(names)) for place in order if apart.flat[place]]
    axes.barh(range(len(pairs)), [apart[pair] for pair in pairs], color="C3")
    labels = [" → ".join(shortened(names[each], 22) for each in pair) for pair in pairs]
    axes.set_yticks(range(len(pairs)), labels, fontsize=8)
    axes.set_ylim(max(len(pairs), 5) - 0.4, -0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title="most often: is → taken for" if pairs else "none taken for another")
    axes.spines[["top", "right"]].set_visible(False)


def mistakes(shown, wrong, total, path):
    """The most certain wrong answers.

    Args:
        shown: (uint8 image, the answer, the label, the answer's probability) of each.
        wrong, total: numbers of wrong answers and of images.
        path: of the PNG.
    """
    plt = pyplot()
    rows = max(1, -(-len(shown) // 6))
    figure, grid = plt.subplots(
        rows, 6, figsize=(12, 2.6 * rows), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.axis("off")
    for axes, (image, answer, label, probability) in zip(grid.flat, shown, strict=False):
        axes.imshow(image)
        answer, label = shortened(answer, 20), shortened(label, 20)
        axes.set_title(f"{answer} {probability:.0%}\nis {label}", fontsize=9)
    figure.suptitle(
        f"Of {total:,} images {wrong:,} were misread; the most certain of them"
        if wrong
        else f"None of {total:,} images was misread"
    )
    save(figure, path)


def learning_rates(rates, losses, smooth, chosen, path):
    """The loss over a ramp of learning rates, and the one that is named."""
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
    """A name of so many characters at most: of a longer one its beginning and its end."""
    if len(name) > longest:
        end = longest // 2
        name = f"{name[: longest - end - 1].rstrip()}…{name[-end:].lstrip()}"
    return figures.drawable(name)


def pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "keras-tnt[train]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure, path):
    figures.save(figure, path, dpi=110)
    pyplot().close(figure)
