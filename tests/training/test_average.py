"""Checkpoint averaging: selection of files, the mean compared with NumPy, and errors."""

import importlib.util
import json
import os
from pathlib import Path

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

from training import average, checkpoint, configuration, evaluate, models

ROOT = Path(__file__).parent.parent.parent
PYRAMID = (
    '{"depths": [1, 1], "outer_dims": [8, 8], "inner_dims": [2, 2], "outer_heads": [2, 2], '
    '"inner_heads": [1, 1], "reductions": [1, 1]}'
)
STEPS = (4, 8, 12, 16)
ACCURACIES = {4: 0.3, 8: 0.7, 12: 0.5, 16: 0.6}


def fill(model, seed):
    random = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(random.normal(size=variable.shape).astype("float32") ** 2)


def make_run(run, keep_best=2, ema=True, model="pyramid_tnt", model_args=PYRAMID, **values):
    """Writes the files of a run with four evaluations and a model with batch normalization."""
    values |= {"model": model, "model_args": model_args, "image_size": 32, "classes": 10}
    config = configuration.make("digits", workdir=str(run), **values)
    built = models.build(config, 10)
    variables = {f"model/{v.path}": v.value for v in built.weights}
    other = models.build(config, 10)
    if ema:
        variables |= {f"ema/{v.path}": v.value for v in other.trainable_weights}
    saved = checkpoint.Checkpoints(run / "checkpoints", variables, keep=3, keep_best=keep_best)
    run.mkdir(parents=True)
    ranked, best = [], -1.0
    for step in STEPS:
        fill(built, step)
        fill(other, 100 + step)
        accuracy = ACCURACIES[step]
        ranked = sorted([*ranked, [accuracy, step]], reverse=True)[:keep_best]
        results = {"accuracy": accuracy} | ({"ema_accuracy": 1 - accuracy} if ema else {})
        notes = {"healthy": step - 1, "results": results, "ranked": ranked}
        saved.save(step, notes, best=accuracy > best)
        best = max(accuracy, best)
    record = {"config": vars(config), "classes": 10, "label_names": None}
    (run / "config.json").write_text(json.dumps(record))
    return built


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("average") / "run"
    make_run(run)
    return run


def numpy_mean(run, names, ema=False):
    """Returns the mean in float64 of a run's files, by variable path."""
    files = [load_file(run / "checkpoints" / f"{name}.safetensors") for name in names]
    means = {}
    for name in files[0]:
        kind, _, path = name.partition("/")
        if kind != "model":
            continue
        source = f"ema/{path}" if ema and f"ema/{path}" in files[0] else name
        means[path] = np.mean([file[source].astype("float64") for file in files], axis=0)
    return means


def assert_holds(run, means):
    model = keras.models.load_model(run / "averaged.keras")
    assert {v.path for v in model.weights} == set(means)
    for variable in model.weights:
        assert variable.dtype == "float32"
        np.testing.assert_array_equal(
            variable.numpy(), means[variable.path].astype("float32"), err_msg=variable.path
        )
    return model


@pytest.mark.parametrize("ema", [False, True])
def test_last_checkpoints_are_averaged_with_moving_statistics(whole, ema):
    result = average.average(whole, last=3, ema=ema)
    names = [f"step_{step:09d}" for step in (8, 12, 16)]
    means = numpy_mean(whole, names, ema)
    assert any("moving_variance" in path for path in means)
    model = assert_holds(whole, means)
    other = models.build_plain(evaluate.make_config({}, str(whole)), 10, None)
    other.load_weights(whole / "averaged.weights.h5")
    for first, second in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(first.numpy(), second.numpy())
    assert sorted(result["steps"]) == [8, 12, 16] and result["ema"] is ema
    assert json.loads((whole / "averaged.json").read_text()) == result
    assert result["results"] is None


def test_last_checkpoints_leave_out_the_untrained_step_0(tmp_path):
    run = tmp_path / "run"
    make_run(run)
    checkpoints = run / "checkpoints"
    os.rename(
        checkpoints / "step_000000008.safetensors", checkpoints / "step_000000000.safetensors"
    )
    paths = average.choose(run, 2, None, [], ema=False)
    assert [checkpoint.step_of(path) for path in paths] == [16, 12]
    message = r"2 last checkpoints \(steps 12, 16, without the untrained step 0\)"
    with pytest.raises(ValueError, match=message):
        average.average(run, last=3)


def test_best_selects_the_best_evaluations(whole):
    assert average.average(whole, best=2)["steps"] == [8, 16]
    assert_holds(whole, numpy_mean(whole, ["step_000000008", "step_000000016"]))
    # Of the two retained checkpoints, the one with the better accuracy of the moving average.
    assert average.average(whole, best=1, ema=True)["steps"] == [16]


def test_sums_are_computed_in_float64(tmp_path, whole):
    """In float32 the small values would be lost next to the large one."""
    config = evaluate.make_config({}, str(whole))
    model = models.build_plain(config, 10, None)
    paths = []
    for number, value in enumerate([2.0**24, 1.0, 1.0, 2.0]):
        for variable in model.weights:
            variable.assign(np.full(variable.shape, value, "float32"))
        paths.append(tmp_path / f"{number}.weights.h5")
        model.save_weights(paths[-1])
    means, steps = average.average_files(paths, model, ema=False)
    assert steps == [None] * 4
    assert all((mean == np.float32((2.0**24 + 4) / 4)).all() for mean in means.values())


def test_files_of_different_formats_are_averaged(whole, tmp_path):
    models.write_model(
        keras.models.load_model(whole / "averaged.keras")
        if (whole / "averaged.keras").exists()
        else models.build_plain(evaluate.make_config({}, str(whole)), 10, None),
        str(tmp_path),
        "mine",
    )
    first = whole / "checkpoints" / "step_000000012.safetensors"
    files = [str(first), str(tmp_path / "mine.keras"), str(tmp_path / "mine.weights.h5")]
    result = average.average(str(whole), files=files)
    assert result["steps"] == [12, None, None]
    model = keras.models.load_model(tmp_path / "mine.keras")
    mine = {v.path: v.numpy().astype("float64") for v in model.weights}
    tensors = load_file(first)
    assert_holds(whole, {p: (tensors[f"model/{p}"] + 2 * mine[p]) / 3 for p in mine})


@pytest.mark.slow
def test_average_is_evaluated_and_exported_by_name(whole):
    result = average.average(whole, last=2, evaluate_with={"batch_size": 120})
    assert result["results"]["images"] == 360
    again = evaluate.evaluate({"batch_size": 120}, run=str(whole), checkpoint="averaged")
    assert again["accuracy"] == result["results"]["accuracy"]
    spec = importlib.util.spec_from_file_location("command", ROOT / "savedmodels" / "export.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    command.check(command.parse([f"--run={whole}", "--checkpoint=averaged"]))
    loaded = command.load_checkpoint_of(str(whole), "averaged")
    assert_holds(whole, {v.path: v.numpy() for v in loaded.weights})


def test_missing_average_error_names_the_command(tmp_path):
    run = tmp_path / "run"
    make_run(run)
    with pytest.raises(ValueError, match="holds no averaged.weights.h5: python training/average.p"):
        evaluate.evaluate({}, run=str(run), checkpoint="averaged")


def make_distilled_run(run, preprocessing):
    sizes = '{"depth": 1, "embed_dim": 8, "num_heads": 2}'
    teacher = {"distill": "hard", "teacher": "absent.keras", "teacher_preprocessing": preprocessing}
    make_run(run, model="deit", model_args=sizes, distilled=True, **teacher)


@pytest.mark.parametrize("preprocessing", ["auto", "tf", "none"])
def test_configuration_of_a_distilled_run_is_read_without_its_teacher(tmp_path, preprocessing):
    make_distilled_run(tmp_path / "run", preprocessing)
    config = evaluate.make_config({}, str(tmp_path / "run"))
    assert (config.distill, config.teacher, config.distilled) == ("none", "", True)
    assert config.teacher_preprocessing == "auto"


@pytest.mark.slow
def test_distilled_run_is_averaged_and_evaluated_without_its_teacher(tmp_path):
    run = tmp_path / "run"
    make_distilled_run(run, "tf")
    assert average.average(run, last=2)["steps"] == [16, 12]
    assert_holds(run, numpy_mean(run, ["step_000000012", "step_000000016"]))
    result = evaluate.evaluate({"batch_size": 360}, run=str(run), checkpoint="averaged")
    assert result["images"] == 360


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of --last=N, --best=N, and files to average. Received: none"),
        ({"last": 1, "best": 1}, "Received: --last and --best"),
        ({"last": 0}, "--last must be at least 1"),
        ({"best": -1}, "--best must be at least 1"),
        ({"last": 4}, r"has 3 last checkpoints \(steps 8, 12, 16\).*--keep=N"),
        ({"best": 3}, r"--best=3: .* 2 of the best evaluations \(steps 8, 16\).*--keep_best=N"),
        ({"files": ["none.safetensors"]}, "there is no file none.safetensors"),
        ({"files": ["x.txt"]}, "x.txt is no checkpoint"),
    ],
)
def test_invalid_selection_raises(whole, arguments, message):
    with pytest.raises(ValueError, match=message):
        average.average(whole, **arguments)


def test_run_without_keep_best_has_one_best_checkpoint(tmp_path):
    run = tmp_path / "run"
    make_run(run, keep_best=0, ema=False)
    assert average.average(run, best=1)["steps"] == [8]
    with pytest.raises(ValueError, match="one of the best evaluation.*--keep_best"):
        average.average(run, best=2)
    for arguments in ({"last": 1}, {"best": 1}):
        with pytest.raises(ValueError, match="the run had no --ema"):
            average.average(run, ema=True, **arguments)


def test_damaged_or_mismatched_files_raise_and_nothing_is_written(tmp_path, whole):
    run = tmp_path / "run"
    make_run(run)
    good = run / "checkpoints" / "step_000000012.safetensors"
    damaged = tmp_path / "damaged.safetensors"
    content = bytearray(good.read_bytes())
    content[-10] ^= 1
    damaged.write_bytes(content)
    other = tmp_path / "other"
    make_run(other, model="deit", model_args='{"depth": 1, "embed_dim": 8, "num_heads": 2}')
    nan = models.build_plain(evaluate.make_config({}, str(run)), 10, None)
    nan.weights[1].assign(np.full(nan.weights[1].shape, np.nan))
    nan.save_weights(tmp_path / "nan.weights.h5")
    for file, message in (
        (damaged, "damaged.safetensors has a wrong checksum"),
        (other / "checkpoints" / "step_000000012.safetensors", "of another model than the run's"),
        (tmp_path / "nan.weights.h5", "NaN|not finite"),
        (os.path.join(run, ".", "checkpoints", good.name), "is named twice"),
    ):
        with pytest.raises(ValueError, match=message):
            average.average(run, files=[str(good), str(file)])
    assert not [name for name in os.listdir(run) if name.startswith("averaged")]


def test_directory_without_a_run_raises(tmp_path):
    with pytest.raises(ValueError, match="is no directory of a run"):
        average.average(tmp_path, last=1)
    with pytest.raises(ValueError, match="give --run"):
        average.average(None, last=1)


# === Checkpoints of the best evaluations ===


def test_keep_best_retains_checkpoints_of_the_best_evaluations(tmp_path):
    make_run(tmp_path / "run")
    names = sorted(os.listdir(tmp_path / "run" / "checkpoints"))
    assert names == [
        "best.safetensors",
        "best_000000008.safetensors",
        "best_000000016.safetensors",
        "step_000000008.safetensors",
        "step_000000012.safetensors",
        "step_000000016.safetensors",
    ]
    _, notes = checkpoint.read(tmp_path / "run" / "checkpoints" / "best_000000008.safetensors")
    assert notes["results"]["accuracy"] == 0.7


def test_without_keep_best_only_one_best_checkpoint_is_retained(tmp_path):
    make_run(tmp_path / "run", keep_best=0)
    names = sorted(os.listdir(tmp_path / "run" / "checkpoints"))
    assert [name for name in names if name.startswith("best")] == ["best.safetensors"]


def test_non_finite_values_raise(tmp_path):
    run = tmp_path / "run"
    built = make_run(run)
    built.weights[1].assign(np.full(built.weights[1].shape, np.inf))
    variables = {f"model/{v.path}": v.value for v in built.weights}
    saved = checkpoint.Checkpoints(run / "checkpoints", variables, keep=3)
    saved.save(20, {"healthy": 20, "results": {}})
    with pytest.raises(ValueError, match="000020.safetensors: .* holds values that are not finite"):
        average.average(run, last=2)
