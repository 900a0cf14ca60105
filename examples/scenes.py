"""Synthetic scenes with known boxes and masks: handwritten digits on cluttered ground."""

import dataclasses

import numpy as np

CLASSES = tuple("0123456789")
SIZE = 64  # of a scene, in pixels
SIDES = (22, 34)  # of a pasted digit, in pixels
COUNTS = (1, 3)  # digits per scene
INK = 0.4  # threshold, relative to full ink, of the pixels that belong to a digit
TRIES = 20  # to find a place where a digit does not touch another


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Scenes with their annotations.

    Attributes:
        images: (n, size, size, 3), uint8.
        boxes: a list of (count, 4) arrays, (top, left, bottom, right) in pixels of a digit's ink.
        labels: a list of (count,) arrays, the digits.
        masks: (n, size, size), uint8: 0 for ground, 1 + digit elsewhere.
    """

    images: np.ndarray
    boxes: list[np.ndarray]
    labels: list[np.ndarray]
    masks: np.ndarray


def digits(held_out: bool):
    """Returns scikit-learn's digits, (n, 8, 8) ink in [0, 1], and labels; 20% are held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype("float32") / 16
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    return (test, test_labels) if held_out else (train, train_labels)


def scenes(count: int, held_out: bool, size: int = SIZE, sides=SIDES, counts=COUNTS, seed: int = 0):
    """Generates scenes of training digits or of held-out digits.

    Args:
        count: number of scenes.
        held_out: whether to use held-out digits, with a separate random stream.
        size: side of the scenes in pixels. Defaults to 64.
        sides: smallest and largest side of a pasted digit in pixels. Defaults to (22, 34).
        counts: smallest and largest number of digits in a scene. Defaults to (1, 3).
        seed: random seed. Defaults to 0.

    Returns:
        `Scenes`.
    """
    random = np.random.default_rng((seed, held_out))
    glyphs, kinds = digits(held_out)
    images = np.empty((count, size, size, 3), "uint8")
    masks = np.zeros((count, size, size), "uint8")
    boxes, labels = [], []
    for i in range(count):
        image = ground(random, size)
        placed = []
        for _ in range(random.integers(counts[0], counts[1] + 1)):
            number = random.integers(len(glyphs))
            ink = enlarge(glyphs[number], random.integers(sides[0], sides[1] + 1))
            place = free_place(random, box_of(ink), ink.shape, size, [box for box, _ in placed])
            if place is None:
                continue
            top, left = place
            paste(random, image, ink, top, left)
            rows, columns = (slice(at, at + len(ink)) for at in place)
            masks[i, rows, columns][ink > INK] = 1 + kinds[number]
            box = box_of(ink) + np.array([top, left, top, left], "float32")
            placed.append((box, kinds[number]))
        images[i] = np.round(255 * image)
        boxes.append(np.array([box for box, _ in placed], "float32").reshape(-1, 4))
        labels.append(np.array([kind for _, kind in placed], "int32"))
    return Scenes(images, boxes, labels, masks)


def ground(random, size):
    """Draws cluttered ground: smooth patches of color, strokes and noise."""
    coarse = random.uniform(0.0, 0.4, (4, 4, 3))
    image = np.stack([enlarge(coarse[..., c], size) for c in range(3)], axis=-1)
    ys, xs = np.mgrid[:size, :size]
    for _ in range(6):
        y, x = random.uniform(0, size, 2)
        angle, length, width = random.uniform((0, 4, 0.5), (np.pi, 14, 1.5))
        along = (xs - x) * np.cos(angle) + (ys - y) * np.sin(angle)
        across = (ys - y) * np.cos(angle) - (xs - x) * np.sin(angle)
        stroke = (abs(along) < length / 2) & (abs(across) < width)
        image[stroke] = random.uniform(0.0, 0.8, 3)
    return np.clip(image + random.normal(0, 0.03, image.shape), 0, 1)


def paste(random, image, ink, top, left):
    """Paints ink onto the image, in place, in one bright color."""
    color = random.uniform(0.7, 1.0, 3)
    part = image[top : top + len(ink), left : left + len(ink)]
    part += ink[..., None] * (color - part)


def enlarge(image, side):
    """Resizes (n, n) to (side, side), bilinear."""
    at = (np.arange(side) + 0.5) * len(image) / side - 0.5
    at = np.clip(at, 0, len(image) - 1)
    low = np.minimum(at.astype(int), len(image) - 2)
    share = at - low
    rows = image[low] * (1 - share)[:, None] + image[low + 1] * share[:, None]
    return rows[:, low] * (1 - share) + rows[:, low + 1] * share


def box_of(ink):
    """Returns (top, left, bottom, right) of the pixels that belong to the digit."""
    rows, columns = np.nonzero(ink > INK)
    return np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1], "float32")


def free_place(random, box, shape, size, others):
    """Returns (top, left) where the box does not touch the others, or `None`."""
    for _ in range(TRIES):
        top, left = (int(random.integers(0, size - side + 1)) for side in shape)
        y1, x1, y2, x2 = box + np.array([top, left, top, left])
        if all(y2 <= b[0] or b[2] <= y1 or x2 <= b[1] or b[3] <= x1 for b in others):
            return top, left
    return None


def crops(count: int, held_out: bool, size: int = 32, seed: int = 0):
    """Generates small scenes of one digit each, for pretraining a classifier.

    Args:
        count: number of scenes.
        held_out: whether to use held-out digits.
        size: side of the scenes in pixels. Defaults to 32.
        seed: random seed. Defaults to 0.

    Returns:
        Images, uint8 (count, size, size, 3), and labels, int32 (count,).
    """
    found = scenes(count, held_out, size, (SIDES[0], size), (1, 1), seed)
    return found.images, np.concatenate(found.labels)
