from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.edited import edit_json
from helpers.malicious import PICKLE, WORDS
from safetensors.torch import load_file, save_file

from uvit import UViT
from uvit.common.errors import InputError
from uvit.config import Config, to_json


def test_a_saved_network_loads_unchanged(tiny, tmp_path):
    model = UViT(tiny, num_classes=5, null_class=True, qk_norm=True)
    model.save_pretrained(tmp_path / "model")
    loaded = UViT.from_pretrained(tmp_path / "model", attention="math")
    assert dataclasses.replace(loaded.config, attention="auto") == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert not loaded.training


def test_a_run_is_not_overwritten(tiny, tmp_path):
    (tmp_path / "config.json").write_text(to_json(Config(model=tiny)))
    with pytest.raises(InputError, match="holds a run"):
        UViT(tiny).save_pretrained(tmp_path)
    for content in ("5", '{"architectures": ["Other"]}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match=r"holds something else, whose config.json would be overwritten"):
            UViT(tiny).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


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


def test_an_unknown_hub_name_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'nobody/nothing' is not a folder on disk, and cannot be fetched"):
        UViT.from_pretrained("nobody/nothing")


@pytest.mark.parametrize("content", [b"", b"garbage", PICKLE])
def test_broken_weights(saved, content, capsys):
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="is not a valid safetensors file"):
        UViT.from_pretrained(saved)
    assert WORDS not in capsys.readouterr().out


def test_truncated_weights(saved):
    content = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(InputError, match="is not a valid safetensors file"):
        UViT.from_pretrained(saved)


@pytest.mark.parametrize("fields", [{}, {"pos_embed": "sincos2d", "patch_embed": "conv", "conv": "none"}])
def test_loading_draws_no_random_numbers_and_copies_the_weights(tiny, fields, tmp_path):
    model = UViT(tiny, **fields).eval()
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded = UViT.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    x, timesteps = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0])
    assert torch.equal(loaded(x, timesteps), model(x, timesteps))
    assert all(each.requires_grad and each.untyped_storage().nbytes() == each.nbytes for each in loaded.parameters())


def test_half_precision_weights_load_in_full_precision(saved):
    halves = {name: tensor.bfloat16() for name, tensor in load_file(saved / "model.safetensors").items()}
    save_file(halves, saved / "model.safetensors")
    loaded = UViT.from_pretrained(saved).state_dict()
    assert all(torch.equal(tensor, halves[name].float()) for name, tensor in loaded.items())
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}


def test_weights_of_another_shape_are_refused(saved, tiny):
    edit_json(saved / "config.json", num_classes=6)
    with pytest.raises(InputError, match=r"do not fit their config: .*label_emb.weight.*\[5, 32\].*\[6, 32\]"):
        UViT.from_pretrained(saved)
    edit_json(saved / "config.json", num_classes=5, qk_norm=True)
    with pytest.raises(InputError, match=r"do not fit their config: .*q_norm.weight"):
        UViT.from_pretrained(saved)
