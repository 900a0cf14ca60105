"""Each augmentation against Pillow's result, and the rules of the random ones."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps

from training import augmentation, configuration

FILL = (124, 116, 104)


def picture(size=(48, 64), seed=0):
    """A smooth picture with edges, whose channels differ and do not span the whole range."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width]
    random = np.random.default_rng(seed)
    channels = [
        120 + 70 * np.sin(x / (5 + c)) * np.cos(y / (7 - c)) + 20 * (x > width / 2)
        for c in range(3)
    ]
    noisy = np.stack(channels, -1) + random.normal(0, 4, (height, width, 3))
    return np.clip(noisy, 20, 230).astype("uint8")


def pillow_affine(image, matrix):
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL
    )


# Ours at a value, Pillow's at the same; both must be equal to the last bit.
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
GEOMETRIC = {
    "rotate": (
        lambda x: augmentation.rotate(x, 23.0, FILL),
        lambda i: i.rotate(23.0, Image.Resampling.BILINEAR, fillcolor=FILL),
    ),
    "shear_x": (
        lambda x: augmentation.shear_x(x, 0.27, FILL),
        lambda i: pillow_affine(i, (1, 0.27, 0, 0, 1, 0)),
    ),
    "shear_y": (
        lambda x: augmentation.shear_y(x, -0.27, FILL),
        lambda i: pillow_affine(i, (1, 0, 0, -0.27, 1, 0)),
    ),
    "translate_x": (
        lambda x: augmentation.translate_x(x, 0.2, FILL),
        lambda i: pillow_affine(i, (1, 0, 0.2 * 64, 0, 1, 0)),
    ),
    "translate_y": (
        lambda x: augmentation.translate_y(x, -0.2, FILL),
        lambda i: pillow_affine(i, (1, 0, 0, 0, 1, -0.2 * 48)),
    ),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("seed", range(3))
def test_op_equals_pillow_s(name, seed):
    ours, pillow = EXACT[name]
    image = picture(seed=seed)
    expected = np.array(pillow(Image.fromarray(image)))
    np.testing.assert_array_equal(ours(tf.constant(image)), expected)


@pytest.mark.parametrize("name", ENHANCE)
@pytest.mark.parametrize("factor", [0.1, 0.73, 1.0, 1.81])
def test_enhancement_equals_pillow_s_to_one_level(name, factor):
    ours, pillow = ENHANCE[name]
    image = picture()
    expected = np.array(pillow(Image.fromarray(image)).enhance(factor)).astype(int)
    difference = np.abs(ours(tf.constant(image), factor).numpy() - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_op_moves_pixels_where_pillow_does(name):
    ours, pillow = GEOMETRIC[name]
    image = picture()
    expected = np.array(pillow(Image.fromarray(image))).astype(int)
    difference = np.abs(ours(tf.constant(image)).numpy() - expected)
    # Pillow cuts off at the image's edge, the op here fades into the fill within a pixel.
    assert (difference > 1).mean() < 0.04
    assert np.abs(image.astype(int) - expected).mean() > 5


def test_a_channel_of_one_value_survives_autocontrast_and_equalize():
    image = picture()
    image[..., 1] = 90
    for name in ("autocontrast", "equalize"):
        ours, pillow = EXACT[name]
        expected = np.array(pillow(Image.fromarray(image)))
        np.testing.assert_array_equal(ours(tf.constant(image)), expected)


def test_resizing_is_pillow_s_bicubic():
    image = picture((61, 83))
    expected = np.array(Image.fromarray(image).resize((40, 32), Image.Resampling.BICUBIC))
    difference = np.abs(augmentation.resize(image, (32, 40)).numpy().astype(int) - expected)
    assert difference.max() <= 1


@pytest.mark.parametrize("shape", [(61, 83), (83, 61), (20, 30), (224, 224)])
def test_evaluation_shows_the_middle(shape):
    image = picture(shape)
    short = int(32 / 0.875)
    scale = short / min(shape)
    height, width = (short if side == min(shape) else int(side * scale) for side in shape)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    expected = np.array(resized)[top : top + 32, left : left + 32].astype(int)
    ours = augmentation.evaluation_image(tf.constant(image), 0.875, (32, 32)).numpy()
    assert np.abs(ours - expected).max() <= 1


def test_random_crops_have_the_areas_and_aspects_asked_for_and_lie_inside():
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
def test_a_random_crop_of_a_strip_falls_back_to_its_middle(shape):
    box = augmentation.inception_box(tf.constant(shape), tf.constant([0, 1]), 0.5).numpy()
    middle = (shape[0] - box[2]) // 2, (shape[1] - box[3]) // 2
    assert tuple(box[:2]) == middle
    assert 3 / 4 - 0.05 <= box[3] / box[2] <= 4 / 3 + 0.05


def randaugment(image, seed):
    return augmentation.randaugment(image, seed, FILL)


@pytest.mark.slow
def test_randaugment_is_a_function_of_its_seed_and_changes_about_three_images_in_four():
    image = tf.constant(picture((32, 32)))
    run = tf.function(lambda seed: randaugment(image, seed))
    results = [run(tf.constant([3, i])).numpy() for i in range(200)]
    np.testing.assert_array_equal(results[5], run(tf.constant([3, 5])))
    changed = np.mean([(result != image.numpy()).any() for result in results])
    # Each of two ops is applied with even odds.
    assert 0.65 < changed < 0.85
    assert len({result.tobytes() for result in results}) > 100


def test_random_erasing_erases_as_often_and_as_much_as_told():
    draw = tf.function(lambda i: augmentation.erasing_box(tf.stack([1, i]), 0.25, (64, 64)))
    boxes = np.array([draw(tf.constant(i)) for i in range(600)])
    erased = boxes[boxes[:, 1] > 0]
    assert 0.2 < len(erased) / len(boxes) < 0.3
    top, bottom, left, right = erased.T
    area = (bottom - top) * (right - left) / 64**2
    assert area.min() >= 0.015 and area.max() <= 0.35 and area.max() > 0.28
    assert bottom.max() <= 64 and right.max() <= 64


def test_mixing_keeps_each_image_s_share_and_pairs_neighbours():
    x = tf.reshape(tf.range(4.0), (4, 1))
    np.testing.assert_allclose(
        augmentation.mix_with_neighbours(x, 0.75)[:, 0], [0.25, 0.75, 2.25, 2.75]
    )


def test_mixing_does_not_depend_on_how_a_batch_is_divided():
    x = tf.random.stateless_normal([8, 3, 3, 1], [0, 0])
    whole = augmentation.mix_with_neighbours(x, 0.3)
    halves = [augmentation.mix_with_neighbours(half, 0.3) for half in (x[:4], x[4:])]
    np.testing.assert_array_equal(whole, tf.concat(halves, 0))


def test_a_box_covers_its_pixels():
    mask = augmentation.box_mask(tf.constant([[1, 3, 0, 2], [0, 0, 0, 0]]), (4, 5)).numpy()
    assert mask.shape == (2, 4, 5, 1)
    assert mask[0, 1:3, 0:2].all() and mask[0].sum() == 4 and not mask[1].any()


def test_an_image_s_augmentation_is_a_function_of_its_seed():
    values = configuration.make(
        "digits", min_crop=0.3, flip=True, shift=2, randaugment=False, color_jitter=0.4
    )
    image = tf.constant(picture())

    def prepare(place):
        seed = tf.constant([5, place], tf.int64)
        return augmentation.training_image(image, seed, values, (32, 32), FILL).numpy()

    np.testing.assert_array_equal(prepare(1), prepare(1))
    assert (prepare(1) != prepare(2)).any()


# === The formulas, in numbers worked out by hand ===


def draw(monkeypatch, *draws):
    """Let `tf.random.stateless_uniform` give these values, one after the other."""
    coming = iter(draws)
    monkeypatch.setattr(
        tf.random, "stateless_uniform", lambda *_, **__: tf.constant(next(coming), tf.float32)
    )


def ten(*first):
    """Ten draws, the first of them given."""
    return [*first, *[0.5] * (10 - len(first))]


SEED = tf.constant([0, 0])


def test_an_erased_box_has_the_area_and_aspect_that_were_drawn(monkeypatch):
    # Area 0.02 of 100 x 100 pixels at aspect 1: 14.14 a side. Places: 0.5 and 0.99 of 87.
    draw(monkeypatch, [ten(0), ten(0.5), ten(0.5), ten(0.99)], 0.1)
    box = augmentation.erasing_box(SEED, 0.25, (100, 100))
    assert box.numpy().tolist() == [43, 57, 86, 100]


def test_a_box_that_does_not_fit_is_drawn_again(monkeypatch):
    # A third of the area at aspect 0.3 is 32 x 105; at 1/0.3, 105 x 32; 0.02 of it at 0.3, 8 x 26.
    draw(monkeypatch, [ten(1, 1, 0), ten(0, 1, 0), ten(0, 0, 0.99), ten(0, 0, 0)], 0.1)
    box = augmentation.erasing_box(SEED, 0.25, (100, 100))
    # exp(log 0.3 * (1 - 2 * 0)) = 0.3 is height over width.
    assert box.numpy().tolist() == [92, 100, 0, 26]


def test_nothing_is_erased_at_the_probability_itself(monkeypatch):
    areas = [ten(0), ten(0.5), ten(0), ten(0)]
    draw(monkeypatch, areas, 0.25, areas, 0.2499)
    assert augmentation.erasing_box(SEED, 0.25, (100, 100)).numpy().tolist() == [0, 0, 0, 0]
    assert augmentation.erasing_box(SEED, 0.25, (100, 100)).numpy().tolist() == [0, 14, 0, 14]


def test_a_random_crop_has_the_area_and_aspect_that_were_drawn(monkeypatch):
    # 0.25 + 0.75 * 0.52 of 100 x 200 pixels is 12,800; the middle of 3/4 to 4/3 is 1: 113 a side
    # does not fit. At 0.25 it is 5,000: 71 a side, of 30 and 130 places the last and the middle.
    draw(monkeypatch, [ten(0.52, 0), ten(0.5, 0.5), ten(0, 0.99), ten(0, 0.5)])
    box = augmentation.inception_box([100, 200], SEED, 0.25)
    assert box.numpy().tolist() == [29, 65, 71, 71]


def test_a_random_crop_is_as_wide_as_its_aspect_says(monkeypatch):
    # 0.3 of 100 x 100 at width over height of 4/3: 47.4 x 63.2.
    draw(monkeypatch, [ten(0), ten(1), ten(0), ten(0)])
    assert augmentation.inception_box([100, 100], SEED, 0.3).numpy().tolist() == [0, 0, 47, 63]
    draw(monkeypatch, [ten(0), ten(0), ten(0), ten(0)])
    assert augmentation.inception_box([100, 100], SEED, 0.3).numpy().tolist() == [0, 0, 63, 47]


def test_a_random_crop_may_be_the_whole_image_and_no_more(monkeypatch):
    # All of 100 x 100 at aspect 1 fits; then 0.3 of it, 55 a side.
    draw(monkeypatch, [ten(1, 0), ten(0.5, 0.5), ten(0, 0), ten(0, 0)])
    assert augmentation.inception_box([100, 100], SEED, 0.3).numpy().tolist() == [0, 0, 100, 100]
    # At aspect 4/3 it is 87 x 115, too wide; at 3/4 too high.
    for aspect in (1, 0):
        draw(monkeypatch, [ten(1, 0), ten(aspect, 0.5), ten(0, 0), ten(0, 0)])
        assert augmentation.inception_box([100, 100], SEED, 0.3).numpy().tolist() == [0, 0, 55, 55]


def test_an_image_is_flipped_at_even_odds(monkeypatch):
    image = tf.constant(picture((32, 32)))
    values = configuration.make(
        "digits", flip=True, **{"min_crop": 1.0, "crop": 1.0, "shift": 0, "rotate": 0.0}
    )
    draw(monkeypatch, 0.5, 0.4999)
    for expected in (image, image[:, ::-1]):
        seed = tf.constant([1, 2], tf.int64)
        flipped = augmentation.training_image(image, seed, values, (32, 32), FILL)
        np.testing.assert_array_equal(flipped, expected)


def test_black_fills_in_where_an_image_is_rotated(monkeypatch):
    image = tf.fill((32, 32, 3), tf.constant(200, tf.uint8))
    values = configuration.make("digits", rotate=30.0, **{"min_crop": 1.0, "crop": 1.0, "shift": 0})
    draw(monkeypatch, 30.0)
    seed = tf.constant([1, 2], tf.int64)
    rotated = augmentation.training_image(image, seed, values, (32, 32), FILL).numpy()
    assert not rotated[0, 0].any() and (rotated[8:24, 8:24] == 200).all()


def test_a_shift_reaches_every_place_and_fills_in_black():
    image = np.zeros((5, 5, 3), "uint8")
    image[2, 2] = [255, 100, 50]
    move = tf.function(lambda seed: augmentation.shift(tf.constant(image), seed, 2))
    places = set()
    for i in range(200):
        moved = move(tf.constant([0, i])).numpy()
        assert moved.sum(axis=(0, 1)).tolist() == [255, 100, 50]
        places.add(tuple(np.argwhere(moved[..., 0])[0]))
    assert places == {(y, x) for y in range(5) for x in range(5)}


def test_colour_jitter_changes_brightness_then_contrast_then_saturation(monkeypatch):
    def factors(shape, seed, low, high):
        assert (shape, low, high) == ([3], 0.6, 1.4)
        return tf.constant([1.3, 0.7, 1.2])

    monkeypatch.setattr(tf.random, "stateless_uniform", factors)
    image = picture()
    expected = Image.fromarray(image)
    for enhance, factor in ((0, 1.3), (1, 0.7), (2, 1.2)):
        kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[enhance]
        expected = kind(expected).enhance(factor)
    ours = augmentation.color_jitter(tf.constant(image), SEED, 0.4).numpy().astype(int)
    assert np.abs(ours - np.array(expected)).max() <= 2


def test_colour_jitter_is_off_under_randaugment_whoever_s_it_is():
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


# RandAugment's ops by the recipe's table: at magnitude 9 of 10 and sign -1, at 10 and sign 1.
RECIPE = [
    ("autocontrast", (), ()),
    ("equalize", (), ()),
    ("invert", (), ()),
    ("rotate", (-27.0, FILL), (30.0, FILL)),
    ("posterize", (1,), (0,)),
    ("solarize", (26,), (0,)),
    ("solarize_add", (99,), (110,)),
    ("color", (0.19,), (1.9,)),
    ("contrast", (0.19,), (1.9,)),
    ("brightness", (0.19,), (1.9,)),
    ("sharpness", (0.19,), (1.9,)),
    ("shear_x", (-0.27, FILL), (0.3, FILL)),
    ("shear_y", (-0.27, FILL), (0.3, FILL)),
    ("translate_x", (-0.405, FILL), (0.45, FILL)),
    ("translate_y", (-0.405, FILL), (0.45, FILL)),
]


@pytest.mark.parametrize(("magnitude", "sign", "column"), [(0.9, -1.0, 1), (1.0, 1.0, 2)])
def test_randaugment_s_magnitudes_are_the_recipe_s(magnitude, sign, column):
    levels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), "uint8")
    image = tf.constant(levels)
    for op, row in zip(augmentation.RANDAUGMENT, RECIPE, strict=True):
        expected = getattr(augmentation, row[0])(image, *row[column]).numpy().astype(int)
        difference = op(image, tf.constant(magnitude), sign, FILL).numpy() - expected
        # Factors and angles are float32 here, and may round a pixel the other way.
        whole = row[0] in EXACT
        assert np.abs(difference).max() <= (0 if whole else 1), row[0]
        assert (difference != 0).mean() < 0.1, row[0]


def test_randaugment_applies_the_ops_that_were_drawn_at_even_odds(monkeypatch):
    image = tf.constant(picture((20, 24)))
    monkeypatch.setattr(tf.random, "stateless_normal", lambda *_, **__: tf.constant([12.0, 5.0]))

    def given(ops, odds):
        coming = iter([tf.constant(ops), tf.constant(odds)])
        monkeypatch.setattr(tf.random, "stateless_uniform", lambda *_, **__: next(coming))
        return augmentation.randaugment(image, SEED, FILL).numpy()

    # Invert, then brightness 1 + 0.9 * 0.5; a magnitude of 12 counts as 10: solarize inverts all.
    inverted = 255 - image
    brighter = augmentation.brightness(inverted, 1.45)
    np.testing.assert_array_equal(given([2, 9], [[0.1, 0.49], [0.49, 0.1]]), brighter)
    darker = augmentation.brightness(inverted, 0.55)
    np.testing.assert_array_equal(given([2, 9], [[0.1, 0.1], [0.5, 0.1]]), darker)
    np.testing.assert_array_equal(given([5, 9], [[0.1, 0.1], [0.1, 0.5]]), inverted)
    np.testing.assert_array_equal(given([2, 9], [[0.1, 0.5], [0.1, 0.5]]), image)
