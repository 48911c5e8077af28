from __future__ import annotations

import hashlib
import json
import re
import resource

import pytest
import torch
from helpers.malicious import PICKLE, WORDS

from uvit import Config
from uvit.common.errors import InputError
from uvit.training import checkpoint
from uvit.training.checkpoint import (
    checkpoint_dirs,
    find_checkpoint,
    find_config,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from uvit.weights import state


def test_the_newest_checkpoint_is_loaded_and_old_ones_are_removed(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, Config(), step, {"model": {"w": torch.full((2,), float(step))}}, keep=2)
    assert [path.name for path in checkpoint_dirs(tmp_path)] == ["step_00000010", "step_00000100"]
    state = load_checkpoint(tmp_path)
    assert state["step"] == 100 and state["model"]["w"].tolist() == [100, 100]


def test_a_checkpoint_can_be_written_again(tmp_path):
    for value in (1, 2):
        save_checkpoint(tmp_path, Config(), 5, {"model": value}, keep=1)
    assert load_checkpoint(tmp_path)["model"] == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", PICKLE])
def test_broken_and_malicious_checkpoints(content, tmp_path, capsys):
    folder = tmp_path / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    (folder / "training_state.pt").write_bytes(content)
    with pytest.raises(InputError, match="is not a complete checkpoint"):
        load_checkpoint(tmp_path)
    assert WORDS not in capsys.readouterr().out


def test_a_full_disk_leaves_earlier_checkpoints_as_they_were(tmp_path):
    save_checkpoint(tmp_path, Config(), 5, {"model": {"w": torch.zeros(10)}}, keep=1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write .*step_00000006: File too large"):
            save_checkpoint(tmp_path, Config(), 6, {"model": {"w": torch.zeros(100_000)}}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]
    assert load_checkpoint(tmp_path)["step"] == 5


def test_broken_checkpoints_are_not_counted_as_kept(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, Config(), step, {}, keep=9)
    (tmp_path / "checkpoints/step_00000003/complete.json").unlink()
    (tmp_path / "checkpoints/step_00000002/training_state.pt").write_bytes(b"cut")
    save_checkpoint(tmp_path, Config(), 4, {}, keep=2)
    assert [int(path.name[5:]) for path in checkpoint_dirs(tmp_path)] == [1, 2, 3, 4]
    save_checkpoint(tmp_path, Config(), 5, {}, keep=2)
    assert [int(path.name[5:]) for path in checkpoint_dirs(tmp_path)] == [4, 5]


def test_all_checkpoints_may_be_kept(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, Config(), step, {}, keep=None)
    (tmp_path / "checkpoints/step_of_mine").mkdir()
    assert [path.name for path in checkpoint_dirs(tmp_path)] == ["step_00000001", "step_00000002", "step_00000003"]


def test_the_marker_has_size_and_hash(tmp_path):
    save_checkpoint(tmp_path, Config(), 1, {"w": torch.zeros(2**19)}, keep=1)
    content = (tmp_path / "checkpoints/step_00000001/training_state.pt").read_bytes()
    assert len(content) > 2**20
    marker = json.loads((tmp_path / "checkpoints/step_00000001/complete.json").read_text())
    assert marker == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda marker, state: marker.unlink(), "it has no complete.json"),
        (lambda marker, state: state.unlink(), "it has no training_state.pt"),
        (lambda marker, state: state.unlink() or state.mkdir(), "it cannot be read: Is a directory"),
        (lambda marker, state: marker.write_text("{"), "its complete.json is not JSON"),
        (lambda marker, state: marker.write_text("[" * 100_000), "its complete.json is not JSON"),
        (lambda marker, state: marker.write_bytes(b"\xff"), "its complete.json is not JSON"),
        (
            lambda marker, state: state.write_bytes(state.read_bytes()[:-1] + b"\x01"),
            "its training_state.pt is not what complete.json says",
        ),
    ],
)
def test_the_fault_of_a_broken_checkpoint_is_told(damage, fault, tmp_path):
    save_checkpoint(tmp_path, Config(), 1, {}, keep=1)
    assert find_checkpoint(tmp_path)[1] == {}
    folder = tmp_path / "checkpoints/step_00000001"
    damage(folder / "complete.json", folder / "training_state.pt")
    with pytest.raises(InputError, match=re.escape(f"is not a complete checkpoint ({fault}), and no older one is")):
        find_checkpoint(tmp_path)


def test_the_config_is_that_of_the_newest_checkpoint_that_has_one(tmp_path):
    assert find_config(tmp_path) is None
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, Config(), step, {}, keep=None)
    assert find_config(tmp_path) == tmp_path / "checkpoints/step_00000003/config.json"
    (tmp_path / "checkpoints/step_00000003/config.json").unlink()
    assert find_config(tmp_path) == tmp_path / "checkpoints/step_00000002/config.json"


def test_a_state_of_another_kind_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "training_state.pt")
    with pytest.raises(InputError, match=r"training_state.pt must hold a dict, got list"):
        read_state(tmp_path)


def test_leftovers_of_a_kill_are_removed_by_the_next_save(tmp_path):
    leftover = tmp_path / "checkpoints/.step_00000003-123"
    leftover.mkdir(parents=True)
    (leftover / "training_state.pt").write_bytes(b"half")
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, Config(), 4, {}, keep=2)
    assert not leftover.exists()


def test_the_newest_whole_checkpoint_is_found_behind_broken_ones(tmp_path):
    for step in (99_999_999, 100_000_000, 100_000_001):
        save_checkpoint(tmp_path, Config(), step, {}, keep=9)
    (tmp_path / "checkpoints/step_100000001/complete.json").write_text("[]")
    found, broken = find_checkpoint(tmp_path)
    assert found.name == "step_100000000"
    assert {folder.name: fault for folder, fault in broken.items()} == {
        "step_100000001": "its training_state.pt is not what complete.json says"
    }


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", PICKLE])
def test_a_malicious_state_with_a_valid_marker_is_not_run(content, tmp_path, capsys):
    save_checkpoint(tmp_path, Config(), 1, {}, keep=1)
    state = tmp_path / "checkpoints/step_00000001/training_state.pt"
    state.write_bytes(content)
    marker = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    state.with_name("complete.json").write_text(json.dumps(marker))
    with pytest.raises(InputError, match="is not a valid checkpoint"):
        load_checkpoint(tmp_path)
    assert WORDS not in capsys.readouterr().out


def test_saving_reads_no_older_checkpoint(tmp_path, monkeypatch):
    """Only their sizes: they may be large."""
    save_checkpoint(tmp_path, Config(), 5, {}, keep=2)
    read = []

    def describe(path, thorough=True):
        read.append((path.parent.name, thorough))
        return before(path, thorough)

    before = state.describe_state
    for module in (checkpoint, state):
        monkeypatch.setattr(module, "describe_state", describe)
    save_checkpoint(tmp_path, Config(), 6, {}, keep=2)
    assert [name for name, thorough in read if not thorough] == ["step_00000006", "step_00000005"]
    assert [thorough for name, thorough in read if name == "step_00000005"] == [False]
