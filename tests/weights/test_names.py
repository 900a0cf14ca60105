"""Every tensor of every public checkpoint maps to a variable of its model."""

import math

import keras
import pytest

import keras_tnt
from keras_tnt.weights.names import UNUSED
from tests.helpers import golden
from tests.helpers.checks import entries

pytestmark = pytest.mark.one_backend

CHECKPOINTS = golden.checkpoints()

# {checkpoint: (variant, arguments, image side, naming convention)}
MODELS = {
    "tnt_s_patch16_224.in1k": ("TNTSmall", {}, 224, 0),
    "tnt_s_legacy_patch16_224.in1k": ("TNTSmall", {"legacy": True}, 224, 0),
    "tnt_b_patch16_224.in1k": ("TNTBase", {}, 224, 0),
    "original_tnt_s_patch16_224": ("TNTSmall", {}, 224, 1),
    "original_tnt_b_patch16_224": ("TNTBase", {}, 224, 1),
    "deit_tiny_patch16_224.fb_in1k": ("DeiTTiny", {}, 224, 0),
    "deit_tiny_distilled_patch16_224.fb_in1k": ("DeiTTiny", {"distilled": True}, 224, 0),
    "deit_small_patch16_224.fb_in1k": ("DeiTSmall", {}, 224, 0),
    "deit_small_distilled_patch16_224.fb_in1k": ("DeiTSmall", {"distilled": True}, 224, 0),
    "deit_base_patch16_224.fb_in1k": ("DeiTBase", {}, 224, 0),
    "deit_base_distilled_patch16_224.fb_in1k": ("DeiTBase", {"distilled": True}, 224, 0),
    "deit_base_patch16_384.fb_in1k": ("DeiTBase", {}, 384, 0),
    "deit_base_distilled_patch16_384.fb_in1k": ("DeiTBase", {"distilled": True}, 384, 0),
    "cait_xxs24_224.fb_dist_in1k": ("CaiTXXS24", {}, 224, 0),
    "cait_xxs24_384.fb_dist_in1k": ("CaiTXXS24", {}, 384, 0),
    "cait_xxs36_224.fb_dist_in1k": ("CaiTXXS36", {}, 224, 0),
    "cait_xxs36_384.fb_dist_in1k": ("CaiTXXS36", {}, 384, 0),
    "cait_xs24_384.fb_dist_in1k": ("CaiTXS24", {}, 384, 0),
    "cait_s24_224.fb_dist_in1k": ("CaiTS24", {}, 224, 0),
    "cait_s24_384.fb_dist_in1k": ("CaiTS24", {}, 384, 0),
    "cait_s36_384.fb_dist_in1k": ("CaiTS36", {}, 384, 0),
    "cait_m36_384.fb_dist_in1k": ("CaiTM36", {}, 384, 0),
    "cait_m48_448.fb_dist_in1k": ("CaiTM48", {}, 448, 0),
    "ptnt_ti_patch16_192": ("PyramidTNTTiny", {}, 192, 0),
    "ptnt_s_patch16_256": ("PyramidTNTSmall", {}, 256, 0),
    "ptnt_m_patch16_256": ("PyramidTNTMedium", {}, 256, 0),
    "ptnt_b_patch16_256": ("PyramidTNTBase", {}, 256, 0),
}
NATIVE_SIZES = {
    "CaiTXS24": 384,
    "CaiTS36": 384,
    "CaiTM36": 384,
    "CaiTM48": 448,
    "PyramidTNTTiny": 192,
    "PyramidTNTSmall": 256,
    "PyramidTNTMedium": 256,
    "PyramidTNTBase": 256,
}  # sides other than 224


@pytest.fixture(autouse=True)
def no_values():
    """Builds models without values: the largest would take 1.4 GB."""
    with keras.StatelessScope(initialize_variables=False):
        yield
    keras.utils.clear_session(free_memory=False)


def parameters(model):
    return sum(math.prod(variable.shape) for variable in model.trainable_variables)


def test_every_public_checkpoint_is_tested():
    assert set(MODELS) == set(CHECKPOINTS)


@pytest.mark.parametrize("checkpoint", MODELS)
def test_tensors_and_variables_map_one_to_one(checkpoint):
    variant, arguments, size, convention = MODELS[checkpoint]
    native = size == NATIVE_SIZES.get(variant, 224)
    shape = None if native else (size, size, 3)
    model = getattr(keras_tnt, variant)(weights=None, input_shape=shape, **arguments)
    assert model.input_shape == (None, size, size, 3)
    assert model.output_shape == (None, 1000)
    assert model.name.replace("_", "") == variant.lower()
    mapped = [
        (name, list(shape))
        for entry in entries(model, convention)
        for name, shape in zip(entry.names, entry.shapes, strict=True)
    ]
    expected = CHECKPOINTS[checkpoint]["tensors"]
    assert dict(mapped) == {k: v for k, v in expected.items() if not UNUSED.search(k)}
    assert len(dict(mapped)) == len(mapped), "two variables share a tensor"
    assert {id(e.variable) for e in entries(model, convention)} == {id(v) for v in model.variables}
    assert parameters(model) == CHECKPOINTS[checkpoint]["params"]


def test_only_tnt_tiny_has_no_public_checkpoint():
    families = (keras_tnt.tnt, keras_tnt.deit, keras_tnt.cait, keras_tnt.pyramid_tnt)
    variants = {name.replace("_", "") for family in families for name in family.VARIANTS}
    assert variants == {row[0].lower() for row in MODELS.values()} | {"tnttiny"}
    assert parameters(keras_tnt.TNTTiny(weights=None)) == 6_076_408
