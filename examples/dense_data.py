"""Images with boxes or masks, at one size, from generated scenes, tfds or a folder.

An item is a dict of numpy arrays: `image` (height, width, 3) uint8; for detection `boxes` (n, 4),
(top, left, bottom, right) in pixels, `labels` (n,) and `crowd` (n,), whether a box is of a crowd;
for segmentation `mask` (height, width), the class of each pixel, or 255 where pixels do not count.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from examples import scenes

IGNORED = 255  # value of mask pixels that do not count
LAYOUTS = {
    "detection": "DIR/train and DIR/validation, each with images and an annotations.json in COCO's "
    "form, whose file_name tells an image's path from there",
    "segmentation": "DIR/train and DIR/validation, each with folders images and masks; a mask is "
    "a PNG named as its image, whose pixels are classes, 255 for none",
}


@dataclasses.dataclass(frozen=True)
class Items:
    """One split of a data set.

    Attributes:
        count: number of items.
        classes: class names by index; in segmentation, index 0 is the mask value 0.
        read: function without arguments that returns an iterator over all items.
    """

    count: int
    classes: tuple[str, ...]
    read: Callable[[], Iterator[dict]]


def load(task: str, options, held_out: bool) -> Items:
    """Loads a split of the data set that `--dataset` names.

    Args:
        task: "detection" or "segmentation".
        options: options of the command: dataset, data_dir, image_size, scenes, held_out_scenes,
            classes.
        held_out: whether to load the held-out split.

    Returns:
        `Items`.

    Raises:
        ValueError: if there is no such data set, or its layout is not supported.
    """
    if options.dataset == "scenes":
        return made_scenes(task, options, held_out)
    if options.dataset.startswith("tfds:"):
        return prepared(task, options, held_out)
    folder = Path(options.dataset)
    if not folder.is_dir():
        raise ValueError(
            f"--dataset={options.dataset} is neither scenes, nor tfds:NAME, nor a folder. A folder "
            f"is {LAYOUTS[task]}"
        )
    folder = folder / ("validation" if held_out else "train")
    return (boxes_in_folder if task == "detection" else masks_in_folder)(folder, options)


# === Generated scenes ===


def made_scenes(task, options, held_out):
    """Returns generated scenes of digits, which are the same at each call."""
    count = options.held_out_scenes if held_out else options.scenes
    made = scenes.scenes(count, held_out, size=options.image_size)

    def read():
        for i in range(count):
            crowd = np.zeros(len(made.labels[i]), bool)
            boxes = {"boxes": made.boxes[i], "labels": made.labels[i], "crowd": crowd}
            target = boxes if task == "detection" else {"mask": made.masks[i]}
            yield {"image": made.images[i], **target}

    ground = () if task == "detection" else ("ground",)
    return Items(count, ground + scenes.CLASSES, read)


# === tensorflow-datasets ===


def prepared(task, options, held_out):
    """Returns a data set of tensorflow-datasets with boxes, or with a mask next to the image."""
    import tensorflow_datasets as tfds

    from training.sources.tfds import HELD_OUT_SPLITS, find_builder

    builder = find_builder(options.dataset.partition(":")[2], options)
    splits = builder.info.splits
    names = [name for name in (HELD_OUT_SPLITS if held_out else ("train",)) if name in splits]
    if not names:
        wanted = "or ".join(HELD_OUT_SPLITS) if held_out else "train"
        raise ValueError(
            f"--dataset={options.dataset} has no split {wanted}; it has {', '.join(splits)}"
        )
    features = builder.info.features
    if task == "detection":
        classes, convert = boxes_of_tfds(options, features, tfds.features)
    else:
        classes, convert = mask_of_tfds(options, features, tfds.features)

    def read():
        for example in tfds.as_numpy(builder.as_dataset(split=names[0])):
            yield convert(example)

    return Items(splits[names[0]].num_examples, classes, read)


def boxes_of_tfds(options, features, kinds):
    """Returns (classes, function from example to item) of a sequence with `bbox` and `label`."""
    found = [
        (key, feature.feature)
        for key, feature in features.items()
        if isinstance(feature, kinds.Sequence)
        and isinstance(feature.feature, kinds.FeaturesDict)
        and {"bbox", "label"} <= set(feature.feature)
    ]
    if not found:
        raise ValueError(
            f"--dataset={options.dataset} has no sequence of bbox and label, as tfds:coco/2017 "
            f"has; its features are {', '.join(features)}"
        )
    key, objects = found[0]

    def convert(example):
        height, width = example["image"].shape[:2]
        boxes = example[key]["bbox"] * np.array([height, width, height, width], "float32")
        labels = example[key]["label"].astype("int32")
        crowd = example[key].get("is_crowd", np.zeros(len(labels), bool))
        return {"image": color(example["image"]), "boxes": boxes, "labels": labels, "crowd": crowd}

    return tuple(objects["label"].names), convert


def mask_of_tfds(options, features, kinds):
    """Returns (classes, function from example to item) of a second image, the mask."""
    masks = [
        key for key, each in features.items() if isinstance(each, kinds.Image) and key != "image"
    ]
    if len(masks) != 1:
        raise ValueError(
            f"--dataset={options.dataset} needs one image feature for the mask beside 'image', as "
            f"tfds:scene_parse150 has; its features are {', '.join(features)}"
        )
    classes = names_of_masks(options, None)

    def convert(example):
        mask = example[masks[0]][..., 0]
        check_mask(mask, len(classes), f"a mask of --dataset={options.dataset}")
        return {"image": color(example["image"]), "mask": mask}

    return classes, convert


def color(image):
    """Converts (height, width, 1 or 3) to three channels."""
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


# === Folders ===


def boxes_in_folder(folder, options):
    """Returns images with annotations in COCO's format."""
    path = folder / "annotations.json"
    if not path.exists():
        raise ValueError(f"There is no {path}. A folder is {LAYOUTS['detection']}")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        categories = sorted(told["categories"], key=lambda each: each["id"])
        images = {each["id"]: folder / each["file_name"] for each in told["images"]}
        number = {each["id"]: i for i, each in enumerate(categories)}
        annotations = {key: [] for key in images}
        for each in told["annotations"]:
            left, top, width, height = each["bbox"]
            box = (top, left, top + height, left + width)
            row = (box, number[each["category_id"]], bool(each.get("iscrowd")))
            annotations[each["image_id"]].append(row)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not in COCO's form: {error!r}") from error
    check_files(images.values())

    def read():
        for key, image in images.items():
            rows = annotations[key]
            yield {
                "image": read_image(image),
                "boxes": np.array([row[0] for row in rows], "float32").reshape(-1, 4),
                "labels": np.array([row[1] for row in rows], "int32"),
                "crowd": np.array([row[2] for row in rows], bool),
            }

    return Items(len(images), tuple(each["name"] for each in categories), read)


def masks_in_folder(folder, options):
    """Returns images with a PNG mask of classes each."""
    images = sorted(path for path in (folder / "images").glob("*") if path.is_file())
    if not images:
        raise ValueError(
            f"There are no images in {folder / 'images'}. A folder is {LAYOUTS['segmentation']}"
        )
    masks = [folder / "masks" / f"{path.stem}.png" for path in images]
    check_files(masks)
    names = folder.parent / "classes.txt"
    lines = names.read_text(encoding="utf-8").split("\n") if names.exists() else None
    classes = names_of_masks(options, lines and [line for line in lines if line.strip()])

    def read():
        from PIL import Image

        for image, path in zip(images, masks, strict=True):
            with Image.open(path) as picture:  # a palette image gives its indices
                mask = np.asarray(picture)
            pixels = read_image(image)
            if mask.shape != pixels.shape[:2]:
                raise ValueError(
                    f"{path} is {mask.shape}, and its image {pixels.shape[:2]}. A mask has one "
                    "number a pixel, without channels"
                )
            check_mask(mask, len(classes), path)
            yield {"image": pixels, "mask": mask.astype("uint8")}

    return Items(len(images), classes, read)


def names_of_masks(options, names):
    """Returns the class names of masks: `names`, or numbers up to `--classes`."""
    if names:
        return tuple(names)
    if not options.classes:
        raise ValueError(
            f"--dataset={options.dataset} does not say how many classes its masks have: type "
            "--classes=N, one more than the greatest value, or name them in DIR/classes.txt"
        )
    return tuple(str(i) for i in range(options.classes))


def check_mask(mask, classes, where):
    """Raises a ValueError if a mask has a value that is not a class."""
    wrong = mask[(mask >= classes) & (mask != IGNORED)]
    if wrong.size:
        raise ValueError(
            f"{where} has the value {wrong[0]}, and there are {classes} classes, 0 to "
            f"{classes - 1}; {IGNORED} is for what does not count"
        )


def check_files(paths):
    """Raises a ValueError if a file is missing."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"There is no {missing[0]}, and {len(missing) - 1} more are missing")


def read_image(path):
    """Reads an image as uint8 (height, width, 3)."""
    from keras_tnt.images import decoding as images

    return np.asarray(images.convert(images.open_picture(path), 3))


# === To one size ===


def resize(item, size, scale=None):
    """Resizes an item to fit a square, padded on the right and at the bottom.

    Args:
        item: an item as described by this module.
        size: side of the square in pixels.
        scale: resize factor. If `None`, the longer side fills the square.

    Returns:
        `(item, scale)`: the image is padded with gray (127), the mask with `IGNORED`.
    """
    from PIL import Image

    height, width = item["image"].shape[:2]
    scale = scale or size / max(height, width)
    sides = (max(1, round(width * scale)), max(1, round(height * scale)))

    def resized(array, kind):
        if sides == (width, height):
            return array
        return np.asarray(Image.fromarray(array).resize(sides, kind))

    image = resized(item["image"], Image.Resampling.BILINEAR)
    result = {"image": pad(image, size, 127)}
    if "mask" in item:
        result["mask"] = pad(resized(item["mask"], Image.Resampling.NEAREST), size, IGNORED)
    else:
        result |= {key: item[key] for key in ("labels", "crowd")}
        result["boxes"] = item["boxes"] * np.float32(scale)
    return result, scale


def pad(array, size, value):
    """Pads an image or mask to a square on the right and at the bottom, or crops it."""
    array = array[:size, :size]
    room = [(0, size - side) for side in array.shape[:2]] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, room, constant_values=value)


def augment(item, random, options):
    """Applies random flips and, with `--crop`, scale jitter and random crops, to an item."""
    if options.flip and random.random() < 0.5:
        width = item["image"].shape[1]
        item = dict(item, image=item["image"][:, ::-1])
        if "mask" in item:
            item["mask"] = item["mask"][:, ::-1]
        else:
            top, left, bottom, right = item["boxes"].T
            item["boxes"] = np.stack([top, width - right, bottom, width - left], axis=-1)
    if not options.crop:
        return resize(item, options.image_size)[0]
    # Scale jitter: the shorter side becomes 0.5 to 2 times the crop, which is at a random place.
    shorter = min(item["image"].shape[:2])
    scale = options.image_size / shorter * random.uniform(0.5, 2.0)
    visible = options.image_size / scale
    places = [random.uniform(0, max(0.0, side - visible)) for side in item["image"].shape[:2]]
    rows, columns = (slice(int(at), int(at + visible) + 1) for at in places)
    cut = {key: item[key][rows, columns] for key in ("image", "mask")}
    return resize(cut, options.image_size, scale)[0]


def batches(items: Items, options, target: Callable, seed: int):
    """Returns endless batches for `fit` on every backend, in an order determined by the seed.

    Args:
        items: the training split.
        options: image_size, batch, flip, crop.
        target: function from an item to the target of the model's loss, of a fixed shape.
        seed: seed of order and augmentation.

    Returns:
        A `tf.data.Dataset` of (images, targets), with float32 images in [0, 255].
    """
    import tensorflow as tf

    def read():
        random = np.random.default_rng(seed)
        window = []
        while True:
            for item in items.read():
                window.append(item)
                if len(window) < min(items.count, 1000):
                    continue
                yield prepare(window.pop(random.integers(len(window))), random)

    def prepare(item, random):
        item = augment(item, random, options)
        return item["image"].astype("float32"), target(item)

    first = prepare(next(iter(items.read())), np.random.default_rng(seed))
    signature = tf.nest.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype), first)
    dataset = tf.data.Dataset.from_generator(read, output_signature=signature)
    return dataset.batch(options.batch, drop_remainder=True).prefetch(2)
