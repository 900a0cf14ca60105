"""Images in tar files, in the layout of WebDataset.

Nothing is extracted: the headers of the shards are read once, and an image is then read from its
offset. So the order is an exact permutation, as for single files, and a run resumes without reading
what came before.
"""

import json
import os
import re
import tarfile

import numpy as np

from training.sources.kinds import Indexed, read_in_python
from training.sources.splits import check_labels, split_files

SUFFIXES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp")
LABELS = ("cls", "json")
# Maximum size of a member that holds a label.
MAX_LABEL_BYTES = 2**20
LAYOUT = (
    "uncompressed tar files whose names have the split as a part (train-0000.tar, val-0000.tar), "
    "or in folders train and val, of WebDataset samples: <key>.jpg and <key>.cls, or <key>.json "
    "with a label; needs --classes, and --label_offset=1 if labels start at 1"
)


def webdataset(config, held_out):
    """Returns a split of WebDataset tar files.

    Args:
        config: A `training.configuration.Config`.
        held_out: Whether to return the held-out split, else the training split.

    Raises:
        ValueError: If there are no files, one is damaged, or a sample has no image or label.
    """
    import tensorflow as tf

    shards = split_files(config, held_out, ".tar", LAYOUT)
    names, numbers, offsets, sizes, labels = [], [], [], [], []
    for number, shard in enumerate(shards):
        for key, offset, size, label in read_index(shard):
            names.append(os.fsencode(f"{os.path.basename(shard)} {key}"))
            numbers.append(number)
            offsets.append(offset)
            sizes.append(size)
            labels.append(label)
    if not names:
        raise ValueError(f"{shards[0]} holds no samples. It must be one of {LAYOUT}")
    labels = check_labels(
        np.array(labels, "int64"), config, lambda i: names[i].decode(errors="replace")
    )

    def read(index):
        return read_member(shards[numbers[index]], offsets[index], sizes[index])

    texts, classes = tf.constant(names), tf.constant(labels)

    def item(index):
        index = tf.cast(index, tf.int64)
        return tf.gather(texts, index), index, tf.gather(classes, index)

    return Indexed(
        len(names),
        config.classes,
        item,
        read_in_python(read),
        labels=labels,
        paths=[
            f"{shards[number]}:{offset}" for number, offset in zip(numbers, offsets, strict=True)
        ],
        in_process=True,
    )


def read_member(shard, offset, size):
    """Returns the bytes of a member; reopens the shard, so that threads share no descriptor."""
    file = os.open(shard, os.O_RDONLY)
    try:
        data = os.pread(file, size, offset)
    finally:
        os.close(file)
    if len(data) != size:
        raise ValueError(f"{shard} has become shorter since the run began")
    return data


def read_index(shard):
    """Lists the samples of a shard.

    Returns:
        List of (key, offset, size, label), with the offset and size of the image.

    Raises:
        ValueError: If the shard is damaged or a sample is invalid; the message names the shard.
    """
    samples, place = [], f"{shard}: "
    try:
        with tarfile.open(shard, "r:") as archive:
            for key, members in samples_of(archive, shard):
                images = [m for suffix, m in members.items() if suffix in SUFFIXES]
                if len(images) != 1:
                    raise ValueError(
                        f"{place}sample {key!r} has {len(images)} images; it must have one of "
                        f"{', '.join(SUFFIXES)}. It has {', '.join(members)}"
                    )
                label = read_label(shard, key, members)
                samples.append((key, images[0].offset_data, images[0].size, label))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{shard} is no whole, uncompressed tar file: {error}") from error
    return samples


def samples_of(archive, shard):
    """Yields (key, dict from suffix to member) of the samples of an open tar file."""
    from keras_tnt.images.decoding import MAX_BYTES

    size, before, current, members = os.path.getsize(shard), None, None, {}
    seen = set()
    for member in archive:
        if member.size < 0 or member.offset_data + max(member.size, 0) > size:
            raise ValueError(f"{shard} breaks off in the member {member.name!r}")
        found = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]+)", member.name, re.DOTALL)
        if not member.isreg() or not found:
            continue
        key, suffix = found[1], found[2].lower()
        if suffix in SUFFIXES and (member.size > MAX_BYTES or member.issparse()):
            raise ValueError(
                f"{shard}: the member {member.name!r} claims {member.size:,} bytes; an image has "
                f"{MAX_BYTES:,} at most, and is not sparse"
            )
        if key != current:
            if current is not None:
                yield current, members
            if key in seen:
                raise ValueError(f"{shard}: the sample {key!r} is there twice")
            seen.add(key)
            current, members = key, {}
        if suffix in members:
            raise ValueError(f"{shard}: the member {member.name!r} is there twice")
        members[suffix] = member
        assert before is None or member.offset > before
        before = member.offset
        archive.members = []  # else tarfile would hold every member of the shard in memory
    check_end(shard, archive.offset)  # checked before the last sample is rejected as incomplete
    if current is not None:
        yield current, members


def read_label(shard, key, members):
    """Returns the label of a sample, an integer.

    Args:
        shard: Path of the tar file.
        key: Key of the sample.
        members: Dict from suffix to member.

    Raises:
        ValueError: If there is no label, or it is not an integer.
    """
    place = f"{shard}: sample {key!r}"
    kind = next((suffix for suffix in LABELS if suffix in members), None)
    if kind is None:
        raise ValueError(
            f"{place} has no label: {' or '.join(LABELS)}. It has {', '.join(members)}"
        )
    member = members[kind]
    if member.size > MAX_LABEL_BYTES:
        raise ValueError(f"{place}: the label in {member.name!r} claims {member.size:,} bytes")
    data = read_member(shard, member.offset_data, member.size)
    try:
        value = parse_integer(data) if kind == "cls" else json.loads(data)
        value = value["label"] if kind == "json" and isinstance(value, dict) else value
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
            raise ValueError
    except (ValueError, KeyError, RecursionError) as error:
        shown = data[:40].decode(errors="replace")
        raise ValueError(f"{place}: {member.name!r} holds no whole number: {shown!r}") from error
    return value


def parse_integer(data):
    """Returns the integer that bytes spell, with a sign, leading zeros or white space, if any.

    Raises:
        ValueError: If they spell no integer.
    """
    text = data.decode("utf-8-sig")
    if "_" in text:  # int accepts 1_000
        raise ValueError(f"{text!r} holds an underscore")
    return int(text)


def check_end(shard, end):
    """Raises a ValueError if a tar file is truncated, or continues after its end."""
    size = os.path.getsize(shard)
    with open(shard, "rb") as file:
        file.seek(end)
        mark = file.read(512)
        rest = any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(2**20), b""))
    if mark.strip(b"\0") or len(mark) < 512:
        raise ValueError(f"{shard} breaks off after {size:,} bytes, without the mark of its end")
    if rest:
        raise ValueError(
            f"{shard} goes on after its end, as tar files do that were joined by cat. Give them "
            "one by one"
        )
