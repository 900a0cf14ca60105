"""Checkpoints are loaded and saved exactly, or not at all with the reason."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import keras_tnt
from keras_tnt.weights.names import UNUSED
from tests.helpers import golden

ROOT = Path(__file__).parents[2]

TNT = {
    "depth": 2,
    "outer_dim": 16,
    "inner_dim": 8,
    "outer_heads": 2,
    "inner_heads": 2,
    "input_shape": (32, 32, 3),
    "classes": 5,
}
OTHERS = {"embed_dim": 16, "depth": 2, "num_heads": 2, "input_shape": (32, 32, 3), "classes": 5}
PYRAMID = {
    "depths": (1, 1, 1, 1),
    "outer_dims": (8, 16, 32, 32),
    "inner_dims": (4, 8, 16, 16),
    "outer_heads": (1, 2, 4, 4),
    "inner_heads": (1, 2, 4, 4),
    "input_shape": (128, 128, 3),
    "classes": 5,
}
MODELS = {
    "tnt": lambda **more: keras_tnt.TNT(**(TNT | more)),
    "tnt legacy": lambda **more: keras_tnt.TNT(**(TNT | {"legacy": True} | more)),
    "tnt with everything": lambda **more: keras_tnt.TNT(
        **(
            TNT
            | {
                "qkv_bias": True,
                "squeeze_excite": True,
                "distilled": True,
                "layer_scale": 0.1,
                "class_attention_depth": 1,
                "inner_blocks": (1,),
            }
            | more
        )
    ),
    "deit": lambda **more: keras_tnt.DeiT(**(OTHERS | more)),
    "deit distilled": lambda **more: keras_tnt.DeiT(**(OTHERS | {"distilled": True} | more)),
    "cait": lambda **more: keras_tnt.CaiT(**(OTHERS | more)),
    "pyramid": lambda **more: keras_tnt.PyramidTNT(**(PYRAMID | more)),
}


def values(model):
    return {v.path: keras.ops.convert_to_numpy(v) for v in model.variables}


def randomize(model):
    rng = np.random.default_rng(3)
    for variable in model.weights:
        if "float" in variable.dtype:
            variable.assign(rng.uniform(0.1, 1, variable.shape))
    return model


def assert_same(first, second):
    assert first.keys() == second.keys()
    for path in first:
        np.testing.assert_array_equal(first[path], second[path], err_msg=path)


def assert_same_predictions(first, second):
    images = np.random.default_rng(0).uniform(0, 255, (2, *first.input_shape[1:]))
    golden.assert_close(first.predict(images, verbose=0), second.predict(images, verbose=0), 1e-5)


def dense_layers(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.Dense)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.safetensors"


# === Round trips ===


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_round_trip_is_exact(name, path):
    model = randomize(MODELS[name]())
    keras_tnt.save_checkpoint(model, path)
    other = MODELS[name]()
    assert keras_tnt.load_checkpoint(other, path) is other
    assert_same(values(model), values(other))


@pytest.mark.parametrize("name", ["tnt_official", "tnt_legacy", "deit", "deit_distilled", "cait"])
def test_public_checkpoint_tensors_round_trip(name, path, tmp_path):
    reference = golden.load(name)
    model = golden_model(name, reference)
    keras_tnt.load_checkpoint(model, reference.save_checkpoint(path))
    keras_tnt.save_checkpoint(model, tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    expected = {k: v for k, v in reference.weights.items() if not UNUSED.search(k)}
    assert back.keys() == expected.keys()
    for tensor, value in expected.items():
        np.testing.assert_array_equal(back[tensor], value, err_msg=tensor)


def golden_model(name, reference):
    """Returns a model with the reference's architecture."""
    config = reference.config
    common = {
        "input_shape": reference.images.shape[1:],
        "classes": config["num_classes"],
        "depth": config["depth"],
    }
    if name.startswith("tnt"):
        return keras_tnt.TNT(
            outer_dim=config["embed_dim"],
            inner_dim=config["inner_dim"],
            outer_heads=config["num_heads_outer"],
            inner_heads=config["num_heads_inner"],
            legacy=config.get("legacy", False),
            **common,
        )
    options = {"embed_dim": config["embed_dim"], "num_heads": config["num_heads"], **common}
    if name == "cait":
        return keras_tnt.CaiT(**options)
    return keras_tnt.DeiT(distilled="distilled" in name, **options)


def test_float16_checkpoint_fills_a_float32_model(path, tmp_path):
    model = randomize(MODELS["tnt"]())
    keras_tnt.save_checkpoint(model, path)
    halves = {name: value.astype("float16") for name, value in load_file(path).items()}
    save_file(halves, tmp_path / "half.safetensors")
    other = keras_tnt.load_checkpoint(MODELS["tnt"](), tmp_path / "half.safetensors")
    for name, value in values(model).items():
        np.testing.assert_array_equal(
            values(other)[name], value.astype("float16").astype(value.dtype)
        )


@pytest.mark.slow
def test_bfloat16_model_round_trip(path):
    keras.config.set_dtype_policy("bfloat16")
    model = randomize(MODELS["tnt"]())
    keras_tnt.save_checkpoint(model, path)
    other = keras_tnt.load_checkpoint(MODELS["tnt"](), path)
    assert {v.dtype for v in other.trainable_variables} == {"bfloat16"}
    assert_same(
        {k: v.astype("float32") for k, v in values(model).items()},
        {k: v.astype("float32") for k, v in values(other).items()},
    )


def test_headless_model_ignores_the_heads(path):
    model = randomize(MODELS["deit distilled"]())
    keras_tnt.save_checkpoint(model, path)
    backbone = keras_tnt.load_checkpoint(MODELS["deit distilled"](include_top=False), path)
    full = values(model)
    assert_same(values(backbone), {k: v for k, v in full.items() if not k.startswith("head")})


def test_custom_head_is_saved_with_the_backbone(path):
    backbone = MODELS["tnt"](include_top=False, pooling="token")
    model = keras.Sequential([backbone, keras.layers.Dense(7, name="head")])
    keras_tnt.save_checkpoint(randomize(model), path)
    other = keras_tnt.load_checkpoint(MODELS["tnt"](classes=7, classifier_activation=None), path)
    assert_same_predictions(model, other)


def test_lora_update_is_merged_into_saved_kernels(path):
    model = MODELS["tnt"]()
    for layer in dense_layers(model):
        layer.enable_lora(2)
    randomize(model)
    keras_tnt.save_checkpoint(model, path)
    other = keras_tnt.load_checkpoint(MODELS["tnt"](), path)
    assert_same_predictions(model, other)


def test_loading_resets_lora(path):
    keras_tnt.save_checkpoint(randomize(MODELS["tnt"]()), path)
    plain, adapted = MODELS["tnt"](), MODELS["tnt"]()
    for layer in dense_layers(adapted):
        layer.enable_lora(2)
    randomize(adapted)
    for model in (plain, adapted):
        keras_tnt.load_checkpoint(model, path)
    assert_same_predictions(plain, adapted)


@pytest.mark.one_backend
def test_saving_is_atomic(path, monkeypatch):
    path.write_text("what was there before")

    def fill_the_disk(tensors, file, **_):
        Path(file).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", fill_the_disk)
    with pytest.raises(OSError, match="disk ran full while the checkpoint was written"):
        keras_tnt.save_checkpoint(MODELS["tnt"](), path)
    assert path.read_text() == "what was there before"
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.one_backend
def test_saving_with_another_extension_raises(tmp_path):
    with pytest.raises(ValueError, match="must end in .safetensors"):
        keras_tnt.save_checkpoint(MODELS["tnt"](), tmp_path / "weights.pth")


def test_quantized_model_raises(path):
    model = MODELS["tnt"]()
    keras_tnt.save_checkpoint(model, path)
    dense_layers(model)[0].quantize("int8")
    with pytest.raises(ValueError, match="is quantized"):
        keras_tnt.save_checkpoint(model, path)
    with pytest.raises(ValueError, match="is quantized"):
        keras_tnt.load_checkpoint(model, path)


@pytest.mark.one_backend
def test_layers_without_a_checkpoint_name_raise(path):
    backbone = MODELS["tnt"](include_top=False, pooling="token")
    model = keras.Sequential([backbone, keras.layers.Dense(7, name="flowers")])
    with pytest.raises(ValueError, match="/flowers/kernel'.*name='head'"):
        keras_tnt.save_checkpoint(model, path)
    with pytest.raises(ValueError, match="not built from one of keras_tnt's"):
        keras_tnt.save_checkpoint(keras.Sequential([keras.layers.Dense(3)]), path)


def test_custom_layers_around_the_model_are_not_changed(path):
    source = randomize(MODELS["tnt"]())
    keras_tnt.save_checkpoint(source, path)
    gray = keras.Input((32, 32, 1))
    colors = keras.layers.Conv2D(3, 1, name="colors")(gray)
    backbone = MODELS["tnt"](
        input_tensor=colors, input_shape=None, include_top=False, pooling="token", weights=path
    )
    model = keras.Sequential([backbone, keras.layers.Dense(3, name="flowers")])
    own = {k: v for k, v in values(model).items() if "flowers" in k or "colors" in k}
    assert len(own) == 4
    for build in (lambda: backbone, lambda: keras_tnt.load_checkpoint(model, path)):
        loaded, expected = values(build()), values(source)
        for variable in set(loaded) & set(expected):
            np.testing.assert_array_equal(loaded[variable], expected[variable], err_msg=variable)
        assert len(set(expected) - set(loaded)) == 2  # the head
    for variable, value in own.items():
        np.testing.assert_array_equal(values(model)[variable], value)


# === Mismatches ===

MISMATCHES = {
    "another variant": ("tnt", {"outer_dim": 32}, "dimension 16 and 2 blocks.*dimension 32"),
    "fewer blocks": ("tnt", {"depth": 3}, "2 blocks, the model is .* 3 blocks: another variant"),
    "classes": ("tnt", {"classes": 7}, "5 classes, the model 7: .*classes=5.*include_top=False"),
    "legacy model": ("tnt", {"legacy": True}, "does not have the biased projections.*legacy=False"),
    "legacy file": ("tnt legacy", {"legacy": False}, "timm's first port.*legacy=True"),
    "distilled model": (
        "deit",
        {"distilled": True},
        "does not have a distillation token.*distilled=False",
    ),
    "distilled file": ("deit distilled", {"distilled": False}, "token.*distilled=True"),
    "channels": ("deit", {"input_shape": (32, 32, 1)}, r"patch_embed.proj.weight is \(16, 3, 16"),
}


@pytest.mark.parametrize("case", MISMATCHES)
@pytest.mark.one_backend
def test_mismatch_raises_with_the_cause_and_changes_nothing(case, path):
    name, difference, message = MISMATCHES[case]
    keras_tnt.save_checkpoint(MODELS[name](), path)
    model = MODELS[name](**difference)
    before = values(model)
    with pytest.raises(ValueError, match="(?s)Nothing was loaded.*" + message):
        keras_tnt.load_checkpoint(model, path)
    assert_same(values(model), before)


@pytest.mark.one_backend
def test_checkpoint_of_another_family_raises(path):
    keras_tnt.save_checkpoint(MODELS["cait"](), path)
    tensors = {f"encoder.{name}": value for name, value in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(ValueError, match="another kind of model, or another program's names"):
        keras_tnt.load_checkpoint(MODELS["tnt"](), path)


@pytest.mark.one_backend
def test_checkpoint_without_a_head_raises(path):
    keras_tnt.save_checkpoint(MODELS["tnt"](include_top=False), path)
    with pytest.raises(ValueError, match="no classifier: .*include_top=False"):
        keras_tnt.load_checkpoint(MODELS["tnt"](), path)


@pytest.mark.one_backend
def test_missing_unused_and_mismatched_tensors_are_listed(path):
    keras_tnt.save_checkpoint(MODELS["tnt"](), path)
    tensors = load_file(path)
    tensors["foo.weight"] = np.zeros((2, 3), "float32")
    del tensors["norm.bias"]
    tensors["norm.weight"] = np.zeros(17, "float32")
    save_file(tensors, path)
    with pytest.raises(ValueError) as caught:
        keras_tnt.load_checkpoint(MODELS["tnt"](), path)
    lines = str(caught.value).splitlines()
    assert "  shape: norm.weight is (17,) in the file, (16,) in the model" in lines
    assert "  missing: norm.bias (16,)" in lines
    assert "  unused: foo.weight (2, 3)" in lines


@pytest.mark.one_backend
def test_at_most_ten_differences_are_listed(path):
    keras_tnt.save_checkpoint(MODELS["tnt"](), path)
    tensors = load_file(path)
    save_file(tensors | {f"extra.{i}": np.zeros(1, "float32") for i in range(25)}, path)
    with pytest.raises(ValueError) as caught:
        keras_tnt.load_checkpoint(MODELS["tnt"](), path)
    lines = str(caught.value).splitlines()
    assert sum("unused" in line for line in lines) == 10
    assert lines[-1].strip() == "and 15 more"


@pytest.mark.one_backend
def test_tensors_unused_by_the_forward_pass_are_ignored(path):
    keras_tnt.save_checkpoint(MODELS["tnt"](), path)
    save_file(load_file(path) | {"outer_tokens": np.zeros((1, 4, 16), "float32")}, path)
    keras_tnt.load_checkpoint(MODELS["tnt"](), path)


# === File paths as `weights` ===


@pytest.mark.parametrize("ending", [".safetensors", ".weights.h5", ".keras"])
@pytest.mark.parametrize("name", ["tnt", "deit distilled", "cait", "pyramid"])
def test_saved_file_as_weights_argument(name, ending, tmp_path):
    model = randomize(MODELS[name]())
    path = str(tmp_path / f"model{ending}")
    if ending == ".safetensors":
        keras_tnt.save_checkpoint(model, path)
    elif ending == ".keras":
        model.save(path)
    else:
        model.save_weights(path)
    assert_same(values(MODELS[name](weights=path)), values(model))


@pytest.mark.parametrize("ending", [".safetensors", ".weights.h5", ".keras"])
def test_saved_file_for_a_headless_model_at_another_resolution(ending, tmp_path):
    model = randomize(MODELS["tnt"]())
    path = str(tmp_path / f"model{ending}")
    if ending == ".safetensors":
        keras_tnt.save_checkpoint(model, path)
    elif ending == ".keras":
        model.save(path)
    else:
        model.save_weights(path)
    backbone = MODELS["tnt"](include_top=False, input_shape=(64, 48, 3), weights=path)
    full, loaded = values(model), values(backbone)
    assert loaded["patch_position/table"].shape[0] == 1 + 4 * 3
    for variable in loaded:
        if variable != "patch_position/table":
            np.testing.assert_array_equal(loaded[variable], full[variable], err_msg=variable)


def test_torch_file_as_weights_argument(tmp_path):
    torch = pytest.importorskip("torch")
    model = randomize(MODELS["tnt"]())
    keras_tnt.save_checkpoint(model, tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    nested = {"model": {f"module.{k}": torch.tensor(v) for k, v in tensors.items()}}
    torch.save(nested, tmp_path / "model.pth")
    assert_same(values(MODELS["tnt"](weights=tmp_path / "model.pth")), values(model))


# === Memory ===

PEAK = """
import sys
import numpy as np
import keras_tnt
from pathlib import Path

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

keras_tnt.DeiT(depth=1, weights=None)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model = keras_tnt.DeiTBase(weights=sys.argv[1])
print((status("VmHWM") - before) / (4 * model.count_params()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_does_not_copy_the_model(path):
    """Builds and loads DeiT-B, 346 MB, within 1.5 times its weights."""
    shapes = golden.checkpoints()["deit_base_patch16_224.fb_in1k"]["tensors"]
    save_file({name: np.ones(shape, "float32") for name, shape in shapes.items()}, path)
    result = subprocess.run(
        [sys.executable, "-c", PEAK, path],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1.5
