"""Parsing of the hub's config.json, and one clear error per invalid value."""

import json

import pytest

from keras_tnt.weights.hub_config import HubConfig, parse_config

pytestmark = pytest.mark.one_backend
FLOWERS = {
    "architecture": "tnt_s_patch16_224.in1k",
    "num_classes": 3,
    "model_args": {"img_size": [96, 64]},
    "label_names": ["n01", "n02", "n03"],
    "label_descriptions": {"n01": "rose", "n03": "daisy, marguerite"},
    "pretrained_cfg": {
        "input_size": [3, 224, 224],
        "num_classes": 1000,
        "mean": [0.5, 0.5, 0.5],
        "std": [1, 1, 1],
        "crop_pct": 0.9,
        "interpolation": "bicubic",
    },
}


def parse(config):
    return parse_config(json.dumps(config).encode(), "hf://someone/flowers")


def test_all_fields_are_parsed():
    config = parse(FLOWERS)
    assert config == HubConfig(
        architecture="tnt_s_patch16_224",
        classes=3,
        size=(96, 64),
        mean=(0.5, 0.5, 0.5),
        std=(1.0, 1.0, 1.0),
        crop=0.9,
        interpolation="bicubic",
        label_names=("n01", "n02", "n03"),
        label_descriptions={"n01": "rose", "n03": "daisy, marguerite"},
    )
    assert config.class_names == ("rose", "n02", "daisy, marguerite")


def test_missing_fields_are_none():
    assert parse({}) == HubConfig()
    assert parse({}).class_names is None
    assert parse({"num_classes": None, "pretrained_cfg": {"num_classes": 5}}).classes is None


def test_pretrained_cfg_fields_at_the_top_level_are_parsed():
    config = parse({"num_classes": 5, "input_size": [3, 64, 96], "mean": [0.5], "std": [0.2]})
    assert (config.classes, config.size, config.mean) == (5, (64, 96), (0.5,))


def test_label_names_by_class_index():
    assert parse({"label_names": {"1": "b", "0": "a"}}).label_names == ("a", "b")


BYTES = {
    "nothing": (b"", "is not JSON"),
    "no JSON": (b"<html>", "is not JSON"),
    "cut off": (json.dumps(FLOWERS).encode()[:50], "is not JSON"),
    "UTF-16": (json.dumps(FLOWERS).encode("utf-16"), "is not UTF-8"),
    "Latin-1": ('{"label_names": ["café"]}'.encode("latin-1"), "is not UTF-8"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    "deep inside": (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "NaN": (b'{"pretrained_cfg": {"mean": [NaN, 0, 0]}}', "holds NaN"),
    "infinity": (b'{"pretrained_cfg": {"mean": [1e999, 0, 0]}}', "`mean` must be"),
    "digits": (b'{"num_classes": ' + b"9" * 10_000 + b"}", "config.json"),
    "large": (b" " * 2**25, "bytes, more than"),
    "a half of a character": (b'{"label_names": ["\\ud800"]}', "`label_names` must be a text"),
}


@pytest.mark.parametrize("kind", BYTES)
def test_invalid_bytes_raise(kind):
    data, message = BYTES[kind]
    with pytest.raises(ValueError) as caught:
        parse_config(data, "hf://someone/flowers")
    assert message in str(caught.value)
    assert "hf://someone/flowers" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *(({"num_classes": n}, "num_classes") for n in (10**9, -1, True, 3.0, "3", [3], {})),
        *(
            ({"model_args": {"img_size": side}}, "img_size")
            for side in (160_000, 0, -16, 1.5, "224", True, [], [224], [1, 2, 3, 4], [224, None])
        ),
        *(
            ({"pretrained_cfg": {"input_size": size}}, "input_size")
            for size in ([3, 10**9, 224], [3, 224, "224"], "3x224x224")
        ),
        *(
            ({"pretrained_cfg": {"std": std}}, "std")
            for std in ([0, 1, 1], [1, 1, -1], [1e-300] * 3, [1, 1], [[1]] * 3, [True] * 3, 1, "1")
        ),
        *(
            ({"pretrained_cfg": {"mean": mean}}, "mean")
            for mean in ([1e9, 0, 0], ["0.5"] * 3, [None] * 3, {"0": 1}, [0.5] * 10_000)
        ),
        ({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5]}}, "`mean` has 3 numbers, `std` 1"),
        *(({"pretrained_cfg": {"crop_pct": crop}}, "crop_pct") for crop in (0, 1.1, "0.9", [1])),
        ({"pretrained_cfg": {"interpolation": 3}}, "interpolation"),
        *(({"architecture": name}, "architecture") for name in (3, "", ["tnt"], {"a": 1})),
        *(({"pretrained_cfg": wrong}, "pretrained_cfg") for wrong in ([], "x", 3, True)),
        *(({"model_args": wrong}, "model_args") for wrong in ([1], "x", 3)),
        *(
            ({"label_names": names}, "label_names")
            for names in ("ab", 3, [1, 2], ["a", None], ["a", ""], {"0": "a", "2": "b"}, {"a": "b"})
        ),
        ({"num_classes": 3, "label_names": ["a", "b"]}, "has 2 names for 3 classes"),
        *(({"label_descriptions": wrong}, "label_desc") for wrong in (["a"], {"a": 1}, "a")),
        *((wrong, "must be an object") for wrong in ([FLOWERS], "tnt", 3, None, True)),
    ],
)
def test_invalid_value_raises(config, message):
    with pytest.raises(ValueError, match="config.json of hf://someone/flowers cannot be") as caught:
        parse(config)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_control_characters_are_escaped_in_errors():
    with pytest.raises(ValueError) as caught:
        parse({"architecture": ["\x1b[2J\u202e"]})
    assert str(caught.value).isprintable()
