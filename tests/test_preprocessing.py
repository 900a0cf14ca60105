"""`load_image` matches Pillow's resize and crop; names of ImageNet classes."""

import io
import subprocess
import sys
import tracemalloc

import keras
import numpy as np
import pytest
from PIL import Image, ImageOps

import keras_tnt
from keras_tnt import preprocessing
from keras_tnt.images import decoding as images
from tests.helpers import malformed_images

SIZES = [(500, 375), (375, 500), (240, 240), (61, 48), (1000, 90), (33, 257)]


def tiny(side=64, channels=3, family=keras_tnt.TNT):
    options = {
        keras_tnt.TNT: {"outer_dim": 8, "inner_dim": 4, "outer_heads": 1, "inner_heads": 1},
        keras_tnt.DeiT: {"embed_dim": 8, "num_heads": 1},
        keras_tnt.CaiT: {"embed_dim": 8, "num_heads": 1},
    }
    sides = side if isinstance(side, tuple) else (side, side)
    shape = (*sides, channels)
    if keras.config.image_data_format() == "channels_first":
        shape = (channels, *sides)
    return family(input_shape=shape, depth=1, classes=2, **options[family])


@pytest.fixture(scope="module")
def model():
    return tiny()


def picture(size=(500, 375), mode="RGB", seed=0):
    """Returns a picture with edges and gradients."""
    width, height = size
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 40), max(2, width // 40), 3), dtype="uint8")
    smooth = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    edges = Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)
    return Image.blend(smooth, edges, 0.5).convert(mode)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def expected(image, side=64, share=0.9):
    """Returns Pillow's resize of the shorter side to floor(side / share), and its center crop."""
    shorter = int(np.floor(side / share))
    image = image.convert("RGB")
    scale = shorter / min(image.size)
    size = [shorter if x == min(image.size) else int(x * scale + 1e-9) for x in image.size]
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (int(round((x - side) / 2.0)) for x in image.size)
    return np.asarray(image.crop((left, top, left + side, top + side)), "float32")


def assert_same_pixels(actual, wanted):
    assert actual.dtype == "float32"
    assert actual.shape == wanted.shape
    assert np.abs(actual - wanted).max() <= 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_crop_matches_pillow(kind, size, model):
    data = encoded(picture(size), kind)
    assert_same_pixels(keras_tnt.load_image(data, model), expected(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("PNG", "L", {}),
        ("PNG", "LA", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("PNG", "RGBA", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("GIF", "P", {}),
    ],
)
def test_every_color_mode_is_converted_to_rgb(kind, mode, options, model):
    data = encoded(picture(mode=mode), kind, **options)
    assert_same_pixels(keras_tnt.load_image(data, model), expected(Image.open(io.BytesIO(data))))


def test_palette_with_transparency_keeps_its_colors(model):
    image = picture(mode="P")
    data = encoded(image, "PNG", transparency=bytes(range(256)))
    assert_same_pixels(keras_tnt.load_image(data, model), expected(image))


def test_transparency_is_dropped(model):
    image = picture(mode="RGBA")
    image.putalpha(0)
    data = encoded(image, "PNG")
    assert_same_pixels(keras_tnt.load_image(data, model), expected(picture()))


def test_sixteen_bit_images_are_scaled_not_clipped(model):
    gray = np.asarray(picture(mode="L"))
    data = encoded(Image.fromarray(gray.astype("uint16") * 257), "PNG")
    assert_same_pixels(keras_tnt.load_image(data, model), expected(Image.fromarray(gray)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, model):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), "JPEG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert_same_pixels(keras_tnt.load_image(data, model), expected(upright))


def test_paths_bytes_pictures_and_arrays_give_the_same_pixels(model, tmp_path):
    image = picture()
    path = tmp_path / "image.png"
    image.save(path)
    array = np.asarray(image)
    wanted = expected(image)
    for given in (path, str(path), path.read_bytes(), image, array, array.astype("float32")):
        np.testing.assert_array_equal(keras_tnt.load_image(given, model), wanted)
    gray = np.asarray(picture(mode="L"))
    for given in (gray, gray[..., None]):
        np.testing.assert_array_equal(
            keras_tnt.load_image(given, model), expected(picture(mode="L"))
        )


@pytest.mark.parametrize(
    ("family", "side", "share"),
    [
        (keras_tnt.TNT, 224, 0.9),
        (keras_tnt.TNT, 384, 0.9),
        (keras_tnt.DeiT, 224, 0.9),
        (keras_tnt.DeiT, 384, 1.0),
        (keras_tnt.CaiT, 224, 1.0),
    ],
)
def test_each_family_has_its_crop(family, side, share):
    image = picture((300, 280))
    actual = keras_tnt.load_image(image, tiny(side, family=family))
    assert_same_pixels(actual, expected(image, side, share))


@pytest.mark.parametrize("size", SIZES)
def test_rectangular_model_gets_a_crop_without_borders(size):
    model = tiny((32, 80))
    white = Image.new("RGB", size, "white")
    crop = keras_tnt.load_image(white, model)
    assert crop.shape == (32, 80, 3)
    assert crop.min() == 255
    middle = np.asarray(keras_tnt.load_image(picture(size), model))
    assert middle.std() > 0


def test_grayscale_model_gets_one_channel():
    image = picture()
    crop = keras_tnt.load_image(image, tiny(channels=1))
    assert crop.shape == (64, 64, 1)
    assert_same_pixels(crop[..., 0], expected(image.convert("L"))[..., 0])


def test_crop_follows_the_data_format_of_the_model():
    keras.config.set_image_data_format("channels_first")
    model = tiny()
    crop = keras_tnt.load_image(picture(), model)
    assert_same_pixels(np.moveaxis(crop, 0, -1), expected(picture()))


def test_nested_model_sets_the_transform(model):
    backbone = keras_tnt.TNT(
        include_top=False,
        input_shape=(64, 64, 3),
        depth=1,
        outer_dim=8,
        inner_dim=4,
        outer_heads=1,
        inner_heads=1,
    )
    around = keras.Sequential([backbone, keras.layers.GlobalAveragePooling2D()])
    np.testing.assert_array_equal(
        keras_tnt.load_image(picture(), around), keras_tnt.load_image(picture(), model)
    )


def test_load_images_matches_load_image(model):
    images = [encoded(picture(size, seed=i), "PNG") for i, size in enumerate(SIZES)]
    batch = keras_tnt.load_images(images, model)
    assert batch.shape == (len(SIZES), 64, 64, 3)
    for image, one in zip(images, batch, strict=True):
        np.testing.assert_array_equal(one, keras_tnt.load_image(image, model))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("no/such.jpg", FileNotFoundError, "no image file 'no/such.jpg'"),
        (__file__, ValueError, "test_preprocessing.py' cannot be read as an image: JPEG, PNG"),
        (b"", ValueError, "The 0 bytes given cannot be read"),
        (encoded(picture(), "JPEG")[:2000], ValueError, "cannot be read as an image.*truncated"),
        (np.zeros((2, 8, 8, 3)), ValueError, r"shape \(2, 8, 8, 3\). For a batch .* load_images"),
        (np.zeros((8, 8, 5)), ValueError, r"shape \(8, 8, 5\)"),
    ],
)
def test_invalid_image_raises(given, error, message, model):
    with pytest.raises(error, match=message):
        keras_tnt.load_image(given, model)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS"),
        (b"II*\0", "TIFF"),
        (b"\0\0\0\x1cftypavif", "AVIF"),
        (b"DDS |", "DDS"),
        (b"P6\n9 9 255\n", "PNM"),
    ],
)
def test_unsupported_formats_are_named_and_start_no_program(
    start, name, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a program"))
    path = tmp_path / "image"
    path.write_bytes(start + bytes(2000))
    with pytest.raises(ValueError, match=f"image' cannot .*: its format, {name}, is not read"):
        keras_tnt.load_image(path, model)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP, extended"])
def test_image_above_the_pixel_limit_is_refused_before_allocation(kind, model):
    for sides in ((13_000, 13_000), (65_535, 65_535)):
        data = malformed_images.claiming(kind, *sides)
        with pytest.raises(
            ValueError, match=rf"cannot be read as .*{sides[0]:,} x {sides[1]:,}|bomb"
        ):
            keras_tnt.load_image(data, model)


def test_file_above_the_size_limit_is_refused(model, tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    picture((20, 30)).save(path)
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="image.png' cannot be read as an image: it has 0 MB"):
        keras_tnt.load_image(path, model)


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (7, 20_011), (20_011, 7)])
def test_only_the_visible_part_of_a_strip_is_resized(size, model):
    tracemalloc.start()
    crop = keras_tnt.load_image(malformed_images.png(*size, color=2), model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert crop.shape == (64, 64, 3) and not crop.any()
    assert peak < 50e6


@pytest.mark.parametrize("size", [(3, 401), (401, 3), (5, 64), (50, 47), (1, 90)])
def test_partial_resize_of_a_strip_is_bit_identical(size, model, monkeypatch):
    image = picture(size)
    wanted = keras_tnt.load_image(image, model)
    monkeypatch.setattr(images, "MAX_PIXELS", 0)  # as if it were too large to be resized
    np.testing.assert_array_equal(keras_tnt.load_image(image, model), wanted)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_ignored(model):
    for damaged in (b"Exif\0\0MM\0*\xff\xff\xff\x08\0\x01", b"Exif\0\0II*\0", b"Exif\0\0"):
        data = encoded(picture(), "JPEG", exif=damaged)
        assert_same_pixels(
            keras_tnt.load_image(data, model), expected(Image.open(io.BytesIO(data)))
        )


def test_first_frame_of_an_animation_is_used(model):
    for kind in malformed_images.ANIMATED:
        data = malformed_images.animated(kind)
        first = Image.open(io.BytesIO(data)).convert("RGB")
        assert_same_pixels(keras_tnt.load_image(data, model), expected(first))


def test_memory_error_is_not_reported_as_an_invalid_image(model, monkeypatch):
    def none_left(*_):
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", none_left)
    with pytest.raises(MemoryError):
        keras_tnt.load_image(encoded(picture(), "PNG"), model)


def test_error_in_a_batch_has_the_index(model):
    good = encoded(picture(), "PNG")
    with pytest.raises(ValueError, match="Image 1 of the batch cannot be read"):
        keras_tnt.load_images([good, b"nonsense", good], model)


# Runs in a separate process, so that a crash or lack of memory fails only this test.
SWEEP = """
import resource, sys
import numpy as np
import keras_tnt
from tests.helpers import malformed_images
model = keras_tnt.TNT(
    input_shape=(64, 64, 3), depth=1, classes=2, outer_dim=8, inner_dim=4, outer_heads=1,
    inner_heads=1,
)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
limit = used + EXTRA
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
read = refused = 0
for number, data in enumerate(malformed_images.sweep(0, COUNT)):
    try:
        pixels = keras_tnt.load_image(data, model)
    except ValueError as error:
        assert str(error).startswith(f"The {len(data)} bytes given cannot be read as an image: ")
        refused += 1
    except BaseException:
        print("image", number, file=sys.stderr)
        raise
    else:
        assert pixels.shape == (64, 64, 3) and np.isfinite(pixels).all()
        read += 1
print("read", read, "refused", refused)
"""


@pytest.mark.one_backend
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_malformed_images_are_read_or_refused_within_1_gib():
    count = malformed_images.number_of(300)
    code = SWEEP.replace("EXTRA", "2**30").replace("COUNT", str(count))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    read, refused = map(int, done.stdout.split()[1::2])
    print(done.stdout)
    assert read + refused == count
    assert min(read, refused) > count // 5


def test_load_images_rejects_a_single_path(model):
    with pytest.raises(ValueError, match="there is load_image"):
        keras_tnt.load_images("cat.jpg", model)


def test_unsupported_number_of_channels_raises():
    with pytest.raises(ValueError, match="the model takes 4"):
        keras_tnt.load_image(picture(), tiny(channels=4))


def test_missing_pillow_error_names_the_extra():
    code = """
import sys
sys.modules["PIL"] = None
from keras_tnt.images import decoding as images
images.open_picture("cat.jpg")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "keras-tnt[images]"' in result.stderr


# === Class names ===


def test_imagenet_classes_are_in_wordnet_order():
    classes = preprocessing.imagenet_classes()
    ids, names = zip(*classes, strict=True)
    assert len(classes) == len(set(ids)) == len(set(names)) == 1000
    assert list(ids) == sorted(ids)
    assert all(len(i) == 9 and i[0] == "n" and i[1:].isdigit() for i in ids)
    # Indices that papers and other packages name.
    for place, name in {
        0: "tench",
        207: "golden retriever",
        281: "tabby",
        388: "giant panda",
        817: "sports car",
        963: "pizza",
        999: "toilet tissue",
    }.items():
        assert names[place] == name


def test_decode_predictions_sorts_by_probability():
    predictions = np.zeros((2, 1000))
    predictions[0, [281, 207, 999]] = 0.5, 0.3, 0.2
    predictions[1, 0] = 1
    first, second = keras_tnt.decode_predictions(predictions, top=3)
    assert first == [
        ("n02123045", "tabby", 0.5),
        ("n02099601", "golden retriever", 0.3),
        ("n15075141", "toilet tissue", 0.2),
    ]
    assert second[0] == ("n01440764", "tench", 1.0)
    assert len(second) == 3
    assert keras_tnt.decode_predictions(predictions, top=1) == [first[:1], second[:1]]
    assert len(keras_tnt.decode_predictions(predictions, top=1000)[0]) == 1000
    assert len(keras_tnt.decode_predictions(keras.ops.convert_to_tensor(predictions))[0]) == 5


@pytest.mark.parametrize("shape", [(1000,), (1, 10), (1, 2, 1000)])
def test_decode_predictions_rejects_other_shapes(shape):
    with pytest.raises(ValueError, match=r"\(batch, 1000\).* Received: shape"):
        keras_tnt.decode_predictions(np.zeros(shape))


@pytest.mark.parametrize("top", [0, 1001])
def test_decode_predictions_rejects_an_invalid_top(top):
    with pytest.raises(ValueError, match="`top` must lie in 1 to 1000"):
        keras_tnt.decode_predictions(np.zeros((1, 1000)), top=top)
