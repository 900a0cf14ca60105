"""C++ kernels of the blocks match the layers in `keras.ops`, and run only where supported."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_tnt import kernels
from keras_tnt.kernels import plain, runtimes
from keras_tnt.layers import TransformerBlock, WordsToPatches, fused
from keras_tnt.layers.attention import record_attention
from keras_tnt.layers.base import inference_device_scope
from tests.helpers.checks import BACKEND, assert_equal, gradients, normal
from tests.helpers.tiny_models import tiny_block as tiny


def block_and_words(shape, **options):
    """Returns a block, its input (words or tokens), and its output in `keras.ops`."""
    block = TransformerBlock(num_heads=2, sample_axes=len(shape) - 2, **options)
    words = normal(shape)
    block.build(words.shape)
    # With twice as large scores, rounding in XLA and TensorFlow alone exceeds 1e-6.
    size = (1.0 if BACKEND == "torch" else 0.5) * min(1.0, (12 / shape[-1]) ** 0.5)
    weights = enumerate(block.get_weights())
    block.set_weights([size * normal(weight.shape, seed=i) for i, weight in weights])
    words = ops.convert_to_tensor(words)
    return block, words, ops.convert_to_numpy(block.transform(words))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 16, 8), {"qkv_bias": True, "layer_scale": 0.5}),
        ((2, 3, 16, 8), {"norm_axis": (-2, -1)}),
        ((1, 2, 32, 12), {"norm_axis": (-2, -1), "layer_scale": 0.5}),
        ((5, 9, 16, 4), {"mlp_ratio": 3}),
    ],
)
def test_inner_transformer_kernel_matches_the_block(shape, options, monkeypatch):
    block, words, expected = block_and_words(shape, **options)
    monkeypatch.setattr(block, "transform", None)
    with inference_device_scope("cpu"):
        assert_equal(block(words), expected)
    assert_equal(block(words), expected)


@pytest.mark.parametrize(
    ("device", "training", "options", "words"),
    [
        ("accelerator", False, {}, 16),
        (None, True, {"dropout": 0.1}, 16),
        (None, True, {"attention_dropout": 0.1}, 16),
        ("cpu", False, {"squeeze_excite": True}, 16),
        (None, True, {"dtype": "mixed_bfloat16"}, 16),
        ("cpu", False, {"dtype": "float64"}, 16),
        (None, False, {}, 9),
    ],
)
@pytest.mark.one_backend
def test_unsupported_blocks_do_not_use_the_kernel(device, training, options, words, monkeypatch):
    block, given = left_alone(options, (1, 3, words, 8), monkeypatch)
    with inference_device_scope(device):
        block(given, training=training)
    assert block.called == [training]


@pytest.mark.parametrize(
    "training, arguments",
    [
        (False, {}),
        (True, {"bias": np.zeros((2, 5, 5), "float32")}),
        (True, {"first_tokens": 1}),
    ],
)
@pytest.mark.one_backend
def test_outer_kernel_is_used_only_in_training_of_all_tokens(training, arguments, monkeypatch):
    block, given = left_alone({}, (1, 5, 8), monkeypatch)
    block(given, **arguments, training=training)
    assert block.called == [training]


def left_alone(options, shape, monkeypatch):
    """Returns a block that records calls of `transform` in `called`, and an input.

    The test fails if a native operator is requested.
    """
    monkeypatch.setattr(runtimes, "operator", lambda *_: pytest.fail("C++ was asked for"))
    block = TransformerBlock(num_heads=2, **options)
    block.build(shape)
    block.called = []
    monkeypatch.setattr(block, "transform", lambda x, *rest: block.called.append(rest[-1]) or x)
    return block, ops.ones(shape)


@pytest.mark.parametrize(
    "options, shape",
    [
        ({"norm_axis": -2}, (1, 5, 8)),
        ({"norm_axis": 1}, (1, 5, 8)),
        ({"norm_axis": -2}, (1, 3, 16, 8)),
        ({"sample_axes": 2, "stochastic_depth": 0.5}, (1, 5, 8)),
    ],
)
@pytest.mark.one_backend
def test_other_norm_axes_and_sample_axes_do_not_use_the_kernel(options, shape, monkeypatch):
    block, given = left_alone(options, shape, monkeypatch)
    block(given, training=True)
    assert block.called == [True]


@pytest.mark.skipif(BACKEND != "torch", reason="the others ask for dtypes themselves")
@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 3, 16, 8)])
def test_other_dtypes_than_float32_do_not_use_the_kernel(shape):
    import torch

    block, given, _ = block_and_words(shape)
    whole = (10 * given).int()
    assert_equal(block(whole, training=True), block.transform(whole, training=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(block(given, training=True), block.transform(given, training=True))
    block.double()
    given = given.double()
    assert_equal(block(given, training=True), block.transform(given, training=True))


@pytest.mark.one_backend
def test_quantized_or_observed_block_does_not_use_the_kernel(monkeypatch):
    block, words = left_alone({}, (1, 3, 16, 8), monkeypatch)
    with record_attention():
        block(words)
    block.mlp.fc2.quantize("int8")
    block(words)
    assert block.called == [False, False]


def test_lora_update_is_included():
    block, words, before = block_and_words((2, 3, 16, 8))
    block.attention.qkv.enable_lora(2)
    block.attention.qkv.lora_kernel_b.assign(normal((2, 24)))
    expected = ops.convert_to_numpy(block.transform(words))
    assert_equal(block(words), expected)
    assert np.max(np.abs(expected - before)) > 1e-3


def test_untested_backend_version_falls_back_with_one_warning(monkeypatch):
    monkeypatch.setitem(runtimes.SEEN, keras.backend.backend(), ("0.0",))
    runtimes._operator.cache_clear()
    block, words, expected = block_and_words((1, 2, 16, 10))
    with inference_device_scope("cpu"):
        with pytest.warns(UserWarning, match="not among the releases.*0.0"):
            result = block(words)
        again = block(words)  # does not warn again
    runtimes._operator.cache_clear()
    assert_equal([result, again], [expected, expected])


# === Training ===


class Learned(keras.layers.Layer):
    """A layer with its input as a trainable weight, called in training mode."""

    def __init__(self, layer, words):
        super().__init__()
        self.layer = layer
        self.words = self.add_weight(words.shape)
        self.words.assign(words)
        self.built = True

    def call(self):
        return self.layer(self.words + 0.0, training=True)

    def gradients(self):
        """Returns the output, and the gradients w.r.t. input and weights."""
        restart_seeds(self.layer)
        result = ops.convert_to_numpy(self.call())
        restart_seeds(self.layer)
        return [result, *gradients(self, self.call, ())]


def restart_seeds(layer):
    generators = [x.seed_generator for x in layer._flatten_layers() if hasattr(x, "seed_generator")]
    for i, generator in enumerate(generators):
        generator.state.assign([1, i])


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 3, 16, 8), {"qkv_bias": True, "layer_scale": 0.5}),
        ((2, 3, 16, 8), {"norm_axis": (-2, -1)}),
        ((4, 7, 32, 12), {"qkv_bias": True, "stochastic_depth": 0.4}),
        ((5, 29, 16, 4), {"mlp_ratio": 3, "norm_axis": (-2, -1), "stochastic_depth": 0.4}),
        ((2, 5, 8), {"qkv_bias": True, "layer_scale": 0.5}),
        ((1, 1, 6), {}),
        ((3, 17, 20), {"mlp_ratio": 2.5}),  # not a multiple of any panel or tile size
        ((6, 9, 8), {"qkv_bias": True, "stochastic_depth": 0.5}),
        ((2, 250, 12), {"layer_scale": 0.5}),  # more tokens than one pass computes
        ((2, 9, 128), {"qkv_bias": True, "stochastic_depth": 0.3}),  # and more channels
    ],
)
def test_training_kernel_matches_the_block(shape, options, monkeypatch):
    block, words, _ = block_and_words(shape, **options)
    check_learned(Learned(block, words), "transform", monkeypatch)


@pytest.mark.parametrize(
    ("shape", "dim", "use_bias"),
    [
        ((3, 5, 16, 4), 20, True),
        ((1, 1, 9, 3), 7, False),
        ((2, 230, 4, 6), 33, True),  # more patches than one pass computes
    ],
)
def test_words_to_patches_training_kernel_matches_the_layer(shape, dim, use_bias, monkeypatch):
    layer = words_to_patches(shape, dim, use_bias=use_bias)
    check_learned(Learned(layer, normal(shape)), "apply_gate", monkeypatch)


def words_to_patches(shape, dim, **options):
    layer = WordsToPatches(dim, **options)
    layer.build(shape)
    weights = enumerate(layer.get_weights())
    layer.set_weights([normal(weight.shape, seed=i) for i, weight in weights])
    return layer


def check_learned(learned, plain_part, monkeypatch):
    """Checks that the kernel's output and gradients match the layer's and are deterministic.

    `plain_part` is a method that the kernel replaces: calling it is an error.
    """
    with monkeypatch.context() as without:
        without.setattr(fused, "runs_here", lambda *_: False)
        expected = learned.gradients()
    with monkeypatch.context() as within:
        within.setattr(learned.layer, plain_part, None)
        found, again = learned.gradients(), learned.gradients()
    for actual, wanted in zip(found, expected, strict=True):
        assert_close_relatively(actual, wanted)
    for first, second in zip(found, again, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "training, options",
    [(False, {}), (True, {"dtype": "mixed_bfloat16"}), (True, {"dtype": "float64"})],
)
@pytest.mark.one_backend
def test_words_to_patches_does_not_use_an_unsupported_kernel(training, options, monkeypatch):
    monkeypatch.setattr(runtimes, "operator", lambda *_: pytest.fail("C++ was asked for"))
    layer = words_to_patches((1, 3, 16, 4), 8, **options)
    assert layer(ops.ones((1, 3, 16, 4)), training=training).shape == (1, 3, 8)
    with record_attention():
        layer(ops.ones((1, 3, 16, 4)), training=True)
    layer.projection.quantize("int8")
    layer(ops.ones((1, 3, 16, 4)), training=True)


# PyramidTNT trains for one step: its stem has ReLUs, and in a second step rounding errors of the
# first decide on the sign of some inputs.
@pytest.mark.slow
@pytest.mark.parametrize("family, batch_size", [("tnt", 4), ("deit", 4), ("pyramid_tnt", 7)])
def test_fit_is_the_same_with_and_without_kernels(family, batch_size, monkeypatch):
    model = tiny(family, stochastic_depth=0.2)
    start, used = model.get_weights(), []
    sizes_of = fused.sizes_of
    monkeypatch.setattr(
        fused, "sizes_of", lambda *a, **k: used.append(sizes_of(*a, **k)) or used[-1]
    )

    def fit():
        restart_seeds(model)
        model.set_weights(start)
        model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
        images, labels = normal((7, 32, 32, 3)), np.arange(7) % 3
        model.fit(images, labels, batch_size, shuffle=False, verbose=0)
        return model.get_weights()

    found = fit()
    assert used and None not in used
    monkeypatch.setattr(fused, "runs_here", lambda *_: False)
    for actual, wanted in zip(found, fit(), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5)


# === Second derivatives, and exports ===


@pytest.fixture(
    params=[
        ((2, 3, 16, 8), kernels.InnerSizes(16, 8, heads=2, hidden=32, across_words=False)),
        ((3, 7, 8), kernels.OuterSizes(heads=2, hidden=32)),
        ((3, 7, 12), kernels.PatchSizes(dim=6)),
    ],
    ids=["words", "tokens", "patches"],
)
def operation(request):
    """Returns (function of the native operator, the same in `keras.ops`, input)."""
    shape, sizes = request.param
    if sizes.part == "patches":
        shapes = kernels.PatchWeights((12,), (12,), (12, 6), (6,), (6,), (6,))
        weights = [normal(weight, seed=i) for i, weight in enumerate(shapes)]
        words, keep = ops.convert_to_tensor(normal(shape)), None
    else:
        block, words, _ = block_and_words(shape)
        weights = fused.weights_of(block, shape)
        keep = ops.convert_to_tensor(1.5 * (normal((2, *shape[:-2])) > -0.5).astype("float32"))
    weights = [ops.stop_gradient(ops.convert_to_tensor(weight)) for weight in weights]
    operator = runtimes.operator(BACKEND, sizes)
    return (
        lambda x: ops.sum(ops.power(operator(x, weights, 1e-5, keep), 3)),
        lambda x: ops.sum(ops.power(plain.compute(x, weights, keep, sizes, 1e-5), 3)),
        words,
    )


def gradient_of_gradient(function, words):
    if BACKEND == "jax":
        import jax

        return jax.grad(lambda x: ops.sum(ops.square(jax.grad(function)(x))))(words)
    if BACKEND == "torch":
        import torch

        words = words.detach().requires_grad_()
        (first,) = torch.autograd.grad(function(words), words, create_graph=True)
        return torch.autograd.grad(ops.sum(ops.square(first)), words)[0]
    import tensorflow as tf

    with tf.GradientTape() as second:
        second.watch(words)
        with tf.GradientTape() as first:
            first.watch(words)
            value = function(words)
        value = ops.sum(ops.square(first.gradient(value, words)))
    return second.gradient(value, words)


@pytest.mark.slow
def test_second_derivative_matches_the_reference(operation):
    in_cpp, in_plain, words = operation
    found, expected = (gradient_of_gradient(function, words) for function in (in_cpp, in_plain))
    assert_close_relatively(found, expected)


def assert_close_relatively(found, expected):
    found, expected = ops.convert_to_numpy(found), ops.convert_to_numpy(expected)
    assert np.max(np.abs(found - expected)) <= 1e-5 * np.max(np.abs(expected))


@pytest.mark.slow  # JAX without jit compiles each operation separately, about a minute.
@pytest.mark.skipif(BACKEND != "jax", reason="these transformations are JAX's")
def test_jax_transformations_match_the_reference(operation):
    import jax

    in_cpp, in_plain, words = operation
    with jax.disable_jit():
        assert_close_relatively(jax.grad(in_cpp)(words), jax.grad(in_plain)(words))
    several, direction = ops.stack([words, -words]), ops.square(words)
    for transform in (
        lambda function: jax.jvp(function, (words,), (direction,))[1],
        lambda function: jax.vmap(jax.grad(function))(several),
        lambda function: jax.grad(jax.checkpoint(function))(words),
        lambda function: jax.jvp(jax.grad(function), (words,), (direction,))[1],
    ):
        assert_close_relatively(transform(in_cpp), transform(in_plain))


@pytest.mark.skipif(BACKEND != "torch", reason="of the backends torch alone tells how many threads")
def test_outer_kernel_is_deterministic_for_any_number_of_threads():
    import torch

    block, tokens, _ = block_and_words((5, 30, 40), stochastic_depth=0.3)
    learned, threads = Learned(block, tokens), torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(learned.gradients())
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*found, strict=True):
        np.testing.assert_array_equal(one, three)


SHAPES = pytest.mark.parametrize("shape", [(2, 3, 16, 8), (2, 7, 8)])


@pytest.mark.skipif(BACKEND != "torch", reason="these transformations are torch's")
@SHAPES
def test_torch_function_transforms_use_the_block(shape):
    import torch

    block, words, _ = block_and_words(shape)

    def function(x):
        return torch.sum(block(x, training=True) ** 2)

    learned = words.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(function(learned), learned)
    assert_close_relatively(torch.func.grad(function)(words), gradient)
    several, value = torch.stack([words, words]), function(words)
    assert_close_relatively(torch.vmap(function)(several), torch.stack([value, value]))


@pytest.mark.skipif(BACKEND != "torch", reason="these transformations are torch's")
@SHAPES
def test_torch_differentiates_a_block_applied_twice(shape, monkeypatch):
    import torch

    block, words, _ = block_and_words(shape)
    weights = [variable.value for variable in block.trainable_variables]

    def found(**options):
        result = block(block(words, training=True), training=True)
        return torch.autograd.grad(result.square().sum(), weights, **options)

    def batched():
        result = block(words, training=True)
        ones = torch.ones(2, *result.shape)
        return torch.autograd.grad(result, weights, ones, is_grads_batched=True)

    once, again, both = found(), found(create_graph=True), batched()
    monkeypatch.setattr(fused, "runs_here", lambda *_: False)
    for actual, wanted in zip(
        (*once, *again, *both), (*found(), *found(), *batched()), strict=True
    ):
        assert_close_relatively(actual.detach(), wanted.detach())


@pytest.mark.skipif(BACKEND != "torch", reason="torch's own check")
@SHAPES
def test_training_operators_pass_torch_opcheck(shape):
    import torch

    from keras_tnt.kernels import torch_operator

    block, words, _ = block_and_words(shape)
    assert runtimes.operator(BACKEND, fused.sizes_of(block, words.shape, half=False)) is not None
    weights = [
        ops.convert_to_tensor(x).detach().requires_grad_()
        for x in fused.weights_of(block, words.shape)
    ]
    keep = torch.ones(2, *shape[:-2])
    arguments = words.requires_grad_(), weights, keep, block.num_heads, 1e-5, False, False
    torch.library.opcheck(torch_operator.run, arguments)
    shapes = (8,), (8,), (8, 6), (6,), (6,), (6,)
    weights = [torch.randn(shape, requires_grad=True) for shape in shapes]
    arguments = torch.randn(2, 7, 8, requires_grad=True), weights, None, 1, 1e-5, False, False
    torch.library.opcheck(torch_operator.run, arguments)


def test_exported_programs_do_not_contain_native_operators():
    model = tiny("tnt")
    images = ops.ones((2, 32, 32, 3))
    if BACKEND == "tensorflow":
        import tensorflow as tf

        traced = tf.function(model).get_concrete_function(images)
        assert "XlaCallModule" not in str(traced.graph.as_graph_def())
    elif BACKEND == "torch":
        import torch

        exported = torch.export.export(model, (images,), strict=False)
        assert "keras_tnt" not in str(exported.graph)
    else:
        import jax

        exported = jax.export.export(jax.jit(model))(images)
        assert "custom_call @keras_tnt" not in exported.mlir_module()
