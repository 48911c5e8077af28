from __future__ import annotations

import pytest
import torch
from malicious import PICKLE, WORDS

from uvit.checkpoint import checkpoint_dirs, load_checkpoint, save_checkpoint
from uvit.errors import InputError


def test_newest_checkpoint_is_loaded_and_old_ones_go(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.full((2,), float(step))}}, keep=2)
    assert [path.name for path in checkpoint_dirs(tmp_path)] == ["step_00000010", "step_00000100"]
    state = load_checkpoint(tmp_path)
    assert state["step"] == 100 and state["model"]["w"].tolist() == [100, 100]


def test_a_checkpoint_can_be_written_again(tmp_path):
    for value in (1, 2):
        save_checkpoint(tmp_path, 5, {"model": value}, keep=1)
    assert load_checkpoint(tmp_path)["model"] == 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000005"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", PICKLE])
def test_broken_and_malicious_checkpoints(content, tmp_path, capsys):
    folder = tmp_path / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    (folder / "training_state.pt").write_bytes(content)
    with pytest.raises(InputError, match="is not a whole checkpoint"):
        load_checkpoint(tmp_path)
    assert WORDS not in capsys.readouterr().out
