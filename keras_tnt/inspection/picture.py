"""Picture of a model's attention on an image."""

import keras
import numpy as np

from keras_tnt.figures import drawable, save
from keras_tnt.inspection.maps import attention_maps, attention_rollout
from keras_tnt.inspection.subject import activation_name, cause_of_nonfinite, check_finite_images
from keras_tnt.models.anatomy import anatomy, class_names, sides_of

COLORS = ("#ff5964", "#35c4dc", "#7ac74f")
GLOW = (1.0, 0.6, 0.0, 0.8)


def plot_attention(model, image, path, patches=None):
    """Draws a model's attention on an image, and writes the picture.

    First row: the image, with three patches framed; the attention rollout from the patches to the
    class token (`attention_rollout`); and the class token's attention in the last block, as the
    mean of the heads and for each head. Without a class token (PyramidTNT), the mean over all
    patches replaces it.

    Second row, if the model has inner transformers: for each framed patch, its pixels, and the
    attention of one word, dotted, to the words of the patch, in the last inner transformer, as the
    mean of the heads. It is the word whose attention is least uniform. Values are multiples of
    uniform attention. Rows, columns and heads are counted from 1 in the picture.

    Args:
        model: a model of this package, with its top or without.
        image: `(height, width, channels)` as the model takes it, or channels first.
        path: file to write, in the format of its extension, one that matplotlib knows.
        patches: indices of up to three patches, from 0, row by row. If `None`, the three that the
            class token attends to most in the last block.

    Returns:
        `path`.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if the image does not match the model or has no such patches, or if it or the
            model's attention is not finite.

    Example:
        >>> image = keras_tnt.load_image("cat.jpg", model)
        >>> keras_tnt.inspection.plot_attention(model, image, "attention.png")
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'plot_attention needs matplotlib: pip install "keras-tnt[plots]"'
        ) from error
    image = np.asarray(image)
    check_finite_images(image[None], ["The image"])
    maps = attention_maps(model, image[None])
    for name, values in maps.items():
        if not np.isfinite(values).all():
            raise ValueError(
                f"The attention of '{name}' in model '{model.name}' is not finite (NaN or "
                f"infinity), and cannot be drawn. {cause_of_nonfinite(model)}"
            )
    heads = class_attention(model, image, maps)
    mean = heads.mean(axis=0)
    if patches is None:
        patches = np.argsort(-mean, axis=None, kind="stable")[: len(COLORS)]
    patches = [int(patch) for patch in patches]
    if not 0 < len(patches) <= len(COLORS) or not set(patches) <= set(range(mean.size)):
        raise ValueError(
            f"`patches` must be up to three numbers from 0 to {mean.size - 1}. Received: {patches}"
        )
    heats = {"through all blocks": class_rollout(model, image), "in the last block": mean}
    heats |= {f"head {number}": head for number, head in enumerate(heads, start=1)}
    frames = [(*divmod(patch, mean.shape[1]), mean.shape) for patch in patches]
    inner = [value[0] for key, value in maps.items() if key.endswith("/inner")]
    inner = [value for value in inner if len(value) == mean.size]

    rows = 2 if inner else 1
    figure = Figure(figsize=(1.7 * (1 + len(heats)), 2.5 * rows), dpi=150, layout="constrained")
    parts = figure.subfigures(rows, 1, squeeze=False)[:, 0]
    reader = "class token" if anatomy(model).class_tokens else "mean patch"
    draw_outer(parts[0], reader, displayed(image), prediction(model, image), heats, frames)
    if inner:
        draw_inner(parts[1], displayed(image), inner[-1][patches].mean(axis=1), frames)
    save(figure, path)
    return path


# === Data ===


def class_attention(model, image, maps):
    """Returns each head's attention of the class token to the patches, (heads, rows, columns)."""
    key = [key for key in maps if not key.endswith("/inner")][-1]
    attention = maps[key][0]  # (heads, queries, keys)
    found = anatomy(model)
    last = found.blocks[-1]
    size = sides_of(image[None].shape, found.image.data_format)
    grid = tuple(side // last.reduction for side in found.grid_of(last, size))
    patches = attention[:, 0] if found.class_tokens else attention.mean(axis=1)
    return np.reshape(patches[:, -grid[0] * grid[1] :], (-1, *grid))


def class_rollout(model, image):
    """Returns the attention rollout of the class token over the patches, (rows, columns)."""
    rollout = attention_rollout(model, image[None])[0]
    found = anatomy(model)
    reached = rollout[0] if found.class_tokens else rollout.mean(axis=0)
    grid = found.grid_of(found.blocks[0], sides_of(image[None].shape, found.image.data_format))
    return np.reshape(reached[-grid[0] * grid[1] :], grid)


def prediction(model, image):
    """Returns a title with the predicted class and its score; `image` without a classifier."""
    outputs = keras.ops.convert_to_numpy(model(image[None], training=False))
    layer = anatomy(model).predictions
    if layer is None:
        return "image"
    names, best = class_names(model), outputs[0].argmax()
    name = f"class {best}" if names is None else names[best]
    is_probability = activation_name(layer) in ("softmax", "sigmoid")
    score = f"{outputs[0].max():.0%}" if is_probability else f"{outputs[0].max():.3g}"
    return f"predicted\n{drawable(name)}, {score}"


def displayed(image):
    """Returns an image as RGB, with channels last and values in [0, 1]."""
    if keras.config.image_data_format() == "channels_first":
        image = np.moveaxis(image, 0, -1)
    if image.shape[-1] != 3:
        image = np.repeat(image[..., :1], 3, axis=-1)
    is_pixels = image.min() >= 0 and image.max() > 2
    low, high = (0, 255) if is_pixels else (image.min(), image.max())
    return np.clip((image - low) / max(high - low, 1e-6), 0, 1)


# === Drawing ===


def draw_outer(figure, reader, pixels, title, heats, frames):
    """Draws the first row: the image, and heat maps of outer attention over it."""
    figure.suptitle(
        f"Outer attention of the {reader}: transparent, least attention; orange, most", fontsize=10
    )
    axes = figure.subplots(1, 1 + len(heats))
    show(axes[0], pixels, title)
    for axis, (name, heat) in zip(axes[1:], heats.items(), strict=True):
        low, high = heat.min(), heat.max()
        show(axis, pixels, f"{name}\n{percent(low)} to {percent(high)}")
        glow = np.tile(np.array(GLOW), (*heat.shape, 1))
        glow[..., 3] *= (heat - low) / max(high - low, 1e-6)
        over(axis, glow, pixels)
    for axis in axes[:3]:
        for (row, column, grid), color in zip(frames, COLORS, strict=False):
            frame(axis, row, column, grid, pixels, color)


def draw_inner(figure, pixels, attention, frames):
    """Draws the second row: each framed patch, and the attention of its dotted word.

    `attention` has the shape (patches, words, words), averaged over heads.
    """
    words = attention.shape[-1]
    side = round(words**0.5)
    shares = words * attention  # 1: uniform
    reach = max(np.abs(shares - 1).max(), 0.5)  # nearly uniform attention should look uniform
    figure.suptitle(
        "Inner attention: what the dotted word of each framed patch attends to (1: an even share)",
        fontsize=10,
    )
    axes = figure.subplots(1, 2 * len(frames))
    for i, ((row, column, grid), color) in enumerate(zip(frames, COLORS, strict=False)):
        patch = cut_out(pixels, row, column, grid)
        word = np.argmax(np.square(shares[i] - 1).sum(axis=1))
        heat = np.reshape(shares[i, word], (side, side))
        show(axes[2 * i], patch, f"row {row + 1}, column {column + 1}, in words", color)
        show(axes[2 * i + 1], patch, "its dotted word attends to", color)
        over(axes[2 * i + 1], heat, patch, cmap="RdBu_r", vmin=1 - reach, vmax=1 + reach)
        for axis in axes[2 * i : 2 * i + 2]:
            frame(axis, *divmod(word, side), (side, side), patch, "black")
            frame(axis, *divmod(word, side), (side, side), patch, "white", linestyle=":")
        height, width = (pixels / side for pixels in patch.shape[:2])
        for (y, x), share in np.ndenumerate(heat):
            place = ((x + 0.5) * width - 0.5, (y + 0.5) * height - 0.5)
            ink = "white" if abs(share - 1) > 0.6 * reach else "black"
            axes[2 * i + 1].text(
                *place, f"{share:.1f}", ha="center", va="center", fontsize=7, color=ink
            )


def percent(x):
    """Returns a fraction as a percentage with two significant digits."""
    return f"{100 * float(f'{x:.2g}'):.6g}%"


def show(axis, pixels, title, color="black"):
    """Shows pixels without ticks, with a title and a colored frame."""
    axis.imshow(pixels, interpolation="nearest")
    axis.set_title(title, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(color)
        spine.set_linewidth(2.5 if color != "black" else 0.5)


def over(axis, heat, pixels, **style):
    """Shows a heat map over pixels, stretched to their size."""
    height, width = pixels.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(heat, extent=extent, interpolation="nearest", **style)


def frame(axis, row, column, grid, pixels, color, linestyle="-"):
    """Draws the frame of a grid's cell over pixels."""
    from matplotlib.patches import Rectangle

    height, width = (side / cells for side, cells in zip(pixels.shape, grid, strict=False))
    corner = (column * width - 0.5, row * height - 0.5)
    axis.add_patch(
        Rectangle(
            corner,
            width,
            height,
            fill=False,
            clip_on=False,
            edgecolor=color,
            linewidth=2,
            linestyle=linestyle,
        )
    )


def cut_out(pixels, row, column, grid):
    """Returns the pixels of a grid's cell."""
    height, width = (side // cells for side, cells in zip(pixels.shape, grid, strict=False))
    return pixels[row * height : (row + 1) * height, column * width : (column + 1) * width]
