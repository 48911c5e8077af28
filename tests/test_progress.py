from __future__ import annotations

import json
import math
import time

import pytest

from uvit.training.progress import MetricsFile, Progress, Stopwatch


def test_lines_of_later_steps_are_removed_and_other_lines_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = ['{"step": 1}', "a note", "[1]", '{"other": 2}', '{"step": "x"}', "", '{"step": 2, "skipped": true}']
    path.write_text("\n".join([*kept, '{"step": 3}', '{"step": 2, "lo']))
    metrics = MetricsFile(path, 2)
    assert path.read_text().split("\n") == [*kept, ""]
    metrics.add(step=3, loss=math.inf, grad_norm=math.nan)
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 3, "loss": "inf", "grad_norm": "nan"}


def test_lines_that_cannot_be_written_are_written_later(tmp_path):
    metrics = MetricsFile(tmp_path / "gone" / "metrics.jsonl", 0)
    for step in (1, 2):
        with pytest.raises(FileNotFoundError):
            metrics.add(step=step)
    (tmp_path / "gone").mkdir()
    metrics.sync()
    assert metrics.path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_deeply_nested_lines_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("[" * 200_000 + '\n{"step": 9}\n')
    MetricsFile(path, 3)
    assert path.read_text() == "[" * 200_000 + "\n"


def test_the_mean_loss_and_bad_steps_are_counted():
    progress = Progress()
    progress.record(2.0, is_sound=True, is_overflow=False)
    progress.record(math.nan, is_sound=False, is_overflow=False)
    progress.record(4.0, is_sound=False, is_overflow=True)  # half precision finds its scale: no fault
    assert progress.bad_steps == 1
    again = Progress()
    again.load_state_dict(progress.state_dict())
    assert again == progress
    assert again.pop_mean_loss() == 3.0 and math.isnan(again.pop_mean_loss())
    again.record(1.0, is_sound=True, is_overflow=False)
    assert again.bad_steps == 0


@pytest.fixture
def clock(monkeypatch):
    """Returns a function that lets seconds go by, on a clock that goes by nothing else."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_a_stopwatch_measures_steps_per_second_since_the_last_call(clock):
    stopwatch = Stopwatch(10)
    clock(4)
    assert stopwatch.steps_per_second(30) == 5
    clock(2)
    assert stopwatch.steps_per_second(31) == 0.5


def test_a_stopwatch_does_not_count_paused_blocks(clock):
    stopwatch = Stopwatch(0)
    clock(1)
    with stopwatch.paused():
        clock(50)
    with pytest.raises(ZeroDivisionError), stopwatch.paused():
        clock(50)
        raise ZeroDivisionError
    clock(1)
    assert stopwatch.steps_per_second(8) == 4


def test_progress_refuses_values_of_another_type():
    for state in ({"bad_steps": "x"}, {"loss_sum": 1}, {"steps": 1}):
        with pytest.raises(TypeError):
            Progress().load_state_dict(state)
