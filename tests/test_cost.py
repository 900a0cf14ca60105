"""Multiply-accumulates, counted."""

import keras

import keras_tnt
from keras_tnt.inspection import multiply_accumulates


def test_matrix_products_and_convolutions_are_counted_alike_on_every_backend():
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
