"""Generated JPEG files and data sets for tests."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(seed, size=(40, 60), mode="RGB"):
    """Returns the bytes of a JPEG of random blocks."""
    random = np.random.default_rng(seed)
    channels = {"L": 1, "RGB": 3, "CMYK": 4}[mode]
    blocks = random.integers(0, 256, (size[0] // 10, size[1] // 10, channels), "uint8")
    pixels = np.kron(blocks, np.ones((10, 10, 1), "uint8"))
    image = Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode=mode)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def class_folders(root, split, images, classes=7):
    """Writes a split of class folders that includes unreadable, grayscale and CMYK files.

    Args:
        root: directory of the data set.
        split: name of the split.
        images: number of images.
        classes: number of classes. Defaults to 7.

    Returns:
        The paths of the files that cannot be read.
    """
    broken = []
    for i in range(images):
        directory = root / split / f"class_{i % classes}"
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{i:04d}.jpg"
        mode = {3: "CMYK", 5: "L"}.get(i, "RGB")
        data = jpeg(i, mode=mode)
        if i in (8, 20):
            data = data[: len(data) // 2]
            broken.append(str(path))
        if i == 13:
            data = b"this is no image\n"
            broken.append(str(path))
        path.write_bytes(data)
    return broken


def prepare(root, name, examples, label_names=None):
    """Prepares a data set in the layout of tensorflow-datasets.

    Args:
        root: its `data_dir`.
        name: name of the data set, with its configuration.
        examples: dict from split to a list of examples with the features' values.
        label_names: names of the classes, if the package has none before preparation.
    """
    import tensorflow_datasets as tfds

    info = tfds.builder(name, data_dir=str(root)).info
    if label_names:
        info.features["label"].names = label_names
    Path(info.data_dir).mkdir(parents=True)
    info.features.save_config(info.data_dir)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=8)
    writer.initialize_splits(list(examples))
    for split, each in examples.items():
        writer.add_examples({split: each})
    writer.close_all()


def prepare_imagenet(root, images):
    """Prepares imagenet2012 with the given number of generated JPEGs per split."""
    examples = {
        split: [
            {"file_name": f"{split}_{i}.JPEG", "image": io.BytesIO(jpeg(i)), "label": 37 * i % 1000}
            for i in range(number)
        ]
        for split, number in images.items()
    }
    prepare(root, "imagenet2012", examples)
