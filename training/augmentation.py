"""What happens to an image before it reaches the model, op by op, in plain TensorFlow.

Images are uint8 (height, width, 3) throughout. Each random op is a pure function of its seed, so
that an image's augmentation depends on (seed, epoch, place in the epoch) and on nothing else.
RandAugment's ops give what Pillow's of the same name give.
"""

import functools
import math

import tensorflow as tf

from keras_tnt.export.image import (
    crop,
    decode,
    decode_and_crop,
    evaluation_crop,
    grey,
)

# === From a file, or an array, to an image of the model's size ===


def resize(image, size):
    """Bicubic and antialiased, as Pillow resizes."""
    image = tf.image.resize(image, size, method="bicubic", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)


def cut(image, choose_box):
    """Cuts a part out of an image, or of the bytes of one, which are decoded just there.

    Args:
        image: uint8 (height, width, 3), or bytes.
        choose_box: function from (height, width) to int32 (top, left, height, width).
    """
    if image.dtype == tf.string:
        return decode_and_crop(image, choose_box)
    box = choose_box(*tf.unstack(tf.shape(image)[:2]))
    return tf.ensure_shape(crop(image, box), (None, None, 3))


def inception_box(shape, seed, min_area, ratio=(3 / 4, 4 / 3), attempts=10):
    """A box of random area and aspect, the first of some draws that fits (Inception's crop).

    Args:
        shape: (height, width).
        seed: integer tensor (2,).
        min_area: smallest share of the image's area.
        ratio: smallest and largest width over height.
        attempts: draws before the middle of the image, as large as `ratio` lets, is taken.

    Returns:
        int32 (top, left, height, width).
    """
    height, width = tf.unstack(tf.cast(shape, tf.float32))
    draws = tf.random.stateless_uniform([4, attempts], seed)
    area = height * width * (min_area + (1 - min_area) * draws[0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = tf.exp(low + (high - low) * draws[1])
    heights, widths = tf.round(tf.sqrt(area / aspect)), tf.round(tf.sqrt(area * aspect))
    fits = (heights >= 1) & (widths >= 1) & (heights <= height) & (widths <= width)
    first = tf.argmax(fits)
    middle_height = tf.minimum(height, tf.round(width / ratio[0]))
    middle_width = tf.minimum(width, tf.round(height * ratio[1]))
    found = tf.reduce_any(fits)
    h = tf.where(found, heights[first], middle_height)
    w = tf.where(found, widths[first], middle_width)
    top = tf.where(found, tf.floor(draws[2, first] * (height - h + 1)), (height - h) // 2)
    left = tf.where(found, tf.floor(draws[3, first] * (width - w + 1)), (width - w) // 2)
    return tf.cast(tf.stack([top, left, h, w]), tf.int32)


def evaluation_image(image, crop, size):
    """The middle of an image, as the published results were measured.

    The image is resized so that `crop` of the shorter side is what `size` shows, and cut.

    Args:
        image: uint8 (height, width, 3), or bytes.
        crop: share of the side, in (0, 1].
        size: (height, width) of the result.

    Returns:
        uint8 (*size, 3).
    """
    if image.dtype != tf.string and crop == 1 and image.shape[:2] == tuple(size):
        return image
    image = decode(image) if image.dtype == tf.string else image
    covered = [math.floor(side / crop) for side in size]
    return tf.cast(evaluation_crop(image, size, covered), tf.uint8)


def training_image(image, seed, config, size, fill):
    """A training image: cropped, flipped, shifted and coloured as the configuration says.

    Args:
        image: uint8 (height, width, 3), or bytes.
        seed: int64 (2,).
        config: a `training.configuration.Config`.
        size: (height, width) of the result.
        fill: colour that geometric ops fill in with.

    Returns:
        uint8 (*size, 3).
    """
    seeds = tf.unstack(tf.random.experimental.stateless_split(seed, 6))
    if config.min_crop < 1:
        box = functools.partial(inception_box, seed=seeds[0], min_area=config.min_crop)
        image = resize(cut(image, lambda *sides: box(sides)), size)
    elif image.dtype == tf.string or image.shape[:2] != tuple(size):
        image = evaluation_image(image, config.crop, size)
    image = tf.ensure_shape(image, (*size, 3))
    if config.flip:
        flipped = tf.random.stateless_uniform([], seeds[1]) < 0.5
        image = tf.cond(flipped, lambda: tf.reverse(image, [1]), lambda: image)
    if config.shift:
        image = shift(image, seeds[2], config.shift)
    if config.rotate:
        reach = config.rotate
        degrees = tf.random.stateless_uniform([], seeds[5], -reach, reach)
        image = rotate(image, degrees, (0, 0, 0))
    if config.randaugment and config.augmentation == "builtin":
        image = randaugment(image, seeds[3], fill)
    elif config.color_jitter and not config.randaugment:
        image = color_jitter(image, seeds[4], config.color_jitter)
    return tf.ensure_shape(image, (*size, 3))


def shift(image, seed, reach):
    """Move an image by up to `reach` pixels each way; black fills in."""
    height, width, channels = image.shape
    padded = tf.pad(image, [[reach, reach], [reach, reach], [0, 0]])
    offset = tf.random.stateless_uniform([2], seed, 0, 2 * reach + 1, tf.int32)
    return tf.ensure_shape(
        tf.slice(padded, [offset[0], offset[1], 0], [height, width, channels]), image.shape
    )


def color_jitter(image, seed, strength):
    """Brightness, contrast and saturation, each by a factor from 1 - strength to 1 + strength."""
    factors = tf.random.stateless_uniform([3], seed, 1 - strength, 1 + strength)
    for op, factor in zip((brightness, contrast, color), tf.unstack(factors), strict=True):
        image = op(image, factor)
    return image


# === RandAugment's ops, as Pillow has them ===


def blend(degenerate, image, factor):
    """`factor` of the image and the rest of `degenerate`, cut to whole numbers in [0, 255]."""
    degenerate, image = tf.cast(degenerate, tf.float32), tf.cast(image, tf.float32)
    return tf.cast(tf.clip_by_value(degenerate + factor * (image - degenerate), 0, 255), tf.uint8)


def color(image, factor):
    return blend(grey(image), image, factor)


def contrast(image, factor):
    mean = tf.floor(tf.reduce_mean(tf.cast(grey(image), tf.float32)) + 0.5)
    return blend(tf.fill(tf.shape(image), mean), image, factor)


def brightness(image, factor):
    return blend(tf.zeros_like(image), image, factor)


def sharpness(image, factor):
    """Against a 3x3 smoothed image, whose border stays as it is."""
    kernel = tf.constant([[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]) / 13
    kernel = tf.tile(tf.reshape(kernel, (3, 3, 1, 1)), [1, 1, 3, 1])
    pixels = tf.cast(image, tf.float32)[None]
    inner = tf.nn.depthwise_conv2d(pixels, kernel, [1, 1, 1, 1], "VALID")[0]
    inner = tf.floor(inner + 0.5)
    height, width, _ = image.shape
    inside = tf.pad(tf.ones((height - 2, width - 2, 1), tf.bool), [[1, 1], [1, 1], [0, 0]])
    smooth = tf.where(inside, tf.pad(inner, [[1, 1], [1, 1], [0, 0]]), pixels[0])
    return blend(smooth, image, factor)


def invert(image):
    return 255 - image


def posterize(image, bits):
    """Keep the highest `bits` bits of each channel."""
    dropped = tf.cast(8 - bits, tf.uint8)
    return tf.bitwise.left_shift(tf.bitwise.right_shift(image, dropped), dropped)


def solarize(image, threshold):
    """Invert what reaches `threshold`, 0 to 256."""
    return tf.where(tf.cast(image, tf.int32) < threshold, image, 255 - image)


def solarize_add(image, addition):
    """Add to what is below 128."""
    pixels = tf.cast(image, tf.int32)
    return tf.where(image < 128, tf.cast(tf.minimum(pixels + addition, 255), tf.uint8), image)


def look_up(image, tables):
    """Each channel's pixels replaced by its table's values: tables (3, 256)."""
    channels = [tf.gather(tables[c], tf.cast(image[..., c], tf.int32)) for c in range(3)]
    return tf.cast(tf.stack(channels, axis=-1), tf.uint8)


def autocontrast(image):
    """Stretch each channel to the whole range, in Pillow's double precision."""

    def table(channel):
        low, high = (tf.cast(f(channel), tf.float64) for f in (tf.reduce_min, tf.reduce_max))
        values = tf.range(256, dtype=tf.float64)
        scale = 255 / tf.maximum(high - low, 1)
        stretched = tf.clip_by_value(values * scale - low * scale, 0, 255)
        return tf.cast(tf.where(high > low, stretched, values), tf.int32)

    return look_up(image, [table(image[..., c]) for c in range(3)])


def equalize(image):
    """Spread each channel's values so that all are about as frequent."""

    def table(channel):
        values = tf.reshape(tf.cast(channel, tf.int32), [-1])
        histogram = tf.math.bincount(values, minlength=256, maxlength=256)
        last = histogram[tf.reduce_max(values)]
        step = (tf.size(values) - last) // 255
        before = tf.cumsum(histogram, exclusive=True)
        spread = tf.minimum((before + step // 2) // tf.maximum(step, 1), 255)
        return tf.where(step > 0, spread, tf.range(256))

    return look_up(image, [table(image[..., c]) for c in range(3)])


def affine(image, matrix, fill):
    """The pixel at (x, y) is taken, bilinearly, from (a x + b y + c, d x + e y + f).

    Args:
        image: uint8 (height, width, 3).
        matrix: a to f, in Pillow's coordinates, whose pixels' centres lie at halves.
        fill: colour of what lies outside.
    """
    a, b, c, d, e, f = (tf.cast(value, tf.float32) for value in matrix)
    c, f = c + (a + b - 1) / 2, f + (d + e - 1) / 2
    transform = tf.stack([a, b, c, d, e, f, 0.0, 0.0])
    fill = tf.constant(fill, tf.float32)
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=(tf.cast(image, tf.float32) - fill)[None],
        transforms=transform[None],
        output_shape=image.shape[:2],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )[0]
    moved = tf.clip_by_value(tf.round(moved + fill), 0, 255)
    return tf.ensure_shape(tf.cast(moved, tf.uint8), image.shape)


def rotate(image, degrees, fill):
    """Counter-clockwise about the middle."""
    height, width, _ = image.shape
    angle = degrees * (math.pi / 180)
    cosine, sine = tf.cos(angle), tf.sin(angle)
    x, y = width / 2, height / 2
    matrix = (
        *(cosine, -sine, x - cosine * x + sine * y),
        *(sine, cosine, y - sine * x - cosine * y),
    )
    return affine(image, matrix, fill)


def shear_x(image, factor, fill):
    return affine(image, (1, factor, 0, 0, 1, 0), fill)


def shear_y(image, factor, fill):
    return affine(image, (1, 0, 0, factor, 1, 0), fill)


def translate_x(image, share, fill):
    return affine(image, (1, 0, share * image.shape[1], 0, 1, 0), fill)


def translate_y(image, share, fill):
    return affine(image, (1, 0, 0, 0, 1, share * image.shape[0]), fill)


def whole_number(value):
    return tf.cast(tf.floor(value), tf.int32)


# Each op at magnitude m in [0, 1] and sign s, with `fill` for what moves in.
RANDAUGMENT = (
    lambda x, m, s, fill: autocontrast(x),
    lambda x, m, s, fill: equalize(x),
    lambda x, m, s, fill: invert(x),
    lambda x, m, s, fill: rotate(x, s * 30 * m, fill),
    lambda x, m, s, fill: posterize(x, 4 - whole_number(4 * m)),
    lambda x, m, s, fill: solarize(x, 256 - whole_number(256 * m)),
    lambda x, m, s, fill: solarize_add(x, whole_number(110 * m)),
    lambda x, m, s, fill: color(x, 1 + s * 0.9 * m),
    lambda x, m, s, fill: contrast(x, 1 + s * 0.9 * m),
    lambda x, m, s, fill: brightness(x, 1 + s * 0.9 * m),
    lambda x, m, s, fill: sharpness(x, 1 + s * 0.9 * m),
    lambda x, m, s, fill: shear_x(x, s * 0.3 * m, fill),
    lambda x, m, s, fill: shear_y(x, s * 0.3 * m, fill),
    lambda x, m, s, fill: translate_x(x, s * 0.45 * m, fill),
    lambda x, m, s, fill: translate_y(x, s * 0.45 * m, fill),
)


def randaugment(image, seed, fill, layers=2, magnitude=9.0, deviation=0.5, probability=0.5):
    """RandAugment (arXiv 1909.13719) in timm's `rand-m9-mstd0.5-inc1`.

    Args:
        image: uint8 (height, width, 3).
        seed: integer tensor (2,).
        fill: colour of what moves in.
        layers: ops an image, drawn with replacement.
        magnitude, deviation: mean and standard deviation of the magnitude, which is cut to [0, 10].
        probability: with which a drawn op is applied.
    """
    seeds = tf.random.experimental.stateless_split(seed, 3)
    ops = tf.random.stateless_uniform([layers], seeds[0], 0, len(RANDAUGMENT), tf.int32)
    magnitudes = tf.random.stateless_normal([layers], seeds[1], magnitude, deviation)
    magnitudes = tf.clip_by_value(magnitudes, 0, 10) / 10
    odds = tf.random.stateless_uniform([layers, 2], seeds[2])
    for i in range(layers):
        m, sign = magnitudes[i], tf.where(odds[i, 0] < 0.5, 1.0, -1.0)
        branches = [
            lambda op=op, x=image, m=m, s=sign: tf.ensure_shape(op(x, m, s, fill), x.shape)
            for op in RANDAUGMENT
        ]
        branches.append(lambda x=image: x)
        chosen = tf.where(odds[i, 1] < probability, ops[i], len(RANDAUGMENT))
        image = tf.switch_case(chosen, branches)
    return image


# === Random erasing and mixing ===


def erasing_box(seed, probability, size, area=(0.02, 1 / 3), ratio=0.3):
    """Where random erasing (arXiv 1708.04896) erases: (top, bottom, left, right), or zeros."""
    seeds = tf.random.experimental.stateless_split(seed, 2)
    draws = tf.random.stateless_uniform([4, 10], seeds[0])
    height, width = size
    pixels = height * width * (area[0] + (area[1] - area[0]) * draws[0])
    aspect = tf.exp(math.log(ratio) * (1 - 2 * draws[1]))
    heights, widths = tf.round(tf.sqrt(pixels * aspect)), tf.round(tf.sqrt(pixels / aspect))
    fits = (heights < height) & (widths < width)
    first = tf.argmax(fits)
    h, w = heights[first], widths[first]
    top = tf.floor(draws[2, first] * (height - h + 1))
    left = tf.floor(draws[3, first] * (width - w + 1))
    erased = tf.random.stateless_uniform([], seeds[1]) < probability
    box = tf.stack([top, top + h, left, left + w])
    return tf.cast(tf.where(erased & tf.reduce_any(fits), box, tf.zeros_like(box)), tf.int32)


def box_mask(boxes, size):
    """Which pixels lie in boxes (..., 4) of top, bottom, left, right: (..., height, width, 1)."""
    top, bottom, left, right = (boxes[..., i, None, None] for i in range(4))
    rows, columns = tf.range(size[0])[:, None], tf.range(size[1])[None, :]
    mask = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return mask[..., None]


def mix_with_neighbours(x, share):
    """`share` of each row and the rest of its neighbour: 0 with 1, 2 with 3, and so on.

    Neighbours stay together however a batch is divided among devices, so that any number of them
    mixes alike.
    """
    pairs = tf.reshape(x, (-1, 2, *x.shape[1:]))  # (b/2, 2, ...)
    partners = tf.reshape(tf.reverse(pairs, [1]), (-1, *x.shape[1:]))  # (b, ...)
    return share * x + (1 - share) * partners
