from __future__ import annotations

import dataclasses
import json
import math

import pytest

from uvit import Config
from uvit.common.errors import InputError
from uvit.common.messages import warn_on_failure
from uvit.config import CONFIG_FILE, OptimConfig, TrainConfig, to_json
from uvit.training.resume import HARMLESS, MetricsFile, Progress, changes, check_same_run


def test_every_field_that_is_named_harmless_exists():
    for section, fields in HARMLESS.items():
        assert fields <= {field.name for field in dataclasses.fields(getattr(Config(), section))}
    assert set(HARMLESS) == {field.name for field in dataclasses.fields(Config)}


def test_changes_are_told_apart():
    before = Config()
    now = Config(optim=OptimConfig(lr=1.0), train=TrainConfig(seed=1, log_every=3))
    assert changes(before, now) == (
        ["optim.lr 0.0002, got 1.0", "train.seed 0, got 1"],
        ["train.log_every 50, got 3"],
    )
    assert changes(before, before) == ([], [])


def test_a_folder_without_a_run_takes_any_config(tmp_path):
    assert check_same_run(Config(), tmp_path, None) == []
    (tmp_path / CONFIG_FILE).write_text(to_json(Config()))
    (tmp_path / "checkpoints").mkdir()
    other = Config(train=TrainConfig(seed=1))
    with pytest.raises(InputError, match=r"holds a run with train.seed 0, got 1: use another --train.run_dir, or"):
        check_same_run(other, tmp_path, tmp_path / CONFIG_FILE)
    anyway = Config(train=TrainConfig(seed=1, resume_anyway=True))
    assert check_same_run(anyway, tmp_path, tmp_path / CONFIG_FILE) == [
        "train.seed 0, got 1",
        "train.resume_anyway False, got True",
    ]


def test_lines_of_metrics_after_the_step_go_and_foreign_ones_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = ['{"step": 1}', "a note", "[1]", '{"other": 2}', '{"step": "x"}', "", '{"step": 2, "skipped": true}']
    path.write_text("\n".join([*kept, '{"step": 3}', '{"step": 2, "lo']))
    metrics = MetricsFile(path, 2)
    assert path.read_text().split("\n") == [*kept, ""]
    metrics.add(step=3, loss=math.inf, grad_norm=math.nan)
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 3, "loss": "inf", "grad_norm": "nan"}


def test_lines_that_cannot_be_written_wait(tmp_path):
    metrics = MetricsFile(tmp_path / "gone" / "metrics.jsonl", 0)
    for step in (1, 2):
        with pytest.raises(FileNotFoundError):
            metrics.add(step=step)
    (tmp_path / "gone").mkdir()
    metrics.sync()
    assert metrics.path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_lines_that_nest_too_deeply_are_none_of_ours(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("[" * 200_000 + '\n{"step": 9}\n')
    MetricsFile(path, 3)
    assert path.read_text() == "[" * 200_000 + "\n"


def test_the_mean_loss_and_bad_steps_are_counted():
    progress = Progress()
    progress.count(2.0, is_sound=True, is_overflow=False)
    progress.count(math.nan, is_sound=False, is_overflow=False)
    progress.count(4.0, is_sound=False, is_overflow=True)  # half precision finds its scale: no fault
    assert progress.bad_steps == 1
    again = Progress()
    again.load_state_dict(progress.state_dict())
    assert again == progress
    assert again.pop_mean_loss() == 3.0 and math.isnan(again.pop_mean_loss())
    again.count(1.0, is_sound=True, is_overflow=False)
    assert again.bad_steps == 0


def test_only_failed_writes_are_survived(capsys):
    with warn_on_failure("file.txt"):
        raise OSError(28, "No space left on device")
    assert capsys.readouterr().err == (
        "warning: cannot write file.txt, training continues: [Errno 28] No space left on device\n"
    )
    with pytest.raises(ZeroDivisionError), warn_on_failure("file.txt"):
        raise ZeroDivisionError
