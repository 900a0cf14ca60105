"""`compile_inference`: predictions, batch sizes, bfloat16, and the program cache."""

from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest

import keras_tnt
from keras_tnt import inference
from keras_tnt.kernels import processor
from keras_tnt.layers import SelfAttention, blocks, half
from tests.helpers.checks import assert_equal, compute, in_fork

TINY = {
    "input_shape": (16, 16, 3),
    "classes": 5,
    "patch_size": 8,
    "inner_stride": 4,
    "depth": 2,
    "outer_dim": 16,
    "inner_dim": 4,
    "outer_heads": 2,
    "inner_heads": 2,
}
# Calls of a model for one program; torch compares its program with an additional eager call.
CALLS = 2 if keras.backend.backend() == "torch" else 1


@pytest.fixture
def images():
    return np.random.default_rng(0).uniform(0, 255, (11, 16, 16, 3)).astype("float32")


@pytest.mark.one_backend
def test_batches_are_padded_to_powers_of_two():
    sizes = []
    program = inference.in_powers_of_two(lambda images: sizes.append(images.shape[0]) or images)
    for count in (1, 2, 3, 4, 5, 8, 9):
        numbers = keras.ops.reshape(keras.ops.arange(count), (count, 1))
        assert program(numbers)[:, 0].shape == (count,)
    assert sizes == [1, 2, 4, 4, 8, 8, 16]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Returns a model, its function, images, results of concurrent calls, and traced calls."""
    model = keras_tnt.TNT(**TINY)
    predict = keras_tnt.compile_inference(model, max_batch=4)
    call, traced = model.call, []
    model.call = lambda *args, **kwargs: (traced.append(args), call(*args, **kwargs))[1]
    images = np.random.default_rng(0).uniform(0, 255, (4, 16, 16, 3)).astype("float32")
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(6) as pool:
        # The cache is empty.
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        results = list(pool.map(lambda _: predict(images), range(12)))
    del model.call
    return model, predict, images, results, traced


@pytest.mark.slow
def test_concurrent_first_calls_share_one_compilation(compiled):
    model, _, images, results, traced = compiled
    expected = compute(model, images)
    for result in results:
        np.testing.assert_allclose(result, expected, atol=1e-5)
    assert len(traced) == CALLS


@pytest.mark.slow
def test_forked_process_raises_with_advice_to_spawn(compiled):
    model, predict, images, *_ = compiled

    def call_in_child(queue):
        for function in (lambda: predict(images), lambda: keras_tnt.compile_inference(model)):
            try:
                function()
            except RuntimeError as error:
                queue.put(str(error))

    for message in in_fork(call_in_child, 2):
        assert "forked" in message and "spawn" in message


@pytest.mark.slow
def test_predictions_match_the_model_at_any_batch_size(compiled, images):
    model, predict, *_, traced = compiled
    expected = model.predict(images, verbose=0)
    for count in (3, 4, 11, 7, 1, 3):
        result = predict(images[:count])
        assert isinstance(result, np.ndarray)
        np.testing.assert_allclose(result, expected[:count], atol=1e-5)
    assert len(traced) == CALLS

    tensor = predict(keras.ops.convert_to_tensor(images[:4]))
    assert keras.ops.is_tensor(tensor)
    for variable in model.trainable_variables:
        variable.assign(np.zeros(variable.shape))
    np.testing.assert_allclose(predict(images[:4]), 1 / 5, atol=1e-6)


def test_compiler_failure_falls_back_with_one_warning(images, monkeypatch):
    compiler = f"{keras.backend.backend()}_program"
    make, made = getattr(inference, compiler), []

    def failing_at_first(model, image_shape, half):
        made.append(model)
        return refuse if len(made) == 1 else make(model, image_shape, half)

    def refuse(images):
        raise ValueError("unknown custom call")

    monkeypatch.setattr(inference, compiler, failing_at_first)
    model = keras_tnt.DeiT(input_shape=(16, 16, 3), depth=1, embed_dim=8, num_heads=2, classes=5)
    predict = keras_tnt.compile_inference(model)
    images = keras.ops.convert_to_tensor(images[:2])
    with pytest.warns(UserWarning, match="slower.*unknown custom call"):
        result = predict(images)
    again = predict(images)  # does not warn again
    assert_equal([result, again], [compute(model, images)] * 2)


def test_images_of_another_size_raise(images):
    predict = keras_tnt.compile_inference(keras_tnt.TNT(**TINY))
    with pytest.raises(ValueError, match=r"shape \(batch, 16, 16, 3\).*\(11, 8, 16, 3\)"):
        predict(images[:, :8])


def test_max_batch_that_is_no_power_of_two_raises():
    with pytest.raises(ValueError, match="power of two"):
        keras_tnt.compile_inference(keras_tnt.TNT(**TINY), max_batch=6)


# === bfloat16 ===

BFLOAT16 = frozenset({"avx512_bf16"})


@pytest.fixture(scope="module")
def wide():
    """Returns a model, images, and its float32 predictions."""
    model = keras_tnt.TNT(**{**TINY, "outer_dim": 64, "inner_stride": 2, "qkv_bias": True})
    random = np.random.default_rng(0)
    for weight in model.weights:
        if weight.name in ("kernel", "bias"):
            weight.assign(weight + random.normal(scale=0.05, size=weight.shape))
    images = random.uniform(0, 255, (4, 16, 16, 3)).astype("float32")
    return model, images, compute(model, images)


@pytest.mark.slow
def test_bfloat16_precision_rounds_predictions_only(wide, monkeypatch):
    """Every processor can compute it, so the CPU features are mocked."""
    model, images, expected = wide
    monkeypatch.setattr(processor, "features", lambda: BFLOAT16)
    predict = keras_tnt.compile_inference(model, precision="bfloat16")
    found = predict(images)
    assert found.dtype == "float32"
    assert 1e-5 < np.abs(found - expected).max() < 2e-2
    policies = {layer.dtype_policy.name for layer in model._flatten_layers()}
    assert policies == {"float32"}
    np.testing.assert_array_equal(compute(model, images), expected)

    if keras.backend.backend() == "torch":  # torch would compile for another minute
        return
    # Later calls use the model's current weights.
    before = model.get_weights()
    for variable in model.trainable_variables:
        variable.assign(np.zeros(variable.shape))
    np.testing.assert_allclose(predict(images), 1 / 5, atol=1e-6)
    model.set_weights(before)


@pytest.mark.slow
def test_without_bfloat16_support_warns_and_uses_float32(wide, monkeypatch):
    model, images, expected = wide
    monkeypatch.setattr(processor, "features", lambda: frozenset({"avx2"}))
    with pytest.warns(UserWarning, match="no instructions for bfloat16.*float32 is computed"):
        predict = keras_tnt.compile_inference(model, precision="bfloat16")
    np.testing.assert_allclose(predict(images), expected, atol=1e-5)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "build",
    [
        lambda: keras_tnt.DeiT(input_shape=(16, 16, 3), depth=1, embed_dim=16, num_heads=2),
        lambda: keras_tnt.CaiT(input_shape=(32, 32, 3), depth=1, embed_dim=16, num_heads=2),
        lambda: keras_tnt.TNT(**TINY, legacy=True, squeeze_excite=True),
        pytest.param(
            lambda: keras_tnt.PyramidTNT(
                input_shape=(64, 64, 3),
                depths=(1, 1, 1, 1),
                outer_dims=(8, 8, 16, 16),
                inner_dims=(4, 4, 8, 8),
                outer_heads=(1, 2, 2, 2),
                inner_heads=(1, 1, 1, 2),
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["DeiT", "CaiT", "TNT", "PyramidTNT"],
)
def test_patch_layers_of_any_family_are_bfloat16(build, monkeypatch):
    monkeypatch.setattr(processor, "features", lambda: frozenset({"bf16"}))
    model = build()
    copy = half.in_bfloat16(model)
    images = np.random.default_rng(0).uniform(0, 255, (2, *model.input_shape[1:]))
    found, expected = compute(copy, images), compute(model, images)
    assert found.dtype == "float32"
    assert 0 < np.abs(found - expected).max() < 2e-2
    for layer in copy._flatten_layers():
        words = "/inner/" in (layer.path or "")  # layers without weights have no path
        changed = layer.dtype_policy.name == half.POLICY
        assert not (words and changed)
        if isinstance(layer, SelfAttention | blocks.MLP) and not words:
            assert changed


@pytest.mark.one_backend
def test_invalid_precision_raises():
    with pytest.raises(ValueError, match="one of float32, bfloat16. Received: 'int8'"):
        keras_tnt.compile_inference(keras_tnt.TNT(**TINY), precision="int8")
    mixed = keras_tnt.TNT(**TINY, dtype="mixed_bfloat16")
    with pytest.raises(ValueError, match="for models in float32.*policy .*mixed_bfloat16"):
        keras_tnt.compile_inference(mixed, precision="bfloat16")
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="attention and MLP of keras_tnt.*'.*' has none"):
        keras_tnt.compile_inference(plain, precision="bfloat16")


# === Program cache ===


@pytest.fixture
def exports(monkeypatch):
    """Returns a list of torch's exports, each of which is compiled."""
    import torch

    exported, export = [], torch.export.export
    monkeypatch.setattr(
        torch.export,
        "export",
        lambda *args, **more: (exported.append(args), export(*args, **more))[1],
    )
    return exported


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "torch", reason="of torch's programs")
def test_inductor_program_is_cached_for_the_next_process(tmp_path, monkeypatch, images, exports):
    from torch._dynamo.utils import counters

    from keras_tnt.kernels import torch_program

    model = keras_tnt.TNT(**{**TINY, "depth": 1}, dropout=0.5)
    expected = compute(model, images)
    counters.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def predict():
        predict = keras_tnt.compile_inference(model, max_batch=16)
        for count in (1, 2, 11):
            np.testing.assert_allclose(predict(images[:count]), expected[:count], atol=1e-5)
        return len(exports)

    assert predict() == 1 and counters["stats"]["unique_graphs"] == 1
    (kept,) = (tmp_path / "keras_tnt").glob("torch-*.safetensors")
    seeds = [v for v in model.variables if not any(v is weight for weight in model.weights)]
    for seed in seeds:  # seeds differ between processes
        seed.assign(seed + 1)
    assert seeds and predict() == 1  # found
    damaged = bytearray(kept.read_bytes())
    damaged[-10] ^= 1  # a weight
    kept.write_bytes(damaged)
    assert predict() == 2  # recompiled and rewritten
    monkeypatch.setattr(torch_program, "KEPT_BYTES", 1.5 * kept.stat().st_size)
    model.get_layer("head").bias.assign(np.arange(5))
    expected = compute(model, images)
    assert predict() == 3 and not kept.exists()  # replaced by that of other weights
    assert predict() == 3
    monkeypatch.setattr(processor, "features", frozenset)  # unknown CPU features
    assert predict() == 4


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="of JAX's programs")
def test_jax_program_is_cached_for_the_next_process(tmp_path, monkeypatch, images):
    import jax

    model = keras_tnt.DeiT(input_shape=(16, 16, 3), depth=1, embed_dim=8, num_heads=2, classes=5)
    expected, compiled = compute(model, images), []
    compile_it = jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda self: compiled.append(self) or compile_it(self)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def predict():
        np.testing.assert_allclose(
            keras_tnt.compile_inference(model, max_batch=16)(images), expected, atol=1e-5
        )
        return len(compiled)

    assert predict() == 1
    (kept,) = (tmp_path / "keras_tnt").glob("jax-*.bin")
    assert predict() == 1  # found
    damaged = bytearray(kept.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    kept.write_bytes(damaged)
    assert predict() == 2  # recompiled and rewritten
    assert predict() == 2
    monkeypatch.setattr(processor, "features", lambda: frozenset({"another"}))
    assert predict() == 3 and len(list(kept.parent.glob("jax-*.bin"))) == 2
    monkeypatch.setattr(processor, "features", frozenset)  # unknown CPU features
    assert predict() == 4
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(processor, "features", lambda: frozenset({"third"}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert predict() == 5
