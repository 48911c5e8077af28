from __future__ import annotations

import dataclasses

import pytest

from uvit import Config
from uvit.common.errors import InputError
from uvit.config import CONFIG_FILE, OptimConfig, TrainConfig, to_json
from uvit.training.resume import HARMLESS, changes, check_same_run


def test_every_field_that_is_named_harmless_exists():
    for section, fields in HARMLESS.items():
        assert fields <= {field.name for field in dataclasses.fields(getattr(Config(), section))}
    assert set(HARMLESS) == {field.name for field in dataclasses.fields(Config)}


def test_harmless_changes_are_told_from_others():
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
