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
        lambda x: augmentation.solarize_add(x, 66),
        lambda i: i.point([min(255, v + 66) if v < 128 else v for v in range(256)] * 3),
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
