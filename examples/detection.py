"""Trains KerasHub's RetinaNet for object detection on a keras_tnt backbone.

    python examples/detection.py
    python examples/detection.py --dataset=tfds:coco/2017 --data_dir=DIR
    python examples/detection.py --dataset=FOLDER --weights=imagenet --steps=5000

Without flags, it generates scenes of handwritten digits on cluttered ground, trains for some
minutes on two cores, and measures COCO's average precision on scenes of held-out digits: of the
trained detector, reloaded from disk, and exported to a SavedModel. An interrupted run resumes if
the same command is run again. docs/dense.md explains the data sets.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from examples.dense_task import TNT_SCENES, Settings, parse, require, run  # noqa: E402

BOXES = "yxyx"
MOST_BOXES = 100  # per image, in training and in predictions

SETTINGS = {
    "scenes": Settings(
        model="tnt",
        architecture=TNT_SCENES,
        weights="digits",
        image_size=64,
        batch=8,
        steps=3000,
        learning_rate=1e-3,
    ),
    # TNT on COCO (arXiv 2103.00112, tables 10 and 13): AdamW, batch 16, images up to 800 pixels,
    # 12 epochs of 118,287 images.
    "paper": Settings(
        model="tnt_small",
        weights="imagenet",
        image_size=800,
        batch=16,
        steps=12 * 118_287 // 16,
        learning_rate=1e-4,
        weight_decay=1e-4,
        flip=True,
    ),
}


def main(arguments=None):
    """Trains, evaluates and exports a detector, and returns the metrics by form of the model."""
    options = parse(__doc__, SETTINGS, arguments)
    require("keras_hub", "faster_coco_eval", "sklearn", "tensorflow")
    import keras

    import keras_tnt  # noqa: F401  registers the layers with Keras
    from examples import dense_data, dense_task

    keras.utils.set_random_seed(options.seed)
    held_out = dense_data.load("detection", options, held_out=True)
    path = options.workdir / "detector.keras"
    results = {}
    images, truth = evaluation_set(held_out, options)
    if not path.exists():
        items = dense_data.load("detection", options, held_out=False)
        detector = make_detector(options, len(items.classes))
        print(f"{detector.count_params():,} parameters, {options.steps} steps", flush=True)
        dataset = dense_data.batches(items, options, padded_boxes, options.seed)
        dense_task.train(detector, dataset, options)
        detector.save(path)
        results["trained"] = evaluate(detect(detector, images, options.batch), truth)
    detector = keras.saving.load_model(path)
    found = detect(detector, images, options.batch)
    results["reloaded"] = evaluate(found, truth)
    draw(options.workdir / "held_out.png", images, found, truth, held_out.classes)
    if not options.no_export:
        directory = options.workdir / "saved_model"
        dense_task.export("detection", path, directory)
        served = dense_task.serve(directory, images, options.workdir)
        results["exported"] = evaluate(served, truth)
    dense_task.write_results(options.workdir, results)
    return results


# === The detector ===


def make_detector(options, classes):
    """Builds and compiles RetinaNet on a keras_tnt backbone.

    For generated scenes, anchors cover objects of a sixth to the whole of the image; otherwise they
    are RetinaNet's own (arXiv 1708.02002).
    """
    import keras
    import keras_hub
    import numpy as np

    import keras_tnt
    from examples import dense_task

    for_scenes = options.dataset == "scenes"
    size = options.image_size
    backbone = keras_hub.models.RetinaNetBackbone(
        image_encoder=keras_tnt.backbone(dense_task.make_model(options), ("P3", "P4", "P5")),
        min_level=3,
        max_level=5 if for_scenes else 7,
        use_p5=False,
        image_shape=(size, size, 3),
    )
    anchors = keras_hub.layers.AnchorGenerator(
        BOXES,
        min_level=3,
        max_level=5 if for_scenes else 7,
        num_scales=3,
        aspect_ratios=[1.5, 2.4] if for_scenes else [0.5, 1.0, 2.0],  # height / width
        anchor_size=2.0 if for_scenes else 4.0,
    )
    detector = keras_hub.models.RetinaNetObjectDetector(
        backbone,
        num_classes=classes,
        bounding_box_format=BOXES,
        anchor_generator=anchors,
        use_prediction_head_norm=True,
        pre_logits_num_conv_layers=1 if for_scenes else 4,
        prediction_decoder=keras_hub.layers.NonMaxSuppression(
            BOXES, from_logits=True, confidence_threshold=0.05, max_detections=MOST_BOXES
        ),
    )
    # RetinaNet initializes class probabilities to 0.01 (section 4.1). KerasHub 0.32 sets this bias
    # on the boxes as well, which then begin far from their anchors.
    for head, bias in (
        (detector.classification_head, -np.log(99)),
        (detector.box_head, 0.0),
    ):
        variable = head.prediction_layer.bias
        variable.assign(np.full(variable.shape, bias))
    if options.freeze is not None:
        keras_tnt.finetuning.freeze(detector, options.freeze)
    optimizer = dense_task.make_optimizer(
        options.steps, options.learning_rate, options.weight_decay, options.schedule
    )
    detector.compile(
        optimizer,
        box_loss=keras.losses.Huber(reduction="sum"),
        jit_compile=dense_task.jit(),
    )
    return detector


def padded_boxes(item):
    """Returns boxes and labels of an item, without crowds, padded to `MOST_BOXES` rows."""
    import numpy as np

    kept = ~item["crowd"]
    boxes, labels = item["boxes"][kept][:MOST_BOXES], item["labels"][kept][:MOST_BOXES]
    room = MOST_BOXES - len(boxes)
    return {
        "boxes": np.pad(boxes.astype("float32"), [(0, room), (0, 0)]),
        "labels": np.pad(labels.astype("float32"), (0, room), constant_values=-1),
    }


def detect(detector, images, batch):
    """Returns the detections in images, as a dict of arrays with `MOST_BOXES` rows per image.

    The last batch is padded with the last image, because KerasHub's non-maximum suppression needs a
    static number of images in a TensorFlow graph.
    """
    import numpy as np

    count = len(images)
    images = np.pad(images, [(0, -count % batch), *[(0, 0)] * 3], mode="edge")
    found = detector.predict(images, batch, verbose=0)
    return {key: value[:count] for key, value in found.items()}


def export(detector, directory):
    """Writes a SavedModel from images to boxes, labels and confidences. Needs TensorFlow."""
    import keras
    import tensorflow as tf

    height, width, channels = detector.input_shape[1:]

    def decode(one):
        predictions, image = tf.nest.map_structure(lambda x: x[None], one)
        found = detector.decode_predictions(predictions, image)
        return {key: tf.cast(found[key][0], spec.dtype) for key, spec in specs.items()}

    def serve(images):
        # One image at a time, because NMS needs a static number of images; see `detect`.
        predictions = detector(images, training=False)
        return tf.map_fn(decode, (predictions, images), fn_output_signature=specs)

    specs = {
        "boxes": tf.TensorSpec((MOST_BOXES, 4), tf.float32),
        "confidence": tf.TensorSpec((MOST_BOXES,), tf.float32),
        "labels": tf.TensorSpec((MOST_BOXES,), tf.int32),
        "num_detections": tf.TensorSpec((), tf.int32),
    }

    archive = keras.export.ExportArchive()
    archive.track(detector)
    signature = [tf.TensorSpec((None, height, width, channels), tf.float32, name="images")]
    archive.add_endpoint("serve", serve, input_signature=signature)
    archive.write_out(str(directory), verbose=False)


# === Evaluation ===


def evaluation_set(items, options):
    """Returns all images at the model's size, and their ground truth in original pixels."""
    import numpy as np

    from examples import dense_data

    resized = [dense_data.resize(item, options.image_size) for item in items.read()]
    images = np.stack([item["image"] for item, _ in resized]).astype("float32")
    truth = [
        {**item, "boxes": item["boxes"] / scale, "scale": scale, "classes": len(items.classes)}
        for item, scale in resized
    ]
    return images, truth


def evaluate(found, truth):
    """Computes COCO's average precision, in the pixels of the original images.

    Args:
        found: predictions of the detector: boxes, labels, confidence, num_detections.
        truth: ground truth returned by `evaluation_set`.

    Returns:
        A dict of AP (mean over IoU 0.5 to 0.95), AP50 and AP75.
    """
    import contextlib
    import io

    import numpy as np
    from faster_coco_eval import COCO, COCOeval_faster

    def row(image, box, **more):
        top, left, bottom, right = (float(x) for x in box)
        box = [left, top, right - left, bottom - top]
        return {"image_id": image, "bbox": box, "area": box[2] * box[3], **more}

    told, answers = [], []
    for i, item in enumerate(truth):
        for box, label, crowd in zip(item["boxes"], item["labels"], item["crowd"], strict=True):
            more = {"category_id": int(label) + 1, "iscrowd": int(crowd), "id": len(told) + 1}
            told.append(row(i + 1, box, **more))
        for n in range(int(np.ravel(found["num_detections"][i])[0])):
            more = {
                "category_id": int(found["labels"][i][n]) + 1,
                "score": float(found["confidence"][i][n]),
            }
            answers.append(row(i + 1, found["boxes"][i][n] / item["scale"], **more))
    if not told:
        raise ValueError("The held-out images have no boxes to compare with.")
    if not answers:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    described = {
        "images": [{"id": i + 1} for i in range(len(truth))],
        "categories": [{"id": i + 1, "name": str(i)} for i in range(truth[0]["classes"])],
        "annotations": told,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(described)
        run_of = COCOeval_faster(ground_truth, ground_truth.loadRes(answers), iouType="bbox")
        run_of.evaluate()
        run_of.accumulate()
        run_of.summarize()
    numbers = run_of.stats
    return {"AP": float(numbers[0]), "AP50": float(numbers[1]), "AP75": float(numbers[2])}


def draw(path, images, found, truth, classes, count=12, threshold=0.5):
    """Draws held-out images with boxes: ground truth dashed, detections solid."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    from keras_tnt import figures

    count = min(count, len(images))
    columns = min(4, count)
    rows = -(-count // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.2 * columns, 3.3 * rows))
    figure.suptitle("Held out: dashed what is there, full lines what the detector found")
    for axis in np.ravel(axes):
        axis.axis("off")
    for i, axis in zip(range(count), np.ravel(axes), strict=False):
        axis.imshow(images[i].astype("uint8"))

        def frame(box, axis=axis, **line):
            top, left, bottom, right = box
            axis.add_patch(
                Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, **line)
            )

        for box in truth[i]["boxes"] * truth[i]["scale"]:
            frame(box, linestyle="--", linewidth=1, edgecolor="white")
        for n in range(int(np.ravel(found["num_detections"][i])[0])):
            confidence, label = found["confidence"][i][n], int(found["labels"][i][n])
            if confidence < threshold:
                continue
            box, color = found["boxes"][i][n], pyplot.get_cmap("tab10")(label % 10)
            frame(box, linewidth=2, edgecolor=color)
            axis.text(
                box[1],
                box[0] - 2,
                f"{figures.drawable(classes[label])} {confidence:.0%}",
                color="white",
                fontsize=8,
                clip_on=True,
                bbox={"facecolor": color, "edgecolor": "none", "pad": 1},
            )
    figure.tight_layout()
    figures.save(figure, path, dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(run(main))
