"""What is computed in C++ is the same, and stands in only where it may."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_tnt import native
from keras_tnt.layers import TransformerBlock, WordsToPatches, fused
from keras_tnt.layers.attention import record_attention
from keras_tnt.layers.base import inference_on
from keras_tnt.native import plain, runtimes
from tests.checks import BACKEND, assert_equal, gradients, normal
from tests.test_families import tiny as tiny_of
from tests.test_tnt import tiny as tiny_tnt


def block_and_words(shape, **options):
    """A block with words or tokens to transform, and what it makes of them without the C++."""
    block = TransformerBlock(num_heads=2, sample_axes=len(shape) - 2, **options)
    words = normal(shape)
    block.build(words.shape)
    # Of scores twice as large XLA's and TensorFlow's own rounding is more than 1e-6.
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
def test_the_inner_transformer_in_cpp_is_the_inner_transformer(shape, options, monkeypatch):
    block, words, expected = block_and_words(shape, **options)
    monkeypatch.setattr(block, "transform", None)
    with inference_on("cpu"):
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
def test_all_else_is_left_to_the_block(device, training, options, words, monkeypatch):
    block, given = left_alone(options, (1, 3, words, 8), monkeypatch)
    with inference_on(device):
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
def test_tokens_are_left_to_the_block_unless_all_learn(training, arguments, monkeypatch):
    block, given = left_alone({}, (1, 5, 8), monkeypatch)
    block(given, **arguments, training=training)
    assert block.called == [training]


def left_alone(options, shape, monkeypatch):
    """A block that says how it was called, and words or tokens; whoever asks for C++ fails."""
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
def test_norms_and_samples_of_another_kind_are_left_to_the_block(options, shape, monkeypatch):
    block, given = left_alone(options, shape, monkeypatch)
    block(given, training=True)
    assert block.called == [True]


@pytest.mark.skipif(BACKEND != "torch", reason="the others ask for dtypes themselves")
@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 3, 16, 8)])
def test_other_numbers_than_float32_are_left_to_the_block(shape):
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
def test_a_quantized_block_and_one_that_is_looked_into_compute_themselves(monkeypatch):
    block, words = left_alone({}, (1, 3, 16, 8), monkeypatch)
    with record_attention():
        block(words)
    block.mlp.fc2.quantize("int8")
    block(words)
    assert block.called == [False, False]


def test_what_lora_adds_is_computed_too():
    block, words, before = block_and_words((2, 3, 16, 8))
    block.attention.qkv.enable_lora(2)
    block.attention.qkv.lora_kernel_b.assign(normal((2, 24)))
    expected = ops.convert_to_numpy(block.transform(words))
    assert_equal(block(words), expected)
    assert np.max(np.abs(expected - before)) > 1e-3


def test_of_an_unknown_release_the_block_computes_itself(monkeypatch):
    monkeypatch.setitem(runtimes.SEEN, keras.backend.backend(), ("0.0",))
    runtimes._operator.cache_clear()
    block, words, expected = block_and_words((1, 2, 16, 10))
    with inference_on("cpu"):
        with pytest.warns(UserWarning, match="not among the releases.*0.0"):
            result = block(words)
        again = block(words)  # and warns no more
    runtimes._operator.cache_clear()
    assert_equal([result, again], [expected, expected])


# === Learning ===


class Learned(keras.layers.Layer):
    """A layer and the words or tokens it is called with while it trains, a weight too."""

    def __init__(self, layer, words):
        super().__init__()
        self.layer = layer
        self.words = self.add_weight(words.shape)
        self.words.assign(words)
        self.built = True

    def call(self):
        return self.layer(self.words + 0.0, training=True)

    def gradients(self):
        """The result, and the gradients by words and weights."""
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
        ((3, 17, 20), {"mlp_ratio": 2.5}),  # of no panel's or tile's size
        ((6, 9, 8), {"qkv_bias": True, "stochastic_depth": 0.5}),
        ((2, 250, 12), {"layer_scale": 0.5}),  # more tokens than are computed at once,
        ((2, 9, 128), {"qkv_bias": True, "stochastic_depth": 0.3}),  # and more channels
    ],
)
def test_the_cpp_learns_what_the_block_learns(shape, options, monkeypatch):
    block, words, _ = block_and_words(shape, **options)
    check_learned(Learned(block, words), "transform", monkeypatch)


@pytest.mark.parametrize(
    ("shape", "dim", "use_bias"),
    [
        ((3, 5, 16, 4), 20, True),
        ((1, 1, 9, 3), 7, False),
        ((2, 230, 4, 6), 33, True),  # more patches than are computed at once
    ],
)
def test_the_cpp_learns_how_words_become_patches(shape, dim, use_bias, monkeypatch):
    layer = words_to_patches(shape, dim, use_bias=use_bias)
    check_learned(Learned(layer, normal(shape)), "weigh", monkeypatch)


def words_to_patches(shape, dim, **options):
    layer = WordsToPatches(dim, **options)
    layer.build(shape)
    weights = enumerate(layer.get_weights())
    layer.set_weights([normal(weight.shape, seed=i) for i, weight in weights])
    return layer


def check_learned(learned, plain_part, monkeypatch):
    """A layer learns in C++, without a part that it would call, what it learns without C++."""
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
def test_words_become_patches_without_it_elsewhere(training, options, monkeypatch):
    monkeypatch.setattr(runtimes, "operator", lambda *_: pytest.fail("C++ was asked for"))
    layer = words_to_patches((1, 3, 16, 4), 8, **options)
    assert layer(ops.ones((1, 3, 16, 4)), training=training).shape == (1, 3, 8)
    with record_attention():
        layer(ops.ones((1, 3, 16, 4)), training=True)
    layer.projection.quantize("int8")
    layer(ops.ones((1, 3, 16, 4)), training=True)


def tiny(family, **arguments):
    if family == "tnt":
        return tiny_tnt(depth=1, **arguments)
    return tiny_of(family, (32, 32), **arguments)


# One step of PyramidTNT, for its stem has ReLUs: in a second one, rounding of the first decides on
# which side of zero some of its values lie.
@pytest.mark.slow
@pytest.mark.parametrize("family, batch_size", [("tnt", 4), ("deit", 4), ("pyramid_tnt", 7)])
def test_a_model_fits_alike_with_the_cpp_and_without(family, batch_size, monkeypatch):
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


# === Derivatives of derivatives, and what is exported ===


@pytest.fixture(
    params=[
        ((2, 3, 16, 8), native.InnerSizes(16, 8, heads=2, hidden=32, across_words=False)),
        ((3, 7, 8), native.OuterSizes(heads=2, hidden=32)),
        ((3, 7, 12), native.PatchSizes(dim=6)),
    ],
    ids=["words", "tokens", "patches"],
)
def operation(request):
    """A function of words or tokens through the operator, the same without it, and them."""
    shape, sizes = request.param
    if sizes.part == "patches":
        shapes = native.PatchWeights((12,), (12,), (12, 6), (6,), (6,), (6,))
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
def test_the_gradient_has_a_gradient(operation):
    in_cpp, in_plain, words = operation
    found, expected = (gradient_of_gradient(function, words) for function in (in_cpp, in_plain))
    assert_close_relatively(found, expected)


def assert_close_relatively(found, expected):
    found, expected = ops.convert_to_numpy(found), ops.convert_to_numpy(expected)
    assert np.max(np.abs(found - expected)) <= 1e-5 * np.max(np.abs(expected))


@pytest.mark.slow  # Without jit, JAX compiles each operation by itself: about a minute.
@pytest.mark.skipif(BACKEND != "jax", reason="these transformations are JAX's")
def test_jax_transforms_it(operation):
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
def test_tokens_give_the_same_numbers_on_any_number_of_threads():
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
def test_torch_transforms_the_block_itself(shape):
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
def test_torch_differentiates_a_block_that_is_applied_twice(shape, monkeypatch):
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
def test_torch_may_compile_what_learns(shape):
    import torch

    from keras_tnt.native import torch_operator

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


def test_what_leaves_the_process_has_no_operator_of_ours():
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
