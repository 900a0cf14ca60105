"""Image files of every kind described in the specification of `keras_tnt.images.decoding`.

`CASES` maps a name to (file, pixels): the bytes, and the expected upright RGB image, computed
without our decoders. Lossy formats are decoded by Pillow, the reference.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image

# EXIF orientation -> the array operation that makes the stored image upright.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


def draw(height, width, seed=0):
    """Returns a smooth uint8 image with a red box, noise, and different borders."""
    random = np.random.default_rng((seed, height, width))
    y, x = (axis[..., None] for axis in np.mgrid[:height, :width])
    periods = random.uniform(5, 40, 3)
    pixels = 127 + 90 * np.sin(x / periods) * np.cos(y / periods[::-1])
    pixels = pixels + random.normal(0, 9, (height, width, 3))
    pixels[height // 4 : height // 2, width // 3 : width // 2] = (240, 10, 20)
    pixels[: height // 8] //= 3
    return pixels.clip(0, 255).astype("uint8")


def save(picture, kind, **settings):
    """Returns the bytes of a picture in one of Pillow's formats."""
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def rgb(file):
    """Returns the stored RGB pixels of a file as Pillow decodes them, without alpha."""
    picture = Image.open(io.BytesIO(file))
    if picture.mode == "P":
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    return np.asarray(picture.convert("RGB"))


def exif(orientation, big_endian=False, kind=3, count=1):
    """Returns EXIF data with an orientation, of type SHORT or another, after another tag."""
    order, byte_order = (">", b"MM") if big_endian else ("<", b"II")
    entries = struct.pack(order + "HHII", 0x0100, 4, 1, 77)
    value = struct.pack(order + ("HH" if kind == 3 else "I"), *[orientation, 0][: 5 - kind])
    entries += struct.pack(order + "HHI", 0x0112, kind, count) + value
    header = byte_order + struct.pack(order + "HI", 42, 8)
    return b"Exif\0\0" + header + struct.pack(order + "H", 2) + entries + bytes(4)


def oriented(kind, **settings):
    """Yields a case for each orientation."""
    for orientation, make_upright in UPRIGHT.items():
        picture = Image.fromarray(draw(61, 90, orientation))
        data = exif(orientation, big_endian=orientation % 2 == 0)
        file = save(picture, kind, exif=data, **settings)
        stored = rgb(save(picture, kind, **settings))
        yield f"{kind}, orientation {orientation}", file, make_upright(stored)


def not_oriented():
    """Yields a case for each way to store an orientation that no decoder applies."""
    picture = Image.fromarray(draw(47, 71))
    for kind in ("JPEG", "PNG", "WEBP"):
        settings = {"lossless": True} if kind == "WEBP" else {}
        stored = rgb(save(picture, kind, **settings))
        for big_endian in (False, True):
            for name, values in (("LONG", {"kind": 4}), ("two values", {"count": 2})):
                file = save(picture, kind, exif=exif(6, big_endian, **values), **settings)
                yield f"{kind}, orientation of {name}, {big_endian}", file, stored


def png_chunk(name, data):
    checksum = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + checksum


def late_exif_png(orientation):
    """Returns a PNG whose eXIf chunk follows its pixels, and its upright image."""
    pixels = draw(30, 47)
    file = save(Image.fromarray(pixels), "PNG")
    end = file.index(b"IEND") - 4
    file = file[:end] + png_chunk(b"eXIf", exif(orientation)[6:]) + file[end:]
    return file, UPRIGHT[orientation](pixels)


def without_adobe_marker(file):
    """Returns a JPEG without its APP14 segment."""
    start = file.index(b"\xff\xee")
    return file[:start] + file[start + 2 + int.from_bytes(file[start + 2 : start + 4], "big") :]


def bmp(indices, palette, bits, top_down=False, padding=0):
    """Returns an uncompressed BMP with a palette, built from bytes.

    Args:
        indices: uint8 array (height, width).
        palette: uint8 array (entries, 3), RGB.
        bits: bits per pixel.
        top_down: whether the first row is stored first. Defaults to False.
        padding: bytes between the palette and the pixels. Defaults to 0.
    """
    height, width = indices.shape
    places = 8 // bits
    rows = np.zeros((height, -(-width * bits // 32) * 4), "uint8")
    for x in range(width):
        rows[:, x // places] |= indices[:, x] << (8 - bits * (x % places + 1))
    rows = rows if top_down else rows[::-1]
    table = b"".join(bytes([blue, green, red, 0]) for red, green, blue in palette)
    start = 54 + len(table) + padding
    header = struct.pack("<2sIHHI", b"BM", start + rows.size, 0, 0, start)
    header += struct.pack(
        "<IiiHHIIiiII", 40, width, -height if top_down else height, 1, bits, 0, 0, 0, 0,
        len(palette), 0,
    )  # fmt: skip
    return header + table + bytes(padding) + rows.tobytes()


def palette_bmps():
    random = np.random.default_rng(5)
    for bits, entries in ((1, 2), (4, 16), (4, 5), (8, 256), (8, 33)):
        for top_down in (False, True):
            palette = random.integers(0, 256, (entries, 3), dtype="uint8")
            indices = random.integers(0, entries, (37, 45), dtype="uint8")
            file = bmp(indices, palette, bits, top_down, padding=8 * top_down)
            yield f"BMP, {bits} bits, {entries} colors, {top_down}", file, palette[indices]


def gif(indices, palette, screen, offset, transparent=None, interlace=False):
    """Returns a GIF whose frame covers only a part of its screen, (height, width)."""
    picture = Image.fromarray(indices, "P")
    picture.putpalette(palette.tobytes())
    file = save(picture, "GIF", interlace=interlace, optimize=False)
    flags = file[10]
    colors = 3 * 2 ** (flags % 8 + 1)
    frame = file.index(b"\x2c", 13 + colors)
    control = b"" if transparent is None else bytes([0x21, 0xF9, 4, 1, 0, 0, transparent, 0])
    top, left = offset
    return (
        b"GIF89a" + struct.pack("<HH", *screen[::-1]) + file[10 : 13 + colors] + control
        + b"\x2c" + struct.pack("<HH", left, top) + file[frame + 5 :]
    )  # fmt: skip


def gifs():
    random = np.random.default_rng(6)
    palette = random.integers(0, 256, (256, 3), dtype="uint8")
    indices = random.integers(0, 256, (40, 50), dtype="uint8")
    for name, offset, screen, transparent in (
        ("transparent", (0, 0), (40, 50), 9),
        ("smaller than its screen", (7, 3), (61, 59), None),
        ("smaller than its screen, transparent", (11, 5), (70, 80), 200),
        ("larger than its screen", (4, 6), (30, 30), None),
    ):
        for interlace in (0, 1):
            sides = [max(a, b + c) for a, b, c in zip(screen, offset, (40, 50), strict=True)]
            expected = np.broadcast_to(palette[transparent or 0], (*sides, 3)).copy()
            expected[offset[0] : offset[0] + 40, offset[1] : offset[1] + 50] = palette[indices]
            file = gif(indices, palette, screen, offset, transparent, interlace)
            yield f"GIF, {name}, interlace {interlace}", file, expected


def grays_of_16_bits():
    """Returns a PNG with 16 bits per gray pixel, and its image."""
    values = np.random.default_rng(7).integers(0, 65536, (33, 44)).astype("uint16")
    gray = np.round(values / 257).astype("uint8")
    return save(Image.fromarray(values), "PNG"), np.dstack([gray] * 3)


def colors_of_16_bits():
    values = np.random.default_rng(8).integers(0, 65536, (21, 34, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 34, 21, 16, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    file += png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return file, np.round(values / 257).astype("uint8")


def kinds_of_pillow():
    """Yields a case for each mode and setting that Pillow can write."""
    image = Image.fromarray(draw(83, 62))
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(draw(83, 62, 1)[..., 0]))
    clear = image.quantize(40)
    clear.info["transparency"] = 3
    for name, picture, kind, settings in (
        ("4:2:0", image, "JPEG", {"quality": 85}),
        ("4:4:4, progressive", image, "JPEG", {"subsampling": 0, "progressive": True}),
        ("gray", image.convert("L"), "JPEG", {}),
        ("CMYK", image.convert("CMYK"), "JPEG", {}),
        ("RGB", image, "PNG", {}),
        ("gray", image.convert("L"), "PNG", {}),
        ("1 bit", image.convert("1"), "PNG", {}),
        ("gray and alpha", alpha.convert("LA"), "PNG", {}),
        ("alpha", alpha, "PNG", {}),
        ("palette", image.quantize(17), "PNG", {}),
        ("palette and alpha", clear, "PNG", {}),
        ("lossy", image, "WEBP", {}),
        ("lossless and alpha", alpha, "WEBP", {"lossless": True, "exact": True}),
        ("palette", image.quantize(64), "GIF", {}),
        ("gray", image.convert("L"), "GIF", {}),
        ("24 bits", image, "BMP", {}),
        ("32 bits", alpha, "BMP", {}),
        ("gray", image.convert("L"), "BMP", {}),
        ("palette", image.quantize(8), "BMP", {}),
        ("1 bit", image.convert("1"), "BMP", {}),
    ):
        file = save(picture, kind, **settings)
        yield f"{kind}, {name}", file, rgb(file)


def cases():
    yield from kinds_of_pillow()
    yield from oriented("JPEG", quality=90)
    yield from oriented("PNG")
    yield from oriented("WEBP", lossless=True)
    yield from not_oriented()
    yield from palette_bmps()
    yield from gifs()
    yield "PNG, EXIF behind the pixels", *late_exif_png(6)
    yield "PNG, 16 bits, gray", *grays_of_16_bits()
    yield "PNG, 16 bits, colors", *colors_of_16_bits()
    marked = save(Image.fromarray(draw(70, 50)).convert("CMYK"), "JPEG", quality=92)
    yield "JPEG, CMYK without Adobe's marker", without_adobe_marker(marked), rgb(marked)


CASES = {name: (file, pixels) for name, file, pixels in cases()}

# Files that every decoder refuses, by a word of the error.
REFUSED = {
    "RLE": (
        struct.pack("<2sIHHI", b"BM", 70, 0, 0, 62)
        + struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 8, 1, 8, 0, 0, 2, 0)
        + bytes(8) + b"\4\0\4\0\4\0\4\1"
    ),
    "16 bits": (
        struct.pack("<2sIHHI", b"BM", 86, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 16, 0, 32, 0, 0, 0, 0) + bytes(32)
    ),
    "OS/2": (
        struct.pack("<2sIHHI", b"BM", 74, 0, 0, 26) + struct.pack("<IHHHH", 12, 4, 4, 1, 24)
        + bytes(48)
    ),
}  # fmt: skip
