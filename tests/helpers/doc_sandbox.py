"""Sandbox for executing documentation: shrunken variants, a fake hub and a folder of photographs.

It runs a page's code as printed, within seconds.
"""

from PIL import Image
from skimage import data

import keras_tnt
from keras_tnt.models import registry
from keras_tnt.models.registry import Variant

# Architecture overrides per family; image sizes and other options are unchanged.
SMALL = {
    "tnt": {"depth": 4, "outer_dim": 24, "inner_dim": 4, "outer_heads": 2, "inner_heads": 2},
    "pyramid_tnt": {
        "depths": (1, 1, 1, 1),
        "outer_dims": (16, 16, 16, 16),
        "inner_dims": (4, 4, 4, 4),
        "outer_heads": (1, 1, 1, 1),
        "inner_heads": (1, 1, 1, 1),
    },
    "deit": {"depth": 4, "embed_dim": 24, "num_heads": 2},
    "cait": {"depth": 4, "embed_dim": 24, "num_heads": 2},
}


def shrink(monkeypatch):
    """Replaces the architecture of every published variant by a small one."""
    for family in registry.families():
        for name, row in dict(family.variants).items():
            architecture = {**row.architecture, **SMALL.get(family.name, {})}
            monkeypatch.setitem(family.variants, name, Variant(architecture, row.image_size))


def publish(hub, names, folder):
    """Publishes checkpoints of these names, with random weights, on the fake hub."""
    for row in keras_tnt.list_weights():
        if row.name in names:
            path = folder / f"{row.name}.safetensors"
            size = (row.size, row.size, 3)
            model = registry.find_model(row.model)(weights=None, input_shape=size, **row.arguments)
            keras_tnt.save_checkpoint(model, path)
            hub.add(row.repository, row.file, path)


def photographs(folder):
    """Writes cat.jpg and photos/<class>/<number>.jpg of two classes, from scikit-image."""
    Image.fromarray(data.chelsea()).save(folder / "cat.jpg")
    for name in ("cat", "coffee"):
        pixels = data.chelsea() if name == "cat" else data.coffee()
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(4):
            part = pixels[10 * i : 10 * i + 240, 30 * i : 30 * i + 240]
            Image.fromarray(part).save(folder / "photos" / name / f"{i}.jpg")


def weights_files(folder):
    """Writes weight files of a small DeiT in each format that users bring."""
    model = keras_tnt.DeiTTiny(weights=None)
    keras_tnt.save_checkpoint(model, folder / "model.safetensors")
    model.save_weights(folder / "mine.weights.h5")
    keras_tnt.save_pretrained(model, folder / "repository")
