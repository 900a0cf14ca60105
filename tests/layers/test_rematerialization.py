"""Rematerialized blocks reuse the masks of the forward pass, and update their state once."""

import contextlib
import functools

import keras
import numpy as np
import pytest
from keras import ops

import keras_tnt
from keras_tnt import layers
from tests.helpers.checks import BACKEND, gradients, normal

RATES = {"dropout": 0.3, "attention_dropout": 0.2, "stochastic_depth": 0.4}
TOKENS, WORDS = (3, 5, 8), (3, 4, 16, 4)

# {name: (class, arguments, input shapes, shapes of inputs by keyword)}.
BLOCKS = {
    "transformer": (layers.TransformerBlock, {"num_heads": 2}, [TOKENS], {}),
    "words": (layers.TransformerBlock, {"num_heads": 2, "sample_axes": 2}, [WORDS], {}),
    "talking_heads": (layers.TalkingHeadBlock, {"num_heads": 2, "layer_scale": 0.1}, [TOKENS], {}),
    "class_attention": (layers.ClassAttentionBlock, {"num_heads": 2}, [TOKENS], {}),
    "tnt": (
        layers.TNTBlock,
        {"outer_heads": 2, "inner_heads": 2, "squeeze_excite": True},
        [TOKENS, WORDS],
        {},
    ),
    "pyramid_tnt": (
        layers.PyramidTNTBlock,
        {"outer_heads": 2, "inner_heads": 2, "grid": (2, 2)},
        [(3, 4, 8), WORDS],
        {"bias": (1, 2, 4, 4)},
    ),
}
SCOPES = {
    "list_of_layers": {"mode": "list_of_layers", "layer_names": ["block"]},
    "nested": {
        "mode": "list_of_layers",
        "layer_names": ["block", "inner", "outer", "attention", "mlp", "drop", "drop_mlp"],
    },
    "larger_than": {"mode": "larger_than", "output_size_threshold": 8},
    "activations": {"mode": "activations"},
    "full": {"mode": "full"},
}
# `jax.checkpoint` cannot recompute Keras's own layers in these modes.
MODES = [name for name in SCOPES if BACKEND == "torch" or name not in ("larger_than", "full")]


def seeds(layer):
    return [part.seed_generator for part in layer._flatten_layers() if hasattr(part, "rate")]


def make(name, scope=None, rates=RATES):
    """Returns a block with fixed weights and seeds, its inputs, and shapes of inputs by keyword."""
    block_class, arguments, shapes, further = BLOCKS[name]
    with keras.RematScope(**scope) if scope else contextlib.nullcontext():
        block = block_class(**arguments, **rates, name="block")
        block.build(*shapes)
    draw = np.random.default_rng(2)
    for variable in block.trainable_variables:
        variable.assign(0.5 * draw.normal(size=variable.shape))
    for i, generator in enumerate(seeds(block)):
        generator.state.assign([100 * i + 5, 0])
    return block, [normal(shape) for shape in shapes], further


def learn(name, scope=None, rates=RATES):
    block, inputs, further = make(name, scope, rates)
    keys = list(further)
    inputs += [normal(shape) for shape in further.values()]

    def call(*tensors):
        count = len(tensors) - len(keys)
        keywords = dict(zip(keys, tensors[count:], strict=True))
        # Calls the block twice before the backward pass: each recomputation must use the masks of
        # its call.
        for _ in range(2):
            outputs = block(*tensors[:count], training=True, **keywords)
        first = block(*tensors[:count], training=True, **keywords)
        return keras.tree.flatten((outputs, first))

    found = gradients(block, call, inputs)
    return found, [ops.convert_to_numpy(generator.state) for generator in seeds(block)]


@pytest.mark.parametrize("mode", MODES)
def test_rematerialized_block_has_the_same_gradients(mode):
    for name in BLOCKS if mode == "list_of_layers" else ("tnt",):
        wanted, state = learn(name)
        found, state_again = learn(name, SCOPES[mode])
        for actual, expected in zip(found, wanted, strict=True):
            np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max() + 1e-6)
        np.testing.assert_array_equal(state_again, state)


def test_keyword_inputs_have_gradients_through_a_rematerialized_block():
    def gradient(scope):
        block, inputs, further = make("pyramid_tnt", scope)
        table = keras.layers.Layer()
        table.weight = table.add_weight(shape=further["bias"], initializer="zeros")
        table.block = block
        table.built = True
        call = lambda *x: block(*x, bias=table.weight * 1.0, training=True)  # noqa: E731
        return gradients(table, call, inputs)[0]

    expected = gradient(None)
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(gradient(SCOPES["list_of_layers"]), expected, atol=1e-5)


@pytest.mark.skipif(BACKEND != "torch", reason="torch.utils.checkpoint")
@pytest.mark.parametrize("reentrant", [False, True])
def test_torch_checkpoint_draws_the_masks_of_the_forward_pass(reentrant):
    import torch
    from torch.utils.checkpoint import checkpoint

    def learn(recomputed):
        block, inputs, _ = make("tnt")
        inputs = [torch.tensor(x, requires_grad=True) for x in inputs]
        results = []
        for _ in range(3):
            run = functools.partial(block, training=True)
            if recomputed:
                tokens, words = checkpoint(run, *inputs, use_reentrant=reentrant)
            else:
                tokens, words = run(*inputs)
            results.append((tokens * words.mean()).sum() * (1 + len(results)))
        sum(results).backward()
        weights = [v.value.grad.numpy() for v in block.trainable_variables]
        return [*(x.grad.numpy() for x in inputs), *weights], [
            g.state.value.tolist() for g in seeds(block)
        ]

    (wanted, state), (found, state_again) = learn(False), learn(True)
    assert state == state_again
    assert any(second for _, second in state)
    for actual, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max() + 1e-6)


@pytest.mark.skipif(BACKEND != "torch", reason="torch.utils.checkpoint")
def test_torch_checkpoint_without_rng_state_raises():
    from torch.utils.checkpoint import checkpoint

    layer = layers.Dropout(0.5)
    x = ops.convert_to_tensor(normal((2, 3))).requires_grad_()
    y = checkpoint(
        lambda x: layer(x, training=True) ** 2, x, use_reentrant=False, preserve_rng_state=False
    )
    with pytest.raises(RuntimeError, match="preserve_rng_state=True"):
        y.sum().backward()


@pytest.mark.skipif(BACKEND != "torch", reason="a recomputation moves them on torch alone")
def test_rematerialized_stem_updates_batch_statistics_once():
    def statistics(scope):
        with scope:
            stem = layers.PyramidStem(8, 4, name="stem")
            stem.build((None, 16, 16, 3))
        for i, variable in enumerate(stem.trainable_variables):
            variable.assign(normal(variable.shape, seed=i))
        gradients(stem, lambda x: stem(x, training=True), [normal((2, 16, 16, 3))])
        return [ops.convert_to_numpy(v) for v in stem.non_trainable_variables]

    plain = statistics(contextlib.nullcontext())
    again = statistics(keras.RematScope(mode="full"))
    for actual, expected in zip(again, plain, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


def weights_after_steps(scope, jit_compile):
    keras.utils.set_random_seed(8)
    with scope:
        model = keras_tnt.TNT(
            input_shape=(16, 16, 3),
            patch_size=8,
            depth=1,
            outer_dim=8,
            inner_dim=4,
            outer_heads=2,
            inner_heads=2,
            classes=3,
            weights=None,
            **RATES,
        )
    model.compile(
        keras.optimizers.SGD(0.3), "sparse_categorical_crossentropy", jit_compile=jit_compile
    )
    images = 255 * np.random.default_rng(0).random((4, 16, 16, 3), "float32")
    model.fit(images, np.arange(4) % 3, batch_size=2, epochs=2, shuffle=False, verbose=0)
    return [ops.convert_to_numpy(v) for v in model.variables]


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", {"tensorflow": [False, True]}.get(BACKEND, ["auto"]))
def test_fit_with_rematerialization_gives_the_same_weights_and_seeds(jit_compile):
    plain = weights_after_steps(contextlib.nullcontext(), jit_compile)
    scope = keras.RematScope(mode="list_of_layers", layer_names=["block_0"])
    for again, expected in zip(weights_after_steps(scope, jit_compile), plain, strict=True):
        np.testing.assert_allclose(again, expected, atol=1e-5)
