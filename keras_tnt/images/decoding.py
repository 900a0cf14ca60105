"""Specification of image decoding: formats, limits and colors; and the evaluation crop.

The same file gives the same pixels, to within 1 of 255, in Python (Pillow), in the trainer and an
exported model's graph (`keras_tnt.export.image`, TensorFlow), and in the browser
(`savedmodels/web/classify.js`).

- Only JPEG, PNG, WebP, GIF and uncompressed BMP files within the limits are decoded. The header is
  checked first: no decoder sees a file that claims to be larger.
- Orientation: the EXIF tag, one value of type SHORT, is applied, in JPEG, PNG (`eXIf`) and WebP
  (`EXIF`). Tags of other types and XMP are not read.
- Palettes are looked up; entries that a file lacks are black.
- Alpha is dropped: a transparent pixel has the color that the file stores for it.
- Gray becomes three equal channels; one channel is Pillow's luma (`GRAY`).
- 16 bits per channel are reduced to 8: the value divided by 257.
- CMYK JPEGs store inverted values, as Adobe's programs write them, with or without their marker.
- Animations: the first frame. Pixels that a GIF's first frame does not cover have the color of the
  transparent palette entry, else of entry 0. The trainer and an exported graph refuse an animated
  WebP, which crashes TensorFlow.
- Color profiles are ignored.
"""

import dataclasses
import functools
import io
import os
from collections.abc import Callable

import numpy as np

from keras_tnt import files

# Limits of an image: bytes of the file, pixels per side and in total. An image at the limits takes
# up to 1.3 GB while it is decoded; a graph decodes as many images at once as there are cores.
MAX_BYTES = 2**28
MAX_SIDE = 65_535
MAX_PIXELS = 2**26

# Weights of red, green and blue in Pillow's luma, in 1/65536.
GRAY = (19595, 38470, 7471)

# === Formats ===


@dataclasses.dataclass(frozen=True)
class Format:
    """Supported image format.

    Attributes:
        name: Pillow's name of the format.
        signature: dict from offset to the bytes there.
        sides: function from `read` to (width, height); `None` if they have no fixed offset.
            `read(start, count, big=False, signed=False)` returns the integer at an offset of the
            file. The sides are integers or tensors, as `read` returns them.
    """

    name: str
    signature: dict
    sides: Callable | None


FORMATS = (
    Format("JPEG", {0: b"\xff\xd8\xff"}, None),
    Format(
        "PNG",
        {0: b"\x89PNG\r\n\x1a\n"},
        lambda read: (read(16, 4, big=True), read(20, 4, big=True)),
    ),
    Format("GIF", {0: b"GIF8"}, lambda read: (read(6, 2), read(8, 2))),
    # The height of a top-down BMP is negative.
    Format("BMP", {0: b"BM"}, lambda read: (read(18, 4), abs(read(22, 4, signed=True)))),
    Format(
        "WEBP",
        {0: b"RIFF", 8: b"WEBPVP8 "},
        lambda read: (read(26, 2) % 2**14, read(28, 2) % 2**14),
    ),
    Format(
        "WEBP",
        {0: b"RIFF", 8: b"WEBPVP8L"},
        lambda read: (read(21, 4) % 2**14 + 1, read(21, 4) // 2**14 % 2**14 + 1),
    ),
    Format("WEBP", {0: b"RIFF", 8: b"WEBPVP8X"}, lambda read: (read(24, 3) + 1, read(27, 3) + 1)),
)

# Unsupported formats that are recognized, for better error messages.
OTHERS = {
    "EPS": ({0: b"%!PS"}, {0: b"\xc5\xd0\xd3\xc6"}),
    "PDF": ({0: b"%PDF"},),
    "SVG or another XML file": ({0: b"<svg"}, {0: b"<?xml"}),
    "TIFF": ({0: b"II*\0"}, {0: b"MM\0*"}),
    "AVIF": ({4: b"ftypavi"},),
    "HEIC": ({4: b"ftyphei"}, {4: b"ftyphev"}, {4: b"ftypmif"}, {4: b"ftypmsf"}),
    "JPEG 2000": ({4: b"jP  "}, {0: b"\xff\x4f\xff\x51"}),
    "JPEG XL": ({4: b"JXL "}, {0: b"\xff\x0a"}),
    "Photoshop file": ({0: b"8BPS"},),
    "DDS": ({0: b"DDS "},),
    "icon": ({0: b"\0\0\1\0"},),
    "PNM": tuple({0: b"P%d" % kind} for kind in range(1, 8)),
}

READ = (
    f"JPEG, PNG, WebP, GIF and uncompressed BMP are read, of up to {MAX_BYTES / 1e6:,.0f} MB, "
    f"{MAX_SIDE:,} pixels a side and {MAX_PIXELS:,} pixels in all"
)


def has(data, signature):
    """Returns whether data has the bytes of a signature."""
    return all(data.startswith(part, place) for place, part in signature.items())


def check_header(data):
    """Returns the `Format` of an image file, if its header is within the limits.

    Args:
        data: content of the file, as bytes.

    Raises:
        ValueError: if the image exceeds the limits, or its format is not supported.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data) / 1e6:,.0f} MB. {READ}")
    found = next((format for format in FORMATS if has(data, format.signature)), None)
    if found is None:
        other = [
            name for name, signatures in OTHERS.items() if any(has(data, s) for s in signatures)
        ]
        raise ValueError(f"its format, {other[0]}, is not read. {READ}" if other else READ)
    read = integers_of(data)
    if found.name == "BMP" and not is_plain_bmp(read):
        raise ValueError(
            "it is a BMP of a kind that is not read (compressed, of 16 bits per pixel, or with an "
            f"OS/2 header). {READ}"
        )
    if found.sides:
        check_sides(*found.sides(read))
    return found


def is_plain_bmp(read):
    """Returns whether a BMP is uncompressed, with a palette or with 24 or 32 bits per pixel.

    Args:
        read: the `read` of `Format.sides`. If it returns tensors, so does this function.
    """
    bits, compression = read(28, 2), read(30, 4)
    palette = (bits == 1) | (bits == 4) | (bits == 8)
    # Compression 3 (BI_BITFIELDS) has channel masks, which must be those of the default BGR order.
    masks = (read(54, 4) == 0xFF0000) & (read(58, 4) == 0xFF00) & (read(62, 4) == 0xFF)
    plain = (compression == 0) & (palette | (bits == 24) | (bits == 32))
    return (read(14, 4) >= 40) & (plain | (compression == 3) & (bits == 32) & masks)


def integers_of(data):
    """Returns the `read` of `Format.sides` for the content of a file."""

    def read(start, count, big=False, signed=False):
        order = "big" if big else "little"
        return int.from_bytes(data[start : start + count], order, signed=signed)

    return read


def check_sides(width, height):
    """Raises a `ValueError` if an image's sides exceed the limits."""
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ValueError(f"it has {width:,} x {height:,} pixels. {READ}")


# === Reading ===


def open_picture(image, name=None):
    """Returns an image as a `PIL.Image`, with its EXIF orientation applied.

    Args:
        image: an image as for `keras_tnt.load_image`.
        name: name of the image for errors. If `None`, the file's path, or the number of bytes.

    Raises:
        ValueError, OSError, ImportError, MemoryError: as for `keras_tnt.load_image`.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            'Reading images needs Pillow. Install it with `pip install "keras-tnt[images]"`.'
        ) from error
    if isinstance(image, Image.Image):
        return upright(image)
    if isinstance(image, str | os.PathLike):
        path = files.expand(image)
        if not os.path.exists(path) or os.path.isdir(path):
            raise FileNotFoundError(f"There is no image file {path!r}.")
        with files.open_regular(path) as file:
            # One byte more than allowed reveals a file that is too large.
            return decode(file.read(MAX_BYTES + 1), repr(path))
    if isinstance(image, bytes | bytearray | memoryview):
        return decode(bytes(image), name or f"The {len(image)} bytes given")
    return from_array(np.asarray(image))


def decode(data, name):
    """Returns the `PIL.Image` in the content of a file, with its EXIF orientation applied."""
    from PIL import Image

    try:
        format = check_header(data)
        with Image.open(io.BytesIO(data), formats=[format.name]) as picture:
            check_sides(*picture.size)
            picture.load()
            return upright(picture)
    except MemoryError:
        raise
    except Exception as error:  # Decoders raise many types for broken files.
        if "out of memory" in str(error):
            raise MemoryError(f"There is no memory to read {name}.") from error
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def exif_orientation(picture):
    """Returns a picture's EXIF orientation; `None` or another value if it is absent or damaged."""
    from PIL import ExifTags

    # Not by `getexif`, which also takes other types, and falls back on XMP: no other decoder does.
    data = picture.info.get("exif")
    if isinstance(data, bytes):
        return tiff_orientation(data.removeprefix(b"Exif\0\0"))
    try:
        exif = picture.getexif() if hasattr(picture, "tag_v2") else {}  # a TIFF's tags
        return exif.get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:
        return None


def tiff_orientation(data):
    """Returns the orientation in the first directory (IFD0) of EXIF data; `None` without.

    Args:
        data: bytes that should begin with a TIFF header.
    """
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return None
    read = functools.partial(integers_of(data), big=data[:2] == b"MM")
    directory = read(4, 4) + 2
    for start in range(directory, directory + 12 * read(directory - 2, 2), 12):
        if start + 12 > len(data):
            return None
        # The orientation tag, with one value of type SHORT.
        if (read(start, 2), read(start + 2, 2), read(start + 4, 4)) == (0x0112, 3, 1):
            return read(start + 8, 2)
    return None


def upright(picture):
    """Returns a picture with its EXIF orientation applied."""
    from PIL import Image

    orientation = exif_orientation(picture)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return picture.transpose(turns[orientation]) if orientation in turns else picture


def from_array(array):
    """Returns the `PIL.Image` of an array of pixels in [0, 255]."""
    from PIL import Image

    if array.ndim not in (2, 3) or array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        raise ValueError(
            "An image array must be (height, width) or (height, width, 1, 3 or 4). Received: shape "
            f"{array.shape}" + (". For a batch there is load_images." if array.ndim == 4 else "")
        )
    if not array.size:
        raise ValueError(f"An image array must have pixels. Received: shape {array.shape}")
    array = as_uint8(array)
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def as_uint8(array):
    """Converts pixels in [0, 255] to uint8.

    Args:
        array: array of any shape.

    Returns:
        uint8 array of the same shape, rounded.

    Raises:
        ValueError: if the values are not in [0, 255], or look as if they were in [0, 1].
    """
    if array.dtype == "uint8":
        return array
    received = f"Received: {array.dtype}"
    if array.dtype == "uint16":
        raise ValueError(
            "An image array must have values in [0, 255]; 16-bit values must be scaled first. "
            f"{received}. Pass `(array / 257).round().astype('uint8')`."
        )
    if array.dtype.kind not in "iuf":
        raise ValueError(
            f"An image array must hold integers or floats in [0, 255]. {received}. Pass "
            "`array.astype('uint8')`, with 255 for white."
        )
    if not array.size:
        return array.astype("uint8")
    low, high = float(array.min()), float(array.max())
    if not (low >= -0.5 and high < 255.5):  # also true of NaN
        raise ValueError(
            f"An image array must have values in [0, 255]. {received} in [{low:.6g}, {high:.6g}]. "
            "Undo its normalization, or pass `np.clip(array, 0, 255)`."
        )
    # Resizing an image in [0, 1] may overshoot; an image in [0, 255] this dark has whole numbers.
    dark = array.dtype.kind == "f" and 0 < high <= 2
    if dark and (high <= 1 or (array != np.round(array)).any()):
        raise ValueError(
            f"An image array must have values in [0, 255], not in [0, 1]. {received} in "
            f"[{low:.6g}, {high:.6g}]. Pass `255 * array`, or uint8 for an image this dark."
        )
    return np.clip(np.round(array), 0, 255).astype("uint8")


def convert(picture, channels):
    """Converts a picture to the number of channels of a model.

    Args:
        picture: a `PIL.Image`.
        channels: 1 or 3.

    Returns:
        A `PIL.Image` of mode L or RGB.
    """
    if channels not in (1, 3):
        raise ValueError(
            f"Images have 1 or 3 channels, the model takes {channels}: prepare its input yourself."
        )
    if 0 in picture.size:
        raise ValueError(
            "A picture must have pixels. Received: one of {} x {} pixels".format(*picture.size)
        )
    if picture.mode in ("La", "RGBa"):  # colors multiplied by alpha; Pillow converts to one mode
        picture = picture.convert(picture.mode.upper())
    if picture.mode[0] in "IF":  # 16 bits, 32 bits and floats, which Pillow would clip at 255
        picture = from_array(rescaled_pixels(picture))
    if picture.mode == "P":
        # Converted to RGB first: Pillow's own conversion to L treats a palette's alpha differently.
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    return picture.convert("RGB" if channels == 3 else "L")


def rescaled_pixels(picture):
    """Returns the pixels of a picture of mode I or I;16 divided by 257, or those of mode F."""
    pixels = np.asarray(picture)
    if picture.mode == "F":
        return pixels
    low, high = int(pixels.min()), int(pixels.max())
    # A 16-bit PNG has its own mode; the range of mode I, Pillow's 32 bits, is a guess.
    if low < 0 or high > 65_535 or picture.mode == "I" and 0 < high <= 255:
        raise ValueError(
            f"A picture of mode {picture.mode} must have values in [0, 65535]. Received: "
            f"[{low}, {high}]. Pass an array of uint8."
        )
    return np.round(pixels / np.float32(257)).astype("uint8")


# === The evaluation crop ===


def evaluation_crop(picture, size, covered):
    """Resizes a picture, bicubic and in proportion, to just cover a size, and center-crops it.

    Args:
        picture: a `PIL.Image` of mode RGB or L.
        size: (height, width) of the result.
        covered: (height, width) that the resized picture covers.

    Returns:
        A `PIL.Image`.
    """
    from PIL import Image

    (height, width), (rows, columns) = size, covering(picture.size, covered)
    # The width is resized first, whatever order Pillow would choose: it rounds to 8 bits in
    # between, and an exported model's graph uses this order.
    picture = stretch(picture, columns, middle(columns, width), width)
    picture = picture.transpose(Image.Transpose.TRANSPOSE)
    picture = stretch(picture, rows, middle(rows, height), height)
    return picture.transpose(Image.Transpose.TRANSPOSE)


def evaluation_pixels(picture, size, covered, channels, data_format):
    """Returns the evaluation crop of a `PIL.Image` of any mode, as `keras_tnt.load_image` does.

    Args:
        picture: a `PIL.Image`.
        size: (height, width) of the result.
        covered: (height, width) that the resized picture covers.
        channels: 1 or 3.
        data_format: "channels_last" or "channels_first".

    Returns:
        float32 array `(height, width, channels)`, or channels first, in [0, 255].
    """
    crop = evaluation_crop(convert(picture, channels), size, covered)
    pixels = np.reshape(np.asarray(crop, "float32"), (*size, channels))
    return np.moveaxis(pixels, -1, 0) if data_format == "channels_first" else pixels


def covering(size, covered):
    """Returns (rows, columns) of an image of `size` (width, height), resized to cover `covered`."""
    (width, height), (covered_height, covered_width) = size, covered
    if covered_height * width >= covered_width * height:
        return covered_height, int(covered_height * width / height)
    return int(covered_width * height / width), covered_width


def middle(whole, part):
    """Returns the offset of a centered part."""
    # Ties round to even, as in torchvision, whose crop the published accuracies use.
    return round((whole - part) / 2)


def stretch(picture, columns, first, count):
    """Returns the columns [first, first + count) of a picture resized to `columns` columns."""
    from PIL import Image

    if columns <= picture.width or columns * picture.height <= MAX_PIXELS:
        stretched = picture.resize((columns, picture.height), Image.Resampling.BICUBIC)
        return stretched.crop((first, 0, first + count, picture.height))
    return Image.fromarray(stretch_part(np.asarray(picture), columns, first, count))


def stretch_part(pixels, columns, first, count):
    """Computes only the requested columns of `stretch`, bit-identical to Pillow.

    Args:
        pixels: uint8 array (height, width) or (height, width, channels).
        columns: number of columns to resize to, more than the array has.
        first: first requested column.
        count: number of requested columns.

    Returns:
        uint8 array (height, count) or (height, count, channels).
    """
    width = pixels.shape[1]
    centers = (np.arange(first, first + count) + 0.5) * (width / columns)
    starts = np.maximum(centers - 1.5, 0).astype(int)
    ends = np.minimum((centers + 2.5).astype(int), width)
    places = starts[:, None] + np.arange(5)
    weights = np.where(places < ends[:, None], cubic(places - centers[:, None] + 0.5), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    # Fixed point with 22 fractional bits, ties rounded away from zero, as in Pillow.
    weights = np.trunc(weights * 2**22 + np.copysign(0.5, weights)).astype("int32")
    weights = weights.reshape(count, 5, *[1] * (pixels.ndim - 2))
    total = np.full((len(pixels), count, *pixels.shape[2:]), 2**21, "int32")
    for tap in range(5):
        total += pixels[:, np.minimum(places[:, tap], width - 1)] * weights[:, tap]
    return np.clip(total >> 22, 0, 255).astype("uint8")


def cubic(x):
    """Returns Keys' cubic convolution kernel with a = -0.5 at `x`."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0))
