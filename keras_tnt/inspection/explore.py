"""HTML page with the attention and relevance of a few images: one file, without a server."""

import base64
import html
import json
import os
import re
from importlib import resources

import keras
import numpy as np
from keras import ops

from keras_tnt.files import check_space, write_atomically
from keras_tnt.inspection import flow
from keras_tnt.inspection.maps import attention_maps
from keras_tnt.inspection.picture import displayed
from keras_tnt.inspection.relevance import gradient_links
from keras_tnt.inspection.subject import Subject, check_finite_images
from keras_tnt.models.anatomy import class_names as names_of

TOP_CLASSES = 5
IMAGES_AT_ONCE = 8
LARGEST_PAGE = 150_000_000  # bytes; a browser needs about four times as much memory


def explore(model, images, path, class_names=None, *, titles=None):
    """Writes a page with the model's attention and the relevance of parts for each image.

    The page is one HTML file, which works from disk, offline. It begins with the image and its
    prediction, and contains the outer attention from any patch and from the class tokens, by block
    and head; the inner attention among the words of any patch; the relevance of patches and words
    for the most likely classes (`relevance`); and the prediction after each block. For models
    without words or class tokens, their sections are absent.

    Scores are the model's own activation of its logits, as for `faithfulness`. Attention is stored
    in 8 bits: each number is within 1/510 of the largest in its row. Maps with values that are not
    finite are marked as such.

    Args:
        model: a classifier of this package.
        images: `(batch, height, width, channels)` as the model takes them, or channels first.
        path: path of the file, `.html`.
        class_names: a name for each class. If `None`, those that the model stores, or numbers.
        titles: a name for each image, such as its file's, which is its title on the page. If
            `None`, "Image 1" and so on.

    Returns:
        `path`.

    Raises:
        ValueError: if the images do not match the model or are more than a page can hold, if they
            or the model's logits are not finite, or the model is not a classifier of this package.
        IsADirectoryError: if `path` is a directory.

    Example:
        >>> names = ["cat.jpg", "dog.jpg"]
        >>> images = np.stack([keras_tnt.load_image(name, model) for name in names])
        >>> keras_tnt.inspection.explore(model, images, "page.html", titles=names)
    """
    path = type(path)(os.path.expanduser(path))  # A Path remains a Path.
    subject = Subject(model, images)
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder. Give the name of a file in it, page.html")
    classes = subject.logits.output_shape[-1]
    names = class_names or names_of(model) or [f"class {i}" for i in range(classes)]
    check_counts(names, classes, titles, images)
    titles = [f"Image {i + 1}" for i in range(len(images))] if titles is None else titles
    check_finite_images(images, titles)
    images = np.asarray(images, "float32")
    for start in range(0, len(images), IMAGES_AT_ONCE):
        some = slice(start, start + IMAGES_AT_ONCE)
        subject.check_finite(subject.predict(images[some]), titles[some])

    first = Pack(subject, images[:1])
    check_size(len(first.data), len(images), os.path.dirname(os.path.abspath(path)))
    packs = [first, *(Pack(subject, images[i : i + 1]) for i in range(1, len(images)))]
    page = {
        "name": model.name,
        "activation": subject.activation,
        "size": subject.sides,
        "grid": subject.grids[0],
        "wordSide": subject.word_side,
        "tokens": ["class token", "distillation token"][: subject.found.class_tokens],
        "blocks": first.blocks,
        "layout": first.layout,
        "images": [pack.describe(names, title) for pack, title in zip(packs, titles, strict=True)],
    }
    write_atomically(path, fill(page, [pack.data for pack in packs]))
    return path


def check_counts(names, classes, titles, images):
    """Raises a `ValueError` unless there are images, and a name per class and image."""
    if not len(images):
        raise ValueError("There is no image to show.")
    if len(names) != classes:
        raise ValueError(
            f"`class_names` must have {classes} names, one a class. Received: {len(names)}"
        )
    if titles is not None and len(titles) != len(images):
        raise ValueError(
            f"`titles` must have one for each of {len(images)} images. Received: {len(titles)}"
        )


def check_size(image_bytes, count, folder):
    """Raises an error if the page would be too large for a browser or the disk."""
    fit = LARGEST_PAGE * 3 // 4 // image_bytes
    if count > fit:
        raise ValueError(
            f"A page holds {fit} images of this model and size, each of "
            f"{image_bytes / 0.75e6:.1f} MB. Received: {count}"
        )
    check_space(folder, 4 * image_bytes * count // 3, "the page")


def fill(page, data):
    """Returns the page's HTML, as bytes, from the template and the page's data."""
    template = resources.files("keras_tnt.inspection").joinpath("explore.html")
    arrays = "\n".join(
        f'<script type="application/octet-stream" id="data-{i}">{base64.b64encode(x).decode()}'
        "</script>"
        for i, x in enumerate(data)
    )
    values = {
        "TITLE": html.escape(f"{page['images'][0]['title']} – {page['name']}"),
        "PAGE": json.dumps(page, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
        "ARRAYS": arrays,
    }
    text = template.read_text(encoding="utf-8")
    text = re.sub(r"%%([A-Z]+)%%", lambda found: values[found[1]], text)
    # Lone surrogates, in file names that are not UTF-8, become escapes, which are valid in JSON.
    return text.encode("utf-8", "backslashreplace")


class Pack:
    """Everything that the page shows of an image, as bytes, and the offset of each array."""

    def __init__(self, subject, image):
        """Computes and packs attention, relevance and predictions of a batch of one image."""
        self.subject = subject
        self.pieces, self.layout, self.size = [], {}, 0
        self.not_finite = []  # maps with values that are NaN or infinite
        self.blocks = list(self.pack_attention(image))
        self.pack_relevance(image)
        self.add("pixels", np.uint8(np.round(255 * displayed(image[0]))))
        self.depths = predictions_by_depth(subject, image)
        self.data = b"".join(self.pieces)

    def add(self, name, array):
        """Appends an array at a multiple of four bytes."""
        data = np.ascontiguousarray(array).tobytes()
        self.layout[name] = {"at": self.size, "type": array.dtype.name, "shape": array.shape}
        self.pieces.append(data + bytes(-len(data) % 4))
        self.size += len(self.pieces[-1])

    def add_rows(self, name, x):
        """Appends attention rows in 8 bits, and the value of 255 in each; NaN if not finite."""
        x = np.asarray(x, "float32")
        finite = np.isfinite(x).all(axis=-1)
        x = np.where(finite[..., None], x, 0)
        largest = x.max(axis=-1)
        scale = np.where(largest > 0, largest, 1)
        self.add(name, np.uint8(np.round(255 * np.clip(x / scale[..., None], 0, 1))))
        self.add(f"{name}/largest", np.where(finite, largest, np.nan).astype("float32"))
        if not finite.all():
            number, kind = name.split("/")
            self.not_finite.append(f"{kind} attention of block {int(number) + 1}")

    def pack_attention(self, image):
        """Packs the attention of each block, and yields the block's description for the page."""
        found, grids = self.subject.found, self.subject.grids
        maps = attention_maps(self.subject.model, image)
        for block in found.blocks:
            number = block.number
            self.add_rows(f"{number}/outer", maps[f"{block.name}/outer"][0])
            if block.inner is not None:
                self.add_rows(f"{number}/inner", maps[f"{block.name}/inner"][0])
            grid = grids[block.stage]
            yield {
                "label": str(number + 1),
                "stage": block.stage,
                "grid": grid,
                "keys": [side // block.reduction for side in grid],
                "reduction": block.reduction,
                "inner": block.inner is not None,
                "tokens": block.prefix_tokens,
                "patchesRead": True,
            }
        for i, layer in enumerate(found.class_blocks, start=len(found.blocks)):
            name = layer.name.removeprefix(found.layer_prefix)
            self.add_rows(f"{i}/outer", maps[name][0])
            yield {
                "label": f"c{i - len(found.blocks) + 1}",
                "stage": 0,
                "grid": grids[-1],
                "keys": grids[-1],
                "reduction": 1,
                "inner": False,
                "tokens": found.class_tokens,
                "patchesRead": False,
            }

    def pack_relevance(self, image):
        """Packs the relevance of patches and words for the most likely classes."""
        subject = self.subject
        self.probabilities = subject.probabilities(subject.predict(image))[0]
        self.classes = np.argsort(-self.probabilities, kind="stable")[:TOP_CLASSES]
        copies = ops.convert_to_tensor(np.repeat(image, len(self.classes), axis=0))
        links = gradient_links(subject, copies, self.classes)
        for level in ("patches", "words") if subject.word_side else ("patches",):
            maps = flow.relevance_map(subject, links, 1.0, level == "words")
            self.add(f"relevance/{level}", maps.astype("float32"))
            if not np.isfinite(maps).all():
                self.not_finite.append(f"relevance of {level}")

    def describe(self, names, title):
        """Returns the image's title, classes and predictions, as a JSON-serializable dict."""
        final = self.probabilities
        classes = [
            {"name": str(names[i]), "index": int(i), "probability": score(final[i])}
            for i in self.classes
        ]
        depths = []
        for block, found in self.depths.items():
            finite = np.isfinite(found)
            best = int(np.where(finite, found, -np.inf).argmax())
            depths.append(
                {
                    "block": block,
                    "name": str(names[best]) if finite.any() else "not finite",
                    "probability": score(found[best]),
                    "classes": [score(found[i]) for i in self.classes],
                }
            )
        return {
            "title": str(title),
            "classes": classes,
            "depths": depths,
            "notFinite": self.not_finite,
        }


def score(x):
    """Returns a float32 number with 7 significant digits; `None` if it is not finite."""
    return float(f"{float(x):.7g}") if np.isfinite(x) else None


def predictions_by_depth(subject, image):
    """Returns the prediction after each block, from its class tokens or mean patch (logit lens).

    Returns:
        A dict from a block's number to probabilities. It lacks blocks without the class token and
        blocks of earlier stages than the last; for a model inside another it is empty.
    """
    found, blocks = subject.found, subject.found.blocks
    if found.model is not subject.model:
        return {}
    layers = {b.number: b.layer for b in blocks if b.stage == blocks[-1].stage}
    if found.class_blocks:
        layers = dict(enumerate(found.class_blocks, start=len(blocks)))
    outputs = [keras.tree.flatten(layer.output)[0] for layer in layers.values()]
    tokens = keras.Model(subject.logits.inputs[0], outputs)(image, training=False)
    read = [read_heads(subject, x) for x in keras.tree.flatten(tokens)]
    return dict(zip(layers, read, strict=True))


def read_heads(subject, tokens):
    """Returns the probabilities (classes,) that the heads compute from one image's tokens."""
    found = subject.found
    tokens = found.norm(tokens)
    read = [tokens[:, i] for i in range(found.class_tokens)] or [ops.mean(tokens, axis=1)]
    logits = [head(x) for head, x in zip(found.heads, read, strict=True)]
    return subject.probabilities(sum(logits) / len(logits))[0]
