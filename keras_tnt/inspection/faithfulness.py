"""Faithfulness of relevance maps: deletion, insertion and SaCo."""

import numpy as np

from keras_tnt.inspection.subject import Subject, check_finite_images

STEPS = 20
GROUPS = 10
FORWARD_BATCH = 64


def faithfulness(model, images, maps, targets=None, *, baseline=None, seed=0):
    """Measures the faithfulness of maps to the model, compared with random maps.

    Parts are deleted by replacing them with the baseline. The measure is the target's output after
    the model's own activation of the (mean) logits: a probability for softmax and sigmoid (where
    each class has its own, and a single output suffices), and the target's logit without an
    activation (linear):

    - deletion: parts are deleted, the most relevant first; a good map's curve falls early;
    - insertion: parts are inserted into the baseline, the most relevant first; a good map's curve
      rises early (both Petsiuk et al. 2018, arXiv 1806.07421);
    - SaCo (Wu et al. 2024, arXiv 2404.01415): over all pairs of ten groups of parts, ordered by
      relevance, whether deleting the more relevant group has the larger effect, weighted by the
      difference in relevance; from -1 to 1.

    Random maps of the same size are measured in the same way, for comparison.

    Args:
        model: as for `relevance`.
        images: as for `relevance`.
        maps: `(batch, rows, columns)`, of which rows and columns divide the images' sides.
        targets: as for `relevance`.
        baseline: pixel value, or one per channel, of a deleted part. If `None`, the one that the
            model normalizes to zero.
        seed: seed of the random maps. Defaults to 0.

    Returns:
        A dict: `"measure"`, the name of the activation; `"fractions"` of the parts changed,
        `(steps,)`; `"deletion"` and `"insertion"`, the mean measures there; `"deletion_area"` and
        `"insertion_area"`, the areas under them, and `"saco"`, means over the images; `"images"`,
        their number; and under `"random"` the same for random maps.

    Raises:
        ValueError: for maps that do not match the images or are not finite, and as `relevance`
            does.

    Example:
        >>> maps = keras_tnt.inspection.relevance(model, images)
        >>> found = keras_tnt.inspection.faithfulness(model, images, maps)
        >>> found["deletion_area"], found["random"]["deletion_area"]
    """
    subject = Subject(model, images)
    check_finite_images(images)
    images, maps = np.asarray(images, "float32"), np.asarray(maps)
    check_maps(subject, images, maps)
    logits = np.concatenate([subject.predict(image[None]) for image in images])
    subject.check_finite(logits)
    if targets is None:
        targets = logits.argmax(axis=-1)
    targets = subject.class_indices(targets, len(images))
    random_maps = np.random.default_rng(seed).random(maps.shape)
    trial = Trial(subject, images, targets, subject.baseline(baseline))
    found = {**trial.of(maps), "images": len(images), "random": trial.of(random_maps)}
    return {"measure": subject.activation, **found}


def check_maps(subject, images, maps):
    """Raises a `ValueError` unless maps are finite and match the images."""
    height, width = subject.sides
    fits = maps.ndim == 3 and len(maps) == len(images) and maps.size
    if not fits or height % maps.shape[1] or width % maps.shape[2]:
        raise ValueError(
            f"`maps` are (batch, rows, columns) for {len(images)} images of {height}x{width} "
            f"pixels, of rows and columns that divide them. Received: {maps.shape}"
        )
    if not np.all(np.isfinite(maps)):
        raise ValueError("`maps` have values that are not finite.")


class Trial:
    """Experiment that deletes parts of a subject's images."""

    def __init__(self, subject, images, targets, baseline):
        """Takes the images, their class indices and the baseline pixel."""
        self.subject, self.images, self.targets, self.baseline = subject, images, targets, baseline

    def of(self, maps):
        """Returns the curves, their areas and SaCo of maps, as means over the images."""
        parts = maps[0].size
        counts = np.unique(np.linspace(0, parts, min(STEPS, parts) + 1).round().astype(int))
        groups = np.array_split(np.arange(parts), min(GROUPS, parts))
        rows = [self.of_image(i, maps[i], counts, groups) for i in range(len(maps))]
        deletion, insertion, saco = (np.array(values) for values in zip(*rows, strict=True))
        fractions = counts / parts
        return {
            "fractions": fractions,
            "deletion": deletion.mean(axis=0),
            "insertion": insertion.mean(axis=0),
            "deletion_area": area_under(deletion.mean(axis=0), fractions),
            "insertion_area": area_under(insertion.mean(axis=0), fractions),
            "saco": float(saco.mean()),
        }

    def of_image(self, i, relevance, counts, groups):
        """Returns (deletion curve, insertion curve, SaCo) of one image."""
        order = np.argsort(-relevance.ravel(), kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        deleted = rank >= counts[:, None]  # (steps, parts): the parts that remain
        without_group = np.stack([~np.isin(rank, group) for group in groups])
        kept = np.concatenate([deleted, ~deleted, without_group])
        probabilities = self.probabilities(i, kept.reshape(-1, *relevance.shape))
        deletion, insertion, without = np.split(probabilities, [len(counts), 2 * len(counts)])
        said = [relevance.ravel()[order[group]].sum() for group in groups]
        return deletion, insertion, saco(np.array(said), deletion[0] - without)

    def probabilities(self, i, kept):
        """Returns the target's output in image `i` for masks of parts, (cases, rows, columns)."""
        image, predict = self.images[i], self.subject.logits.predict_on_batch
        cases = []
        for start in range(0, len(kept), FORWARD_BATCH):
            mask = self.subject.to_pixels(kept[start : start + FORWARD_BATCH])
            cases.append(predict(np.where(mask, image, self.baseline)))
        outputs = self.subject.probabilities(np.concatenate(cases))
        return outputs[:, self.targets[i]].astype("float64")


def area_under(curve, x):
    """Returns the area under a curve, by the trapezoidal rule."""
    return float(np.sum((curve[1:] + curve[:-1]) / 2 * np.diff(x)))


def saco(said, measured):
    """Returns the salience-guided faithfulness coefficient (arXiv 2404.01415, algorithm 1).

    Args:
        said: relevance of each group, the most relevant first.
        measured: decrease of the target's output without each group.

    Returns:
        A number from -1 to 1; 0 if all groups have the same relevance.
    """
    more = said[:, None] - said[None]
    pairs = np.triu_indices(len(said), k=1)
    signs = np.where(measured[:, None] >= measured[None], 1, -1)
    total = np.abs(more[pairs]).sum()
    return float((signs * more)[pairs].sum() / total) if total else 0.0
