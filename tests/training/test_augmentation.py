"""Each augmentation op is compared with Pillow, and random draws with their distributions."""

import io
import math

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from training import augmentation, configuration

FILL = (124, 116, 104)


def picture(size=(48, 64), seed=0):
    """Returns a smooth picture with edges, different channels and a limited range of values."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width]
    random = np.random.default_rng(seed)
    channels = [
        120 + 70 * np.sin(x / (5 + c)) * np.cos(y / (7 - c)) + 20 * (x > width / 2)
        for c in range(3)
    ]
    noisy = np.stack(channels, -1) + random.normal(0, 4, (height, width, 3))
    return np.clip(noisy, 20, 230).astype("uint8")


def pillow_affine(image, matrix, bicubic=False):
    resample = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=FILL)


def assert_close(ours, pillow, levels=1):
    difference = np.abs(np.asarray(ours).astype(int) - np.asarray(pillow).astype(int))
    assert difference.max() <= levels


# Our op and Pillow's at the same value; the results must be identical.
EXACT = {
    "autocontrast": (lambda x: augmentation.autocontrast(x), ImageOps.autocontrast),
    "equalize": (lambda x: augmentation.equalize(x), ImageOps.equalize),
    "invert": (lambda x: augmentation.invert(x), ImageOps.invert),
    "posterize": (lambda x: augmentation.posterize(x, 2), lambda i: ImageOps.posterize(i, 2)),
    "solarize": (lambda x: augmentation.solarize(x, 77), lambda i: ImageOps.solarize(i, 77)),
    "solarize_add": (
        lambda x: augmentation.solarize_add(x, 180),
        lambda i: i.point([min(255, v + 180) if v < 128 else v for v in range(256)] * 3),
    ),
}
ENHANCE = {
    "color": (augmentation.color, ImageEnhance.Color),
    "contrast": (augmentation.contrast, ImageEnhance.Contrast),
    "brightness": (augmentation.brightness, ImageEnhance.Brightness),
    "sharpness": (augmentation.sharpness, ImageEnhance.Sharpness),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("seed", range(3))
def test_op_equals_pillow(name, seed):
    ours, pillow = EXACT[name]
    image = picture(seed=seed)
    expected = np.array(pillow(Image.fromarray(image)))
    np.testing.assert_array_equal(ours(tf.constant(image)), expected)


@pytest.mark.parametrize("name", ENHANCE)
@pytest.mark.parametrize("factor", [0.1, 0.73, 1.0, 1.81])
def test_enhancement_equals_pillow_to_one_level(name, factor):
    ours, pillow = ENHANCE[name]
    image = picture()
    expected = np.array(pillow(Image.fromarray(image)).enhance(factor)).astype(int)
    difference = np.abs(ours(tf.constant(image), factor).numpy() - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


# RandAugment's ops in Pillow, at a magnitude in [0, 1] and a sign.
RANDAUGMENT_BY_PILLOW = {
    "autocontrast": lambda i, m, s, cubic: ImageOps.autocontrast(i),
    "equalize": lambda i, m, s, cubic: ImageOps.equalize(i),
    "invert": lambda i, m, s, cubic: ImageOps.invert(i),
    "rotate": lambda i, m, s, cubic: i.rotate(
        s * m * 30,
        Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR,
        fillcolor=FILL,
    ),
    # Pillow of 2020 returned a black image for 0 bits, the current one raises an error.
    "posterize": lambda i, m, s, cubic: (
        ImageOps.posterize(i, 4 - int(4 * m)) if m < 1 else i.point([0] * 768)
    ),
    "solarize": lambda i, m, s, cubic: ImageOps.solarize(i, 256 - int(256 * m)),
    "solarize_add": lambda i, m, s, cubic: i.point(
        [min(255, v + int(110 * m)) if v < 128 else v for v in range(256)] * 3
    ),
    "color": lambda i, m, s, cubic: ImageEnhance.Color(i).enhance(1 + s * m * 0.9),
    "contrast": lambda i, m, s, cubic: ImageEnhance.Contrast(i).enhance(1 + s * m * 0.9),
    "brightness": lambda i, m, s, cubic: ImageEnhance.Brightness(i).enhance(1 + s * m * 0.9),
    "sharpness": lambda i, m, s, cubic: ImageEnhance.Sharpness(i).enhance(1 + s * m * 0.9),
    "shear_x": lambda i, m, s, cubic: pillow_affine(i, (1, s * m * 0.3, 0, 0, 1, 0), cubic),
    "shear_y": lambda i, m, s, cubic: pillow_affine(i, (1, 0, 0, s * m * 0.3, 1, 0), cubic),
    "translate_x": lambda i, m, s, cubic: pillow_affine(
        i, (1, 0, s * m * 0.45 * i.width, 0, 1, 0), cubic
    ),
    "translate_y": lambda i, m, s, cubic: pillow_affine(
        i, (1, 0, 0, 0, 1, s * m * 0.45 * i.height), cubic
    ),
}
MAGNITUDES = [0.0, 0.33, 0.8125, 0.9, 1.0]


@pytest.mark.parametrize("place", range(15), ids=RANDAUGMENT_BY_PILLOW)
@pytest.mark.parametrize("size", [(31, 46), (64, 33)], ids=str)
def test_randaugment_ops_equal_pillow_at_every_magnitude(place, size):
    ours = augmentation.RANDAUGMENT[place]
    pillow = list(RANDAUGMENT_BY_PILLOW.values())[place]
    for seed, m in enumerate(MAGNITUDES):
        image = np.random.default_rng(seed).integers(0, 256, (*size, 3), "uint8")
        for sign in (-1, 1):
            for cubic in (False, True):
                expected = pillow(Image.fromarray(image), m, sign, cubic)
                assert_close(ours(tf.constant(image), m, sign, FILL, cubic), expected)


def test_randaugment_has_the_ops_of_timm():
    assert len(augmentation.RANDAUGMENT) == len(RANDAUGMENT_BY_PILLOW)


@pytest.mark.parametrize("cubic", [False, True], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(7, 12), (40, 25)], ids=str)
def test_rotation_by_tensors_in_a_graph_equals_pillow(size, cubic):
    image = picture(size, seed=3)
    run = tf.function(lambda x, v, c: augmentation.rotate(x, v, FILL, c))
    for degrees in (-30.0, -11.3, 0.0, 14.25, 90.0, 180.0):
        resample = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
        expected = Image.fromarray(image).rotate(degrees, resample, fillcolor=FILL)
        rotated = run(image, tf.constant(degrees), tf.constant(cubic))
        assert_close(rotated, expected)
        assert (rotated.numpy() != np.array(expected)).mean() < 0.02  # truncated, not rounded


@pytest.mark.parametrize("share", [1 / 16, -1 / 16, 1 / 8, -1 / 8])
def test_source_exactly_on_the_edge_is_treated_as_in_pillow(share):
    image = picture((8, 8))
    pixels = share * 8
    for cubic in (False, True):
        expected = pillow_affine(Image.fromarray(image), (1, 0, pixels, 0, 1, 0), cubic)
        assert_close(augmentation.translate_x(tf.constant(image), share, FILL, cubic), expected)
        expected = pillow_affine(Image.fromarray(image), (1, 0, 0, 0, 1, pixels), cubic)
        assert_close(augmentation.translate_y(tf.constant(image), share, FILL, cubic), expected)


def test_fill_color_is_not_blended_into_the_edge():
    image = np.full((20, 30, 3), 200, "uint8")
    for cubic in (False, True):
        moved = augmentation.rotate(tf.constant(image), 20.0, FILL, cubic).numpy()
        assert {tuple(pixel) for pixel in moved.reshape(-1, 3)} == {FILL, (200, 200, 200)}


@pytest.mark.parametrize("bits", range(1, 9))
def test_posterize_keeps_as_many_bits_as_pillow(bits):
    image = picture(seed=bits)
    expected = ImageOps.posterize(Image.fromarray(image), bits)
    np.testing.assert_array_equal(augmentation.posterize(tf.constant(image), bits), expected)
    assert not augmentation.posterize(tf.constant(image), tf.constant(0)).numpy().any()


@pytest.mark.parametrize("size", [(9, 5), (33, 47)], ids=str)
@pytest.mark.parametrize("radius", [0.1, 0.35, 0.77, 1.0, 1.3, 1.6, 2.0])
def test_gaussian_blur_equals_pillow(size, radius):
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), "uint8")
    expected = Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius))
    assert_close(augmentation.gaussian_blur(tf.constant(image), radius), expected, 2)
    assert_close(
        augmentation.gaussian_blur(tf.constant(picture(size)), radius),
        Image.fromarray(picture(size)).filter(ImageFilter.GaussianBlur(radius)),
        2,
    )


def test_constant_channel_in_autocontrast_and_equalize():
    image = picture()
    image[..., 1] = 90
    for name in ("autocontrast", "equalize"):
        ours, pillow = EXACT[name]
        expected = np.array(pillow(Image.fromarray(image)))
        np.testing.assert_array_equal(ours(tf.constant(image)), expected)


def test_resize_equals_pillow_bicubic():
    image = picture((61, 83))
    expected = np.array(Image.fromarray(image).resize((40, 32), Image.Resampling.BICUBIC))
    difference = np.abs(augmentation.resize(image, (32, 40)).numpy().astype(int) - expected)
    assert difference.max() <= 1


@pytest.mark.parametrize("shape", [(61, 83), (83, 61), (20, 30), (224, 224)])
def test_evaluation_image_is_the_center_crop(shape):
    image = picture(shape)
    short = int(32 / 0.875)
    scale = short / min(shape)
    height, width = (short if side == min(shape) else int(side * scale) for side in shape)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    expected = np.array(resized)[top : top + 32, left : left + 32].astype(int)
    ours = augmentation.evaluation_image(tf.constant(image), 0.875, (32, 32)).numpy()
    assert np.abs(ours - expected).max() <= 1


def test_random_crops_have_the_given_areas_and_aspects_and_lie_inside():
    shape = tf.constant([120, 200])
    draw = tf.function(lambda i: augmentation.inception_box(shape, tf.stack([7, i]), 0.08))
    boxes = np.array([draw(tf.constant(i)) for i in range(300)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 120).all() and (left + width <= 200).all()
    area = height * width / (120 * 200)
    assert 0.07 < area.min() < 0.15 and area.max() > 0.7
    assert 0.7 < (width / height).min() < 0.85 and 1.2 < (width / height).max() < 1.4


@pytest.mark.parametrize("shape", [(10, 1000), (1000, 10)])
def test_random_crop_of_a_strip_falls_back_to_its_center(shape):
    box = augmentation.inception_box(tf.constant(shape), tf.constant([0, 1]), 0.5).numpy()
    middle = (shape[0] - box[2]) // 2, (shape[1] - box[3]) // 2
    assert tuple(box[:2]) == middle
    assert 3 / 4 - 0.05 <= box[3] / box[2] <= 4 / 3 + 0.05


def randaugment(image, seed):
    return augmentation.randaugment(image, seed, FILL)


@pytest.mark.slow
def test_randaugment_depends_on_its_seed_and_changes_most_images():
    image = tf.constant(picture((32, 32)))
    run = tf.function(lambda seed: randaugment(image, seed))
    results = [run(tf.constant([3, i])).numpy() for i in range(200)]
    np.testing.assert_array_equal(results[5], run(tf.constant([3, 5])))
    changed = np.mean([(result != image.numpy()).any() for result in results])
    # Each of two ops is applied with probability 0.5.
    assert 0.65 < changed < 0.85
    assert len({result.tobytes() for result in results}) > 100


def test_random_erasing_has_the_given_probability_and_area():
    draw = tf.function(lambda i: augmentation.erasing_box(tf.stack([1, i]), 0.25, (64, 64)))
    boxes = np.array([draw(tf.constant(i)) for i in range(600)])
    erased = boxes[boxes[:, 1] > 0]
    assert 0.2 < len(erased) / len(boxes) < 0.3
    top, bottom, left, right = erased.T
    area = (bottom - top) * (right - left) / 64**2
    assert area.min() >= 0.015 and area.max() <= 0.35 and area.max() > 0.28
    assert bottom.max() <= 64 and right.max() <= 64


def test_mix_pairs_image_i_with_the_ith_last_of_its_group():
    x = tf.reshape(tf.range(8.0) ** 2, (8, 1))
    mixed = augmentation.mix(x, tf.constant([[0.75], [0.25]]))[:, 0]
    x = x[:, 0].numpy()
    partner = np.array([3, 2, 1, 0, 7, 6, 5, 4])
    kept = np.array([0.75] * 4 + [0.25] * 4)
    np.testing.assert_allclose(mixed, kept * x + (1 - kept) * x[partner])


def test_mix_does_not_depend_on_the_distribution_of_groups():
    x = tf.random.stateless_normal([12, 3, 2, 1], [0, 0])
    kept = tf.random.stateless_uniform([3, 3, 2, 1], [0, 1])
    whole = augmentation.mix(x, kept)
    parts = [augmentation.mix(x[4 * i : 4 * i + 4], kept[i : i + 1]) for i in range(3)]
    np.testing.assert_array_equal(whole, tf.concat(parts, 0))


def test_box_mask_covers_its_pixels():
    mask = augmentation.box_mask(tf.constant([[1, 3, 0, 2], [0, 0, 0, 0]]), (4, 5)).numpy()
    assert mask.shape == (2, 4, 5, 1)
    assert mask[0, 1:3, 0:2].all() and mask[0].sum() == 4 and not mask[1].any()


def test_image_augmentation_depends_on_its_seed():
    values = configuration.make(
        "digits", min_crop=0.3, flip=True, shift=2, randaugment=False, color_jitter=0.4
    )
    image = tf.constant(picture())

    def prepare(place):
        seed = tf.constant([5, place], tf.int64)
        return augmentation.training_image(image, seed, values, (32, 32), FILL).numpy()

    np.testing.assert_array_equal(prepare(1), prepare(1))
    assert (prepare(1) != prepare(2)).any()


# === Formulas, with values computed by hand ===


def draw(monkeypatch, *draws):
    """Makes `tf.random.stateless_uniform` return these values, one per call."""
    coming = iter(draws)
    monkeypatch.setattr(
        tf.random, "stateless_uniform", lambda *_, **__: tf.constant(next(coming), tf.float32)
    )


def ten(*first):
    """Returns ten draws that begin with the given ones."""
    return [*first, *[0.5] * (10 - len(first))]


SEED = tf.constant([0, 0])


def test_erased_box_has_the_drawn_area_and_aspect(monkeypatch):
    # Area 0.02 of 100 x 100 pixels at aspect 1: side 14.14. Positions: 0.5 and 0.99 of 87.
    draw(monkeypatch, [ten(0), ten(0.5), ten(0.5), ten(0.99)], 0.1)
    box = augmentation.erasing_box(SEED, 0.25, (100, 100))
    assert box.numpy().tolist() == [43, 57, 86, 100]


def test_box_that_does_not_fit_is_drawn_again(monkeypatch):
    # A third of the area at aspect 0.3 is 32 x 105; at 1/0.3, 105 x 32; 0.02 of it at 0.3, 8 x 26.
    draw(monkeypatch, [ten(1, 1, 0), ten(0, 1, 0), ten(0, 0, 0.99), ten(0, 0, 0)], 0.1)
    box = augmentation.erasing_box(SEED, 0.25, (100, 100))
    # exp(log 0.3 * (1 - 2 * 0)) = 0.3 is height over width.
    assert box.numpy().tolist() == [92, 100, 0, 26]


def test_erasing_probability_is_exclusive(monkeypatch):
    areas = [ten(0), ten(0.5), ten(0), ten(0)]
    draw(monkeypatch, areas, 0.25, areas, 0.2499)
    assert augmentation.erasing_box(SEED, 0.25, (100, 100)).numpy().tolist() == [0, 0, 0, 0]
    assert augmentation.erasing_box(SEED, 0.25, (100, 100)).numpy().tolist() == [0, 14, 0, 14]


def test_random_crop_has_the_drawn_area_and_aspect(monkeypatch):
    # 0.25 + 0.75 * 0.52 of 100 x 200 pixels is 12,800; the middle of 3/4 to 4/3 is 1: side 113 does
    # not fit. At 0.25 it is 5,000: side 71, at the last of 30 and the middle of 130 positions.
    draw(monkeypatch, [ten(0.52, 0), ten(0.5, 0.5), ten(0, 0.99), ten(0, 0.5)])
    box = augmentation.inception_box([100, 200], SEED, 0.25)
    assert box.numpy().tolist() == [29, 65, 71, 71]


def test_random_crop_aspect_is_width_over_height(monkeypatch):
    # 0.3 of 100 x 100 at width over height of 4/3: 47.4 x 63.2.
    draw(monkeypatch, [ten(0), ten(1), ten(0), ten(0)])
    assert augmentation.inception_box([100, 100], SEED, 0.3).numpy().tolist() == [0, 0, 47, 63]
    draw(monkeypatch, [ten(0), ten(0), ten(0), ten(0)])
    assert augmentation.inception_box([100, 100], SEED, 0.3).numpy().tolist() == [0, 0, 63, 47]


def test_random_crop_can_be_the_whole_image_but_not_larger(monkeypatch):
    # All of 100 x 100 at aspect 1 fits; then 0.3 of it, side 55.
    draw(monkeypatch, [ten(1, 0), ten(0.5, 0.5), ten(0, 0), ten(0, 0)])
    assert augmentation.inception_box([100, 100], SEED, 0.3).numpy().tolist() == [0, 0, 100, 100]
    # At aspect 4/3 it is 87 x 115, too wide; at 3/4 too high.
    for aspect in (1, 0):
        draw(monkeypatch, [ten(1, 0), ten(aspect, 0.5), ten(0, 0), ten(0, 0)])
        assert augmentation.inception_box([100, 100], SEED, 0.3).numpy().tolist() == [0, 0, 55, 55]


def test_flip_probability_is_one_half(monkeypatch):
    image = tf.constant(picture((32, 32)))
    values = configuration.make(
        "digits", flip=True, **{"min_crop": 1.0, "crop": 1.0, "shift": 0, "rotate": 0.0}
    )
    draw(monkeypatch, 0.5, 0.4999)
    for expected in (image, image[:, ::-1]):
        seed = tf.constant([1, 2], tf.int64)
        flipped = augmentation.training_image(image, seed, values, (32, 32), FILL)
        np.testing.assert_array_equal(flipped, expected)


def test_rotation_fills_in_black(monkeypatch):
    image = tf.fill((32, 32, 3), tf.constant(200, tf.uint8))
    values = configuration.make("digits", rotate=30.0, **{"min_crop": 1.0, "crop": 1.0, "shift": 0})
    draw(monkeypatch, 30.0)
    seed = tf.constant([1, 2], tf.int64)
    rotated = augmentation.training_image(image, seed, values, (32, 32), FILL).numpy()
    assert not rotated[0, 0].any() and (rotated[8:24, 8:24] == 200).all()


def test_shift_reaches_every_position_and_fills_in_black():
    image = np.zeros((5, 5, 3), "uint8")
    image[2, 2] = [255, 100, 50]
    move = tf.function(lambda seed: augmentation.shift(tf.constant(image), seed, 2))
    places = set()
    for i in range(200):
        moved = move(tf.constant([0, i])).numpy()
        assert moved.sum(axis=(0, 1)).tolist() == [255, 100, 50]
        places.add(tuple(np.argwhere(moved[..., 0])[0]))
    assert places == {(y, x) for y in range(5) for x in range(5)}


ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_color_jitter_applies_ops_in_the_drawn_order(monkeypatch, order):
    factors = (1.3, 0.7, 1.2)
    ranks = [0.0] * 3
    for place, op in enumerate(order):
        ranks[op] = place / 3
    draw(monkeypatch, factors, ranks)
    expected = Image.fromarray(picture())
    for op in order:
        expected = ENHANCERS[op](expected).enhance(factors[op])
    assert_close(augmentation.color_jitter(tf.constant(picture()), SEED, 0.4), expected, 2)


def test_color_jitter_factors_and_orders_are_uniform(monkeypatch):
    def recording(place):
        # Records the op's position in the order and its factor in the pixel of the op.
        def op(x, factor):
            code = tf.cast(tf.round(factor * 100), tf.uint8)
            count = x[0, 0, 2] + 1
            column = tf.stack([code, count, tf.constant(0, tf.uint8)])
            mask = tf.one_hot(place + 1, 4, dtype=tf.uint8)[None, :, None]
            counter = tf.one_hot(0, 4, dtype=tf.uint8)[None, :, None] * tf.constant(
                [0, 0, 1], tf.uint8
            )
            return x * (1 - mask) + mask * column + counter

        return op

    for place, name in enumerate(("brightness", "contrast", "color")):
        monkeypatch.setattr(augmentation, name, recording(place))
    start = tf.zeros((1, 4, 3), tf.uint8)
    drawn = drawings(lambda seed: augmentation.color_jitter(start, seed, 0.4), 1500)[:, 0, 1:]
    factors, orders = drawn[..., 0] / 100, drawn[..., 1]
    assert factors.min() < 0.61 and factors.max() > 1.39
    for i in range(3):
        assert_same_distribution(factors[:, i], np.random.default_rng(i).uniform(0.6, 1.4, 4000))
    counts = np.unique(orders @ [100, 10, 1], return_counts=True)
    assert sorted(counts[0]) == [123, 132, 213, 231, 312, 321]
    assert counts[1].min() > 190 and counts[1].max() < 310  # 250 each; five standard deviations
    strong = drawings(lambda seed: augmentation.color_jitter(start, seed, 1.5), 300)[:, 0, 1:, 0]
    # No factor is negative: uniform from 0 to 2.5.
    assert_same_distribution(strong.ravel() / 100, np.random.default_rng(0).uniform(0, 2.5, 4000))


def test_color_jitter_is_disabled_with_randaugment():
    image = tf.constant(picture((32, 32)))
    images = [
        augmentation.training_image(
            image,
            tf.constant([1, 2], tf.int64),
            configuration.make(
                "digits",
                **{"augmentation": "keras_cv", "randaugment": True, "color_jitter": jitter},
                **{"min_crop": 1.0, "shift": 0, "rotate": 0.0},
            ),
            (32, 32),
            FILL,
        ).numpy()
        for jitter in (0.0, 0.4)
    ]
    np.testing.assert_array_equal(*images)


def test_randaugment_applies_the_drawn_ops_with_probability_one_half(monkeypatch):
    image = tf.constant(picture((20, 24)))
    monkeypatch.setattr(tf.random, "stateless_normal", lambda *_, **__: tf.constant([12.0, 5.0]))

    def given(ops, odds):
        coming = iter([tf.constant(ops), tf.constant(odds)])
        monkeypatch.setattr(tf.random, "stateless_uniform", lambda *_, **__: next(coming))
        return augmentation.randaugment(image, SEED, FILL).numpy()

    # Invert, then brightness 1 + 0.9 * 0.5; a magnitude of 12 is clipped to 10: solarize inverts
    # all.
    inverted = 255 - image
    brighter = augmentation.brightness(inverted, 1.45)
    np.testing.assert_array_equal(given([2, 9], [[0.1, 0.49], [0.49, 0.1]]), brighter)
    darker = augmentation.brightness(inverted, 0.55)
    np.testing.assert_array_equal(given([2, 9], [[0.1, 0.1], [0.5, 0.1]]), darker)
    np.testing.assert_array_equal(given([5, 9], [[0.1, 0.1], [0.1, 0.5]]), inverted)
    np.testing.assert_array_equal(given([2, 9], [[0.1, 0.5], [0.1, 0.5]]), image)


# === Distributions, compared with an independent implementation ===


def drawings(draw, count):
    """Returns the results of a function of a seed for `count` seeds, as one array."""
    seeds = tf.stack([tf.fill([count], 11), tf.range(count)], axis=1)
    shape = tf.type_spec_from_value(draw(seeds[0]))
    run = tf.function(lambda: tf.map_fn(draw, seeds, fn_output_signature=shape))
    return run().numpy()


def assert_same_distribution(first, second, level=1.95):
    """Runs a two-sample Kolmogorov-Smirnov test; 1.95 rejects one equal pair in a thousand."""
    grid = np.concatenate([first, second])
    below = [
        np.searchsorted(np.sort(sample), grid, side="right") / len(sample)
        for sample in (first, second)
    ]
    distance = np.abs(below[0] - below[1]).max()
    assert distance < level * math.sqrt(1 / len(first) + 1 / len(second))


def test_random_crops_have_the_reference_distribution():
    height, width, least = 90, 160, 0.08
    random = np.random.default_rng(0)

    def reference():
        for _ in range(10):
            area = random.uniform(least, 1) * height * width
            aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if w <= width and h <= height:
                return random.integers(height - h + 1), random.integers(width - w + 1), h, w
        return 0, 20, 90, 120

    expected = np.array([reference() for _ in range(4000)])
    ours = drawings(lambda seed: augmentation.inception_box([height, width], seed, least), 2500)
    for of in (
        lambda b: b[:, 2] * b[:, 3] + 0.0,
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0] / np.maximum(height - b[:, 2], 1),
        lambda b: b[:, 1] / np.maximum(width - b[:, 3], 1),
        lambda b: b[:, 0] + b[:, 2] / 2,
        lambda b: b[:, 1] + b[:, 3] / 2,
    ):
        assert_same_distribution(of(ours), of(expected))


def test_erased_boxes_have_the_reference_distribution():
    height, width = 64, 48
    random = np.random.default_rng(0)

    def reference():
        for _ in range(10):
            area = random.uniform(0.02, 1 / 3) * height * width
            aspect = np.exp(random.uniform(np.log(0.3), np.log(1 / 0.3)))
            h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if w < width and h < height:
                top, left = random.integers(height - h + 1), random.integers(width - w + 1)
                return top, top + h, left, left + w
        return 0, 0, 0, 0

    expected = np.array([reference() for _ in range(4000)])
    ours = drawings(lambda seed: augmentation.erasing_box(seed, 0.25, (height, width)), 8000)
    erased = ours[:, 1] > 0
    assert abs(erased.mean() - 0.25) < 0.02
    ours = ours[erased]
    for of in (
        lambda b: (b[:, 1] - b[:, 0]) * (b[:, 3] - b[:, 2]) + 0.0,
        lambda b: (b[:, 1] - b[:, 0]) / (b[:, 3] - b[:, 2]),
        lambda b: b[:, 0] / (height - b[:, 1] + b[:, 0]),
        lambda b: b[:, 2] / (width - b[:, 3] + b[:, 2]),
    ):
        assert_same_distribution(of(ours), of(expected))


@pytest.mark.parametrize("interpolation", ["random", "bilinear", "bicubic"])
def test_randaugment_draws_have_the_reference_distribution(monkeypatch, interpolation):
    def recording(place):
        def op(x, m, s, fill, cubic):
            assert fill == FILL
            values = [place + 1, tf.round(200 * m), s + 1, tf.cast(cubic, tf.float32)]
            code = tf.cast(tf.stack([tf.cast(v, tf.float32) for v in values]), tf.uint8)
            return tf.tile(code[None, :, None], [1, 1, 3])

        return op

    monkeypatch.setattr(augmentation, "RANDAUGMENT", [recording(i) for i in range(15)])
    start = tf.zeros((1, 4, 3), tf.uint8)
    drawn = drawings(
        lambda seed: augmentation.randaugment(start, seed, FILL, interpolation, layers=1), 3000
    )[:, 0, :, 0].astype(float)
    applied = drawn[drawn[:, 0] > 0]
    assert abs(len(applied) / len(drawn) - 0.5) < 0.04
    counts = np.bincount(applied[:, 0].astype(int), minlength=16)[1:]
    assert ((counts - len(applied) / 15) ** 2 / (len(applied) / 15)).sum() < 36.1  # chi2, 0.1%
    normal = np.random.default_rng(0).normal(9, 0.5, 6000)
    assert_same_distribution(applied[:, 1], np.round(20 * np.clip(normal, 0, 10)))
    assert set(applied[:, 2]) == {0, 2} and abs(applied[:, 2].mean() - 1) < 0.1
    cubic = {"random": 0.5, "bilinear": 0, "bicubic": 1}[interpolation]
    assert abs(applied[:, 3].mean() - cubic) < (0.05 if interpolation == "random" else 1e-9)


def test_randaugment_ops_of_an_image_are_independent(monkeypatch):
    def op(place):
        return lambda x, m, s, fill, cubic: x * 4 + tf.cast(place + 1, tf.uint8)

    monkeypatch.setattr(augmentation, "RANDAUGMENT", [op(i) for i in range(3)])
    start = tf.zeros((1, 1, 3), tf.uint8)
    drawn = drawings(lambda seed: augmentation.randaugment(start, seed, FILL), 1500)[:, 0, 0, 0]
    counts = np.bincount(drawn, minlength=16)
    assert abs(counts[0] / 1500 - 0.25) < 0.06
    pairs = [counts[4 * i + j] for i in range(1, 4) for j in range(1, 4)]
    assert min(pairs) > 20 and max(pairs) < 70  # 1500 / 36 each, including equal ones


# === 3-Augment and crop modes ===


def test_three_augment_applies_exactly_one_of_three_ops(monkeypatch):
    image = picture((24, 20))
    start = tf.constant(image)
    gray = np.array(ImageOps.grayscale(Image.fromarray(image)).convert("RGB"))
    solarized = np.array(ImageOps.solarize(Image.fromarray(image)))
    seen = {"gray": 0, "solarized": 0, "blurred": 0}
    for result in drawings(lambda seed: augmentation.three_augment(start, seed), 300):
        if (result == gray).all():
            seen["gray"] += 1
        elif (result == solarized).all():
            seen["solarized"] += 1
        else:
            seen["blurred"] += 1
            assert np.abs(result.astype(int) - image).mean() < 20
    assert min(seen.values()) > 65 and max(seen.values()) < 135


def test_three_augment_blur_radius_is_uniform(monkeypatch):
    monkeypatch.setattr(
        augmentation,
        "gaussian_blur",
        lambda x, radius: tf.fill(x.shape, tf.cast(radius * 100, tf.uint8)),
    )
    start = tf.fill((2, 2, 3), tf.constant(255, tf.uint8))
    codes = drawings(lambda seed: augmentation.three_augment(start, seed), 3000)[:, 0, 0, 0]
    radii = codes[(codes != 255) & (codes != 0)] / 100
    expected = np.floor(np.random.default_rng(0).uniform(10, 200, 4000)) / 100
    assert_same_distribution(radii, expected)


def test_color_jitter_follows_three_augment(monkeypatch):
    order = []
    for name in ("three_augment", "color_jitter"):
        monkeypatch.setattr(
            augmentation, name, lambda x, *_, name=name: (order.append((name, *_[1:])), x)[1]
        )
    values = plain_values(three_augment=True, color_jitter=0.3)
    augmentation.training_image(tf.constant(picture((32, 32))), SEED, values, (32, 32), FILL)
    assert order == [("three_augment",), ("color_jitter", 0.3)]


def plain_values(**values):
    """Returns a configuration without augmentation, except for the given values."""
    nothing = {"min_crop": 1.0, "crop": 1.0, "shift": 0, "rotate": 0.0}
    return configuration.make("digits", **{**nothing, **values})


def test_three_augment_replaces_the_randaugment_of_the_recipe(tmp_path):
    assert configuration.make("tnt_small").randaugment
    (tmp_path / "run.yaml").write_text("three_augment: true\n")
    for values in ({"three_augment": True}, {"config": str(tmp_path / "run.yaml")}):
        config = configuration.make("tnt_small", **values)
        assert config.three_augment and not config.randaugment
    assert configuration.make("tnt_small", three_augment=False).randaugment


def test_explicit_three_augment_and_randaugment_are_exclusive():
    with pytest.raises(ValueError, match="--three_augment .*--norandaugment"):
        configuration.make("tnt_small", three_augment=True, randaugment=True)


@pytest.mark.parametrize(
    ("shape", "size"), [((50, 70), (32, 32)), ((71, 44), (32, 32)), ((60, 50), (24, 40))], ids=str
)
def test_simple_random_crop_is_a_crop_of_the_padded_image(shape, size):
    image = picture(shape)
    scale = max(size[0] / shape[0], size[1] / shape[1])
    covering = [int(side * scale + 1e-9) for side in shape]
    resized = Image.fromarray(image).resize(covering[::-1], Image.Resampling.BICUBIC)
    padded = np.pad(resized, ((4, 4), (4, 4), (0, 0)), mode="reflect").astype(int)
    places = set()
    crop = lambda seed: augmentation.simple_random_crop(tf.constant(image), seed, size)  # noqa: E731
    for result in drawings(crop, 60):
        found = [
            (y, x)
            for y in range(padded.shape[0] - size[0] + 1)
            for x in range(padded.shape[1] - size[1] + 1)
            if np.abs(padded[y : y + size[0], x : x + size[1]] - result).max() <= 1
        ]
        assert found
        places.update(found)
    reach = np.array(padded.shape[:2]) - size
    assert np.min(list(places), 0).max() <= 1 and (np.max(list(places), 0) >= reach - 1).all()


def test_simple_random_crop_accepts_encoded_images():
    image = picture((40, 50))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    values = plain_values(crop_mode="simple")
    results = [
        augmentation.training_image(tf.constant(x), SEED, values, (32, 32), FILL)
        for x in (buffer.getvalue(), image)
    ]
    np.testing.assert_array_equal(*results)
    assert results[0].shape == (32, 32, 3)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_random_resized_crop_uses_the_given_interpolation(monkeypatch, interpolation):
    image = tf.constant(picture((40, 50)))
    box = [3, 5, 30, 26]
    monkeypatch.setattr(augmentation, "inception_box", lambda *_, **settings: tf.constant(box))
    values = plain_values(min_crop=0.2, interpolation=interpolation)
    results = drawings(
        lambda seed: augmentation.training_image(image, seed, values, (24, 24), FILL), 60
    )
    part = Image.fromarray(image.numpy()[3:33, 5:31])
    seen = []
    for result in results:
        seen.append(
            [
                np.abs(np.array(part.resize((24, 24), kind)).astype(int) - result).max() <= 1
                for kind in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
            ]
        )
        assert sum(seen[-1]) == 1
    bilinear = np.mean(seen, axis=0)[0]
    assert {"bilinear": bilinear == 1, "bicubic": bilinear == 0}.get(
        interpolation, 0.25 < bilinear < 0.75
    )
