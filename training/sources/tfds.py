"""Data sets prepared by tensorflow-datasets that have an image and a label."""

import difflib
import re

from training.sources.kinds import Streamed
from training.sources.records import READERS, divides_files

HELD_OUT_SPLITS = ("validation", "val", "valid", "dev", "test")
NAME = r"\w+(/[\w.\-]+)?(:\d+\.\d+\.\d+)?"
LAYOUT = (
    "<name>[/<config>][:<version>], any data set of tensorflow-datasets with an image and a "
    "label, prepared in --data_dir; --train_split and --eval_split in its syntax: train[:90%]"
)


def prepared(config, held_out, name=None, train_split=None, eval_split=None):
    """Returns a split of a data set of tensorflow-datasets, with encoded images.

    Args:
        config: A `training.configuration.Config`.
        held_out: Whether to return the held-out split, else the training split.
        name: Name in tensorflow-datasets. If `None`, the text after `--dataset=tfds:`.
        train_split: Split used without `--train_split`. If `None`, `train`.
        eval_split: Split used without `--eval_split`. If `None`, the first of `HELD_OUT_SPLITS`.

    Returns:
        A `Streamed`.

    Raises:
        ValueError: If there is no such data set or split, it is not prepared, or has no label.
    """
    name = name or config.dataset.partition(":")[2]
    builder = find_builder(name, config)
    names = list(builder.info.splits)
    if held_out:
        default = eval_split or next((s for s in HELD_OUT_SPLITS if s in names), "validation")
        option, wanted = "--eval_split", config.eval_split or default
    else:
        option, wanted = "--train_split", config.train_split or train_split or "train"
    try:
        split = builder.info.splits[wanted]
    except (KeyError, ValueError, AssertionError) as error:
        raise ValueError(
            f"--dataset={config.dataset} has no split {wanted!r}; it has {', '.join(names)}, and "
            f"{option} takes parts and sums of them: train[:90%], train+test"
        ) from error
    if not split.num_examples:
        raise ValueError(f"{option}={wanted} of --dataset={config.dataset} holds no images")
    if held_out and not config.eval_split and not eval_split and wanted == HELD_OUT_SPLITS[-1]:
        print(
            f"held-out split {wanted!r} of {name}: it has no validation split. "
            "--eval_split='train[90%:]' and --train_split='train[:90%]' hold out training images",
            flush=True,
        )
    image, label = image_and_label(builder.info, config)
    return stream_of(builder, wanted, image, label, config.classes)


def find_builder(name, config):
    """Returns the tensorflow-datasets builder of a prepared data set.

    Args:
        name: Name in tensorflow-datasets.
        config: A `training.configuration.Config`.

    Raises:
        ValueError: If there is no such data set, or it is not prepared.
        ImportError: If tensorflow-datasets is not installed.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f'--dataset={config.dataset} needs tensorflow-datasets: pip install "keras-tnt[train]"'
        ) from error
    if not re.fullmatch(NAME, name):
        raise ValueError(
            f"--dataset={config.dataset} must be tfds:<name>[/<config>][:<version>], such as "
            "tfds:cifar10, tfds:imagenet_v2/topimages or tfds:cifar10:3.0.2"
        )
    plain = re.split("[/:]", name)[0]
    try:
        builder = tfds.builder(name, data_dir=config.data_dir or None)
    except (ValueError, AssertionError) as error:
        known = tfds.list_builders(with_community_datasets=False)
        if plain in known:
            row = tfds.builder_cls(plain)
            there_are = ", ".join(row.builder_configs) or "none"
            raise ValueError(
                f"--dataset={config.dataset}: {plain} has the version {row.VERSION} and the "
                f"configurations {there_are}"
            ) from error
        near = [known_name for known_name in known if plain in known_name]
        near = near[:3] or difflib.get_close_matches(plain, known)
        raise ValueError(
            f"--dataset={config.dataset}: tensorflow-datasets has no {plain!r}"
            + (f". Did you mean {' or '.join(near)}?" if near else "")
        ) from error
    if not builder.info.splits:
        directory = f" --data_dir={config.data_dir}" if config.data_dir else ""
        raise ValueError(
            f"--dataset={config.dataset} is not prepared in {builder.data_dir}. "
            f"`tfds build {name}{directory}` prepares it, or --data_dir tells where it is"
        )
    return builder


def image_and_label(info, config):
    """Returns the names of the image feature and the label feature.

    Args:
        info: A `tfds.core.DatasetInfo`.
        config: A `training.configuration.Config`, for messages.

    Raises:
        ValueError: If there is no such feature, or several to choose from.
    """
    import tensorflow_datasets as tfds

    features = dict(info.features.items())
    supervised = [key for key in info.supervised_keys or () if isinstance(key, str)]

    def is_label(feature):
        feature = getattr(feature, "feature", feature)  # of a Sequence of labels
        return isinstance(feature, tfds.features.ClassLabel)

    found = []
    for what, fits in (
        ("image", lambda feature: isinstance(feature, tfds.features.Image)),
        ("label of named classes", is_label),
    ):
        fitting = [key for key, feature in features.items() if fits(feature)]
        chosen = [key for key in fitting if key in supervised] or fitting
        if len(chosen) != 1:
            raise ValueError(
                f"--dataset={config.dataset} has {'several features' if chosen else 'no feature'} "
                f"for the {what}; its features are {', '.join(features)}"
            )
        found += chosen
    return found


def stream_of(builder, split, image, label, classes):
    """Returns a source of the images and labels of a split.

    Args:
        builder: A tensorflow-datasets builder.
        split: Split, in the syntax of tensorflow-datasets.
        image: Name of the image feature.
        label: Name of the label feature.
        classes: Number of model outputs, the minimum length of multi-label targets.

    Returns:
        A `Streamed`.
    """
    import tensorflow as tf
    import tensorflow_datasets as tfds

    feature, info = builder.info.features[label], builder.info.splits[split]
    several = hasattr(feature, "feature")
    feature = feature.feature if several else feature
    files = info.file_instructions

    def item(example):
        value = example[label]
        if several:
            # Models may have more outputs than there are labels.
            depth = max(classes, feature.num_classes)
            value = tf.minimum(tf.reduce_sum(tf.one_hot(value, depth), axis=0), 1.0)
        return example["tfds_id"], example[image], value

    def stream(seed, worker, workers):
        by_file = divides_files(seed, len(files), workers)
        read = tfds.ReadConfig(
            shuffle_seed=seed,
            interleave_cycle_length=READERS,
            add_tfds_id=True,
            try_autocache=False,
            input_context=tf.distribute.InputContext(workers, worker) if by_file else None,
        )
        read.options.deterministic = True
        dataset = builder.as_dataset(
            split=split,
            shuffle_files=seed is not None,
            decoders=tfds.decode.PartialDecoding(
                {image: True, label: True}, decoders={image: tfds.decode.SkipDecoding()}
            ),
            read_config=read,
        )
        dataset = dataset.map(item)
        return dataset if by_file else dataset.shard(workers, worker)

    return Streamed(
        info.num_examples,
        feature.num_classes,
        stream,
        label_names=tuple(feature.names),
        stretches=[
            (f.filename, f.skip, f.skip + f.take if f.take >= 0 else f.examples_in_shard)
            for f in files
        ],
        several_labels=several,
    )
