"""`python savedmodels/export.py` exports runs and files, and rejects invalid input early."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow_serving")

import keras_tnt
from training.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent.parent


def load_command():
    spec = importlib.util.spec_from_file_location("command", ROOT / "savedmodels" / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


command = load_command()


def tiny():
    return keras_tnt.TNT(
        input_shape=(32, 32, 3), classes=3, outer_dim=16, inner_dim=8, depth=1, outer_heads=2,
        inner_heads=2, name="tiny",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.one_backend
def test_training_run_is_exported(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    tiny().save(run / "final.keras")
    labels = tmp_path / "labels.txt"
    labels.write_text("ant\nbee\ncat\n", encoding="utf-8")
    command.main(
        [
            f"--run={run}",
            f"--directory={tmp_path / 'served'}",
            f"--onnx={tmp_path / 'tiny.onnx'}",
            f"--labels={labels}",
            "--signatures=serving_default,classify",
        ]
    )
    said = capsys.readouterr().out
    assert f"SavedModel, verified: {tmp_path / 'served' / '1'}" in said
    assert "the same best class for 100% of 6 images" in said
    version = tmp_path / "served" / "1"
    assert (version / "assets" / "labels.txt").read_text() == "ant\nbee\ncat\n"
    card = json.loads((version / "assets.extra" / "model.json").read_text())
    assert card["labels"] == ["ant", "bee", "cat"]
    assert card["weights"] == f"run {run}, final"


@pytest.mark.one_backend
def test_better_weights_of_a_run_are_exported_by_default(tmp_path):
    models = {name: tiny() for name in ("final", "final_ema", "best")}
    for name, model in models.items():
        model.get_layer("head").bias.assign([0.0, 1.0, float(len(name))])
    models["final"].save(tmp_path / "final.keras")
    with pytest.raises(ValueError, match="holds no final_ema.keras: the run had no --ema"):
        command.load_checkpoint_of(str(tmp_path), "final_ema")
    models["final_ema"].save(tmp_path / "final_ema.keras")
    (tmp_path / "checkpoints").mkdir()
    best = {f"model/{v.path}": v for v in models["best"].weights}
    Checkpoints(tmp_path / "checkpoints", best, keep=1).save(1, {"healthy": 1}, best=True)
    for name in models:
        found = command.load_checkpoint_of(str(tmp_path), name)
        for ours, theirs in zip(found.get_weights(), models[name].get_weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert command.better(tmp_path) == "final"
    (tmp_path / "results.json").write_text(json.dumps({"better": "final_ema"}))
    assert command.better(tmp_path) == "final_ema"
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="results.json is damaged"):
        command.better(tmp_path)


@pytest.mark.one_backend
def test_damaged_or_mismatched_best_weights_raise(tmp_path):
    tiny().save(tmp_path / "final.keras")
    with pytest.raises(ValueError, match="holds no checkpoints/best.safetensors"):
        command.load_checkpoint_of(str(tmp_path), "best")
    (tmp_path / "checkpoints").mkdir()
    variables = {f"model/{v.path}": v for v in tiny().weights}
    Checkpoints(tmp_path / "checkpoints", variables, keep=1).save(1, {"healthy": 1}, best=True)
    path = tmp_path / "checkpoints" / "best.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="best.safetensors has a wrong checksum"):
        command.load_checkpoint_of(str(tmp_path), "best")
    other = dict(list(variables.items())[1:])
    Checkpoints(tmp_path / "checkpoints", other, keep=1).save(2, {"healthy": 2}, best=True)
    with pytest.raises(ValueError, match="1 of .* tensors are missing"):
        command.load_checkpoint_of(str(tmp_path), "best")


@pytest.mark.slow
@pytest.mark.one_backend
def test_no_saved_model_writes_only_the_onnx_file(tmp_path, capsys):
    tiny().save(tmp_path / "tiny.keras")
    served, onnx = tmp_path / "served", tmp_path / "tiny.onnx"
    arguments = [f"--model={tmp_path / 'tiny.keras'}", f"--directory={served}", f"--onnx={onnx}"]
    command.main([*arguments, "--no_saved_model"])
    said = capsys.readouterr().out
    assert "SavedModel" not in said and str(served) not in said
    assert f"ONNX, verified: {onnx}" in said
    assert sorted(os.listdir(tmp_path)) == ["tiny.keras", "tiny.onnx"]


@pytest.mark.one_backend
def test_invalid_arguments_are_errors(tmp_path, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit) as stopped:
            command.main(list(arguments))
        return str(stopped.value.code) + capsys.readouterr().err

    assert "holds no final.keras" in refused(f"--run={tmp_path}")
    assert "there is no file nowhere.keras" in refused("--model=nowhere.keras")
    assert "there is no file nowhere.txt" in refused("--model=TNTTiny", "--labels=nowhere.txt")
    assert "There is no model 'TNTHuge'. There are: tnt_tiny" in refused("--model=TNTHuge")
    assert "leaves nothing to do" in refused("--model=TNTTiny", "--no_saved_model")
    assert "not allowed with argument" in refused("--model=TNTTiny", "--run=x")
    assert "invalid choice: 'int4'" in refused("--model=TNTTiny", "--precision=int4")


@pytest.mark.one_backend
@pytest.mark.parametrize("value", ["none", "None", ""])
def test_weights_none_are_random_ones(value):
    options = command.parse(["--model=DeiTTiny", f"--weights={value}", "--classes=3"])
    command.check(options)
    model, weights = command.load(options)
    assert model.output_shape == (None, 3)
    assert weights == "none, random values"


@pytest.mark.one_backend
def test_empty_weights_count_as_given(tmp_path):
    (tmp_path / "final.keras").write_text("")
    for source in (f"--run={tmp_path}", f"--model={tmp_path / 'final.keras'}"):
        with pytest.raises(SystemExit, match="leave out --weights"):
            command.check(command.parse([source, "--weights="]))


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--modle=x", "There is no option --modle. Did you mean --model?"),
        ("--pretrained", "There is no option --pretrained. Did you mean --weights?"),
        ("--lr=1", "There is no option --lr. "),
        ("--Image-Size=1", "Did you mean --image_size?"),
    ],
)
@pytest.mark.parametrize("others", [[], ["--model=TNTSmall"]])
def test_unknown_option_suggests_the_closest(option, message, others, capsys):
    with pytest.raises(SystemExit) as ended:
        command.parse([option, *others])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model=tnt_s_patch16_224"],
            "Type --model=tnt_small --weights=tnt_s_patch16_224.in1k.",
        ),
        (
            ["--model=tnt_s_legacy_patch16_224", "--weights=none"],
            "Type --model=tnt_small --weights=none.",
        ),
        (["--model=TNTSmall", "--weights=nowhere"], "--weights must be none, 'imagenet', a name "),
        (["--model=TNTTiny", "--weights=imagenet"], "Use --weights=none for random initialization"),
    ],
)
def test_messages_name_flags(options, message):
    with pytest.raises((SystemExit, ValueError)) as error:
        command.load(command.parse(options))
    printed = str(error.value)
    if not isinstance(error.value, SystemExit):
        printed = command.with_flags(error.value)
    assert message in printed
    assert "create_model" not in printed


@pytest.mark.slow
@pytest.mark.one_backend
def test_export_error_is_one_line(tmp_path):
    model = tmp_path / "tiny.keras"
    tiny().save(model)
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, ROOT / "savedmodels" / "export.py", f"--model={model}",
         f"--directory={tmp_path / 'file'}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("export.py: ")
    assert "is a file" in done.stderr


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "content", ["FIFO", b"\xff\xfe", b"[" * 200_000, b'{"better": "../x"}', b"3"]
)
def test_invalid_results_file_raises(content, tmp_path):
    put(tmp_path / "results.json", content)
    with pytest.raises(ValueError, match=r"results\.json"):
        command.better(str(tmp_path))


@pytest.mark.one_backend
@pytest.mark.parametrize("content", ["FIFO", b"\xff\xfe"])
def test_invalid_labels_file_raises(content, tmp_path):
    put(tmp_path / "labels.txt", content)
    with pytest.raises(ValueError, match=r"labels\.txt"):
        command.read_labels(str(tmp_path / "labels.txt"))


def put(path, content):
    if content == "FIFO":
        os.mkfifo(path)
    else:
        path.write_bytes(content)


@pytest.mark.one_backend
def test_tilde_expands_to_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for argument in ("--model=~/none.keras", "--run=~/none"):
        with pytest.raises(SystemExit, match=f"{tmp_path}/none"):
            command.main([argument])
