"""The bfloat16 kernels round operands where documented, and nothing else."""

import math

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

import keras_tnt
from keras_tnt import kernels
from keras_tnt.kernels import plain, processor, runtimes
from keras_tnt.layers import TransformerBlock, WordsToPatches
from keras_tnt.layers.base import inference_device_scope
from keras_tnt.layers.half import POLICY, in_bfloat16, kernels_to_change
from tests.helpers.checks import BACKEND, compute, normal
from tests.helpers.tiny_models import tiny_block as tiny

has_pairs = pytest.mark.skipif(
    not processor.has_pairs(), reason="the processor is not one that this C++ is for"
)


def half(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype("float64")


def normalized(x, norm, axes):
    gamma, beta = (ops.convert_to_numpy(weight) for weight in (norm.gamma, norm.beta))
    x = x - x.mean(axes, keepdims=True)
    return x / np.sqrt((x * x).mean(axes, keepdims=True) + norm.epsilon) * gamma + beta


def projected(x, dense, scale=1.0):
    kernel = ops.convert_to_numpy(dense.kernel) * scale
    bias = 0.0 if dense.bias is None else ops.convert_to_numpy(dense.bias) * scale
    return half(x) @ half(kernel) + bias


def transformed(block, x, axes):
    """Returns the expected output of the bfloat16 kernel for words or tokens, in NumPy."""
    scales = (1.0, 1.0)
    if block.layer_scale is not None:
        scales = [ops.convert_to_numpy(y.gamma) for y in (block.scale_attention, block.scale_mlp)]
    heads = block.num_heads
    qkv = half(projected(normalized(x, block.norm_attention, axes), block.attention.qkv))
    qkv = qkv.reshape(*x.shape[:-1], 3, heads, -1)
    query, key, value = (np.swapaxes(qkv[..., i, :, :], -3, -2) for i in range(3))
    scores = query @ np.swapaxes(key, -1, -2) / query.shape[-1] ** 0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = half(weights) @ value / weights.sum(-1, keepdims=True)
    mixed = np.swapaxes(mixed, -3, -2).reshape(x.shape)
    x = x + projected(mixed, block.attention.projection, scales[0])
    wide = projected(normalized(x, block.norm_mlp, axes), block.mlp.fc1)
    return x + projected(
        wide * (1 + np.vectorize(math.erf)(wide / 2**0.5)) / 2, block.mlp.fc2, scales[1]
    )


def block_and_input(shape, heads, **options):
    block = TransformerBlock(heads, sample_axes=len(shape) - 2, **options)
    block.build(shape)
    size = 0.5 * min(1.0, (12 / shape[-1]) ** 0.5)
    weights = enumerate(block.get_weights())
    block.set_weights([size * normal(weight.shape, seed=i) for i, weight in weights])
    for part in (block.attention, block.mlp):
        for layer in part._flatten_layers():
            layer.dtype_policy = POLICY
    return block, normal(shape, seed=99)


def check(found, expected):
    # Rounding errors of a float32 sum may change how it is rounded to bfloat16 afterwards.
    difference = np.abs(ops.convert_to_numpy(found) - expected) / np.ptp(expected)
    assert difference.max() < 2e-3
    assert difference.mean() < 1e-4


@has_pairs
@pytest.mark.parametrize(
    ("shape", "heads", "options"),
    [
        ((1, 5, 8), 2, {}),
        ((2, 16, 32), 1, {"qkv_bias": True}),
        ((3, 33, 36), 3, {"layer_scale": 0.5, "mlp_ratio": 3}),
        ((4, 50, 40), 2, {"qkv_bias": True, "layer_scale": 0.5}),
        ((1, 300, 16), 2, {"epsilon": 1e-3}),
        ((17, 15, 68), 2, {"mlp_ratio": 2.5}),
        ((1, 37, 8), 2, {}),  # remainder of eight rows or more after the last full tile
        ((3, 13, 8), 2, {}),
    ],
)
def test_outer_bf16_kernel_rounds_matmul_operands(shape, heads, options, monkeypatch):
    block, tokens = block_and_input(shape, heads, **options)
    expected = transformed(block, tokens.astype("float64"), -1)
    monkeypatch.setattr(block, "transform", None)
    with inference_device_scope("cpu"):
        check(block(tokens), expected)
    check(block(tokens), expected)


@has_pairs
@pytest.mark.parametrize(
    ("shape", "heads", "options"),
    [
        ((2, 3, 16, 8), 2, {"qkv_bias": True, "layer_scale": 0.5}),
        ((1, 37, 16, 24), 4, {}),
        ((1, 2, 32, 12), 3, {"norm_axis": (-2, -1), "mlp_ratio": 2.5}),
    ],
)
def test_inner_bf16_kernel_rounds_matmul_operands(shape, heads, options, monkeypatch):
    block, words = block_and_input(shape, heads, **options)
    axes = options.get("norm_axis", -1)
    expected = transformed(block, words.astype("float64"), axes)
    monkeypatch.setattr(block, "transform", None)
    with inference_device_scope("cpu"):
        check(block(words), expected)


@has_pairs
@pytest.mark.parametrize("shape, dim", [((2, 3, 16, 4), 6), ((1, 130, 9, 2), 50)])
def test_words_to_patches_bf16_kernel_rounds_matmul_operands(shape, dim, monkeypatch):
    layer = WordsToPatches(dim)
    layer.build(shape)
    weights = enumerate(layer.get_weights())
    layer.set_weights([normal(weight.shape, seed=i) for i, weight in weights])
    layer.projection.dtype_policy = POLICY
    words = normal(shape, seed=99)
    flat = words.reshape(*shape[:2], -1).astype("float64")
    expected = projected(normalized(flat, layer.norm_words, -1), layer.projection)
    monkeypatch.setattr(layer, "apply_gate", None)
    with inference_device_scope("cpu"):
        check(layer(words), normalized(expected, layer.norm_patches, -1))


@has_pairs
@pytest.mark.parametrize(
    ("shape", "heads", "options", "arguments"),
    [
        ((1, 5, 6), 2, {}, {}),  # head dimension 3
        ((1, 3, 16, 8), 2, {"mlp_ratio": 0.625}, {}),  # hidden dimension 5
        ((1, 5, 8), 2, {}, {"training": True}),
        ((1, 5, 8), 2, {}, {"first_tokens": 1}),
        ((1, 5, 8), 2, {"squeeze_excite": True}, {}),
    ],
)
@pytest.mark.one_backend
def test_unsupported_blocks_do_not_use_the_bf16_kernel(
    shape, heads, options, arguments, monkeypatch
):
    monkeypatch.setattr(runtimes, "operator", lambda *_: pytest.fail("C++ was asked for"))
    block, x = block_and_input(shape, heads, **options)
    block(x, **arguments)


@pytest.mark.parametrize("features", [{"avx512_bf16", "amx_bf16"}, {"bf16"}, set()])
@pytest.mark.one_backend
def test_processors_without_pairs_do_not_use_the_bf16_kernel(features, monkeypatch):
    monkeypatch.setattr(processor, "features", lambda: frozenset(features))
    monkeypatch.setattr(runtimes, "operator", lambda *_: pytest.fail("C++ was asked for"))
    block, x = block_and_input((1, 5, 8), 2)
    block(x)


@pytest.mark.parametrize("compiler", ["c++ -mno-avx512bf16", "no-such-compiler"])
@pytest.mark.one_backend
def test_compiler_without_avx512_bf16_does_not_use_the_kernel(compiler, monkeypatch):
    monkeypatch.setattr(processor, "features", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setattr(runtimes, "operator", lambda *_: pytest.fail("C++ was asked for"))
    monkeypatch.setenv("CXX", compiler)
    block, x = block_and_input((1, 5, 8), 2)
    block(x)


@pytest.mark.parametrize("features", [{"avx512_bf16"}, {"bf16"}])
@pytest.mark.one_backend
def test_word_layers_are_bfloat16_only_with_a_kernel(features, monkeypatch):
    monkeypatch.setattr(processor, "features", lambda: frozenset(features))
    monkeypatch.setattr(kernels, "defined", lambda *_: "#define __AVX512BF16__ 1")
    in_cpp = features == {"avx512_bf16"}
    copy = in_bfloat16(tiny("tnt"))
    inner, outer = copy.get_layer("block_0").inner, copy.get_layer("block_0").outer
    assert outer.attention.qkv.dtype_policy.name == POLICY
    assert (inner.attention.qkv.dtype_policy.name == POLICY) is in_cpp
    paths = [kernel.path for kernel in kernels_to_change(copy)]
    assert any("block_0/outer" in path for path in paths) is not in_cpp


@pytest.fixture(
    params=[
        ((2, 3, 16, 8), kernels.InnerSizes(16, 8, 2, 16, across_words=False, half=True)),
        ((3, 7, 8), kernels.OuterSizes(2, 16, half=True)),
        ((3, 7, 12), kernels.PatchSizes(8, half=True)),
    ],
    ids=["words", "tokens", "patches"],
)
def operation(request):
    shape, sizes = request.param
    dim, inputs = 8, shape[-1]
    norm = (dim, 16) if len(shape) == 4 else (dim,)
    if sizes.weights is kernels.Weights:
        shapes = norm, norm, (dim, 24), (24,), (dim, dim), (dim,)
        shapes += norm, norm, (dim, 16), (16,), (16, dim), (dim,)
    else:
        shapes = (inputs,), (inputs,), (inputs, dim), (dim,), norm, norm
    weights = [normal(one, seed=i) for i, one in enumerate(shapes)]
    return sizes, ops.convert_to_tensor(normal(shape, seed=99)), weights


@has_pairs
def test_gradient_of_bf16_operator_is_float32(operation):
    sizes, x, weights = operation
    weights = [ops.convert_to_tensor(weight) for weight in weights]
    operator = runtimes.operator(BACKEND, sizes)
    found = gradient(lambda x: ops.sum(operator(x, weights, 1e-5)), x)
    expected = gradient(lambda x: ops.sum(plain.compute(x, weights, None, sizes, 1e-5)), x)
    difference = np.abs(ops.convert_to_numpy(found) - ops.convert_to_numpy(expected))
    assert difference.max() <= 1e-5 * max(1.0, np.abs(ops.convert_to_numpy(expected)).max())


def gradient(function, x):
    if BACKEND == "jax":
        import jax

        return jax.grad(function)(x)
    if BACKEND == "torch":
        import torch

        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x), x)[0]
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return tape.gradient(value, x)


@has_pairs
@pytest.mark.skipif(BACKEND != "torch", reason="the check is torch's")
def test_bf16_operator_passes_torch_opcheck(operation):
    import torch

    from keras_tnt.kernels import torch_operator

    sizes, x, weights = operation
    weights = [ops.convert_to_tensor(weight) for weight in weights]
    settings = None, getattr(sizes, "heads", 1), 1e-5, False, True
    torch.library.opcheck(torch_operator.run, (x, weights, *settings))


@has_pairs
@pytest.mark.skipif(BACKEND != "torch", reason="of the backends torch alone tells how many threads")
@pytest.mark.parametrize("shape", [(4, 70, 40), (1, 37, 40), (1, 13, 40)])
def test_bf16_kernels_are_deterministic_for_any_number_of_threads(shape):
    import torch

    block, tokens = block_and_input(shape, 2)
    layer = WordsToPatches(6)
    layer.build((*shape[:2], 10, 4))
    layer.projection.dtype_policy = POLICY
    words = ops.reshape(tokens, (*shape[:2], 10, 4))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3, 4, 32):  # partitioned by rows of all images, and by images
            torch.set_num_threads(count)
            found.append([ops.convert_to_numpy(y) for y in (block(tokens), layer(words))])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for actual, first in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(actual, first)


@has_pairs
@pytest.mark.slow
@pytest.mark.parametrize("family", ["tnt", "cait"])
def test_compiled_bf16_model_uses_updated_weights(family):
    model = tiny(family)
    images = np.random.default_rng(0).uniform(0, 255, (3, 32, 32, 3)).astype("float32")
    predict = keras_tnt.compile_inference(model, precision="bfloat16")
    for seed in range(2):
        keras.utils.set_random_seed(seed)
        weights = [weight + 0.05 * normal(weight.shape) for weight in model.get_weights()]
        model.set_weights(weights)
        expected, found = compute(model, images), predict(images)
        assert 0 < np.abs(found - expected).max() < 2e-2 * max(1.0, np.ptp(expected))
