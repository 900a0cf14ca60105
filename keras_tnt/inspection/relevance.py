"""Why a model says so: how much each patch, or each word in it, speaks for a class."""

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
    """How much each part of an image speaks for a class, by the model's own reckoning.

    Gradients are those of the class's logit, of a distilled model of the mean of both heads'.
    docs/relevance.md has the equations, those of the words among them.

    Args:
        model: a classifier of this package, or one built on such a model.
        images: `(batch, height, width, channels)` as the model takes them, or channels first.
        targets: a class for each image, or one for all, by index or name; None: the predicted ones.
        method:
            - `"gradient_attention"`: the positive part of gradient times attention, accumulated
              over the blocks (Chefer et al. 2021, arXiv 2103.15679);
            - `"rollout"`: attention alone, the same for every class (`attention_rollout`);
            - `"grad_cam"`: channels weighted by their mean gradient (arXiv 1610.02391), before the
              last block: behind its attention no class token reads a patch any more;
            - `"integrated_gradients"`: of the pixels on the way from the baseline (arXiv
              1703.01365), summed over each part; may be negative;
            - `"random"`: what any method should be better than.
        level: `"patches"`, or `"words"` where the model has them.
        baseline: pixel value, or one a channel, where integrated gradients start; None: what the
            model normalises to zero.
        seed: of `"random"`.

    Returns:
        Float32 array `(batch, rows, columns)` of the patches or words, as the equations give it; of
        PyramidTNT those of its first stage.

    Raises:
        ValueError: for a class that is not there, images that do not fit, a model without head or
            attention, a level that it does not have, an unknown method, and images or logits that
            are not finite.

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
    if given not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}. Received: {given!r}")


# === Methods: (subject, images, classes, words, settings) to maps (batch, rows, columns) ===


def gradient_attention(subject, images, classes, words, **_):
    links = gradient_links(subject, images, classes)
    return flow.relevance_map(subject, links, 1.0, words)


def gradient_links(subject, images, classes):
    """The positive part of gradient times weight, mean of heads, by the path of a layer."""
    _, weights = observe(subject.logits, images)
    gates = subject.gate_gradient(weights, images, subject.chosen(classes))
    return {path: mean_of_heads(np.maximum(x, 0)) for path, x in gates.items()}


def rollout(subject, images, classes, words, **_):
    _, weights = observe(subject.logits, images)
    weights = {path: ops.convert_to_numpy(x).astype("float64") for path, x in weights.items()}
    links = {path: mean_of_heads(x) / 2 for path, x in weights.items()}
    return flow.relevance_map(subject, links, 0.5, words)


def mean_of_heads(x):
    """The mean over the heads of attention (batch, ..., heads, queries, keys); words have none."""
    return x.mean(axis=-3) if x.ndim > 3 else x


def grad_cam(subject, images, classes, words, **_):
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
    """The path from the baseline to the image at the middles of its steps, image by image."""
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
    """The sum of an image's values over each patch or word, (batch, rows, columns)."""
    if subject.found.image.data_format == "channels_first":
        pixels = np.moveaxis(pixels, 1, -1)
    size = subject.found.patch_size // (subject.word_side if words else 1)
    _, height, width, channels = pixels.shape
    x = np.reshape(pixels, (-1, height // size, size, width // size, size * channels))
    return x.sum(axis=(2, 4))  # (b, rows, columns)


def random(subject, images, classes, words, random, **_):
    side = subject.word_side if words else 1
    return random.random((len(images), *(side * count for count in subject.grids[0])))


METHODS = {
    "gradient_attention": gradient_attention,
    "rollout": rollout,
    "grad_cam": grad_cam,
    "integrated_gradients": integrated_gradients,
    "random": random,
}
