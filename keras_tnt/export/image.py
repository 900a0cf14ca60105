"""`keras_tnt.load_image` in TensorFlow operations, within 1 of 255 of Pillow's result.

The specification is in `keras_tnt.images.decoding`. Exported graphs and the trainer decode with
these functions. As in Pillow, an image is resized along the width, rounded to 8 bits, and
resized along the height; TensorFlow's operation has the same kernel, Keys' cubic with a = -0.5.

TensorFlow's decoders run only after the header is checked: they allocate as much memory as a file
claims to need, hold all frames of a GIF before they return the first, and crash the process at an
animated WebP of opaque frames. Where they differ from the specification, the file is rewritten
before it is decoded (CMYK JPEG, GIF) or decoded here (BMP).
"""

import functools

from keras_tnt.images.decoding import (
    FORMATS,
    GRAY,
    MAX_BYTES,
    MAX_PIXELS,
    MAX_SIDE,
    READ,
    is_plain_bmp,
)

# Adobe's APP14 marker without a color transform, which means inverted CMYK.
ADOBE_MARKER = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
JPEG_EXIF_REACH = 1 << 20  # bytes in which a JPEG's EXIF data must begin


def load_images(image_bytes, size, covered, channels=3):
    """Decodes encoded images and applies the evaluation crop.

    Args:
        image_bytes: string tensor (batch,) of files, in the formats and within the limits of
            `keras_tnt.images.decoding`, except animated WebP.
        size: (height, width) of the crop.
        covered: (height, width) that the resized image just covers before it is cropped.
        channels: 3 or 1. Defaults to 3.

    Returns:
        Float tensor (batch, height, width, channels) in [0, 255]. If images cannot be decoded, it
        fails at run time with an error that lists their indices in the batch.
    """
    import tensorflow as tf

    shape = (*size, channels)
    batch = tf.shape(image_bytes, tf.int64)[0]

    # AutoGraph is not needed, and writes files that it removes only when the process ends.
    @tf.autograph.experimental.do_not_convert
    def numbered(place, encoded):
        return place, evaluation_crop(decode(encoded, channels), size, covered)

    # A dataset decodes on all cores, and skips failures, so that their positions can be reported.
    decoded = (
        tf.data.Dataset.from_tensor_slices(image_bytes)
        .enumerate()
        .map(numbered, num_parallel_calls=tf.data.AUTOTUNE)
        .ignore_errors()
    )
    end = tf.data.Dataset.from_tensors((batch, tf.zeros(shape)))
    places, images = decoded.concatenate(end).batch(batch + 1).get_single_element()
    broken = tf.sets.difference([tf.range(batch + 1)], [places]).values
    tf.debugging.Assert(
        tf.size(broken) == 0,
        # The dataset also skips images for which there is too little memory.
        [
            f"Not an image that can be decoded, or no memory for it: {READ}, but no animated WebP. "
            "Places in the batch:",
            broken,
        ],
        summarize=100,
    )
    return tf.ensure_shape(images[:-1], (None, *shape))


# === Decoding ===


def decode(encoded, channels=3):
    """Decodes the first frame of an image file to uint8 (height, width, channels), upright.

    It fails at run time for files that `keras_tnt.images.decoding` refuses, and for an animated
    WebP.
    """
    image = upright(decode_stored(encoded), exif_orientation(encoded))
    return gray(image) if channels == 1 else image


def decode_stored(encoded):
    """Decodes an image file to uint8 (height, width, 3), without applying its orientation."""
    import tensorflow as tf

    def decoder(format, encoded):
        fits = tf.strings.length(encoded) <= MAX_BYTES
        read = integers_of(encoded)
        fits &= within_limits(*(format.sides(read) if format.sides else jpeg_sides(encoded)))
        if format.name == "BMP":
            fits &= is_plain_bmp(read)
        # Every decoder fails on an empty string.
        image = DECODERS[format.name](tf.where(fits, encoded, ""))
        return tf.ensure_shape(image, (None, None, 3))

    def refuse(encoded):
        return tf.io.decode_png(tf.strings.substr(encoded, 0, 0), channels=3)

    places = [tf.where(has(encoded, f.signature), i, len(FORMATS)) for i, f in enumerate(FORMATS)]
    decoders = [functools.partial(decoder, format) for format in FORMATS]
    return switch(tf.reduce_min(places), [*decoders, refuse], encoded, tf.uint8, (None, None, 3))


def decode_and_crop(encoded, choose_box):
    """Decodes a box of an image file; of a JPEG, only that box.

    Args:
        encoded: string tensor, a file.
        choose_box: function from (height, width), int32 tensors, of the upright image to a box in
            it, int32 (top, left, height, width).

    Returns:
        uint8 (height, width, 3), equal to the box of `decode(encoded)`.
    """
    import tensorflow as tf

    def crop_jpeg():
        orientation = exif_orientation(encoded)
        height, width, channels = tf.unstack(tf.io.extract_jpeg_shape(encoded))
        transposed = orientation >= 5
        sides = tf.where(transposed, width, height), tf.where(transposed, height, width)
        box = stored_box(choose_box(*sides), orientation, *sides)
        # libjpeg interpolates chroma between neighbors, so the box needs a margin.
        start = tf.maximum(box[:2] - 2, 0)
        end = tf.minimum(box[:2] + box[2:] + 2, tf.stack([height, width]))
        part = tf.image.decode_and_crop_jpeg(
            with_adobe_marker(encoded, channels),
            tf.concat([start, end - start], 0),
            channels=3,
            dct_method="INTEGER_ACCURATE",
        )
        return upright(crop(part, tf.concat([box[:2] - start, box[2:]], 0)), orientation)

    def crop_other():
        return crop(image, choose_box(*tf.unstack(tf.shape(image)[:2])))

    is_jpeg = is_readable_jpeg(encoded)
    none = functools.partial(tf.zeros, (0, 0, 3), tf.uint8)
    image = switch(is_jpeg, [decode, lambda encoded: none()], encoded, tf.uint8, (None, None, 3))
    part = tf.cond(is_jpeg, crop_jpeg, crop_other)
    return tf.ensure_shape(part, (None, None, 3))


def crop(image, box):
    """Returns the box (top, left, height, width) of an image with 3 channels."""
    import tensorflow as tf

    return tf.slice(image, [box[0], box[1], 0], [box[2], box[3], 3])


def stored_box(box, orientation, height, width):
    """Maps a box of the upright image to the image as the file stores it.

    Args:
        box: int32 (top, left, height, width) in the upright image.
        orientation: EXIF orientation, 1 to 8.
        height: height of the upright image.
        width: width of the upright image.

    Returns:
        int32 (top, left, height, width).
    """
    import tensorflow as tf

    top, left, rows, columns = tf.unstack(box)
    top = tf.where(is_one_of(orientation, FLIPPED_ROWS), height - top - rows, top)
    left = tf.where(is_one_of(orientation, FLIPPED_COLUMNS), width - left - columns, left)
    return tf.where(
        orientation >= 5,
        tf.stack([left, top, columns, rows]),
        tf.stack([top, left, rows, columns]),
    )


def is_readable_jpeg(encoded):
    """Returns whether a file is, according to its header, a JPEG within the limits."""
    import tensorflow as tf

    return tf.cond(
        has(encoded, FORMATS[0].signature) & (tf.strings.length(encoded) <= MAX_BYTES),
        lambda: within_limits(*jpeg_sides(encoded)),
        lambda: False,
    )


def switch(index, branches, encoded, dtype, shape):
    """Calls the function with number `index` on a string tensor.

    `tf.switch_case` computes the same, but is lowered to operations that also run for the branches
    not taken, on dead tensors. With all decoders as branches, this is slower than decoding.

    In eager mode the branch is called directly: each nested `StatelessCase` blocks a thread of
    TensorFlow's pool, and as many of them as the pool has threads would deadlock.
    """
    import tensorflow as tf

    if tf.executing_eagerly():
        return branches[int(index)](encoded)
    spec = tf.TensorSpec((), tf.string)
    functions = [tf.function(f, autograph=False).get_concrete_function(spec) for f in branches]
    result = tf.raw_ops.StatelessCase(
        branch_index=tf.cast(index, tf.int32),
        input=[encoded],
        Tout=[dtype],
        branches=functions,
        output_shapes=[shape],
    )
    return tf.ensure_shape(result[0], shape)


def has(encoded, signature):
    """Returns whether a file has the bytes of a signature, a dict from offset to bytes."""
    import tensorflow as tf

    return tf.reduce_all(
        [tf.strings.substr(encoded, at, len(part)) == part for at, part in signature.items()]
    )


def integers_of(encoded):
    """Returns the `read` function of `keras_tnt.images.Format` for a string tensor."""
    import tensorflow as tf

    def read(start, count, big=False, signed=False):
        values = tf.io.decode_raw(tf.strings.substr(encoded, start, count), tf.uint8)
        powers = [256**i for i in range(count)]
        number = tf.reduce_sum(tf.cast(values, tf.int64) * (powers[::-1] if big else powers))
        negative = signed & (number >= 256**count // 2)
        return tf.where(negative, number - 256**count, number)

    return read


def within_limits(width, height):
    """Returns whether an image of this size is within `MAX_SIDE` and `MAX_PIXELS`."""
    import tensorflow as tf

    sides = tf.cast(tf.stack([width, height]), tf.int64)
    return (tf.reduce_max(sides) <= MAX_SIDE) & (tf.reduce_prod(sides) <= MAX_PIXELS)


def jpeg_sides(encoded):
    """Returns (width, height) from the header of a JPEG."""
    import tensorflow as tf

    height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(encoded))
    return width, height


def decode_jpeg(encoded):
    """Decodes a JPEG, which may be CMYK, to uint8 (height, width, 3), without EXIF."""
    import tensorflow as tf

    # The accurate inverse DCT is the default of libjpeg, and therefore of Pillow.
    channels = tf.io.extract_jpeg_shape(encoded)[2]
    encoded = with_adobe_marker(encoded, channels)
    return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")


def with_adobe_marker(encoded, channels):
    """Inserts Adobe's marker into a CMYK JPEG; one that the file has overrides it."""
    import tensorflow as tf

    def marked():
        start, rest = tf.strings.substr(encoded, 0, 2), tf.strings.substr(encoded, 2, -1)
        return tf.strings.join([start, ADOBE_MARKER, rest])

    return tf.cond(channels == 4, marked, lambda: encoded)


def decode_png(encoded):
    """Decodes a PNG to uint8 (height, width, 3)."""
    import tensorflow as tf

    return tf.io.decode_png(encoded, channels=3)


def decode_bmp(encoded):
    """Decodes an uncompressed BMP to uint8 (height, width, 3).

    TensorFlow's decoder supports neither palettes nor 1 bit per pixel.
    """
    import tensorflow as tf

    read = integers_of(encoded)
    bits, width = read(28, 2), read(18, 4)
    height = read(22, 4, signed=True)
    rows, stride = tf.abs(height), (width * bits + 31) // 32 * 4
    length = tf.cast(tf.strings.length(encoded), tf.int64)
    start = read(10, 4)
    fits = (width > 0) & (rows > 0) & (start + rows * stride <= length)
    # If the pixels do not fit into the file, the string is empty and the reshape fails.
    pixels = tf.strings.substr(encoded, tf.where(fits, start, 0), tf.where(fits, rows * stride, 0))
    pixels = tf.reshape(tf.io.decode_raw(pixels, tf.uint8), (rows, stride))

    def colors(channels):  # stored as BGR, or BGRX with 4 channels
        image = tf.reshape(pixels[:, : width * channels], (rows, width, channels))
        return image[..., 2::-1]

    def palette_colors(count):  # indices of `count` bits, the most significant first
        shifts = tf.constant([*range(8 - count, -1, -count)], tf.uint8)
        parts = tf.bitwise.right_shift(pixels[..., None], shifts)
        indices = tf.reshape(parts & (2**count - 1), (rows, -1))[:, :width]
        stated = read(46, 4)
        size = 4 * tf.where((stated > 0) & (stated < 2**count), stated, 2**count)
        table_start = 14 + read(14, 4)
        size = tf.minimum(size, tf.maximum(start - table_start, 0))
        table = tf.io.decode_raw(tf.strings.substr(encoded, table_start, size), tf.uint8)
        table = tf.pad(table, [[0, 4 * 2**count - tf.size(table)]])
        return tf.gather(tf.reshape(table, (-1, 4))[:, 2::-1], tf.cast(indices, tf.int32))

    kinds = {24: lambda: colors(3), 32: lambda: colors(4)}
    kinds |= {count: functools.partial(palette_colors, count) for count in (1, 4, 8)}
    place = tf.argmax(tf.constant([*kinds], tf.int64) == bits, output_type=tf.int32)
    image = tf.switch_case(place, [*kinds.values()])
    return tf.cond(height > 0, lambda: image[::-1], lambda: image)


def decode_webp(encoded):
    """Decodes a still WebP to uint8 (height, width, 3), without its alpha channel."""
    import tensorflow as tf

    extended = tf.strings.substr(encoded, 12, 4) == "VP8X"
    animated = extended & (integers_of(encoded)(20, 1) // 2 % 2 == 1)
    # The decoder returns frames of 3 or 4 channels, and cannot drop the alpha channel.
    return tf.io.decode_webp(tf.where(animated, "", encoded))[0, ..., :3]


def decode_gif(encoded):
    """Decodes the first frame of a GIF, from a rewritten file that ends after it."""
    import tensorflow as tf

    data = tf.pad(tf.io.decode_raw(encoded, tf.uint8), [[0, 1]])

    def byte(place):
        return tf.cast(data[tf.minimum(place, tf.size(data) - 1)], tf.int32)

    def behind_colors(place, flags):
        return place + tf.where(flags >= 128, 3 * 2 ** (flags % 8 + 1), 0)

    def behind_blocks(place, at_most):
        """Returns the offset after data sub-blocks.

        Each begins with its length; the last has length 0.
        """
        goes_on = {"cond": lambda p: byte(p) > 0, "body": lambda p: [p + 1 + byte(p)]}
        return tf.while_loop(**goes_on, loop_vars=[place], maximum_iterations=at_most)[0] + 1

    def bytes_at(start, count):
        return data[start : start + count]

    def names_transparent(place):
        return (byte(place + 1) == 0xF9) & (byte(place + 3) % 2 == 1)

    frame, transparent = tf.while_loop(
        lambda place, _: byte(place) == 0x21,  # an extension
        lambda place, found: [
            behind_blocks(place + 2, 1 << 12),
            # A graphic control extension may name a transparent palette entry.
            tf.where(names_transparent(place), byte(place + 6), found),
        ],
        [behind_colors(13, byte(10)), 0],
        maximum_iterations=1 << 6,
    )
    screen = [little_endian(bytes_at(start, 2)) for start in (6, 8)]
    left, top, width, height = (little_endian(bytes_at(frame + at, 2)) for at in (1, 3, 5, 7))
    sides = tf.maximum(screen[0], left + width), tf.maximum(screen[1], top + height)
    fits = (byte(frame) == 0x2C) & within_limits(*sides)
    flags = byte(frame + 9)
    start = behind_colors(frame + 10, flags)  # of the compressed pixels
    end = behind_blocks(tf.where(fits, start, tf.size(data)) + 1, 1 << 16)  # up to 16 MB
    local, shared = flags >= 128, byte(10) >= 128
    count = 3 * 2 ** (tf.where(local, flags, byte(10)) % 8 + 1)
    palette = bytes_at(tf.where(local, frame + 10, 13), count)
    palette = tf.pad(palette, [[0, 768 - tf.size(palette)]])
    grays = tf.repeat(tf.range(256), 3)
    palette = tf.where(local | shared, palette, tf.cast(grays, tf.uint8))

    def piece(start, count):
        return tf.strings.substr(encoded, tf.where(fits, start, 0), tf.where(fits, count, 0))

    # A GIF of this frame alone, with a palette of 256 colors and without transparency.
    alone = [
        b"GIF89a",
        piece(frame + 5, 4),
        b"\xf7\0\0",
        string_of(palette),
        b"\x2c\0\0\0\0",
        piece(frame + 5, 4),
        tf.where(flags & 64 > 0, b"\x40", b"\0"),  # interlaced
        piece(start, end - start),
        b";",
    ]
    image = tf.io.decode_gif(tf.where(fits, tf.strings.join(alone), ""))[0]
    # Outside of the frame, the canvas has the color of the transparent palette entry.
    padding = [[top, sides[1] - top - height], [left, sides[0] - left - width]]
    color = tf.reshape(palette, (256, 3))[transparent]
    inside = tf.pad(tf.ones((height, width, 1), tf.bool), [*padding, [0, 0]])
    return tf.where(inside, tf.pad(image, [*padding, [0, 0]]), color)


def little_endian(values):
    """Returns the integer in a uint8 tensor of two bytes, little-endian."""
    import tensorflow as tf

    return tf.reduce_sum(tf.cast(values, tf.int32) * [1, 256])


def string_of(values):
    """Converts a uint8 tensor (length,) to a string tensor."""
    import tensorflow as tf

    characters = tf.constant([bytes([i]) for i in range(256)])
    return tf.strings.reduce_join(tf.gather(characters, tf.cast(values, tf.int32)))


DECODERS = {
    "JPEG": decode_jpeg,
    "PNG": decode_png,
    "GIF": decode_gif,
    "BMP": decode_bmp,
    "WEBP": decode_webp,
}


def gray(image):
    """Returns luma, uint8 (height, width, 1), in Pillow's fixed-point arithmetic."""
    import tensorflow as tf

    luma = tf.reduce_sum(tf.cast(image, tf.int32) * GRAY, axis=-1, keepdims=True)
    return tf.cast((luma + 32768) // 65536, tf.uint8)


# === Orientation ===

# EXIF orientations that flip an axis. Orientations 5 to 8 are transposed first.
FLIPPED_COLUMNS = (2, 3, 6, 7)
FLIPPED_ROWS = (3, 4, 7, 8)


def exif_orientation(encoded):
    """Returns the EXIF orientation, 1 to 8, of a JPEG, PNG or WebP; 1 without.

    The name of the chunk is searched for, because as a graph, walking from chunk to chunk is slower
    than decoding. The name and the header of its data are at least 8 bytes, which do not occur in
    compressed pixels by chance.
    """
    import tensorflow as tf

    found = tf.size(split_at_exif(encoded)[0]) == 2
    return switch(found, [lambda encoded: tf.constant(1), parse_exif], encoded, tf.int32, ())


def split_at_exif(encoded):
    """Splits a file at the name of its EXIF chunk.

    Returns:
        The parts before and after the name as a string tensor (2,), or the whole file, (1,), if it
        has none; whether the file is neither PNG nor WebP; whether it is a WebP.
    """
    import tensorflow as tf

    png, webp = has(encoded, FORMATS[1].signature), has(encoded, FORMATS[6].signature)
    # In PNG and WebP the chunk may follow the pixels.
    reach = tf.where(png | webp, tf.strings.length(encoded), JPEG_EXIF_REACH)
    name = tf.where(png, b"eXIf", tf.where(webp, b"EXIF", b"Exif\0\0"))
    searched = tf.strings.substr(encoded, 0, reach)[None]
    parts = tf.raw_ops.StringSplitV2(input=searched, sep=name, maxsplit=1).values
    return parts, ~(png | webp), webp


def parse_exif(encoded):
    """Returns the orientation, 1 to 8, of a file that contains the name of an EXIF chunk."""
    import tensorflow as tf

    parts, jpeg, webp = split_at_exif(encoded)
    before, data = parts[0], parts[1]
    # In JPEG, the APP1 marker and two bytes of length precede the name.
    start = tf.maximum(tf.strings.length(before) - 4, 0)
    valid = ~jpeg | (tf.strings.substr(before, start, 2) == b"\xff\xe1")
    # In WebP, a length follows the name, and some programs write JPEG's name after it.
    size = tf.where(webp & (tf.strings.length(data) >= 4), 4, 0)
    data = tf.strings.substr(data, size, -1)
    named = tf.strings.substr(data, 0, 6) == b"Exif\0\0"
    data = tf.strings.substr(data, tf.where(named, 6, 0), -1)
    valid &= tf.strings.length(data) >= 14
    return tf.cond(valid, lambda: tiff_orientation(data), lambda: 1)


def tiff_orientation(data):
    """Returns the orientation, 1 to 8, in the first directory (IFD0) of EXIF data; 1 without.

    Args:
        data: string tensor of at least 14 bytes, which should begin with a TIFF header.
    """
    import tensorflow as tf

    length = tf.cast(tf.strings.length(data), tf.int64)
    order = tf.strings.substr(data, 0, 4)
    little = order == b"II*\0"

    def integers(values):
        """Returns the integers in the last axis, of 2 or 4 bytes."""
        powers = tf.constant([256**i for i in range(values.shape[-1])], tf.int64)
        powers = tf.where(little, powers, powers[::-1])
        return tf.reduce_sum(tf.cast(values, tf.int64) * powers, axis=-1)

    def read(start, count):
        return integers(
            tf.reshape(tf.io.decode_raw(tf.strings.substr(data, start, count), tf.uint8), (count,))
        )

    def search(directory):
        count = tf.minimum(read(directory, 2), (length - directory - 2) // 12)
        entries = tf.strings.substr(data, directory + 2, 12 * count)
        entries = tf.reshape(tf.io.decode_raw(entries, tf.uint8), (-1, 12))
        # The orientation tag, with one value of type SHORT.
        valid = integers(entries[:, :2]) == 0x0112
        valid &= (integers(entries[:, 2:4]) == 3) & (integers(entries[:, 4:8]) == 1)
        found = tf.boolean_mask(integers(entries[:, 8:10]), valid)
        value = tf.cast(tf.concat([found, [1]], 0)[0], tf.int32)
        return tf.where((value >= 1) & (value <= 8), value, 1)

    directory = read(4, 4)
    valid = (little | (order == b"MM\0*")) & (directory + 2 <= length)
    return tf.cond(valid, lambda: search(directory), lambda: 1)


def upright(image, orientation):
    """Applies an EXIF orientation to an image."""
    import tensorflow as tf

    def when(chosen, change, image):
        return tf.cond(chosen, lambda: change(image), lambda: image)

    image = when(orientation >= 5, lambda x: tf.transpose(x, (1, 0, 2)), image)  # (w, h, c)
    image = when(is_one_of(orientation, FLIPPED_COLUMNS), lambda x: x[:, ::-1], image)
    return when(is_one_of(orientation, FLIPPED_ROWS), lambda x: x[::-1], image)


def is_one_of(orientation, orientations):
    """Returns whether an orientation is in the tuple `orientations`."""
    import tensorflow as tf

    return tf.reduce_any(orientation == tf.constant(orientations))


# === The evaluation crop ===


def evaluation_crop(image, size, covered):
    """Resizes an image (bicubic, aspect ratio preserved) to just cover a size, and center-crops it.

    Args:
        image: uint8 (height, width, channels).
        size: (height, width) of the result.
        covered: (height, width) that the resized image covers.

    Returns:
        Float tensor (*size, channels) of integers in [0, 255].
    """
    import tensorflow as tf

    (height, width), (covered_height, covered_width) = size, covered
    rows, columns = tf.shape(image)[0], tf.shape(image)[1]
    tall = covered_height * columns >= covered_width * rows
    new_rows = tf.where(tall, covered_height, covered_width * rows // columns)
    new_columns = tf.where(tall, covered_height * columns // rows, covered_width)
    for axis, new, count in ((1, new_columns, width), (0, new_rows, height)):
        image = stretch_middle(image, axis, new, count)
        image = tf.clip_by_value(tf.floor(image + 0.5), 0.0, 255.0)
    return tf.ensure_shape(image, (*size, image.shape[-1]))


def stretch_middle(image, axis, new, count):
    """Returns the center `count` rows (axis 0) or columns (1) of an image resized to `new`."""
    import tensorflow as tf

    old = tf.cast(tf.shape(image)[axis], tf.float64)
    new = tf.cast(new, tf.float64)
    # Halves are rounded to even, as in `load_image`.
    first = tf.round((new - count) / 2)
    # Only the part that the kernel reads is resized, because the image may be a long strip.
    reach = 2 * tf.maximum(old / new, 1) + 1
    start = tf.maximum(tf.floor(first * old / new - reach), 0)
    end = tf.minimum(tf.math.ceil((first + count) * old / new + reach), old)
    read = slice(tf.cast(start, tf.int32), tf.cast(end, tf.int32))

    rows, columns = tf.shape(image)[0], tf.shape(image)[1]
    scale, translation = new / old, start * new / old - first
    if axis == 0:
        image, size = image[read], (count, columns)
        scale, translation = (scale, 1.0), (translation, 0.0)
    else:
        image, size = image[:, read], (rows, count)
        scale, translation = (1.0, scale), (0.0, translation)
    return tf.raw_ops.ScaleAndTranslate(
        images=image[None],
        size=size,
        scale=tf.cast(scale, tf.float32),
        translation=tf.cast(translation, tf.float32),
        kernel_type="keyscubic",
        antialias=True,
    )[0]
