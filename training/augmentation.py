"""What happens to an image before it reaches the model, op by op, in plain TensorFlow.

Images are uint8 (height, width, 3) throughout. Each random op is a pure function of its seed, so
that an image's augmentation depends on (seed, epoch, place in the epoch) and on nothing else.
The ops equal Pillow's of the same name to within 1 of 255: the published recipes were trained on
Pillow's pixels, through timm 0.3.2 and DeiT's `augment.py`.
"""

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


def resize(image, size, bicubic=True):
    """Resizes with antialiasing, as Pillow does; bilinear unless `bicubic`, a bool or a tensor."""
    image = choose(
        bicubic,
        lambda: tf.image.resize(image, size, method="bicubic", antialias=True),
        lambda: tf.image.resize(image, size, method="bilinear", antialias=True),
    )
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


def simple_random_crop(image, seed, size, padding=4):
    """Resizes an image to cover `size`, pads it by reflection, and crops it at a random place.

    This is DeiT III's simple random crop (SRC), which keeps the aspect ratio and most of the image.

    Args:
        image: uint8 (height, width, 3).
        seed: integer tensor (2,).
        size: (height, width) of the result.
        padding: pixels added to each side. Defaults to DeiT's 4.

    Returns:
        uint8 (*size, 3).
    """
    rows, columns = tf.unstack(tf.shape(image)[:2])
    height, width = size
    tall = rows * width >= columns * height
    covering = tf.where(tall, [rows * width // columns, width], [height, columns * height // rows])
    resized = resize(image, covering)
    padded = tf.pad(resized, [[padding, padding], [padding, padding], [0, 0]], "REFLECT")
    places = tf.cast(covering - size + 2 * padding + 1, tf.float32)
    offset = tf.cast(tf.floor(tf.random.stateless_uniform([2], seed) * places), tf.int32)
    return tf.slice(padded, [offset[0], offset[1], 0], [height, width, 3])


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
    """Crops, flips and augments an image as the configuration says.

    Args:
        image: uint8 (height, width, 3), or bytes.
        seed: int64 (2,).
        config: a `training.configuration.Config`.
        size: (height, width) of the result.
        fill: colour that geometric ops fill in with.

    Returns:
        uint8 (*size, 3).
    """
    seeds = tf.unstack(tf.random.experimental.stateless_split(seed, 8))
    if config.crop_mode == "simple":
        image = decode(image) if image.dtype == tf.string else image
        image = simple_random_crop(image, seeds[0], size)
    elif config.min_crop < 1:
        part = cut(image, lambda *sides: inception_box(sides, seeds[0], config.min_crop))
        image = resize(part, size, draw_bicubic(config.interpolation, seeds[6]))
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
    if config.three_augment:
        image = three_augment(image, seeds[7])
    if config.randaugment and config.augmentation == "builtin":
        image = randaugment(image, seeds[3], fill, config.interpolation)
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
    """Changes brightness, contrast and saturation in a random order, as torchvision does.

    Args:
        image: uint8 (height, width, 3).
        seed: integer tensor (2,).
        strength: each factor is drawn from 1 - strength, at least 0, to 1 + strength.
    """
    seeds = tf.random.experimental.stateless_split(seed, 2)
    factors = tf.random.stateless_uniform([3], seeds[0], max(0.0, 1 - strength), 1 + strength)
    order = tf.argsort(tf.random.stateless_uniform([3], seeds[1]))
    for i in range(3):
        ops = [
            lambda op=op, x=image, factor=factors[j]: op(x, factor)
            for j, op in enumerate((brightness, contrast, color))
        ]
        image = tf.ensure_shape(tf.switch_case(order[i], ops), image.shape)
    return image


def three_augment(image, seed):
    """Applies one of grayscale, solarization and Gaussian blur (DeiT III's 3-Augment).

    Each has the probability 1/3. The color jitter that follows in DeiT III is `color_jitter`.

    Args:
        image: uint8 (height, width, 3).
        seed: integer tensor (2,).
    """
    seeds = tf.random.experimental.stateless_split(seed, 2)
    chosen = tf.random.stateless_uniform([], seeds[0], 0, 3, tf.int32)
    radius = tf.random.stateless_uniform([], seeds[1], 0.1, MAX_BLUR)
    ops = [
        lambda: tf.tile(grey(image), [1, 1, 3]),
        lambda: solarize(image, 128),
        lambda: gaussian_blur(image, radius),
    ]
    return tf.ensure_shape(tf.switch_case(chosen, ops), image.shape)


# === Interpolation ===


def draw_bicubic(interpolation, seed):
    """Returns whether to interpolate bicubically: a bool, or for "random" a tensor of even odds."""
    if interpolation == "random":
        return tf.random.stateless_uniform([], seed) < 0.5
    return interpolation == "bicubic"


def choose(condition, if_true, if_false):
    """Returns `tf.cond`'s result; a Python bool leaves the other branch out of the graph."""
    if isinstance(condition, bool):
        return if_true() if condition else if_false()
    return tf.cond(condition, if_true, if_false)


# === Pillow's ops ===

MAX_BLUR = 2.0  # largest radius of 3-Augment's Gaussian blur
BOX_PASSES = 3  # box blurs that Pillow approximates a Gaussian blur by


def blend(degenerate, image, factor):
    """`factor` of the image and the rest of `degenerate`, cut to whole numbers in [0, 255]."""
    degenerate, image = tf.cast(degenerate, tf.float32), tf.cast(image, tf.float32)
    return tf.cast(tf.clip_by_value(degenerate + factor * (image - degenerate), 0, 255), tf.uint8)


def color(image, factor):
    return blend(grey(image), image, factor)


def contrast(image, factor):
    # float64, for the sum over a large image has more digits than float32.
    mean = tf.floor(tf.reduce_mean(tf.cast(grey(image), tf.float64)) + 0.5)
    return blend(tf.fill(tf.shape(image), tf.cast(mean, tf.float32)), image, factor)


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
    """Keeps the highest `bits` bits of each channel; of 0 bits the image is black."""
    # Not by shifts: a shift of a uint8 by 8 bits is undefined.
    unit = tf.bitwise.left_shift(1, 8 - bits)
    return tf.cast(tf.cast(image, tf.int32) // unit * unit, tf.uint8)


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


def gaussian_blur(image, radius, max_radius=MAX_BLUR):
    """Blurs by three box blurs along each axis, each rounded to 8 bits, as Pillow does.

    The boxes have fractional ends, so that their variances sum to `radius` squared (Gwosdek et al.,
    "Theoretical Foundations of Gaussian Convolution by Extended Box Filtering").

    Args:
        image: uint8 (height, width, 3).
        radius: standard deviation in pixels, in (0, max_radius]; a number or a tensor.
        max_radius: bounds the number of taps.
    """
    variance = tf.cast(radius, tf.float32) ** 2 / BOX_PASSES  # of one box
    whole = tf.floor((tf.sqrt(12 * variance + 1) - 1) / 2)  # pixels to each side that count fully
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    rest /= 6 * (variance - (whole + 1) ** 2)  # share of the next pixel
    reach = math.floor((math.sqrt(12 * max_radius**2 / BOX_PASSES + 1) - 1) / 2) + 1
    distance = tf.abs(tf.range(-reach, reach + 1, dtype=tf.float32))
    weights = tf.where(distance <= whole, 1.0, tf.where(distance == whole + 1, rest, 0.0))
    weights = tf.unstack(weights / (2 * (whole + rest) + 1))
    pixels = tf.cast(image, tf.float32)
    for axis in (1, 0):
        size = image.shape[axis]
        near = tf.clip_by_value(tf.range(-reach, size + reach), 0, size - 1)  # edges replicated
        for _ in range(BOX_PASSES):
            padded = tf.gather(pixels, near, axis=axis)
            taps = [
                weight * (padded[:, i : i + size] if axis else padded[i : i + size])
                for i, weight in enumerate(weights)
            ]
            # Halves go down: Pillow's fixed-point weights are cut off, never rounded up.
            pixels = tf.floor(tf.add_n(taps) + 0.4999)
    return tf.cast(pixels, tf.uint8)


def affine(image, matrix, fill, bicubic=False):
    """Takes the pixel at (x, y) from (a x + b y + c, d x + e y + f), as Pillow's AFFINE does.

    Pillow interpolates between pixels of the image, whose edge it replicates, and cuts the result
    to whole numbers; where the source lies outside the image it writes `fill`, unblended. The
    source is found in float64, for at the image's edge a rounding error decides between the two.

    Args:
        image: uint8 (height, width, 3).
        matrix: a to f, numbers or scalar tensors, for pixels whose centers lie at halves. An axis
            whose row of it is the numbers of the identity is not interpolated.
        fill: color of what lies outside.
        bicubic: whether to interpolate bicubically (Keys' kernel with a = -1), else bilinearly; a
            bool or a scalar tensor.
    """
    height, width, _ = image.shape
    a, b, c, d, e, f = (double(value) for value in matrix)
    x = tf.range(width, dtype=tf.float64) + 0.5
    y = (tf.range(height, dtype=tf.float64) + 0.5)[:, None]
    source_x, source_y = a * x + b * y + c, d * x + e * y + f  # (height, width)
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    left, top = tf.floor(source_x - 0.5), tf.floor(source_y - 0.5)
    beyond_left = tf.cast(source_x - 0.5 - left, tf.float32)[..., None]
    below_top = tf.cast(source_y - 0.5 - top, tf.float32)[..., None]
    left, top = tf.cast(left, tf.int32), tf.cast(top, tf.int32)
    # A pixel's channels as one integer: gathering numbers is faster than gathering slices.
    packed = tf.reshape(tf.bitcast(tf.pad(image, [[0, 0], [0, 0], [0, 1]]), tf.int32), [-1])

    def pixels(row, column):
        row = tf.clip_by_value(top + row, 0, height - 1)
        column = tf.clip_by_value(left + column, 0, width - 1)
        found = tf.bitcast(tf.gather(packed, row * width + column), tf.uint8)
        return tf.cast(found[..., :3], tf.float32)

    def sample(taps):
        across, down = (
            (0,) if identical(row, unit) else taps
            for row, unit in ((matrix[:3], (1, 0, 0)), (matrix[3:], (0, 1, 0)))
        )
        rows = [interpolate([pixels(i, j) for j in across], beyond_left) for i in down]
        return interpolate(rows, below_top)

    moved = choose(bicubic, lambda: sample((-1, 0, 1, 2)), lambda: sample((0, 1)))
    moved = tf.cast(tf.clip_by_value(moved, 0, 255), tf.uint8)  # truncated
    moved = tf.where(inside[..., None], moved, tf.constant(fill, tf.uint8))
    return tf.ensure_shape(moved, image.shape)


def double(value):
    """Returns a number or tensor as float64; `tf.cast` would make float32 of a number first."""
    return tf.cast(value, tf.float64) if tf.is_tensor(value) else tf.constant(value, tf.float64)


def identical(values, numbers):
    """Returns whether values are these numbers, and none of them a tensor."""
    return not any(tf.is_tensor(value) for value in values) and tuple(values) == numbers


def interpolate(taps, distance):
    """Interpolates between one, two (linear) or four (cubic) neighbors.

    Args:
        taps: neighbors along an axis, of which the first, or of four the second, lies at 0.
        distance: where to interpolate, in [0, 1).
    """
    if len(taps) == 1:
        return taps[0]
    if len(taps) == 2:
        return taps[0] + (taps[1] - taps[0]) * distance
    before, first, second, after = taps
    slope = second - before
    bend = 2 * (before - first) + second - after
    twist = first - before + after - second
    return first + distance * (slope + distance * (bend + distance * twist))


def rotate(image, degrees, fill, bicubic=False):
    """Rotates counter-clockwise about the middle."""
    height, width, _ = image.shape
    angle = -double(degrees) * (math.pi / 180)
    # Pillow rounds to 15 digits, so that a right angle's cosine is 0.
    cosine, sine = (tf.round(value * 1e15) / 1e15 for value in (tf.cos(angle), tf.sin(angle)))
    x, y = width / 2, height / 2
    matrix = (
        *(cosine, sine, -cosine * x - sine * y + x),
        *(-sine, cosine, sine * x - cosine * y + y),
    )
    return affine(image, matrix, fill, bicubic)


def shear_x(image, factor, fill, bicubic=False):
    return affine(image, (1, double(factor), 0, 0, 1, 0), fill, bicubic)


def shear_y(image, factor, fill, bicubic=False):
    return affine(image, (1, 0, 0, double(factor), 1, 0), fill, bicubic)


def translate_x(image, share, fill, bicubic=False):
    return affine(image, (1, 0, double(share) * image.shape[1], 0, 1, 0), fill, bicubic)


def translate_y(image, share, fill, bicubic=False):
    return affine(image, (1, 0, 0, 0, 1, double(share) * image.shape[0]), fill, bicubic)


def whole_number(value):
    return tf.cast(tf.floor(value), tf.int32)


# Each op at magnitude m in [0, 1] and sign s, with `fill` for what moves in: those that timm 0.3.2
# calls `_RAND_INCREASING_TRANSFORMS` (timm/data/auto_augment.py, lines 558 to 575).
RANDAUGMENT = (
    lambda x, m, s, fill, cubic: autocontrast(x),
    lambda x, m, s, fill, cubic: equalize(x),
    lambda x, m, s, fill, cubic: invert(x),
    lambda x, m, s, fill, cubic: rotate(x, s * 30 * m, fill, cubic),
    lambda x, m, s, fill, cubic: posterize(x, 4 - whole_number(4 * m)),
    lambda x, m, s, fill, cubic: solarize(x, 256 - whole_number(256 * m)),
    lambda x, m, s, fill, cubic: solarize_add(x, whole_number(110 * m)),
    lambda x, m, s, fill, cubic: color(x, 1 + s * 0.9 * m),
    lambda x, m, s, fill, cubic: contrast(x, 1 + s * 0.9 * m),
    lambda x, m, s, fill, cubic: brightness(x, 1 + s * 0.9 * m),
    lambda x, m, s, fill, cubic: sharpness(x, 1 + s * 0.9 * m),
    lambda x, m, s, fill, cubic: shear_x(x, s * 0.3 * m, fill, cubic),
    lambda x, m, s, fill, cubic: shear_y(x, s * 0.3 * m, fill, cubic),
    lambda x, m, s, fill, cubic: translate_x(x, s * 0.45 * m, fill, cubic),
    lambda x, m, s, fill, cubic: translate_y(x, s * 0.45 * m, fill, cubic),
)


def randaugment(
    image,
    seed,
    fill,
    interpolation="bicubic",
    layers=2,
    magnitude=9.0,
    deviation=0.5,
    probability=0.5,
):
    """Applies RandAugment (arXiv 1909.13719) as timm's `rand-m9-mstd0.5-inc1` does.

    Args:
        image: uint8 (height, width, 3).
        seed: integer tensor (2,).
        fill: color of what moves in.
        interpolation: of geometric ops: bilinear, bicubic, or random, drawn for each op.
        layers: ops an image, drawn with replacement.
        magnitude, deviation: mean and standard deviation of the magnitude, which is cut to [0, 10].
        probability: with which a drawn op is applied.
    """
    seeds = tf.random.experimental.stateless_split(seed, 4)
    ops = tf.random.stateless_uniform([layers], seeds[0], 0, len(RANDAUGMENT), tf.int32)
    magnitudes = tf.random.stateless_normal([layers], seeds[1], magnitude, deviation)
    magnitudes = tf.clip_by_value(magnitudes, 0, 10) / 10
    odds = tf.random.stateless_uniform([layers, 2], seeds[2])
    seeds_of_ops = tf.random.experimental.stateless_split(seeds[3], layers)
    for i in range(layers):
        m, sign = magnitudes[i], tf.where(odds[i, 0] < 0.5, 1.0, -1.0)
        cubic = draw_bicubic(interpolation, seeds_of_ops[i])
        branches = [
            lambda op=op, x=image, m=m, s=sign, c=cubic: tf.ensure_shape(
                op(x, m, s, fill, c), x.shape
            )
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


def mix(x, kept):
    """Mixes the rows of each group in pairs: row i with the last but i, as timm does.

    Args:
        x: float (batch, ...): groups of an equal number of rows, one after the other.
        kept: float (groups, ...): share of a row that it keeps, the rest being its partner's. It
            is broadcast over the rows of a group.
    """
    grouped = tf.reshape(x, (kept.shape[0], -1, *x.shape[1:]))
    kept = kept[:, None]
    mixed = kept * grouped + (1 - kept) * tf.reverse(grouped, [1])
    return tf.reshape(mixed, (-1, *x.shape[1:]))
