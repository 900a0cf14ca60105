"""`keras_tnt.load_image` as TensorFlow operations: within 1 of 255 of what Pillow gives.

Pillow resizes along the width, rounds to 8 bits, then along the height. So does this; rounding
apart, TensorFlow's operation has the same kernel, Keys' cubic with a = -0.5. Images are turned
upright by the EXIF data of JPEGs; that of other formats, which is rare, is not read.

TensorFlow's decoders are given nothing before its header was read: they take as much memory as a
file claims to need, all frames of a GIF are in memory before the first is returned, and an animated
WebP of opaque frames ends the process.
"""

from keras_tnt.images import FORMATS, GREY, MAX_BYTES, MAX_PIXELS, MAX_SIDE, READ

# How far into a JPEG its EXIF data is looked for.
EXIF_REACH = 1 << 17


def load_images(image_bytes, size, covered, channels=3):
    """Encoded images to the evaluation crop.

    Args:
        image_bytes: string tensor (batch,): files of the formats, and within the limits, of
            `keras_tnt.images`; an animated WebP is none.
        size: (height, width) of the crop.
        covered: (height, width) that the image just covers before it is cropped.
        channels: 3 or 1.

    Returns:
        Float tensor (batch, height, width, channels) in [0, 255]. Running it fails, and tells the
        places in the batch, if images cannot be decoded.
    """
    import tensorflow as tf

    shape = (*size, channels)
    batch = tf.shape(image_bytes, tf.int64)[0]

    # AutoGraph, which nothing here needs, writes files that it removes at the process's end alone.
    @tf.autograph.experimental.do_not_convert
    def numbered(place, encoded):
        image = upright(decode(encoded, channels), orientation(encoded))
        return place, evaluation_crop(image, size, covered)

    # A dataset decodes on all cores, and leaves out what fails, so that its place can be told.
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
        # TensorFlow leaves out what there is no memory for as it does what it cannot decode.
        [
            f"Not an image that can be decoded, or no memory for it: {READ}. Places in the batch:",
            broken,
        ],
        summarize=100,
    )
    return tf.ensure_shape(images[:-1], (None, *shape))


# === Decoding ===


def decode(encoded, channels=3):
    """Bytes of a file to an image, uint8 (height, width, channels), as it lies; its first frame.

    Running it fails for what `keras_tnt.images` refuses, and for an animated WebP.
    """
    import tensorflow as tf

    def decoder(format):
        def decode_format():
            fits = (tf.strings.length(encoded) <= MAX_BYTES) & within_limits(
                *(format.sides(integers_of(encoded)) if format.sides else jpeg_sides(encoded))
            )
            # No decoder takes an empty string.
            image = DECODERS[format.name](tf.where(fits, encoded, ""))
            return tf.ensure_shape(image, (None, None, 3))

        return decode_format

    def refuse():
        return tf.io.decode_png(tf.strings.substr(encoded, 0, 0), channels=3)

    places = [tf.where(has(encoded, f.signature), i, len(FORMATS)) for i, f in enumerate(FORMATS)]
    image = tf.switch_case(
        tf.reduce_min(places), [*(decoder(format) for format in FORMATS), refuse]
    )
    return grey(image) if channels == 1 else image


def has(encoded, signature):
    import tensorflow as tf

    return tf.reduce_all(
        [tf.strings.substr(encoded, at, len(part)) == part for at, part in signature.items()]
    )


def integers_of(encoded):
    """The function `read` of `keras_tnt.images.Format`."""
    import tensorflow as tf

    def read(start, count, big=False, signed=False):
        values = tf.io.decode_raw(tf.strings.substr(encoded, start, count), tf.uint8)
        powers = [256**i for i in range(count)]
        number = tf.reduce_sum(tf.cast(values, tf.int64) * (powers[::-1] if big else powers))
        negative = signed & (number >= 256**count // 2)
        return tf.where(negative, number - 256**count, number)

    return read


def within_limits(width, height):
    import tensorflow as tf

    return (tf.maximum(width, height) <= MAX_SIDE) & (width * height <= MAX_PIXELS)


def jpeg_sides(encoded):
    import tensorflow as tf

    height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(encoded, tf.int64))
    return width, height


def decode_jpeg(encoded):
    import tensorflow as tf

    # The accurate transform is what libjpeg, and so Pillow, uses unless told otherwise.
    return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")


def decode_png(encoded):
    import tensorflow as tf

    return tf.io.decode_png(encoded, channels=3)


def decode_bmp(encoded):
    import tensorflow as tf

    return tf.io.decode_bmp(encoded, channels=3)


def decode_webp(encoded):
    import tensorflow as tf

    extended = tf.strings.substr(encoded, 12, 4) == "VP8X"
    animated = extended & (integers_of(encoded)(20, 1) // 2 % 2 == 1)
    # It gives frames, of 3 or 4 channels, and refuses to give 3 of 4.
    return tf.io.decode_webp(tf.where(animated, "", encoded))[0, ..., :3]


def decode_gif(encoded):
    """The first frame of a GIF, from a file that ends behind it."""
    import tensorflow as tf

    data = tf.pad(tf.io.decode_raw(encoded, tf.uint8), [[0, 1]])

    def byte(place):
        return tf.cast(data[tf.minimum(place, tf.size(data) - 1)], tf.int32)

    def behind_colors(place, flags):
        return place + tf.where(flags >= 128, 3 * 2 ** (flags % 8 + 1), 0)

    def behind_blocks(place, at_most):
        """Behind blocks of data, each of which begins with its length, the last with 0."""
        goes_on = {"cond": lambda p: byte(p) > 0, "body": lambda p: [p + 1 + byte(p)]}
        return tf.while_loop(**goes_on, loop_vars=[place], maximum_iterations=at_most)[0] + 1

    frame = tf.while_loop(
        lambda place: byte(place) == 0x21,  # an extension
        lambda place: [behind_blocks(place + 2, 1 << 12)],
        [behind_colors(13, byte(10))],
        maximum_iterations=1 << 6,
    )[0]
    read = integers_of(encoded)
    fits = (byte(frame) == 0x2C) & within_limits(read(frame + 5, 2), read(frame + 7, 2))
    colors = tf.where(fits, frame + 10, tf.size(data))
    end = behind_blocks(behind_colors(colors, byte(frame + 9)) + 1, 1 << 16)  # up to 16 MB
    alone = tf.strings.join([tf.strings.substr(encoded, 0, tf.where(fits, end, 0)), ";"])
    return tf.io.decode_image(alone, channels=3, expand_animations=False)


DECODERS = {
    "JPEG": decode_jpeg,
    "PNG": decode_png,
    "GIF": decode_gif,
    "BMP": decode_bmp,
    "WEBP": decode_webp,
}


def grey(image):
    """Luma, uint8 (height, width, 1), in Pillow's fixed point."""
    import tensorflow as tf

    luma = tf.reduce_sum(tf.cast(image, tf.int32) * GREY, axis=-1, keepdims=True)
    return tf.cast((luma + 32768) // 65536, tf.uint8)


# === Upright ===


def orientation(encoded):
    """The orientation, 1 to 8, that the EXIF data of a JPEG tells; 1 of anything else."""
    import tensorflow as tf

    return tf.cond(tf.io.is_jpeg(encoded), lambda: jpeg_orientation(encoded), lambda: 1)


def jpeg_orientation(encoded):
    """The orientation, 1 to 8, that the EXIF data of a JPEG tells; 1 without."""
    import tensorflow as tf

    header = tf.cast(
        tf.io.decode_raw(tf.strings.substr(encoded, 0, EXIF_REACH), tf.uint8), tf.int32
    )
    header = tf.pad(header, [[0, 16]])

    def read(start, count, little=False):
        """Unsigned integer of `count` bytes; whatever lies beyond the header reads as 0."""
        places = tf.minimum(start + tf.range(count), tf.size(header) - 1)
        values = tf.gather(header, tf.maximum(places, 0))
        powers = 256 ** tf.range(count)
        return tf.reduce_sum(values * tf.where(little, powers, powers[::-1]))

    def is_exif(start):
        # Marker APP1, two bytes of length, "Exif".
        return (read(start, 2) == 0xFFE1) & (read(start + 4, 4) == 0x45786966)

    def goes_on(start):
        inside = (start < tf.size(header) - 16) & (read(start, 1) == 0xFF)
        return inside & (read(start + 1, 1) != 0xDA) & ~is_exif(start)

    start = tf.while_loop(goes_on, lambda start: [start + 2 + read(start + 2, 2)], [2])[0]
    tiff = start + 10
    little = read(tiff, 2) == 0x4949
    directory = tiff + read(tiff + 4, 4, little)
    count = tf.minimum(read(directory, 2, little), 256)
    entries = directory + 2 + 12 * tf.range(count)
    tags = tf.map_fn(lambda entry: read(entry, 2, little), entries)
    found = tf.boolean_mask(entries, tags == 0x0112)
    value = tf.cond(tf.size(found) > 0, lambda: read(found[0] + 8, 2, little), lambda: 1)
    return tf.where(is_exif(start) & (value >= 1) & (value <= 8), value, 1)


def upright(image, orientation):
    """Turn an image as its EXIF orientation asks."""
    import tensorflow as tf

    def when(orientations, change, image):
        chosen = tf.reduce_any(orientation == tf.constant(orientations))
        return tf.cond(chosen, lambda: change(image), lambda: image)

    image = when((5, 6, 7, 8), lambda x: tf.transpose(x, (1, 0, 2)), image)  # (w, h, c)
    image = when((2, 3, 6, 7), lambda x: x[:, ::-1], image)
    return when((3, 4, 7, 8), lambda x: x[::-1], image)


# === The evaluation crop ===


def evaluation_crop(image, size, covered):
    """Resize an image in proportion, bicubic, until it just covers a size; cut out its middle.

    Args:
        image: uint8 (height, width, channels).
        size: (height, width) of the result.
        covered: (height, width) that the resized image covers.

    Returns:
        Float tensor (*size, channels) of whole numbers in [0, 255].
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
    """The `count` middle rows, axis 0, or columns, 1, of an image resized to `new` of them."""
    import tensorflow as tf

    old = tf.cast(tf.shape(image)[axis], tf.float64)
    new = tf.cast(new, tf.float64)
    # Halves are rounded to even, as `load_image` does.
    first = tf.round((new - count) / 2)
    # What the kernel reads of the image: no more is resized, however long a strip it is.
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
