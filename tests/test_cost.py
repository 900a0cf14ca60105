"""Counts of multiply-accumulates and parameters."""

import keras
import pytest

import keras_tnt
from keras_tnt.inspection import multiply_accumulates
from keras_tnt.layers.base import skip_weight_init
from keras_tnt.models import registry


def test_matmuls_and_convolutions_are_counted_equally_on_every_backend():
    model = keras_tnt.DeiT(
        input_shape=(32, 32, 3),
        patch_size=16,
        embed_dim=8,
        depth=1,
        num_heads=2,
        classes=3,
        include_top=False,
    )
    patches, tokens, dim = 4, 5, 8
    attention = 2 * tokens * tokens * dim
    block = tokens * dim * (3 * dim + dim + 4 * dim + 4 * dim) + attention
    assert multiply_accumulates(model) == patches * 16 * 16 * 3 * dim + block

    convolution = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(5, 3)])
    assert multiply_accumulates(convolution) == 6 * 6 * 5 * 3 * 3 * 3


# `list_models` would include families that other test modules register.
NAMES = [
    name
    for family in (keras_tnt.tnt, keras_tnt.pyramid_tnt, keras_tnt.deit, keras_tnt.cait)
    for name in family.VARIANTS
]


@pytest.mark.one_backend
@pytest.mark.parametrize("name", NAMES)
def test_variants_have_a_cost_that_matches_their_weights(name):
    family = next(family for family in registry.families() if name in family.variants)
    row = family.variants[name]
    assert row.cost is not None
    for checkpoint in family.checkpoints:
        same = checkpoint.model == family.function_name(name) and not checkpoint.arguments
        if same and checkpoint.size == row.image_size:
            assert row.cost.parameters == checkpoint.parameters


@pytest.mark.slow
@pytest.mark.one_backend
@pytest.mark.parametrize("name", NAMES)
def test_stored_cost_matches_the_counted_one(name):
    row = next(f.variants[name] for f in registry.families() if name in f.variants)
    with skip_weight_init():
        model = keras_tnt.create_model(name, weights=None)
    parts = keras_tnt.anatomy(model)
    assert row.cost == registry.Cost(
        model.count_params(),
        multiply_accumulates(model),
        len(parts.blocks) + len(parts.class_blocks),
    )
