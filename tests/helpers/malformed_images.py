"""Malformed, truncated and malicious image files, generated from a seed.

Set `KERAS_TNT_FUZZ=10000` in the environment to sweep over 10000 files instead of a few.
"""

import io
import os
import struct
import zlib

import numpy as np
from PIL import Image

KINDS = {
    "jpeg": ("JPEG", "RGB", {"quality": 60}),
    "jpeg, progressive": ("JPEG", "RGB", {"progressive": True}),
    "jpeg, cmyk": ("JPEG", "CMYK", {}),
    "jpeg, gray": ("JPEG", "L", {}),
    "png": ("PNG", "RGB", {}),
    "png, palette": ("PNG", "P", {"transparency": 3}),
    "png, transparent": ("PNG", "RGBA", {}),
    "png, 1 bit": ("PNG", "1", {}),
    "webp": ("WEBP", "RGB", {}),
    "webp, lossless": ("WEBP", "RGB", {"lossless": True}),
    "webp, transparent": ("WEBP", "RGBA", {}),
    "gif": ("GIF", "P", {}),
    "bmp": ("BMP", "RGB", {}),
    "bmp, palette": ("BMP", "P", {}),
}
ANIMATED = ("WEBP", "GIF", "PNG")


def number_of(few):
    """Returns the number of images of a sweep."""
    return int(os.environ.get("KERAS_TNT_FUZZ", few))


def picture(random, mode="RGB", sides=(40, 60)):
    coarse = random.integers(0, 256, (4, 5, 3), dtype="uint8")
    image = Image.fromarray(coarse).resize(sides, Image.Resampling.BICUBIC).convert(mode)
    if mode == "RGBA":
        image.putalpha(77)  # Pillow drops the alpha channel of a WebP if it is opaque
    return image


def encoded(image, kind, **settings):
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def animated(kind, random=None, frames=3):
    """Returns an animation of opaque frames."""
    random = random or np.random.default_rng(0)
    pictures = [picture(random) for _ in range(frames)]
    return encoded(pictures[0], kind, save_all=True, append_images=pictures[1:], duration=50)


def png(width, height, color=0, rows=None):
    """Returns a PNG of zeros whose header claims (width, height), with `rows` rows of data.

    If `rows` is `None`, it has `height` rows.
    """

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    channels = {0: 1, 2: 3, 6: 4}[color]
    rows = height if rows is None else rows
    data = zlib.compress(bytes(rows * (1 + width * channels)), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def claiming(kind, width, height):
    """Returns a small file whose header claims (width, height)."""
    small = picture(np.random.default_rng(0))
    if kind == "PNG":
        return png(width, height, rows=1)
    if kind == "WEBP, extended":
        data = bytearray(encoded(picture(np.random.default_rng(0), "RGBA"), "WEBP"))
        data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        return bytes(data)
    data = bytearray(encoded(small, kind))
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def sweep(seed, count):
    """Yields `count` files: intact, truncated, mutated, spliced, or with false headers."""
    random = np.random.default_rng(seed)
    kinds = list(KINDS)
    for _ in range(count):
        kind, mode, settings = KINDS[kinds[random.integers(len(kinds))]]
        if kind in ANIMATED and random.random() < 0.15:
            data = animated(kind, random, int(random.integers(2, 5)))
        else:
            image = picture(random, mode, tuple(random.integers(1, 70, 2).tolist()))
            exif = Image.Exif()
            exif[0x0112] = int(random.integers(0, 12))
            settings = {**settings, **({"exif": exif} if kind != "GIF" and kind != "BMP" else {})}
            data = encoded(image, kind, **settings)
        yield CHANGES[random.integers(len(CHANGES))](data, random)


def place(data, random, within=1.0):
    return int(random.integers(max(1, int(len(data) * within))))


def changed(data, random, within=1.0):
    data = bytearray(data)
    for _ in range(random.integers(1, 9)):
        data[place(data, random, within)] = random.integers(256)
    return bytes(data)


def extreme(data, random):
    """Overwrites bytes of the header with those of extreme integers."""
    data, at = bytearray(data), place(data[:64], random)
    value = (
        b"\0\0\0\0",
        b"\xff\xff\xff\xff",
        b"\x7f\xff\xff\xff",
        b"\xff\xff\xff\x7f",
        b"\0\0\0\x80",
    )
    size = int(random.integers(1, 5))
    data[at : at + size] = value[random.integers(len(value))][:size]
    return bytes(data)


def doubled(data, random):
    start, end = sorted((place(data, random), place(data, random)))
    return data[:end] + data[start:]


def without(data, random):
    start, end = sorted((place(data, random), place(data, random)))
    return data[:start] + data[end:]


def joined(data, random):
    other = KINDS[list(KINDS)[random.integers(len(KINDS))]]
    tail = encoded(picture(random, other[1]), other[0], **other[2])
    return data[: place(data, random)] + tail[place(tail, random) :]


CHANGES = (
    lambda data, random: data,
    lambda data, random: data[: place(data, random)],
    changed,
    lambda data, random: changed(data, random, 0.1),
    lambda data, random: changed(data[:64], random) + data[64:],
    extreme,
    doubled,
    without,
    joined,
    lambda data, random: data[:12] + random.bytes(int(random.integers(1, 400))),
)
