"""Data sets: image names, encoded bytes or pixels, and labels.

A data set is a function and a row of `DATASETS`. `register_dataset` adds custom ones, in a module
that `--plugins=` names. TensorFlow is imported where it is used, not here, so that `--help` is
fast.
"""

from functools import partial

from training.sources import (
    folders,
    generated,
    huggingface,
    parquet,
    records,
    tables,
    tars,
    tfds,
)
from training.sources.generated import digits
from training.sources.kinds import Indexed, Streamed, in_memory, of_files
from training.sources.registry import (
    DATASETS,
    OPTIONS,
    Dataset,
    check,
    check_label_names,
    describe,
    open_sources,
    open_split,
    register_dataset,
)

IMAGENET = {"name": "imagenet2012", "train_split": "train", "eval_split": "validation"}
IMAGENET_V2 = {"name": "imagenet_v2/matched-frequency", "eval_split": "test"}
IMAGENET_REAL = {"name": "imagenet2012_real", "eval_split": "validation"}

DATASETS.update(
    {
        "digits": Dataset(generated.digits_split, "scikit-learn's 1,797 handwritten digits"),
        "synthetic": Dataset(generated.synthetic, "noise, for measurements of speed"),
        "folder": Dataset(
            folders.folder,
            folders.LAYOUT,
            needs_data_dir=True,
            options=("train_split", "eval_split", "validation_share"),
        ),
        "table": Dataset(
            tables.table,
            tables.LAYOUT,
            needs_data_dir=True,
            options=("train_split", "eval_split", "validation_share"),
        ),
        "tfrecord": Dataset(
            records.tfrecord,
            records.LAYOUT,
            needs_data_dir=True,
            options=("train_split", "eval_split", "label_offset"),
        ),
        "webdataset": Dataset(
            tars.webdataset,
            tars.LAYOUT,
            needs_data_dir=True,
            options=("train_split", "eval_split", "label_offset"),
        ),
        "parquet": Dataset(
            parquet.parquet,
            parquet.LAYOUT,
            needs_data_dir=True,
            options=("train_split", "eval_split", "label_offset"),
        ),
        "huggingface": Dataset(
            huggingface.huggingface,
            huggingface.LAYOUT,
            needs_data_dir=True,
            options=("train_split", "eval_split", "label_offset"),
        ),
        "tfds:": Dataset(
            tfds.prepared,
            tfds.LAYOUT,
            options=("train_split", "eval_split"),
        ),
        "imagenet2012": Dataset(
            partial(tfds.prepared, **IMAGENET),
            "ImageNet of tensorflow-datasets, its validation images held out",
            options=("train_split", "eval_split"),
        ),
        "imagenet_v2": Dataset(
            partial(tfds.prepared, **IMAGENET_V2),
            "ImageNet-V2 (matched frequency) of tensorflow-datasets; for evaluation alone",
            evaluation_only=True,
        ),
        "imagenet2012_real": Dataset(
            partial(tfds.prepared, **IMAGENET_REAL),
            "ReaL: ImageNet's validation images, each with all of its right labels, of "
            "tensorflow-datasets; for evaluation alone",
            evaluation_only=True,
        ),
    }
)
