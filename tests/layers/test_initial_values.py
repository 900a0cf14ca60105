"""Initial weights of new models, compared with the distributions in the published code.

The published code, by file and line (TNT: Efficient-AI-Backbones f90e129, DeiT and CaiT:
facebookresearch/deit 7e160fe, timm 0.3.2, of which DeiT is a subclass):

* `nn.Linear`: `trunc_normal_(std=.02)`, bias 0: tnt.py:275-282, pyramid_tnt.py:406-410, timm
  vision_transformer.py:245-252, cait_models.py:212-219. `trunc_normal_` truncates at +-2 in
  absolute terms (timm weight_init.py:42): the standard deviation is 0.0200.
* Class and distillation tokens, position tables: the same: tnt.py:270-272, pyramid_tnt.py:402-403,
  models.py:28-29, cait_models.py:208-209.
* `nn.Conv2d` is not initialized explicitly, so PyTorch's default remains: TNT's words (tnt.py:206)
  and the patches of DeiT (vision_transformer.py:158) and CaiT.
* PyramidTNT's `nn.Conv2d`: N(0, sqrt(2 / fan_out)), bias 0 (pyramid_tnt.py:411-416), and
  `relative_pos = torch.randn` (pyramid_tnt.py:343).
* Norms: weight 1, bias 0. LayerScale: `init_scale` of the model (cait_models.py:259-464).
"""

import re

import keras
import numpy as np
import pytest
from keras import ops

import keras_tnt
from keras_tnt.layers.base import TruncatedNormal, skip_weight_init, torch_uniform

# Distribution of a weight by its path: "linear", "ones", "zeros", a constant, or ("uniform",
# fan_in) and ("normal", standard deviation).
TRANSFORMER = (
    (r"(gamma|moving_variance)$", "ones"),
    (r"(beta|moving_mean)$", "zeros"),
    (r"(qkv|query|kv|reduce|projection|fc1|fc2|mix_before|mix_after|head|head_distillation)/bias$",
     "zeros"),
    (r"/kernel$", "linear"),
    (r"/(table|token)$", "linear"),
)  # fmt: skip
WORDS = (r"word_embedding/(kernel|bias)$", ("uniform", 7 * 7 * 3))
PATCHES = (r"patch_embedding/projection/(kernel|bias)$", ("uniform", 8 * 8 * 3))
TNT = {
    "patch_size": 8,
    "inner_stride": 2,
    "depth": 2,
    "outer_dim": 48,
    "inner_dim": 16,
    "outer_heads": 3,
    "inner_heads": 4,
}
PYRAMID = {
    "depths": (2, 1),
    "outer_dims": (32, 48),
    "inner_dims": (8, 12),
    "outer_heads": (4, 4),
    "inner_heads": (2, 2),
    "reductions": (2, 1),
}
VIT = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
CASES = {
    "tnt": (keras_tnt.TNT, {**TNT, "distilled": True, "squeeze_excite": True}, (WORDS,)),
    "tnt of the legacy stem": (keras_tnt.TNT, {**TNT, "legacy": True}, (WORDS,)),
    "pyramid_tnt": (
        keras_tnt.PyramidTNT,
        PYRAMID,
        (
            (r"stem/common/convolution/kernel$", ("normal", (2 / (9 * 16)) ** 0.5)),
            (r"stem/words/convolution/kernel$", ("normal", (2 / (9 * 8)) ** 0.5)),
            (r"stem/patches1/convolution/kernel$", ("normal", (2 / (9 * 32)) ** 0.5)),
            (r"stem/patches2/convolution/kernel$", ("normal", (2 / (9 * 64)) ** 0.5)),
            (r"stem/patches3/convolution/kernel$", ("normal", (2 / (9 * 32)) ** 0.5)),
            (r"merge_words_0/convolution/kernel$", ("normal", (2 / (9 * 12)) ** 0.5)),
            (r"merge_patches_0/convolution/kernel$", ("normal", (2 / (9 * 48)) ** 0.5)),
            (r"convolution/bias$", "zeros"),
            (r"relative_position/table$", ("normal", 1.0)),
        ),
    ),
    "deit": (keras_tnt.DeiT, {**VIT, "distilled": True}, (PATCHES,)),
    "cait": (
        keras_tnt.CaiT,
        {**VIT, "layer_scale": 1e-3},
        (PATCHES, (r"scale_(attention|mlp)/gamma$", 1e-3),
         (r"(query|key|value)/bias$", "zeros")),
    ),
}  # fmt: skip


def sample(distribution, shape):
    """Returns samples of a distribution, drawn by NumPy."""
    random = np.random.default_rng(7)
    if distribution == "linear":
        return np.clip(random.normal(0, 0.02, shape), -2, 2)
    kind, value = distribution
    if kind == "normal":
        return random.normal(0, value, shape)
    return random.uniform(-(value**-0.5), value**-0.5, shape)


def assert_same_distribution(values, expected, path):
    """Asserts that mean, standard deviation and empirical distribution function agree."""
    values, expected = np.ravel(values), np.ravel(expected)
    n, std = len(values), expected.std()
    assert abs(values.mean()) < 5 * std / n**0.5, path
    assert values.std() == pytest.approx(std, rel=5 / n**0.5), path
    points = np.sort(np.concatenate([values, expected]))
    distance = np.abs(
        np.searchsorted(np.sort(values), points, "right") / n
        - np.searchsorted(np.sort(expected), points, "right") / len(expected)
    ).max()
    # The Kolmogorov-Smirnov distance of two samples exceeds 2.3 times this value once in 20,000
    # times.
    assert distance < 2.3 * (1 / n + 1 / len(expected)) ** 0.5, path


@pytest.mark.parametrize("case", CASES)
def test_initial_weights_follow_the_published_distributions(case):
    build, arguments, own = CASES[case]
    keras.utils.set_random_seed(3)
    model = build(weights=None, input_shape=(32, 32, 3), classes=20, **arguments)
    for weight in model.weights:
        distribution = next(
            d for pattern, d in (*own, *TRANSFORMER) if re.search(pattern, weight.path)
        )
        values = ops.convert_to_numpy(weight)
        if isinstance(distribution, str) and distribution != "linear":
            np.testing.assert_array_equal(values, float(distribution == "ones"), weight.path)
        elif isinstance(distribution, float):
            np.testing.assert_allclose(values, distribution, rtol=1e-6, err_msg=weight.path)
        else:
            assert len(np.unique(values)) > values.size / 2, weight.path
            assert_same_distribution(values, sample(distribution, (20_000,)), weight.path)


def test_truncated_normal_of_0_02_exceeds_two_standard_deviations():
    values = ops.convert_to_numpy(TruncatedNormal(stddev=0.02, seed=5)((400, 500)))
    assert values.std() == pytest.approx(0.02, rel=0.01)
    assert np.mean(np.abs(values) > 0.04) == pytest.approx(0.0455, rel=0.05)
    assert np.abs(values).max() > 0.07


def test_truncated_normal_is_truncated_at_absolute_two():
    values = ops.convert_to_numpy(TruncatedNormal(stddev=1.5, seed=5)((100, 100)))
    assert values.min() == -2 and values.max() == 2


def test_word_convolution_has_pytorch_default_range():
    values = ops.convert_to_numpy(torch_uniform(7 * 7 * 3)((7, 7, 3, 400)))
    assert values.std() == pytest.approx(0.0476, rel=0.01)
    assert 0.0815 < np.abs(values).max() <= 147**-0.5


@pytest.mark.parametrize(
    ("function", "value"),
    [
        *((name, 1e-5) for name in ("CaiTXXS24", "CaiTXXS36", "CaiTXS24", "CaiTS24")),
        *((name, 1e-6) for name in ("CaiTS36", "CaiTM36", "CaiTM48")),
    ],
)
@pytest.mark.one_backend
def test_layer_scale_starts_from_the_published_value_of_each_cait(function, value):
    from keras_tnt.models import registry

    rows = registry.family("cait").variants
    names = {registry.family("cait").function_name(name): name for name in rows}
    assert rows[names[function]].architecture["layer_scale"] == value


def test_initial_weights_do_not_depend_on_the_image_data_format():
    built = {}
    for layout, shape in (("channels_last", (32, 32, 3)), ("channels_first", (3, 32, 32))):
        keras.config.set_image_data_format(layout)
        keras.utils.set_random_seed(11)
        built[layout] = keras_tnt.DeiT(weights=None, input_shape=shape, classes=3, **VIT)
    for one, other in zip(*(each.weights for each in built.values()), strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(one), ops.convert_to_numpy(other))


def test_layers_of_a_model_start_from_different_values():
    model = keras_tnt.DeiT(weights=None, input_shape=(32, 32, 3), classes=3, **VIT)
    first, second = (model.get_layer(f"block_{i}").attention.qkv.kernel for i in range(2))
    assert np.abs(ops.convert_to_numpy(first) - ops.convert_to_numpy(second)).max() > 0.01


@pytest.mark.parametrize("case", CASES)
def test_model_that_loads_a_file_draws_no_random_weights(case):
    build, arguments, own = CASES[case]
    with skip_weight_init():
        model = build(weights=None, input_shape=(32, 32, 3), classes=20, **arguments)
    for weight in model.weights:
        distribution = next(
            d for pattern, d in (*own, *TRANSFORMER) if re.search(pattern, weight.path)
        )
        if isinstance(distribution, tuple) or distribution == "linear":
            assert not np.any(ops.convert_to_numpy(weight)), weight.path


def test_initializers_in_files_of_earlier_versions_are_loaded():
    saved = {
        "module": None,
        "class_name": "TruncatedNormal",
        "config": {"mean": 0.0, "stddev": 0.02, "seed": None},
        "registered_name": "keras_tnt>TruncatedNormal",
    }
    initializer = keras.saving.deserialize_keras_object(saved)
    assert isinstance(initializer, TruncatedNormal)
    values = ops.convert_to_numpy(initializer((100, 100)))
    assert values.std() == pytest.approx(0.02, rel=0.05)


def test_initializer_config_round_trip():
    initializer = torch_uniform(48)
    config = keras.saving.serialize_keras_object(initializer)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is type(initializer)
    assert again.get_config() == initializer.get_config()
