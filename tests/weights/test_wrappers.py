"""Checkpoints of wrapped models, and what training scripts save next to the weights."""

import argparse
import collections
import datetime
import decimal
import os
import pathlib
import types

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import keras_tnt
from keras_tnt.weights.files import open_tensors
from keras_tnt.weights.wrappers import without_wrappers

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.one_backend

W = np.arange(6, dtype="float32").reshape(2, 3)


def tiny():
    return keras_tnt.DeiT(
        input_shape=(16, 16, 3), patch_size=8, embed_dim=8, depth=1, num_heads=1, classes=3
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Returns a model, and its tensors by their names without a wrapper."""
    path = tmp_path_factory.mktemp("plain") / "plain.safetensors"
    keras.utils.set_random_seed(1)
    model = tiny()
    keras_tnt.save_checkpoint(model, path)
    return model, load_file(path)


def prefixed(tensors, prefix):
    return {prefix + name: torch.tensor(value) for name, value in tensors.items()}


def compiled_blocks(tensors):
    """Returns the tensors under the names of a model with `torch.compile` on each block."""
    return {
        name.replace("blocks.0.", "blocks.0._orig_mod."): torch.tensor(value)
        for name, value in tensors.items()
    }


WRAPPED = {
    "compiled": lambda t: prefixed(t, "_orig_mod."),
    "compiled_data_parallel": lambda t: {"model": prefixed(t, "module._orig_mod.")},
    "data_parallel_compiled": lambda t: {"state_dict": prefixed(t, "_orig_mod.module.")},
    "compiled_blocks": compiled_blocks,
    "averaged": lambda t: prefixed(t, "module.") | {"n_averaged": torch.tensor(3)},
    "averaged_data_parallel": lambda t: (
        prefixed(t, "module.module.") | {"module.n_averaged": torch.tensor([3])}
    ),
    "averaged_compiled": lambda t: {
        "model_state_dict": prefixed(t, "module._orig_mod.") | {"n_averaged": torch.tensor(3)}
    },
    "lightning": lambda t: {"state_dict": prefixed(t, "model."), "epoch": 1},
    "lightning_compiled": lambda t: {"state_dict": prefixed(t, "net._orig_mod.")},
    "lightning_with_a_loss": lambda t: {
        "state_dict": prefixed(t, "model.") | {"criterion.weight": torch.ones(3)},
        "pytorch-lightning_version": "2.5.0",
        "hyper_parameters": {"lr": 1e-3},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_path": "x.ckpt"}},
    },
    "deepspeed": lambda t: {"module": prefixed(t, ""), "global_steps": 7},
    "nested_twice": lambda t: {"model": {"state_dict": prefixed(t, "module.")}},
}


@pytest.mark.parametrize("ending", [".pth", ".ckpt"])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrapped_checkpoint_loads_as_plain_one(wrapped, ending, plain, tmp_path):
    model, tensors = plain
    path = tmp_path / f"weights{ending}"
    torch.save(WRAPPED[wrapped](tensors), path)
    loaded = keras_tnt.load_checkpoint(tiny(), path)
    for variable, expected in zip(loaded.weights, model.weights, strict=True):
        np.testing.assert_array_equal(variable.numpy(), expected.numpy())


OF_A_MODULE = {
    "backbone": lambda t: prefixed(t, "backbone.") | {"criterion.weight": torch.ones(3)},
    "student": lambda t: (
        prefixed(t, "student.") | {"teacher.conv1.weight": torch.ones(3, 3), "n": torch.ones(1)}
    ),
    "nested": lambda t: prefixed(t, "learner.net.") | {"learner.loss.weight": torch.ones(3)},
    "compiled": lambda t: prefixed(t, "encoder._orig_mod."),
}


@pytest.mark.parametrize("ending", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("module", OF_A_MODULE)
def test_checkpoint_of_a_module_loads_under_the_attribute_of_the_model(
    module, ending, plain, tmp_path
):
    model, tensors = plain
    path, saved = tmp_path / f"weights{ending}", OF_A_MODULE[module](tensors)
    if ending == ".ckpt":
        torch.save({"state_dict": saved, "pytorch-lightning_version": "2.5.0"}, path)
    else:
        save_file({name: value.numpy() for name, value in saved.items()}, path)
    loaded = keras_tnt.load_checkpoint(tiny(), path)
    for variable, expected in zip(loaded.weights, model.weights, strict=True):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(variable), keras.ops.convert_to_numpy(expected)
        )


def test_checkpoint_of_several_models_raises_with_their_prefixes(plain, tmp_path):
    path = tmp_path / "weights.ckpt"
    torch.save(prefixed(plain[1], "student.") | prefixed(plain[1], "ema.model."), path)
    with pytest.raises(ValueError, match=r"several models, under 'ema\.model\.', 'student\.'"):
        keras_tnt.load_checkpoint(tiny(), path)


def test_ema_of_a_compiled_model_loads(plain, tmp_path):
    _, tensors = plain
    twice = {name: 2 * value for name, value in tensors.items()}
    path = tmp_path / "weights.pth"
    torch.save(
        {
            "model": prefixed(tensors, "_orig_mod."),
            "model_ema": prefixed(twice, "module._orig_mod."),
        },
        path,
    )
    for ema, expected in ((False, tensors), (True, twice)):
        loaded = keras_tnt.load_checkpoint(tiny(), path, ema=ema)
        bias = keras.ops.convert_to_numpy(loaded.get_layer("norm").gamma)
        np.testing.assert_array_equal(bias, expected["norm.weight"])


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "model.", "model.module."])
def test_wrapped_safetensors_load_without_torch(prefix, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({f"{prefix}a.weight": W, f"{prefix}b": W + 1}, path)
    file = open_tensors(path)
    assert set(file.shapes) == {"a.weight", "b"}
    np.testing.assert_array_equal(file.read(["b"])[0], W + 1)


def test_layers_with_a_wrapper_name_keep_it():
    assert set(without_wrappers("x", ["model.a", "b"])) == {"model.a", "b"}
    assert set(without_wrappers("x", ["module.a", "net.b"])) == {"module.a", "net.b"}
    assert set(without_wrappers("x", ["a.model.b", "a.c"])) == {"a.model.b", "a.c"}


def test_two_tensors_of_one_name_raise():
    with pytest.raises(ValueError, match="holds 'a' twice, as '_orig_mod.a' and as 'a'"):
        without_wrappers("x", ["_orig_mod.a", "a"])


COMPANIONS = {
    "float64": np.float64(81.5),
    "float32": np.float32(0.25),
    "integer": np.int64(-3),
    "bool": np.bool_(True),
    "text": np.str_("best"),
    "array": np.arange(5),
    "random_state": np.random.RandomState(0).get_state(),
    "path": pathlib.Path("out") / "run",
    "windows_path": pathlib.PureWindowsPath("C:/out"),
    "namespace": argparse.Namespace(output=pathlib.Path("out"), best=np.float64(1.0)),
    "simple_namespace": types.SimpleNamespace(lr=0.1),
    "defaultdict": collections.defaultdict(list, loss=[1.0, np.float64(2.0)]),
    "nested_defaultdict": {"log": collections.defaultdict(dict, a={"b": 1})},
    "ordered": collections.OrderedDict(a=1),
    "counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2], maxlen=3),
    "date": datetime.datetime(2026, 1, 2, 3, 4),
    "set": {1, 2},
    "datetime64": np.datetime64("2026-01-02T03:04"),
    "timedelta64": np.timedelta64(5, "D"),
    "numpy_type": np.float32,
    "numpy_dtype": np.dtype("float32"),
    "frozenset": frozenset([1, 2]),
    "range": range(3),
    "slice": slice(1, 5),
    "decimal": decimal.Decimal("0.1"),
    "inert_in_a_set": {frozenset([1])},
    "empty_bytes": b"",
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("companion", COMPANIONS)
def test_other_contents_of_a_checkpoint_are_ignored(companion, zipped, tmp_path):
    path = tmp_path / "weights.pth"
    content = {"model": {"w": torch.tensor(W)}, "extra": COMPANIONS[companion]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    np.testing.assert_array_equal(open_tensors(path).read(["w"])[0], W)


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.mkdir, "posix.mkdir"),
        (eval, "eval"),
        (torch.nn.Linear, "torch.nn.modules.linear.Linear"),
    ],
)
def test_refused_global_is_named_and_not_called(function, name, tmp_path):
    path = tmp_path / "weights.pth"
    argument = str(tmp_path / "made") if function is os.mkdir else "1"
    torch.save({"model": {"w": torch.tensor(W)}, "extra": Calls(function, argument)}, path)
    with pytest.raises(ValueError, match=f"is refused: it holds the global '{name}'"):
        open_tensors(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("function", [bytes, list, dict, int])
def test_factories_are_never_called_with_arguments(function, tmp_path):
    path = tmp_path / "weights.pth"
    argument = 10**15 if function is bytes else "1" if function is int else []
    torch.save({"w": torch.tensor(W), "extra": Calls(function, argument)}, path)
    with pytest.raises(
        ValueError, match=f"refused: it calls the global 'builtins.{function.__name__}'"
    ):
        open_tensors(path)


def test_scalar_of_another_size_is_refused(tmp_path):
    scalar, (dtype, _) = np.float64(1).__reduce__()
    for data in (b"", b"\0" * 4, b"\0" * 800):
        path = tmp_path / "weights.pth"
        torch.save({"w": torch.tensor(W), "extra": Calls(scalar, dtype, data)}, path)
        with pytest.raises(ValueError, match="another size"):
            open_tensors(path)


def test_scalar_of_objects_is_refused(tmp_path):
    scalar, _ = np.float64(1).__reduce__()
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.tensor(W), "extra": Calls(scalar, np.dtype("O"), b"\0" * 8)}, path)
    with pytest.raises(ValueError, match="no number"):
        open_tensors(path)
