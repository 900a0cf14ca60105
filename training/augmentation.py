"""Image augmentation in TensorFlow ops, from decoding to the model's input.

Images are uint8 (height, width, 3). Each random op is a pure function of its seed, so that an
image's augmentation depends only on (seed, epoch, position in the epoch). The ops match Pillow's of
the same name to within 1 of 255, because the published recipes were trained on Pillow's pixels,
through timm 0.3.2 and DeiT's `augment.py`.
"""

import math

import tensorflow as tf

from keras_tnt.export.image import (
    crop,
    decode,
    decode_and_crop,
    evaluation_crop,
    gray,
)

# === From a file, or an array, to an image of the model's size ===


def resize(image, size, bicubic=True):
    """Resizes with antialiasing, as Pillow does.

    Args:
        image: (height, width, channels), any numeric dtype.
        size: (height, width) of the result.
        bicubic: Whether to interpolate bicubically, else bilinearly; a bool or a scalar tensor.
            Defaults to `True`.

    Returns:
        uint8 (*size, channels).
    """
    image = choose(
        bicubic,
        lambda: tf.image.resize(image, size, method="bicubic", antialias=True),
        lambda: tf.image.resize(image, size, method="bilinear", antialias=True),
    )
    return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)


def cut(image, choose_box):
    """Crops an image; of encoded bytes only the crop is decoded.

    Args:
        image: uint8 (height, width, 3), or encoded bytes, a string tensor.
        choose_box: Function from (height, width) to int32 (top, left, height, width).

    Returns:
        uint8 (height, width, 3).
    """
    if image.dtype == tf.string:
        return decode_and_crop(image, choose_box)
    box = choose_box(*tf.unstack(tf.shape(image)[:2]))
    return tf.ensure_shape(crop(image, box), (None, None, 3))


def inception_box(shape, seed, min_area, ratio=(3 / 4, 4 / 3), attempts=10):
    """Draws a box of random area and aspect ratio (Inception's random resized crop).

    Args:
        shape: (height, width).
        seed: Integer tensor (2,).
        min_area: Smallest share of the image's area.
        ratio: Smallest and largest aspect ratio, width over height. Defaults to (3/4, 4/3).
        attempts: Number of draws, of which the first that fits is used; if none does, the largest
            center crop within `ratio`. Defaults to 10.

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
    """Resizes an image to cover `size`, pads it by reflection, and crops it at a random position.

    This is DeiT III's simple random crop (SRC), which preserves the aspect ratio and most of the
    image.

    Args:
        image: uint8 (height, width, 3).
        seed: Integer tensor (2,).
        size: (height, width) of the result.
        padding: Pixels added to each side. Defaults to DeiT's 4.

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
    """Resizes and center-crops an image, as the published results were measured.

    The image is resized so that `size` covers the share `crop` of its shorter side.

    Args:
        image: uint8 (height, width, 3), or encoded bytes.
        crop: Share of the side, in (0, 1].
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
    """Crops, flips and augments an image as configured.

    Args:
        image: uint8 (height, width, 3), or encoded bytes.
        seed: int64 (2,).
        config: A `training.configuration.Config`.
        size: (height, width) of the result.
        fill: Color that geometric ops fill in.

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
    """Translates an image by a random offset of up to `reach` pixels along each axis.

    Args:
        image: uint8 (height, width, 3).
        seed: Integer tensor (2,).
        reach: Largest offset in pixels.

    Returns:
        uint8 of the same shape, black where the image moved away.
    """
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
        seed: Integer tensor (2,).
        strength: Each factor is drawn from [max(0, 1 - strength), 1 + strength].
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

    Each has probability 1/3. The color jitter that follows in DeiT III is `color_jitter`.

    Args:
        image: uint8 (height, width, 3).
        seed: Integer tensor (2,).
    """
    seeds = tf.random.experimental.stateless_split(seed, 2)
    chosen = tf.random.stateless_uniform([], seeds[0], 0, 3, tf.int32)
    radius = tf.random.stateless_uniform([], seeds[1], 0.1, MAX_BLUR)
    ops = [
        lambda: tf.tile(gray(image), [1, 1, 3]),
        lambda: solarize(image, 128),
        lambda: gaussian_blur(image, radius),
    ]
    return tf.ensure_shape(tf.switch_case(chosen, ops), image.shape)


# === Interpolation ===


def draw_bicubic(interpolation, seed):
    """Returns whether to interpolate bicubically, a bool, or for "random" a tensor with even odds.

    Args:
        interpolation: "bicubic", "bilinear" or "random".
        seed: Integer tensor (2,), for "random".
    """
    if interpolation == "random":
        return tf.random.stateless_uniform([], seed) < 0.5
    return interpolation == "bicubic"


def choose(condition, if_true, if_false):
    """Returns `tf.cond`'s result; for a Python bool only the chosen branch is traced."""
    if isinstance(condition, bool):
        return if_true() if condition else if_false()
    return tf.cond(condition, if_true, if_false)


# === Pillow's ops ===

MAX_BLUR = 2.0  # largest radius of 3-Augment's Gaussian blur
BOX_PASSES = 3  # number of box blurs that Pillow approximates a Gaussian blur by


def blend(degenerate, image, factor):
    """Extrapolates from a degenerate image through the image, as Pillow's `Image.blend`.

    Args:
        degenerate: Image at `factor` 0.
        image: Image at `factor` 1, (height, width, 3).
        factor: Number or scalar tensor.

    Returns:
        uint8 (height, width, 3), clipped to [0, 255] and truncated.
    """
    degenerate, image = tf.cast(degenerate, tf.float32), tf.cast(image, tf.float32)
    return tf.cast(tf.clip_by_value(degenerate + factor * (image - degenerate), 0, 255), tf.uint8)


def color(image, factor):
    """Changes saturation: 0 is grayscale, 1 the image."""
    return blend(gray(image), image, factor)


def contrast(image, factor):
    """Changes contrast: 0 is a uniform gray of the mean luminance, 1 the image."""
    # float64, because the sum over a large image exceeds float32's precision.
    mean = tf.floor(tf.reduce_mean(tf.cast(gray(image), tf.float64)) + 0.5)
    return blend(tf.fill(tf.shape(image), tf.cast(mean, tf.float32)), image, factor)


def brightness(image, factor):
    """Changes brightness: 0 is black, 1 the image."""
    return blend(tf.zeros_like(image), image, factor)


def sharpness(image, factor):
    """Changes sharpness: 0 is the image smoothed by a 3x3 filter inside its border, 1 the image."""
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
    """Inverts each channel: 255 - image."""
    return 255 - image


def posterize(image, bits):
    """Truncates each channel to its highest `bits` bits; 0 bits give a black image."""
    # Not by shifting the image: a shift of a uint8 by 8 bits is undefined.
    unit = tf.bitwise.left_shift(1, 8 - bits)
    return tf.cast(tf.cast(image, tf.int32) // unit * unit, tf.uint8)


def solarize(image, threshold):
    """Inverts values of at least `threshold`, 0 to 256."""
    return tf.where(tf.cast(image, tf.int32) < threshold, image, 255 - image)


def solarize_add(image, addition):
    """Adds to values below 128, saturating at 255."""
    pixels = tf.cast(image, tf.int32)
    return tf.where(image < 128, tf.cast(tf.minimum(pixels + addition, 255), tf.uint8), image)


def look_up(image, tables):
    """Applies a lookup table to each channel.

    Args:
        image: uint8 (height, width, 3).
        tables: Three integer tensors (256,).
    """
    channels = [tf.gather(tables[c], tf.cast(image[..., c], tf.int32)) for c in range(3)]
    return tf.cast(tf.stack(channels, axis=-1), tf.uint8)


def autocontrast(image):
    """Stretches each channel to [0, 255], in Pillow's double precision."""

    def table(channel):
        low, high = (tf.cast(f(channel), tf.float64) for f in (tf.reduce_min, tf.reduce_max))
        values = tf.range(256, dtype=tf.float64)
        scale = 255 / tf.maximum(high - low, 1)
        stretched = tf.clip_by_value(values * scale - low * scale, 0, 255)
        return tf.cast(tf.where(high > low, stretched, values), tf.int32)

    return look_up(image, [table(image[..., c]) for c in range(3)])


def equalize(image):
    """Equalizes the histogram of each channel."""

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
    """Approximates a Gaussian blur by three box blurs along each axis, as Pillow does.

    Each box blur is rounded to 8 bits. The boxes have fractional ends, so that their variances sum
    to `radius` squared (Gwosdek et al., "Theoretical Foundations of Gaussian Convolution by
    Extended Box Filtering").

    Args:
        image: uint8 (height, width, 3).
        radius: Standard deviation in pixels, in (0, max_radius]; a number or a scalar tensor.
        max_radius: Upper bound of `radius`, which sets the number of taps. Defaults to 2.
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
            # Halves are rounded down, because Pillow's fixed-point weights are truncated.
            pixels = tf.floor(tf.add_n(taps) + 0.4999)
    return tf.cast(pixels, tf.uint8)


def affine(image, matrix, fill, bicubic=False):
    """Takes the pixel at (x, y) from (a x + b y + c, d x + e y + f), as Pillow's AFFINE does.

    Pillow interpolates between pixels of the image, replicates its edge, and truncates the result
    to integers. Outside of the image it writes `fill`, without blending. Source positions are
    computed in float64, because at the image's edge a rounding error decides between the two.

    Args:
        image: uint8 (height, width, 3).
        matrix: a to f, numbers or scalar tensors, for pixel centers at half-integers. An axis whose
            row equals the identity's, as Python numbers, is not interpolated.
        fill: Color outside of the image.
        bicubic: Whether to interpolate bicubically (Keys' kernel with a = -1), else bilinearly; a
            bool or a scalar tensor. Defaults to `False`.
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
    # A pixel's channels are packed into one integer: gathering scalars is faster than slices.
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
    """Returns a number or tensor as float64; `tf.cast` would convert a number to float32 first."""
    return tf.cast(value, tf.float64) if tf.is_tensor(value) else tf.constant(value, tf.float64)


def identical(values, numbers):
    """Returns whether `values` equals `numbers` and contains no tensor."""
    return not any(tf.is_tensor(value) for value in values) and tuple(values) == numbers


def interpolate(taps, distance):
    """Interpolates between one, two (linear) or four (cubic) neighbors.

    Args:
        taps: Neighbors along an axis. Position 0 is the first, or of four the second.
        distance: Position, in [0, 1).
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
    """Rotates an image counterclockwise about its center.

    Args:
        image: uint8 (height, width, 3).
        degrees: Angle, a number or a scalar tensor.
        fill: Color outside of the image.
        bicubic: As in `affine`. Defaults to `False`.
    """
    height, width, _ = image.shape
    angle = -double(degrees) * (math.pi / 180)
    # Pillow rounds to 15 decimals, so that the cosine of a right angle is 0.
    cosine, sine = (tf.round(value * 1e15) / 1e15 for value in (tf.cos(angle), tf.sin(angle)))
    x, y = width / 2, height / 2
    matrix = (
        *(cosine, sine, -cosine * x - sine * y + x),
        *(-sine, cosine, sine * x - cosine * y + y),
    )
    return affine(image, matrix, fill, bicubic)


def shear_x(image, factor, fill, bicubic=False):
    """Shears an image horizontally: takes x from x + factor * y."""
    return affine(image, (1, double(factor), 0, 0, 1, 0), fill, bicubic)


def shear_y(image, factor, fill, bicubic=False):
    """Shears an image vertically: takes y from y + factor * x."""
    return affine(image, (1, 0, 0, double(factor), 1, 0), fill, bicubic)


def translate_x(image, share, fill, bicubic=False):
    """Translates an image horizontally: takes x from x + share * width."""
    return affine(image, (1, 0, double(share) * image.shape[1], 0, 1, 0), fill, bicubic)


def translate_y(image, share, fill, bicubic=False):
    """Translates an image vertically: takes y from y + share * height."""
    return affine(image, (1, 0, 0, 0, 1, double(share) * image.shape[0]), fill, bicubic)


def whole_number(value):
    """Returns a float tensor rounded down, as int32."""
    return tf.cast(tf.floor(value), tf.int32)


# Each op at magnitude m in [0, 1] and sign s: `_RAND_INCREASING_TRANSFORMS` of timm 0.3.2
# (timm/data/auto_augment.py, lines 558 to 575).
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
        seed: Integer tensor (2,).
        fill: Color that geometric ops fill in.
        interpolation: Of geometric ops: "bilinear", "bicubic", or "random", drawn for each op.
            Defaults to "bicubic".
        layers: Number of ops per image, drawn with replacement. Defaults to 2.
        magnitude: Mean of the magnitude, which is clipped to [0, 10]. Defaults to 9.
        deviation: Standard deviation of the magnitude. Defaults to 0.5.
        probability: Probability with which a drawn op is applied. Defaults to 0.5.
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
    """Draws the box of random erasing (arXiv 1708.04896).

    Args:
        seed: Integer tensor (2,).
        probability: Probability of erasing.
        size: (height, width) of the image.
        area: Smallest and largest share of the image's area. Defaults to (0.02, 1/3).
        ratio: Smallest aspect ratio, of which the largest is the inverse. Defaults to 0.3.

    Returns:
        int32 (top, bottom, left, right), zeros if nothing is erased.
    """
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
    """Returns a mask of the pixels inside of boxes.

    Args:
        boxes: Integers (..., 4): top, bottom, left, right.
        size: (height, width).

    Returns:
        Booleans (..., height, width, 1).
    """
    top, bottom, left, right = (boxes[..., i, None, None] for i in range(4))
    rows, columns = tf.range(size[0])[:, None], tf.range(size[1])[None, :]
    mask = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return mask[..., None]


def mix(x, kept):
    """Mixes the rows of each group in pairs: row i with the i-th from the end, as timm does.

    Args:
        x: float (batch, ...), consecutive groups of equal size.
        kept: float (groups, ...), lambda of mixup: the weight of the row itself, its partner's
            being 1 - kept. It is broadcast over the rows of a group.
    """
    grouped = tf.reshape(x, (kept.shape[0], -1, *x.shape[1:]))
    kept = kept[:, None]
    mixed = kept * grouped + (1 - kept) * tf.reverse(grouped, [1])
    return tf.reshape(mixed, (-1, *x.shape[1:]))
