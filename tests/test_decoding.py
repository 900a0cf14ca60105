"""Image decoding: Pillow, exported graphs and the trainer give equal pixels."""

import numpy as np
import pytest

import keras_tnt
from keras_tnt.export import image as graph
from keras_tnt.images.decoding import convert, evaluation_pixels, open_picture
from tests.helpers import malformed_images
from tests.helpers.image_cases import CASES, REFUSED, draw, save

tf = pytest.importorskip("tensorflow")
Image = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.one_backend


def compiled(function, *specs):
    specs = [tf.TensorSpec((), tf.string), *specs]
    return tf.function(function, input_signature=specs, autograph=False)


@pytest.fixture(scope="module")
def graphs():
    return {
        "colors": compiled(graph.decode),
        "gray": compiled(lambda encoded: graph.decode(encoded, 1)),
        "crop": compiled(
            lambda encoded, box: graph.decode_and_crop(encoded, lambda *sides: box),
            tf.TensorSpec((4,), tf.int32),
        ),
        "whole": compiled(
            lambda encoded: graph.decode_and_crop(encoded, lambda *sides: tf.stack([0, 0, *sides]))
        ),
    }


def largest_difference(found, expected):
    assert found.shape == expected.shape
    return np.abs(found.astype(int) - expected.astype(int)).max()


@pytest.mark.parametrize("name", CASES)
def test_every_decoder_gives_the_expected_pixels(name, graphs):
    file, expected = CASES[name]
    encoded = tf.constant(file)
    colors = np.asarray(convert(open_picture(file), 3))
    assert largest_difference(colors, expected) <= 1
    assert largest_difference(graphs["colors"](encoded).numpy(), expected) <= 1
    gray = np.asarray(convert(open_picture(file), 1))[..., None]
    assert largest_difference(graphs["gray"](encoded).numpy(), gray) <= 1
    luma = np.round(expected @ [0.299, 0.587, 0.114])[..., None]
    assert largest_difference(gray, luma) <= 1


@pytest.mark.parametrize("name", CASES)
def test_decode_and_crop_matches_a_crop_of_the_upright_image(name, graphs):
    file, _ = CASES[name]
    encoded = tf.constant(file)
    expected = np.asarray(convert(open_picture(file), 3))
    height, width, _ = expected.shape
    assert largest_difference(graphs["whole"](encoded).numpy(), expected) <= 1
    random = np.random.default_rng(len(file))
    corners = [(height - 1, width - 1, 1, 1), (height // 2, width // 2, 8, 8)]
    for _ in range(3):
        rows, columns = random.integers(1, (height + 1, width + 1))
        corners.append(
            (*random.integers(0, (height - rows + 1, width - columns + 1)), rows, columns)
        )
    for top, left, rows, columns in corners:
        found = graphs["crop"](encoded, tf.constant([top, left, rows, columns], tf.int32))
        part = expected[top : top + rows, left : left + columns]
        assert largest_difference(found.numpy(), part) <= 1


@pytest.mark.parametrize("name", ["JPEG, orientation 6", "GIF, transparent, interlace 0"])
def test_trainer_evaluation_image_matches_load_image(name):
    from training.augmentation import evaluation_image

    file, _ = CASES[name]
    found = evaluation_image(tf.constant(file), 0.875, (32, 48)).numpy()
    covered = [int(side / 0.875) for side in (32, 48)]
    expected = evaluation_pixels(open_picture(file), (32, 48), covered, 3, "channels_last")
    assert largest_difference(found, expected) <= 1


def test_training_crop_of_a_rotated_photograph_is_upright():
    """The upright image is red above blue, whatever the file stores."""
    from training import augmentation, configuration

    pixels = np.zeros((96, 64, 3), "uint8")
    pixels[:48, :, 0] = pixels[48:, :, 2] = 255
    config = configuration.make("digits", min_crop=0.9, shift=0, rotate=0.0)
    for orientation, stored in ((6, np.rot90(pixels)), (8, np.rot90(pixels, -1))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("JPEG", "PNG", "WEBP"):
            file = save(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
            seed = tf.constant([3, orientation], tf.int64)
            image = augmentation.training_image(tf.constant(file), seed, config, (32, 32), 0)
            image = image.numpy().astype(int)
            assert image[:8, :, 0].min() > 200 and image[:8, :, 2].max() < 50, kind
            assert image[-8:, :, 2].min() > 200 and image[-8:, :, 0].max() < 50, kind


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_bmp_is_refused_by_name(name, graphs):
    with pytest.raises(ValueError, match="BMP of a kind that is not read"):
        open_picture(REFUSED[name])
    with pytest.raises(tf.errors.OpError):
        graphs["colors"](tf.constant(REFUSED[name]))


def test_animated_webp_is_named_where_it_is_refused():
    file = malformed_images.animated("WEBP")
    open_picture(file)
    with pytest.raises(tf.errors.InvalidArgumentError, match="no animated WebP"):
        graph.load_images(tf.constant([file]), (8, 8), (8, 8))


def test_xmp_orientation_is_ignored():
    """Pillow falls back to XMP, which no other decoder reads."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    pixels = draw(40, 60)
    file = save(Image.fromarray(pixels), "JPEG", xmp=xmp)
    assert open_picture(file).size == (60, 40)


@pytest.fixture(scope="module")
def model():
    return keras_tnt.TNT(
        input_shape=(32, 32, 3), classes=3, outer_dim=16, inner_dim=8, depth=1, outer_heads=2,
        inner_heads=2,
    )  # fmt: skip


class TestArrays:
    """Arrays with values outside of [0, 255] raise instead of becoming white or black."""

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (draw(20, 30).astype("uint16") * 257, r"array / 257"),
            (draw(20, 30) / 255.0, r"255 \* array"),
            (draw(20, 30).astype("float16") / 255, r"255 \* array"),
            (np.random.default_rng(0).random((40, 40, 3)) * 1.2, r"255 \* array"),
            (draw(20, 30) / 127.5 - 1, "normalization"),
            (draw(20, 30).astype("int32") * 2 - 9, "normalization"),
            (draw(20, 30) > 127, r"astype\('uint8'\)"),
            (np.full((20, 30, 3), np.nan), "normalization"),
        ],
        ids=["uint16", "unit", "unit float16", "overshot", "normalized", "integers", "bool", "nan"],
    )
    def test_other_value_ranges_raise(self, model, array, message):
        with pytest.raises(ValueError, match=message) as error:
            keras_tnt.load_image(array, model)
        assert str(array.dtype) in str(error.value)
        with pytest.raises(ValueError, match=message):
            keras_tnt.load_images(array[None], model)

    @pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "float16", "float32", "float64"])
    def test_pixels_of_every_dtype_are_equal(self, model, dtype):
        pixels = draw(20, 30)
        expected = keras_tnt.load_image(pixels, model)
        np.testing.assert_array_equal(keras_tnt.load_image(pixels.astype(dtype), model), expected)

    @pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3), (0, 0)])
    def test_empty_images_raise(self, model, shape):
        with pytest.raises(ValueError, match=rf"must have pixels. Received: shape \({shape[0]}, "):
            keras_tnt.load_image(np.zeros(shape), model)
        with pytest.raises(ValueError, match="must have pixels. Received: one of"):
            keras_tnt.load_image(Image.new("RGB", shape[1::-1]), model)

    def test_dark_image_of_whole_numbers_is_accepted(self, model):
        dark = (draw(20, 30) % 3).astype("float32")
        expected = keras_tnt.load_image(dark.astype("uint8"), model)
        np.testing.assert_array_equal(keras_tnt.load_image(dark, model), expected)
        darker = Image.fromarray((draw(20, 30)[..., 0] % 3).astype("uint16") * 257)
        assert keras_tnt.load_image(darker, model).max() <= 2
        assert keras_tnt.load_image(Image.fromarray(np.full((9, 9), 200, "uint16")), model).max()

    @pytest.mark.parametrize("mode", ["LA", "RGBA"])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_premultiplied_pictures_are_converted(self, mode, channels):
        picture = Image.fromarray(draw(20, 30)).convert(mode)
        multiplied = picture.convert({"LA": "La", "RGBA": "RGBa"}[mode])
        found, expected = convert(multiplied, channels), convert(picture, channels)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))

    def test_dark_image_in_a_batch_is_accepted(self, model):
        batch = np.stack([draw(32, 32), np.ones((32, 32, 3), "uint8")]).astype("float32")
        assert keras_tnt.load_images(batch, model)[1].max() == 1

    def test_pictures_of_16_and_32_bits_and_floats(self, model):
        gray = draw(20, 30)[..., 0]
        expected = keras_tnt.load_image(gray, model)
        for wide in (gray.astype("uint16") * 257, gray.astype("int32") * 257, gray / np.float32(1)):
            found = keras_tnt.load_image(Image.fromarray(wide), model)
            np.testing.assert_array_equal(found, expected)
        for bad in (gray.astype("int32"), gray.astype("int32") * 300, gray / np.float32(255)):
            with pytest.raises(ValueError, match="must have values in"):
                keras_tnt.load_image(Image.fromarray(bad), model)
