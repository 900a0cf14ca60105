"""Input normalization and token selection, compared with values computed by hand."""

import numpy as np
import pytest

from keras_tnt.layers.inputs_outputs import (
    ImageNormalization,
    SelectToken,
    SelectTokens,
    along_channels,
    scale_and_offset,
)
from tests.helpers.checks import assert_equal, check_layer, compute, normal

MEAN, STD = (0.5, 0.25, 0.125), (0.5, 0.25, 1.0)


@pytest.mark.parametrize(
    ("channels", "mean", "std", "scale", "offset"),
    [
        (3, MEAN, STD, [2 / 255, 4 / 255, 1 / 255], [-1, -1, -0.125]),
        (3, MEAN, (0.5,) * 3, [2 / 255] * 3, [-1, -0.5, -0.25]),
        (3, (0.5,) * 3, STD, [2 / 255, 4 / 255, 1 / 255], [-1, -2, -0.5]),
        (3, (0.5,) * 3, (0.5,) * 3, [2 / 255], [-1]),
        (3, (1.0, 0.5, 0.5), (1.0, 0.5, 0.5), [1 / 255, 2 / 255, 2 / 255], [-1, -1, -1]),
        (1, MEAN, STD, [12 / 7 / 255], [-0.5]),  # channel means 7/24 and 7/12
        (4, MEAN, STD, [12 / 7 / 255], [-0.5]),
        (2, (0.5, 0.25), (0.5, 0.5), [2 / 255, 2 / 255], [-1, -0.5]),
    ],
)
def test_scale_and_offset_of_pixels(channels, mean, std, scale, offset):
    found = scale_and_offset(mean, std, channels)
    for values, expected in zip(found, (scale, offset), strict=True):
        assert values.dtype == "float64" and values.shape == (len(expected),)
        np.testing.assert_allclose(values, expected, rtol=1e-14)


def test_channel_values_broadcast_along_the_channel_axis():
    assert along_channels(np.arange(3), "channels_last").shape == (3,)
    assert along_channels(np.arange(3), "channels_first").shape == (3, 1, 1)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_images_are_normalized_per_channel(data_format):
    shape = (2, 4, 5, 3) if data_format == "channels_last" else (2, 3, 4, 5)
    arguments = {"family": "tnt", "mean": MEAN, "std": STD, "data_format": data_format}
    layer = check_layer(ImageNormalization, shape, **arguments)
    images = 255 * np.random.default_rng(0).random((2, 4, 5, 3), "float32")
    expected = (images / 255 - np.float32(MEAN)) / np.float32(STD)
    if data_format == "channels_first":
        images, expected = (x.transpose(0, 3, 1, 2) for x in (images, expected))
    assert_equal(compute(layer, images), expected)
    outside = ImageNormalization(normalises=False, **arguments)
    assert_equal(compute(outside, images), images)


def test_tokens_are_selected():
    x = normal((2, 5, 4))
    assert_equal(compute(check_layer(SelectTokens, x.shape, start=1, stop=3), x), x[:, 1:3])
    assert_equal(compute(check_layer(SelectTokens, x.shape, start=2), x), x[:, 2:])
    assert_equal(compute(check_layer(SelectToken, x.shape, index=1), x), x[:, 1])
    assert SelectToken().compute_output_shape((None, 5, 4)) == (None, 4)
