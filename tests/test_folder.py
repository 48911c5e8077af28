from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.runs import ROOT

from uvit import Config, UViTConfig
from uvit.common.errors import InputError
from uvit.config import (
    checkpoint_dirs,
    config_kind,
    grid_files,
    grid_path,
    load_config,
    read_network_config,
    step_name,
    step_of,
    to_json,
)

BAD_FILES = [
    ("broken.json", '{"model": ', "is not valid JSON"),
    ("list.json", "[1, 2]", "must be a JSON object, got"),
    ("extra.json", '{"modle": {}}', "has no field 'modle', did you mean 'model'?"),
    ("nested.json", '{"model": {"dept": 4}}', "has no field 'dept', did you mean 'depth'?"),
    ("huge.json", '{"optim": {"lr": 1' + "0" * 400 + "}}", "lr must be float, got 1000"),
    ("type.json", '{"optim": {"lr": "fast"}}', "lr must be float, got 'fast'"),
    ("empty.py", "", r"must define `config = Config\(...\)`, got NoneType"),
    ("wrong.py", "config = {}", "must define"),
    ("crash.py", "1 / 0", "cannot be read as Python: ZeroDivisionError"),
    ("syntax.py", "config = (", "cannot be read as Python: SyntaxError"),
    ("odd.py", "from uvit import *\nconfig = Config(model=UViTConfig(depth=3))", "depth must be even"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
def test_bad_config_files_are_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"{name}.* {message}"):
        load_config(tmp_path / name)


def test_missing_config_file_names_the_nearest():
    with pytest.raises(InputError, match=r"not found: .*digit.py, did you mean '.*digits.py'"):
        load_config(ROOT / "configs" / "digit.py")


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (json.loads(to_json(Config())), "run"),
        ({"process": {}}, "run"),
        (json.loads(to_json(UViTConfig())), "network"),
        ({"img_size": 8}, "network"),
        ({"architectures": ["Other"]}, "unknown"),
        ({}, "unknown"),
        ([1, 2], "unknown"),
        ("process", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_kind_of_a_config_is_recognised(raw, kind):
    assert config_kind(raw) == kind


def test_the_config_of_the_network_is_read_from_a_run_and_from_weights(tmp_path):
    model = UViTConfig(embed_dim=64, num_heads=2)
    for config in (model, Config(model=model)):
        (tmp_path / "config.json").write_text(to_json(config))
        assert read_network_config(tmp_path) == model


def test_a_broken_config_of_the_network_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"img_size": 8, "dept": 4}')
    with pytest.raises(InputError, match=r"config.json: UViTConfig has no field 'dept'"):
        read_network_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step_00000100", 100),
        ("step_00000100.png", 100),
        ("step_123456789", 123_456_789),
        ("step_0", 0),
        (".step_00000100", None),
        ("broken_step_00000100", None),
        ("step_", None),
        ("step_1a", None),
        ("step_-1", None),
        ("step_00000100.txt", None),
    ],
)
def test_the_step_of_a_name(name, step):
    assert step_of(name) == step


@pytest.mark.parametrize("step", [0, 7, 99_999_999, 100_000_000])
def test_step_of_is_the_inverse_of_step_name(step):
    assert step_of(step_name(step)) == step_of(grid_path(Path(), step).name) == step
    assert len(step_name(step)) >= len("step_00000000")


def test_grids_and_checkpoints_are_listed_oldest_first(tmp_path):
    assert grid_files(tmp_path) == checkpoint_dirs(tmp_path) == []
    for step in (100_000_000, 99_999_999, 20):
        (tmp_path / "checkpoints" / step_name(step)).mkdir(parents=True)
        path = grid_path(tmp_path, step)
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for name in ("step_00000030.jpg", ".step_00000040-77.png", "step_x.png", "other.png"):
        (tmp_path / "samples" / name).touch()
    for name in ("broken_step_00000030", ".step_00000040-77", "step_x"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert [step_of(path.name) for path in grid_files(tmp_path)] == [20, 99_999_999, 100_000_000]
    assert [step_of(path.name) for path in checkpoint_dirs(tmp_path)] == [20, 99_999_999, 100_000_000]
