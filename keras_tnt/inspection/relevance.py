"""Relevance of patches, or of the words in them, for a class."""

import keras
import numpy as np
from keras import ops

from keras_tnt.inspection import flow
from keras_tnt.inspection.links import gradient_of, observe, sum_of_targets
from keras_tnt.inspection.subject import Subject, check_finite_images

LEVELS = ("patches", "words")
IMAGES_AT_ONCE = 8
STEPS_FROM_BASELINE = 32


def relevance(
    model,
    images,
    targets=None,
    method="gradient_attention",
    level="patches",
    *,
    baseline=None,
    seed=0,
):
    """Computes the relevance of each part of an image for a class.

    Gradients are those of the class's logit, or of the mean of both heads' logits for a distilled
    model. docs/relevance.md has the equations, including those of words.

    Args:
        model: a classifier of this package, or one built on such a model.
        images: `(batch, height, width, channels)` as the model takes them, or channels first.
        targets: a class for each image, or one for all, by index or name. If `None`, the predicted
            ones.
        method:
            - `"gradient_attention"`: the positive part of gradient times attention, accumulated
              over the blocks (Chefer et al. 2021, arXiv 2103.15679);
            - `"rollout"`: attention alone, the same for every class (`attention_rollout`);
            - `"grad_cam"`: channels weighted by their mean gradient (arXiv 1610.02391), before the
              last block, because no class token reads a patch after its attention;
            - `"integrated_gradients"`: those of the pixels on the path from the baseline (arXiv
              1703.01365), summed over each part; may be negative;
            - `"random"`: random values, the baseline for the others.

            Defaults to `"gradient_attention"`.
        level: `"patches"`, or `"words"` if the model has them. Defaults to `"patches"`.
        baseline: pixel value, or one per channel, where integrated gradients start. If `None`, the
            one that the model normalizes to zero.
        seed: seed of `"random"`. Defaults to 0.

    Returns:
        Float32 array `(batch, rows, columns)` of the patches or words, not normalized; for
        PyramidTNT those of its first stage.

    Raises:
        ValueError: for an unknown class, images that do not match the model, a model without head
            or attention, a level that it does not have, an unknown method, and images or logits
            that are not finite.

    Example:
        >>> maps = keras_tnt.inspection.relevance(model, images, targets="tabby", level="words")
        >>> maps.shape
        (1, 56, 56)
    """
    subject = Subject(model, images)
    check_choice("method", method, METHODS)
    check_choice("level", level, LEVELS)
    if level == "words" and not subject.word_side:
        raise ValueError(f"Model '{model.name}' has patches alone. Use level='patches'.")
    check_finite_images(images)
    if targets is not None:
        targets = subject.class_indices(targets, len(images))
    settings = {"baseline": subject.baseline(baseline), "random": np.random.default_rng(seed)}
    maps = []
    for start in range(0, len(images), IMAGES_AT_ONCE):
        chunk = slice(start, start + IMAGES_AT_ONCE)
        some = ops.convert_to_tensor(images[chunk], model.inputs[0].dtype)
        logits = subject.predict(some)
        subject.check_finite(logits)
        classes = logits.argmax(axis=-1) if targets is None else targets[chunk]
        maps.append(METHODS[method](subject, some, classes, level == "words", **settings))
    return np.concatenate(maps).astype("float32")


def check_choice(name, given, choices):
    """Raises a `ValueError` unless an argument is one of the choices."""
    if given not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}. Received: {given!r}")


# === Methods: (subject, images, classes, words, settings) to maps (batch, rows, columns) ===


def gradient_attention(subject, images, classes, words, **_):
    """Returns maps of gradient times attention, accumulated over the blocks."""
    links = gradient_links(subject, images, classes)
    return flow.relevance_map(subject, links, 1.0, words)


def gradient_links(subject, images, classes):
    """Returns the positive part of gradient times link, averaged over heads, by layer path."""
    _, weights = observe(subject.logits, images)
    gates = subject.gate_gradient(weights, images, subject.chosen(classes))
    return {path: mean_of_heads(np.maximum(x, 0)) for path, x in gates.items()}


def rollout(subject, images, classes, words, **_):
    """Returns maps of attention rollout, which are the same for every class."""
    _, weights = observe(subject.logits, images)
    weights = {path: ops.convert_to_numpy(x).astype("float64") for path, x in weights.items()}
    links = {path: mean_of_heads(x) / 2 for path, x in weights.items()}
    return flow.relevance_map(subject, links, 0.5, words)


def mean_of_heads(x):
    """Averages attention (batch, ..., heads, queries, keys) over heads; others do not change."""
    return x.mean(axis=-3) if x.ndim > 3 else x


def grad_cam(subject, images, classes, words, **_):
    """Returns Grad-CAM maps of the tokens that enter the last block."""
    found = subject.found
    if found.model is not subject.model:
        raise ValueError(
            f"Grad-CAM looks at the tokens of '{found.model.name}', which is wrapped in "
            f"'{subject.model.name}'. Use another method."
        )
    block = [block for block in found.blocks if block.inner or not words][-1]
    layer = found.class_blocks[-1] if found.class_blocks and not words else block.layer
    inputs = keras.tree.flatten(layer.input)
    place = 1 if words else 0
    before = keras.Model(subject.logits.inputs[0], inputs)
    entering = keras.tree.flatten(before(images, training=False))
    rest = keras.Model(inputs, subject.logits.output)

    def target_logits(x, others, chosen):
        tensors = [*others[:place], x, *others[place:]]
        return sum_of_targets(rest(tensors, training=False), chosen)

    others = entering[:place] + entering[place + 1 :]
    gradient = gradient_of(target_logits, rest.variables)
    gradient = gradient(entering[place], others, subject.chosen(classes))
    tokens, gradient = (ops.convert_to_numpy(x) for x in (entering[place], gradient))
    if not words:
        patches = np.prod(subject.grids[block.stage])
        tokens, gradient = tokens[:, -patches:], gradient[:, -patches:]
    channels = gradient.mean(axis=tuple(range(1, gradient.ndim - 1)), keepdims=True)
    cam = np.maximum((channels * tokens).sum(axis=-1), 0)  # (b, patches) or (b, patches, words)
    return flow.back_to_first_stage(subject, cam, block.stage)


def integrated_gradients(subject, images, classes, words, baseline, **_):
    """Returns maps of integrated gradients by the midpoint rule, one image at a time."""
    ways = (np.arange(STEPS_FROM_BASELINE) + 0.5) / STEPS_FROM_BASELINE
    maps = []
    for image, label in zip(ops.convert_to_numpy(images), classes, strict=True):
        path = baseline + ways[:, None, None, None] * (image - baseline)
        path = ops.convert_to_tensor(path, images.dtype)
        gradient = subject.pixel_gradient(path, subject.chosen([label] * STEPS_FROM_BASELINE))
        mean = ops.convert_to_numpy(gradient).mean(axis=0)
        maps.append(sum_of_pixels(subject, (mean * (image - baseline))[None], words))
    return np.concatenate(maps)


def sum_of_pixels(subject, pixels, words):
    """Returns the sum of an image's values over each patch or word, (batch, rows, columns)."""
    if subject.found.image.data_format == "channels_first":
        pixels = np.moveaxis(pixels, 1, -1)
    size = subject.found.patch_size // (subject.word_side if words else 1)
    _, height, width, channels = pixels.shape
    x = np.reshape(pixels, (-1, height // size, size, width // size, size * channels))
    return x.sum(axis=(2, 4))  # (b, rows, columns)


def random(subject, images, classes, words, random, **_):
    """Returns maps of uniform random values."""
    side = subject.word_side if words else 1
    return random.random((len(images), *(side * count for count in subject.grids[0])))


METHODS = {
    "gradient_attention": gradient_attention,
    "rollout": rollout,
    "grad_cam": grad_cam,
    "integrated_gradients": integrated_gradients,
    "random": random,
}
