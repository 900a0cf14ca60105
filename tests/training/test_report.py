"""Reports of a run: speed, remaining time, and appending to metrics.jsonl."""

import errno
import json
import os
import stat

import pytest

from training import checkpoint, configuration, report


class Clock:
    """A fake clock that is set by tests."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(report.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def reporter(directory, active=True, total=40, **values):
    values = {"tensorboard": False, "epochs": 4, "batch_size": 6, "evaluate_epochs": 1, **values}
    config = configuration.make("digits", workdir=str(directory), **values)
    return report.Reporter(config, total, 10, 1, active, evaluation_images=90)


def updates(made, clock, count, seconds):
    for _ in range(count):
        clock.now += seconds
        made.executed(1)


def test_speed_excludes_compilation_and_time_left_includes_evaluations(tmp_path, clock):
    made = reporter(tmp_path)
    updates(made, clock, 1, 60.0)
    updates(made, clock, 9, 2.0)
    made.training(10, 1.0, 0.1)
    (line,) = made.lines
    assert line["images_per_second"] == 3.0
    # 30 updates of 2 s, and 4 evaluations of 90 images at three times the training speed.
    assert line["seconds_left"] == pytest.approx(60 + 4 * 10)
    clock.now += 25
    made.evaluation(10, {"accuracy": 0.5, "images": 90}, 25.0)
    updates(made, clock, 5, 2.0)
    made.training(15, 1.0, 0.1)
    assert made.lines[-1]["seconds_left"] == pytest.approx(50 + 3 * 25)
    assert made.lines[-1]["images_per_second"] == 3.0


def test_speed_excludes_executions_that_trace(tmp_path, clock):
    made = reporter(tmp_path, steps_per_execution=3)
    updates(made, clock, 1, 60.0)
    clock.now += 50.0
    made.executed(3, traced=True)
    for _ in range(2):
        clock.now += 6.0
        made.executed(3)
    made.training(10, 1.0, 0.1)
    (line,) = made.lines
    assert line["images_per_second"] == 3.0
    assert line["seconds_left"] == pytest.approx(60 + 4 * 10)


@pytest.mark.parametrize("count", [1, 3])
def test_input_wait_is_reported_only_where_it_is_measured(tmp_path, clock, capsys, count):
    made = reporter(tmp_path, steps_per_execution=count)
    updates(made, clock, 3, 2.0)
    made.waited = 1.0
    made.training(3, 1.0, 0.1)
    assert made.lines[0].get("input_wait") == (0.25 if count == 1 else None)
    assert ("a device, 25% waiting for input)" in capsys.readouterr().out) == (count == 1)


def test_report_of_the_first_update_has_no_time_left(tmp_path, clock, capsys):
    made = reporter(tmp_path)
    updates(made, clock, 1, 60.0)
    made.training(1, 1.0, 0.1)
    assert "seconds_left" not in made.lines[0] and "left" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("every", "step", "left"),
    [(1, 0, 4), (1, 10, 4), (1, 11, 3), (3, 5, 2), (3, 31, 1), (4, 40, 1)],
)
def test_evaluations_left_include_the_last_epoch(tmp_path, every, step, left):
    assert reporter(tmp_path, evaluate_epochs=every).evaluations_left(step) == left


@pytest.mark.parametrize(
    ("number", "text"),
    [(1234.4, "1,234"), (100, "100"), (31.44, "31.4"), (9.876, "9.88"), (0.05, "0.05")],
)
def test_low_speeds_are_shown_with_decimals(number, text):
    assert report.rate_text(number) == text


def test_line_shows_gradient_norm_loss_scale_skips_and_memory(tmp_path, clock, capsys):
    made = reporter(tmp_path)
    updates(made, clock, 2, 1.0)
    extra = {"gradient_norm": 1.5, "loss_scale": 1024.0, "skipped_updates": 2}
    made.training(2, 1.0, 0.1, device_memory_bytes=3_200_000_000, **extra)
    assert (
        "gradient norm 1.5  loss scale 1024  2 updates skipped  3.2 GB" in capsys.readouterr().out
    )
    assert extra.items() <= checkpoint.read_metrics(made.path)[0].items()
    made.training(3, 1.0, 0.1, gradient_norm=None, loss_scale=None)
    assert not {"gradient_norm", "loss_scale"} & set(made.lines[-1])
    assert report.finite_mean([1.0, float("inf"), 3.0]) == 2.0
    assert report.finite_mean([float("nan")]) is None
    assert report.device_memory() > 1e6


# === metrics.jsonl ===


def test_lines_are_appended_to_an_existing_file(tmp_path):
    made = reporter(tmp_path)
    made.write(1, loss=1.0)
    before = os.stat(made.path).st_ino
    with open(made.path, "a") as other:
        other.write('{"step": 2}\n')
    made.write(3, loss=0.5)
    assert [line["step"] for line in checkpoint.read_metrics(made.path)] == [1, 2, 3]
    assert os.stat(made.path).st_ino == before


def test_resuming_removes_reports_of_repeated_steps(tmp_path):
    made = reporter(tmp_path)
    for step in (1, 2, 3):
        made.write(step, loss=1.0)
    before = os.stat(made.path).st_ino
    again = reporter(tmp_path)
    again.go_on_from(3)
    assert os.stat(made.path).st_ino == before and len(again.lines) == 3
    again.go_on_from(2)
    again.write(3, loss=2.0)
    lines = checkpoint.read_metrics(made.path)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 2.0)]


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b"\x00" * 100, b"{", b'{"step": 2}'])
def test_truncated_line_is_repaired_before_the_next(tmp_path, torn):
    made = reporter(tmp_path)
    made.write(1, loss=1.0)
    made.path.write_bytes(made.path.read_bytes() + torn)
    again = reporter(tmp_path)
    again.go_on_from(2)
    again.write(3, loss=0.5)
    whole = [2] if torn.endswith(b"}") else []
    assert [line["step"] for line in checkpoint.read_metrics(made.path)] == [1, *whole, 3]


def test_full_disk_leaves_no_partial_line(tmp_path, monkeypatch):
    made = reporter(tmp_path)
    made.write(1, loss=1.0)
    before, write = made.path.read_bytes(), os.write

    def partly(descriptor, data):
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:-10])

    with monkeypatch.context() as patch:
        patch.setattr(report.os, "write", partly)
        with pytest.raises(OSError, match="No space left") as failed:
            made.write(2, loss=1.0)
    assert failed.value.errno == errno.ENOSPC and made.path.read_bytes() == before
    made.write(2, loss=1.0)
    assert [line["step"] for line in checkpoint.read_metrics(made.path)] == [1, 2]


def test_symlink_is_replaced_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    mine = tmp_path / "mine"
    mine.write_text('{"step": 1}\n')
    (tmp_path / "run" / "metrics.jsonl").symlink_to(mine)
    made = reporter(tmp_path / "run")
    made.go_on_from(1)
    made.write(2, loss=1.0)
    assert mine.read_text() == '{"step": 1}\n' and len(made.path.read_text().splitlines()) == 2
    assert stat.S_ISREG(os.lstat(made.path).st_mode)


def test_inactive_process_writes_nothing(tmp_path):
    made = reporter(tmp_path, active=False)
    made.write(1, loss=1.0)
    made.go_on_from(0)
    assert not made.path.exists()


# === Terminal output ===


def test_progress_bar_is_shown_only_on_a_terminal(tmp_path, capsys, monkeypatch):
    made = reporter(tmp_path)
    made.open_bar(0)
    assert made.bar is None
    made.say("plain")
    assert capsys.readouterr().out == "plain\n"
    monkeypatch.setattr(report.sys.stdout, "isatty", lambda: True, raising=False)
    made.open_bar(5)
    made.executed(2)
    assert (made.bar.n, made.bar.total) == (7, 40)
    made.go_on_from(6)
    assert made.bar.n == 6
    made.say("a line")
    made.close_bar()
    assert "a line\n" in capsys.readouterr().out and made.bar is None
    json.dumps(made.lines)
