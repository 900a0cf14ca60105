"""Trains KerasHub's DeepLabV3+ for semantic segmentation on a keras_tnt backbone.

    python examples/segmentation.py
    python examples/segmentation.py --dataset=tfds:scene_parse150 --data_dir=DIR --classes=151
    python examples/segmentation.py --dataset=FOLDER --weights=imagenet --steps=5000

Without flags, it generates scenes of handwritten digits on cluttered ground, trains for some
minutes on two cores, and measures the mean IoU over ten digits and ground on scenes of held-out
digits: of the trained segmenter, reloaded from disk, and exported to a SavedModel. An interrupted
run resumes if the same command is run again. docs/dense.md explains the data sets.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.dense_task import TNT_SCENES, Settings, parse, require, run  # noqa: E402

SETTINGS = {
    "scenes": Settings(
        model="tnt",
        architecture=TNT_SCENES,
        weights="digits",
        image_size=64,
        batch=16,
        steps=2400,
        learning_rate=1e-3,
    ),
    # TNT on ADE20K (arXiv 2103.00112, table 11, as Trans2Seg): AdamW, 512x512 crops, 40,000 steps.
    "paper": Settings(
        model="tnt_small",
        weights="imagenet",
        image_size=512,
        batch=16,
        steps=40_000,
        learning_rate=1e-4,
        schedule="poly",
        weight_decay=1e-4,
        flip=True,
        crop=True,
    ),
}


def main(arguments=None):
    """Trains, evaluates and exports a segmenter, and returns the metrics by form of the model."""
    options = parse(__doc__, SETTINGS, arguments)
    require("keras_hub", "sklearn", "tensorflow")
    import keras

    import keras_tnt  # noqa: F401  registers the layers with Keras
    from examples import dense_data, dense_task

    keras.utils.set_random_seed(options.seed)
    held_out = dense_data.load("segmentation", options, held_out=True)
    classes = len(held_out.classes)
    path = options.workdir / "segmenter.keras"
    results = {}
    images, masks = evaluation_set(held_out, options)
    if not path.exists():
        items = dense_data.load("segmentation", options, held_out=False)
        segmenter = make_segmenter(options, classes)
        print(f"{segmenter.count_params():,} parameters, {options.steps} steps", flush=True)
        dataset = dense_data.batches(items, options, lambda item: item["mask"], options.seed)
        dense_task.train(segmenter, dataset, options)
        segmenter.save(path)
        results["trained"] = evaluate(classify(segmenter, images, options), masks, classes)
    segmenter = keras.saving.load_model(path)
    found = classify(segmenter, images, options)
    results["reloaded"] = evaluate(found, masks, classes)
    draw(options.workdir / "held_out.png", images, found, masks, held_out.classes)
    if not options.no_export:
        directory = options.workdir / "saved_model"
        dense_task.export("segmentation", path, directory)
        served = dense_task.serve(directory, images, options.workdir)
        results["exported"] = evaluate(served["mask"], masks, classes)
    dense_task.write_results(options.workdir, results)
    return results


# === The segmenter ===


def make_segmenter(options, classes):
    """Builds and compiles DeepLabV3+ on a keras_tnt backbone."""
    import keras
    import keras_hub

    import keras_tnt
    from examples import dense_data, dense_task

    for_scenes = options.dataset == "scenes"
    size = options.image_size
    model = dense_task.make_model(options)
    fine = 3 if len(keras_tnt.anatomy(model).stages) > 1 else 2  # the finest available level
    coarse = 4 if for_scenes else 5
    backbone = keras_hub.models.DeepLabV3Backbone(
        image_encoder=keras_tnt.backbone(model, (f"P{fine}", f"P{coarse}")),
        spatial_pyramid_pooling_key=f"P{coarse}",
        low_level_feature_key=f"P{fine}",
        upsampling_size=2 ** (coarse - fine),
        dilation_rates=[1, 2] if for_scenes else [6, 12, 18],
        projection_filters=48,
        image_shape=(size, size, 3),
    )
    segmenter = keras_hub.models.DeepLabV3ImageSegmenter(
        backbone,
        num_classes=classes,
        compile=False,  # metrics of a first compilation would remain after the second
    )
    if options.freeze is not None:
        keras_tnt.finetuning.freeze(segmenter, options.freeze)
    optimizer = dense_task.make_optimizer(
        options.steps, options.learning_rate, options.weight_decay, options.schedule
    )
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=dense_data.IGNORED
    )
    segmenter.compile(optimizer, loss=loss, metrics=None, jit_compile=dense_task.jit())
    return segmenter


def classify(segmenter, images, options):
    """Returns the most likely class of each pixel, uint8 (n, height, width)."""
    import numpy as np

    parts = [
        segmenter.predict_on_batch(images[i : i + options.batch]).argmax(axis=-1)
        for i in range(0, len(images), options.batch)
    ]
    return np.concatenate(parts).astype("uint8")


def export(segmenter, directory):
    """Writes a SavedModel from images to probabilities and the most likely class of each pixel."""
    import keras
    import tensorflow as tf

    height, width, channels = segmenter.input_shape[1:]

    def serve(images):
        probabilities = keras.ops.softmax(segmenter(images, training=False))
        mask = keras.ops.cast(keras.ops.argmax(probabilities, axis=-1), "uint8")
        return {"mask": mask, "probabilities": probabilities}

    archive = keras.export.ExportArchive()
    archive.track(segmenter)
    signature = [tf.TensorSpec((None, height, width, channels), tf.float32, name="images")]
    archive.add_endpoint("serve", serve, input_signature=signature)
    archive.write_out(str(directory), verbose=False)


# === Evaluation ===


def evaluation_set(items, options):
    """Returns all images at the model's size, and their masks at that size."""
    import numpy as np

    from examples import dense_data

    resized = [dense_data.resize(item, options.image_size)[0] for item in items.read()]
    images = np.stack([item["image"] for item in resized]).astype("float32")
    return images, np.stack([item["mask"] for item in resized])


def evaluate(found, masks, classes):
    """Computes mean IoU over the classes, and pixel accuracy.

    Args:
        found: predicted classes, (n, height, width).
        masks: true classes, (n, height, width); `IGNORED` pixels do not count.
        classes: number of classes.

    Returns:
        A dict of "mean IoU" and "pixel accuracy".
    """
    import keras

    from examples import dense_data

    metric = keras.metrics.MeanIoU(classes, ignore_class=dense_data.IGNORED)
    for i in range(0, len(masks), 50):
        metric.update_state(masks[i : i + 50].astype("int32"), found[i : i + 50].astype("int32"))
    counted = masks != dense_data.IGNORED
    return {
        "mean IoU": float(metric.result()),
        "pixel accuracy": float((found == masks)[counted].mean()),
    }


def draw(path, images, found, masks, classes, count=6):
    """Draws held-out images, their masks, and the predicted masks."""
    import matplotlib
    import numpy as np

    from examples import dense_data
    from keras_tnt import figures

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    palette = np.asarray(pyplot.get_cmap("tab10" if len(classes) <= 11 else "tab20").colors)
    palette = np.vstack([[(0.12, 0.12, 0.12)], palette])

    def painted(mask):
        index = np.where(mask == 0, 0, 1 + (mask.astype(int) - 1) % (len(palette) - 1))
        picture = palette[index]
        picture[mask == dense_data.IGNORED] = 1
        return picture

    count = min(count, len(images))
    figure, axes = pyplot.subplots(3, count, figsize=(2.4 * count, 7.8), squeeze=False)
    rows = ("held-out image", "its mask", "found")
    for i in range(count):
        for axis, picture, name in zip(
            axes[:, i],
            (images[i].astype("uint8"), painted(masks[i]), painted(found[i])),
            rows,
            strict=True,
        ):
            axis.imshow(picture)
            axis.set_xticks([])
            axis.set_yticks([])
            if i == 0:
                axis.set_ylabel(name, fontsize=12)
    shown = np.unique(np.concatenate([masks[:count].ravel(), found[:count].ravel()]))
    handles = [
        Patch(
            color=palette[0 if k == 0 else 1 + (k - 1) % (len(palette) - 1)],
            label=figures.drawable(classes[k]),
        )
        for k in shown.astype(int)
        if k != dense_data.IGNORED
    ][:24]
    figure.legend(handles=handles, loc="lower center", ncols=min(12, len(handles)))
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figures.save(figure, path, dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run(main))
