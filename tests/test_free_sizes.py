"""Models for any image size match models built for each size with the same weights."""

import functools
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import ops

import keras_tnt
from keras_tnt import inference, preprocessing
from keras_tnt.export.onnx_runtime import use_native
from keras_tnt.layers import PositionEmbedding, RelativePosition
from keras_tnt.layers.base import skip_weight_init
from keras_tnt.layers.grid import resampling_matrix
from tests.helpers.checks import BACKEND, assert_equal, compute, gradients, normal
from tests.helpers.golden import assert_close
from tests.helpers.tiny_models import tiny_of as tiny_family
from tests.helpers.tiny_models import tiny_tnt

ANY = (None, None)
# Size that the position tables are made for, and the sizes to test.
NATIVE, SIZES = (32, 48), ((32, 48), (48, 32), (64, 80))
# The C++ kernels support inner transformers of 16 words.
WORDS = {"patch_size": 16, "inner_stride": 4}
BUILD = {
    "tnt": functools.partial(tiny_tnt, **WORDS, distilled=True),
    "tnt_legacy": functools.partial(
        tiny_tnt, **WORDS, legacy=True, squeeze_excite=True, inner_blocks=(0,)
    ),
    "tnt_class_attention": functools.partial(
        tiny_tnt, **WORDS, class_attention_depth=1, layer_scale=0.5
    ),
    "deit": functools.partial(tiny_family, "deit_distilled"),
    "cait": functools.partial(tiny_family, "cait"),
    "pyramid_tnt": functools.partial(tiny_family, "pyramid_tnt"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Returns a function from a name to (free-size model, function from a size to its model)."""
    folder = tmp_path_factory.mktemp("weights")

    @functools.cache
    def make(name):
        path = folder / f"{name}.weights.h5"
        donor = BUILD[name](size=NATIVE)
        donor.set_weights([filled(v) for v in donor.weights])
        donor.save_weights(path)

        @functools.cache
        def of_size(size):
            return donor if size == NATIVE else BUILD[name](size=size, weights=path)

        free = BUILD[name](size=ANY, weights=path)
        free.weights_file = path
        return free, of_size

    return make


def filled(variable):
    """Returns values such that every weight affects the output."""
    scale = {"table": 1.0, "gamma": 0.1, "moving_variance": 0.1}.get(variable.name, 0.2)
    offset = 1 if variable.name in ("gamma", "moving_variance") else 0
    return offset + scale * normal(variable.shape)


def pixels(size, batch=2, channels=3):
    random = np.random.default_rng(sum(size))
    return random.uniform(0, 255, (batch, *size, channels)).astype("float32")


# === Equal outputs ===


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILD)
def test_free_size_model_matches_a_model_of_that_size(name, models):
    free, of_size = models(name)
    assert free.input_shape == (None, None, None, 3)
    for size in SIZES:
        images = pixels(size)
        expected = compute(of_size(size), images)
        assert np.ptp(expected) > 0.01
        assert_close(compute(free, images), expected, 1e-5)


@pytest.mark.parametrize("name", BUILD)
def test_gradients_match_a_model_of_that_size(name, models):
    """Gradients of a position table pass through the resampling."""
    free, of_size = models(name)
    size = SIZES[-1]
    images, fixed = pixels(size), of_size(size)
    found, expected = (gradients(model, model, [images]) for model in (free, fixed))
    layers = {v.path: layer for layer in fixed.layers for v in layer.trainable_variables}
    largest = max(np.ptp(gradient) for gradient in expected)
    tables = {v.path: layer for layer in free.layers for v in layer.trainable_variables}
    for variable, ours, theirs in zip(free.trainable_variables, found, expected, strict=True):
        path = variable.path
        if isinstance(tables[path], (PositionEmbedding, RelativePosition)):
            theirs = brought_back(theirs, layers[path], tables[path])
        # If the loss does not depend on a variable, such as a shift of all scores, only rounding
        # remains.
        error = np.abs(ours - theirs).max() / max(np.ptp(theirs), 1e-3 * largest)
        assert error < 2e-5, f"{path}: {error:.1e}"


def brought_back(gradient, layer, table):
    """Returns the gradient w.r.t. a table from that w.r.t. the resampled table."""
    if isinstance(layer, RelativePosition):
        new, old = (layer.table_sides(x.grid) for x in (layer, table))
        matrices = [resampling_matrix(*sides) for sides in zip(old, new, strict=True)]
        gradient = np.reshape(gradient, (-1, *new))
        gradient = np.einsum("nijkl,ia,jb,kc,ld->nabcd", gradient, *matrices)
        return gradient.reshape(table.table.shape)
    rows, columns = (
        resampling_matrix(*sides) for sides in zip(table.grid, layer.grid, strict=True)
    )
    prefix, dim = layer.prefix_tokens, gradient.shape[-1]
    places = np.reshape(gradient[prefix:], (*layer.grid, dim))
    places = np.einsum("ijd,ia,jb->abd", places, rows, columns).reshape(-1, dim)
    return np.concatenate([gradient[:prefix], places])


def test_table_is_not_resampled_on_its_own_grid():
    for layer in (PositionEmbedding((3, 2), 1), RelativePosition(2, (4, 6), 2)):
        layer.build((None, None, 8))
        tokens = np.zeros((2, 7, 8), "float32")
        grid = np.zeros((2, *layer.grid), "float32")
        assert_equal(layer(tokens, grid)[0], layer.table)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="the other backends know every size")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", BUILD)
def test_graph_supports_unknown_sizes(name, compiled, models):
    import tensorflow as tf

    if compiled and name not in ("tnt", "pyramid_tnt"):
        pytest.skip("the same operations")
    free, of_size = models(name)
    images = tf.TensorSpec((None, None, None, 3))
    run = tf.function(
        lambda x: free(x, training=False), input_signature=[images], jit_compile=compiled
    )
    for size in SIZES:
        assert_close(run(pixels(size)), compute(of_size(size), pixels(size)), 1e-5)
    if not compiled:
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"nearest size that fits is"):
            run(pixels((33, 47)))


@pytest.mark.parametrize("name", ["tnt", "pyramid_tnt"])
def test_channels_first_models_support_any_size(name, models):
    free, _ = models(name)
    images = pixels(SIZES[1])
    expected = compute(free, images)
    keras.config.set_image_data_format("channels_first")
    turned = BUILD[name](size=ANY, weights=free.weights_file)
    assert turned.input_shape == (None, 3, None, None)
    assert_close(compute(turned, np.transpose(images, (0, 3, 1, 2))), expected, 1e-5)


# === Invalid sizes ===


@pytest.mark.parametrize("name", ["tnt", "tnt_legacy", "deit", "pyramid_tnt"])
def test_size_not_divisible_by_the_patch_raises_with_the_nearest(name, models):
    free, _ = models(name)
    side = keras_tnt.anatomy(free).patch_size
    wrong = pixels((3 * side + 1, 2 * side))
    for call in (free, free.predict_on_batch, keras_tnt.compile_inference(free)):
        with pytest.raises(ValueError, match=f"multiples of {side}.*fits is {3 * side}x{2 * side}"):
            call(wrong)


def test_fit_error_names_the_nearest_size(models):
    free, _ = models("deit")
    free.compile("sgd", "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="nearest size that fits is 48x32"):
        free.fit(pixels((47, 33)), np.zeros(2), verbose=0)


def test_image_with_too_few_patches_to_pool_raises(models):
    free, _ = models("pyramid_tnt")
    with pytest.raises(
        ValueError, match=r"at least 2x2 patches for pooling, got 1x4.*larger images"
    ):
        free(pixels((8, 32)))


@pytest.mark.one_backend
def test_invalid_input_shape_raises_at_construction():
    for shape, said in (
        ((None, None, None), r"\(height, width, channels\), of which height and width may be None"),
        ((None, 0, 3), "three sizes"),
        ((None, 40, 3), r"multiples of 16.*fits is anyx48"),
    ):
        with pytest.raises(ValueError, match=said):
            keras_tnt.DeiT(input_shape=shape)


# === Files ===


@pytest.mark.parametrize("name", ["tnt", "pyramid_tnt"])
def test_files_are_compatible_with_models_of_one_size(name, models, tmp_path):
    free, of_size = models(name)
    native, other = of_size(NATIVE), of_size(SIZES[-1])
    grid = keras_tnt.anatomy(native).grid
    image = keras_tnt.anatomy(free).image
    assert (image.height, image.width, image.native_size) == (None, None, NATIVE)

    path = tmp_path / "free.weights.h5"
    free.save_weights(path)
    for layer, value in zip(other.layers, weights_at(other, path), strict=True):
        for variable, found in zip(layer.variables, value, strict=True):
            assert_close(variable, found, 1e-5)

    free.save(tmp_path / "free.keras")
    loaded = keras.models.load_model(tmp_path / "free.keras")
    images = pixels(SIZES[-1])
    expected = compute(free, images)
    assert_close(compute(loaded, images), expected, 1e-6)

    # From other files, tables take the grid of the file, if it is square.
    square = of_size((64, 64))
    keras_tnt.save_checkpoint(square, tmp_path / "square.safetensors")
    square.save(tmp_path / "square.keras")
    for file in ("square.safetensors", "square.keras"):
        copy = BUILD[name](size=ANY, weights=tmp_path / file)
        assert keras_tnt.anatomy(copy).image.native_size == (64, 64)
        assert [v.shape for v in copy.weights] == [v.shape for v in square.weights]
    assert grid == keras_tnt.anatomy(native).grid


def weights_at(model, path):
    """Returns each layer's variables before zeroing the model's weights and loading a file."""
    before = model.get_weights()
    expected = [[np.array(v) for v in map(ops.convert_to_numpy, x.variables)] for x in model.layers]
    model.set_weights([np.zeros_like(w) for w in before])
    model.load_weights(path)
    return expected


def test_bundle_of_a_free_size_model_round_trips(models, tmp_path):
    free, _ = models("tnt")
    keras_tnt.save_pretrained(free, tmp_path / "bundle")
    copy = keras_tnt.load_pretrained(tmp_path / "bundle")
    assert copy.input_shape == (None, None, None, 3)
    assert keras_tnt.anatomy(copy).image.native_size == NATIVE
    images = pixels(SIZES[1])
    assert_close(compute(copy, images), compute(free, images), 1e-6)


@pytest.mark.one_backend
def test_position_tables_have_the_size_of_the_variant():
    with skip_weight_init():
        for name, size in (("deit_tiny", 224), ("pyramid_tnt_tiny", 192), ("cait_xxs24", 224)):
            model = keras_tnt.create_model(name, weights=None, input_shape=(None, None, 3))
            assert keras_tnt.anatomy(model).image.native_size == (size, size)


# === Uses of the models ===


@pytest.mark.parametrize("name", ["tnt", "pyramid_tnt"])
def test_inspection_uses_the_grid_of_the_images(name, models):
    free, of_size = models(name)
    size = SIZES[-1]
    fixed, images = of_size(size), pixels(size, batch=1)
    inspection = keras_tnt.inspection
    found, expected = (inspection.attention_maps(model, images) for model in (free, fixed))
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert_close(found[key], value, 1e-5)
    rollouts = (inspection.attention_rollout(model, images) for model in (free, fixed))
    assert_close(*rollouts, 1e-5)
    for level in ("patches", "words"):
        maps = (inspection.relevance(model, images, 1, level=level) for model in (free, fixed))
        assert_close(*maps, 1e-4)
    for ours, theirs in zip(
        *(inspection.feature_maps(model)(images) for model in (free, fixed)), strict=True
    ):
        assert ours.shape == theirs.shape
        assert_close(ours, theirs, 1e-5)


def test_headless_free_size_model_gives_a_map(models):
    free, _ = models("tnt")
    bare = BUILD["tnt"](size=ANY, include_top=False, weights=free.weights_file)
    assert bare.output_shape == (None, None, None, 16)
    fixed = BUILD["tnt"](size=SIZES[-1], include_top=False, weights=free.weights_file)
    images = pixels(SIZES[-1])
    expected = compute(fixed, images)
    assert expected.shape == (2, 4, 5, 16)
    assert_close(compute(bare, images), expected, 1e-5)
    backbone = keras_tnt.backbone(bare)
    assert backbone(pixels((64, 96)))["P5"].shape == (2, 2, 3, 16)
    # 4x5 patches of 16 pixels cannot be halved.
    with pytest.raises(ValueError, match="multiples of 32. Received: 64x80.*64x96"):
        backbone(images)


def test_fit_supports_batches_of_any_size(models):
    model = BUILD["deit"](size=ANY, weights=models("deit")[0].weights_file)
    before = model.get_weights()
    model.compile("sgd", "sparse_categorical_crossentropy")
    losses = [model.train_on_batch(pixels(size), np.array([0, 1])) for size in SIZES]
    assert np.all(np.isfinite(losses))
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.any(old != new)
    assert np.isfinite(model.evaluate(pixels(SIZES[0]), np.array([0, 1]), verbose=0))


@pytest.mark.slow
def test_compiled_model_caches_at_most_max_sizes_programs(models, monkeypatch):
    free, of_size = models("tnt")
    made = []
    make = inference.with_second_choice
    monkeypatch.setattr(
        inference, "with_second_choice", lambda *told: made.append(told[2]) or make(*told)
    )
    predict = keras_tnt.compile_inference(free, max_sizes=1)
    for size in (NATIVE, SIZES[1], SIZES[1]):
        for batch in (1, 3):
            expected = compute(of_size(size), pixels(size, batch))
            assert_close(predict(pixels(size, batch)), expected, 1e-5)
    assert made == [(*NATIVE, 3), (*SIZES[1], 3)]
    with pytest.raises(ValueError, match=r"`max_sizes` must be a positive integer. Received: 0"):
        keras_tnt.compile_inference(free, max_sizes=0)


def test_load_image_uses_the_native_size(models):
    free, of_size = models("deit")
    picture = np.random.default_rng(0).integers(0, 256, (50, 90, 3), "uint8")
    loaded = keras_tnt.load_image(picture, free)
    assert_equal(loaded, keras_tnt.load_image(picture, of_size(NATIVE)))


@pytest.mark.parametrize("kind", ["float32", "uint8", "tensor"])
def test_padding_adds_the_mean_color_below_and_to_the_right(kind, models):
    free, _ = models("deit")
    images = np.random.default_rng(0).integers(0, 256, (2, 33, 48, 3), "uint8")
    given = images if kind == "uint8" else images.astype("float32")
    padded = keras_tnt.pad_to_fit(ops.convert_to_tensor(given) if kind == "tensor" else given, free)
    padded = ops.convert_to_numpy(padded)
    assert padded.shape == (2, 48, 48, 3) and padded.dtype == given.dtype
    assert_equal(padded[:, :33], given)
    mean = 255 * np.array(keras_tnt.anatomy(free).image.mean)
    wanted = mean.round() if kind == "uint8" else mean
    np.testing.assert_allclose(padded[:, 33:], np.broadcast_to(wanted, (2, 15, 48, 3)), rtol=1e-6)
    one = keras_tnt.pad_to_fit(given[0], free)
    assert_equal(one, padded[0])
    assert keras_tnt.pad_to_fit(one, free) is one


def test_padding_of_models_of_other_kinds(models):
    pyramid, of_size = models("pyramid_tnt")
    assert keras_tnt.pad_to_fit(pixels((7, 41)), pyramid).shape == (2, 16, 48, 3)
    fixed = of_size(NATIVE)
    assert keras_tnt.pad_to_fit(pixels((30, 48)), fixed).shape == (2, *NATIVE, 3)
    with pytest.raises(ValueError, match="Received larger ones"):
        keras_tnt.pad_to_fit(pixels((33, 48)), fixed)
    with pytest.raises(ValueError, match="or a batch of them"):
        keras_tnt.pad_to_fit(np.zeros((32, 32, 4)), pyramid)
    outside = BUILD["deit"](size=ANY, include_preprocessing=False)
    assert_equal(keras_tnt.pad_to_fit(np.ones((15, 16, 3)), outside)[15], np.zeros((16, 3)))
    keras.config.set_image_data_format("channels_first")
    turned = BUILD["deit"](size=ANY)
    assert keras_tnt.pad_to_fit(np.zeros((3, 20, 16)), turned).shape == (3, 32, 16)
    assert keras_tnt.pad_to_fit(np.zeros((3, 16, 20)), turned).shape == (3, 16, 32)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the other backends know every size")
def test_padding_in_a_graph_need_not_know_the_size(models):
    import tensorflow as tf

    free, _ = models("deit")
    given = pixels((33, 48))
    pad = tf.function(lambda images: keras_tnt.pad_to_fit(images, free))
    pad = pad.get_concrete_function(tf.TensorSpec((2, None, None, 3)))
    assert_equal(pad(tf.constant(given)), keras_tnt.pad_to_fit(given, free))


@pytest.mark.one_backend
def test_the_next_side_has_the_patches_that_the_stages_pool():
    def next_side(side, multiple, *blocks):
        blocks = [SimpleNamespace(reduction=r, stage=stage) for r, stage in blocks]
        found = SimpleNamespace(blocks=blocks, image=SimpleNamespace(multiple_of=multiple))
        return preprocessing.fitting_side(found, side, None)

    # A block that pools 3x3 patches of a second stage needs three of them, so at least five
    # patches.
    assert next_side(9, 8, (4, 0), (3, 1)) == 40
    assert next_side(41, 8, (4, 0), (3, 1)) == 48
    assert next_side(7, None, (1, 0)) == 7


# === Exports ===


@pytest.mark.slow
@pytest.mark.one_backend
def test_onnx_runs_at_every_size(models, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    for name in ("tnt", "pyramid_tnt"):
        free, of_size = models(name)
        path = keras_tnt.export.onnx(free, tmp_path / f"{name}.onnx")
        plain = onnxruntime.InferenceSession(path)
        assert plain.get_inputs()[0].shape == ["batch", "height", "width", 3]
        proto = onnx.load(path)
        use_native(proto, "keras_tnt")
        count = [node.op_type for node in proto.graph.node].count("InnerTransformer")
        assert count == 2, name
        for session in (plain, keras_tnt.export.onnx_session(path)):
            for size in SIZES:
                for batch in (1, 3):
                    images = pixels(size, batch)
                    (found,) = session.run(["probabilities"], {"images": images})
                    assert_close(found, compute(of_size(size), images), 1e-5)


@pytest.mark.slow
def test_saved_model_runs_at_every_size(models, tmp_path):
    pytest.importorskip("tensorflow_serving")
    runtimes = pytest.importorskip("tests.helpers.saved_model_runtimes")
    free, of_size = models("tnt")
    path = keras_tnt.export.saved_model(free, tmp_path / "tnt", signatures=["serving_default"])
    session = runtimes.CSession(path)
    for size in SIZES:
        for batch in (1, 3):
            images = pixels(size, batch)
            given = {"serving_default_images:0": images}
            outputs = [f"StatefulPartitionedCall:{i}" for i in range(2)]
            found = session.run(given, outputs)
            expected = compute(of_size(size), images)
            assert min(np.abs(x - expected).max() for x in found) < 1e-5 * np.ptp(expected)
    with pytest.raises(RuntimeError, match="nearest size that fits is 32x48"):
        session.run({"serving_default_images:0": pixels((33, 47))}, outputs)


@pytest.mark.one_backend
def test_export_formats_with_fixed_sizes_raise(models, tmp_path, monkeypatch):
    monkeypatch.setattr("keras_tnt.export.edge.require", lambda *_, **__: None)
    with pytest.raises(ValueError, match="takes images of any size, and such a file is for one"):
        keras_tnt.export.litert(models("deit")[0], tmp_path / "model.tflite")
