"""Properties of PyramidTNT: stages, image sizes in multiples of eight, batch statistics."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_tnt
from keras_tnt.layers import PyramidTNTBlock, ReducedBlock, RelativePosition
from tests.helpers.checks import compute, normal


def tiny(size, **arguments):
    architecture = {
        "input_shape": (*size, 3),
        "classes": 3,
        "depths": (1, 1, 1, 1),
        "outer_dims": (8, 8, 16, 16),
        "inner_dims": (4, 4, 4, 4),
        "outer_heads": (2, 2, 2, 2),
        "inner_heads": (2, 2, 2, 2),
    }
    return keras_tnt.PyramidTNT(**{**architecture, **arguments})


def test_first_block_of_a_stage_and_second_of_a_deep_one_have_inner_transformers():
    model = tiny((32, 32), depths=(1, 7, 6, 2))
    inner = {
        layer.name: isinstance(layer, PyramidTNTBlock)
        for layer in model.layers
        if isinstance(layer, (PyramidTNTBlock, ReducedBlock))
    }
    assert len(inner) == 16
    assert [name for name, has_inner in inner.items() if has_inner] == [
        "stage_0_block_0",
        "stage_1_block_0",
        "stage_1_block_1",
        "stage_2_block_0",
        "stage_3_block_0",
    ]


def test_stochastic_depth_grows_linearly_over_all_stages():
    model = tiny((32, 32), depths=(2, 1, 1, 1), stochastic_depth=0.4)
    blocks = [layer for layer in model.layers if "_block_" in layer.name]
    rates = [getattr(block, "outer", block).stochastic_depth for block in blocks]
    np.testing.assert_allclose(rates, [0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("size", "grids"),
    [
        ((64, 128), [(8, 16), (4, 8), (2, 4), (1, 2)]),
        ((56, 40), [(7, 5), (4, 3), (2, 2), (1, 1)]),
    ],
)
def test_grids_are_halved_per_stage_and_rounded_up(size, grids):
    model = tiny(size, include_top=False)
    positions = [layer for layer in model.layers if isinstance(layer, RelativePosition)]
    assert [layer.grid for layer in positions] == grids
    assert [layer.reduction for layer in positions] == [4, 2, 1, 1]
    assert compute(model, normal((2, *size, 3))).shape == (2, *grids[-1], 16)


def test_relative_positions_of_a_stage_affect_each_of_its_blocks():
    model = tiny((32, 64), depths=(2, 1, 1, 1), include_top=False)
    images = normal((1, 32, 64, 3))
    blocks = [model.get_layer(f"stage_0_block_{i}").output for i in range(2)]
    outputs = keras.Model(model.input, [blocks[0][0], blocks[1]])
    before = compute(outputs, images)
    table = model.get_layer("stage_0_relative_position").table
    table.assign(10 * normal(table.shape))
    for first, second in zip(before, compute(outputs, images), strict=True):
        assert np.abs(first - second).max() > 1e-4


@pytest.mark.slow
def test_training_step_updates_every_weight_and_batch_statistic():
    size = (64, 128)
    model = tiny(size)
    for i, variable in enumerate(model.trainable_variables):
        variable.assign(0.3 * normal(variable.shape, seed=i))
    before = {v.path: ops.convert_to_numpy(v) for v in model.variables}
    # JAX compiles each operation separately in eager mode.
    eagerly = keras.backend.backend() != "jax"
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=eagerly)
    images = np.random.default_rng(0).uniform(0, 255, (4, *size, 3)).astype("float32")
    model.train_on_batch(images, np.array([0, 1, 2, 0]))
    moved = {v.path for v in model.variables if np.any(ops.convert_to_numpy(v) != before[v.path])}
    # BatchNormalization cancels the bias of the preceding convolution.
    taken_away = {path for path in before if path.endswith("convolution/bias") and "stem" in path}
    assert moved | taken_away == before.keys()
