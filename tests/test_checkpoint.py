from __future__ import annotations

import pickle

import pytest
import torch

from uvit import UViT
from uvit.checkpoint import checkpoint_dirs, load_checkpoint, save_checkpoint, write_aside, write_text
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


class Malicious:
    def __reduce__(self):
        return print, ("this must never run",)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps(Malicious())])
def test_broken_and_malicious_checkpoints(content, tmp_path, capsys):
    folder = tmp_path / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True)
    (folder / "training_state.pt").write_bytes(content)
    with pytest.raises(InputError, match="is not a whole checkpoint"):
        load_checkpoint(tmp_path)
    assert "never run" not in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), write_aside(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"cannot write to .*folder: Not a directory"),
        write_aside(tmp_path / "file" / "folder" / "grid.png"),
    ):
        pass


@pytest.fixture
def saved(tiny, tmp_path):
    UViT(tiny, num_classes=5).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_missing_weights(saved, tmp_path):
    with pytest.raises(InputError, match="checkpoint not found: "):
        UViT.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*config.json: No such file"):
        UViT.from_pretrained(tmp_path / "empty")
    (saved / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no weights at .*model.safetensors"):
        UViT.from_pretrained(saved)


def test_a_hub_name_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'nobody/nothing' is no folder on disk, and the hub did not give it"):
        UViT.from_pretrained("nobody/nothing")


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps(Malicious())])
def test_broken_weights(saved, content, capsys):
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        UViT.from_pretrained(saved)
    assert "never run" not in capsys.readouterr().out


def test_truncated_weights(saved):
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        UViT.from_pretrained(saved)


def test_weights_of_another_shape(saved, tiny):
    config = (saved / "config.json").read_text()
    (saved / "config.json").write_text(config.replace('"num_classes": 5', '"num_classes": 6'))
    with pytest.raises(InputError, match=r"do not fit their config: .*label_emb.weight.*\[5, 32\].*\[6, 32\]"):
        UViT.from_pretrained(saved)
    (saved / "config.json").write_text(config.replace('"qk_norm": false', '"qk_norm": true'))
    with pytest.raises(InputError, match=r"do not fit their config: .*q_norm.weight"):
        UViT.from_pretrained(saved)
