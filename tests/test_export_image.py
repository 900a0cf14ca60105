"""The evaluation transform in an exported graph matches `load_image` with Pillow."""

import io
import subprocess
import sys

import numpy as np
import pytest

import keras_tnt
from tests.helpers import malformed_images
from tests.helpers.image_graphs import model_and_graph

tf = pytest.importorskip("tensorflow")
Image = pytest.importorskip("PIL.Image")


pytestmark = pytest.mark.one_backend


def picture(height, width):
    random = np.random.default_rng(height * width)
    y, x = (axis[..., None] for axis in np.mgrid[:height, :width])
    periods = random.uniform(3, 40, 3)
    pixels = 127 + 100 * np.sin(x / periods) * np.cos(y / periods[::-1])
    pixels = pixels + random.normal(0, 20, (height, width, 3))
    pixels[height // 4 : height // 2, width // 3 : width // 2] = (255, 0, 0)
    return Image.fromarray(pixels.clip(0, 255).astype("uint8"))


def encode(image, kind="JPEG", **settings):
    encoded = io.BytesIO()
    image.save(encoded, kind, **settings)
    return encoded.getvalue()


def with_orientation(orientation):
    exif = Image.Exif()
    exif[0x010E] = "a description before it"
    exif[0x0112] = orientation
    return encode(picture(90, 60), exif=exif)


def transparent(mode="RGBA"):
    image = picture(90, 120)
    image.putalpha(77)
    return image.convert(mode)


BIG_ENDIAN = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
PICTURES = {
    **{
        f"{height}x{width}": encode(picture(height, width), quality=88)
        for height, width in ((500, 375), (100, 300), (20, 31), (37, 20), (901, 1200), (64, 64))
    },
    **{f"orientation {n}": with_orientation(n) for n in range(1, 9)},
    "orientation, big-endian": encode(picture(90, 60), exif=BIG_ENDIAN),
    "progressive": encode(picture(300, 200), progressive=True),
    "full chroma": encode(picture(300, 201), subsampling=0),
    "gray": encode(picture(300, 200).convert("L")),
    "cmyk": encode(picture(300, 200).convert("CMYK")),
    "png": encode(picture(90, 200), "PNG"),
    "png, palette": encode(picture(90, 200).quantize(32), "PNG"),
    "png, transparent": encode(transparent(), "PNG"),
    "png, gray and transparent": encode(transparent("LA"), "PNG"),
    "webp": encode(picture(90, 200), "WEBP"),
    "webp, transparent": encode(transparent(), "WEBP"),
    "gif": encode(picture(90, 200).quantize(64), "GIF"),
    "gif, animated": malformed_images.animated("GIF"),
    "bmp": encode(picture(90, 200), "BMP"),
    "webp, lossless": encode(picture(90, 200), "WEBP", lossless=True),
    "strip": encode(picture(7, 2000), "PNG"),
    "tall strip": encode(picture(2000, 7), "PNG"),
}


@pytest.mark.parametrize("shape", [(64, 64, 3), (32, 80, 3), (64, 64, 1)])
def test_pixels_are_within_one_level_of_pillow(shape):
    model, graph = model_and_graph(shape)
    for name, encoded in PICTURES.items():
        found = graph(tf.constant([encoded]))[0].numpy()
        difference = np.abs(found - keras_tnt.load_image(encoded, model))
        assert difference.max() <= 1, name
        assert (difference > 0).mean() < 0.005, name


def test_predictions_match_load_image():
    model, graph = model_and_graph((64, 64, 3))
    expected = model.predict_on_batch(keras_tnt.load_images(list(PICTURES.values()), model))
    found = model.predict_on_batch(graph(tf.constant(list(PICTURES.values()))))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_damaged_exif_is_ignored():
    _, graph = model_and_graph((64, 64, 3))
    plain = encode(picture(90, 60))
    for damaged in (b"Exif\0\0MM\0*\xff\xff\xff\x08\0\x01", b"Exif\0\0II*\0", b"Exif\0\0"):
        image = encode(picture(90, 60), exif=damaged)
        found, expected = graph(tf.constant([image, plain])).numpy()
        assert (found == expected).all()


def test_indices_of_broken_images_are_reported():
    _, graph = model_and_graph((64, 64, 3))
    good = PICTURES["png"]
    batch = [good, b"nonsense", good, PICTURES["progressive"][:900], b""]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"Places in the batch:\] \[1 3 4\]"):
        graph(tf.constant(batch))
    assert graph(tf.constant([], tf.string)).shape == (0, 64, 64, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP, extended"])
def test_image_above_the_pixel_limit_is_refused_before_decoding(kind):
    _, graph = model_and_graph((64, 64, 3))
    large = [malformed_images.claiming(kind, side, side) for side in (13_000, 65_535)]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"67,108,864 pixels.*\] \[1 2\]"):
        graph(tf.constant([PICTURES["png"], *large]))


@pytest.mark.parametrize("sides", [(60_000, 1), (1, 60_000)])
def test_only_the_visible_part_of_a_strip_is_resized(sides):
    _, graph = model_and_graph((64, 64, 3))
    crop = graph(tf.constant([malformed_images.png(*sides, color=2)])).numpy()
    assert crop.shape == (1, 64, 64, 3) and not crop.any()


# Runs in a separate process, so that a decoder crash fails only this test.
SWEEP = """
import resource, sys
import numpy as np
import tensorflow as tf
from keras_tnt.export.card import describe
from keras_tnt.export.graph import serving_module
from keras_tnt.export.network import serving_network
from keras_tnt.export.warmup import image_example
from tests.helpers import malformed_images
from tests.helpers.image_graphs import model_and_graph
model, _ = model_and_graph((64, 64, 3))
network = serving_network(model)
card = describe(model, network)
module, signatures = serving_module(network, card, sys.argv[1], ["serving_bytes", "classify"])
calls = (
    lambda files: signatures["serving_bytes"](image_bytes=tf.constant(files)),
    lambda files: signatures["classify"](inputs=tf.constant([image_example(f) for f in files])),
)
good = malformed_images.encoded(malformed_images.picture(np.random.default_rng(0)), "PNG")
expected = [call([good])["scores"].numpy()[0] for call in calls]
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA, used + EXTRA))
read = refused = 0
files = [malformed_images.animated(kind) for kind in malformed_images.ANIMATED]
files.extend(malformed_images.sweep(1, COUNT))
for number, data in enumerate(files):
    print("image", number, file=sys.stderr, flush=True)
    try:
        scores = calls[number % 2]([good, data, good])["scores"].numpy()
    except tf.errors.InvalidArgumentError as error:
        assert "Places in the batch:] [1]" in error.message, error.message
        refused += 1
    else:
        assert np.isfinite(scores).all()
        np.testing.assert_allclose(scores[[0, 2]], expected[number % 2][None].repeat(2, 0), 1e-4)
        read += 1
print("read", read, "refused", refused)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_malformed_images_report_their_index_and_never_crash(tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join("abcdefg"))
    count = malformed_images.number_of(300)
    code = SWEEP.replace("EXTRA", "2**30").replace("COUNT", str(count))
    done = subprocess.run([sys.executable, "-c", code, labels], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    read, refused = map(int, done.stdout.split()[1::2])
    assert read + refused == count + len(malformed_images.ANIMATED)
    assert min(read, refused) > count // 5
