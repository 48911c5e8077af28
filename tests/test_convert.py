from __future__ import annotations

import pickle

import pytest
import torch
from helpers.commands import refused
from helpers.golden import golden_model
from helpers.malicious import PICKLE

from uvit import UViT
from uvit.commands import convert


@pytest.fixture
def published(tmp_path):
    """A checkpoint folder of the reference code."""
    folder = tmp_path / "500000.ckpt"
    folder.mkdir()
    torch.save(golden_model("tiny_class").state_dict(), folder / "nnet_ema.pth")
    return folder


def test_published_files_and_folders_load(published):
    expected = golden_model("tiny_class").state_dict()
    for path in (published, published / "nnet_ema.pth"):
        model = UViT.from_pretrained(path, num_heads=4, null_class=True)
        assert model.config.null_label == 10
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_convert(published, tmp_path, capsys):
    out = tmp_path / "converted"
    convert.main([str(published), str(out), "--num_heads", "4"])
    assert "77,440 parameters, 5 blocks of width 32" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    expected = golden_model("tiny_class").state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in UViT.from_pretrained(out).state_dict().items())


def bad_published(kind, whole):
    if kind == "resnet":
        return {"conv1.weight": torch.zeros(4, 3, 7, 7)}
    if kind == "wider":
        return {**whole, "mid_block.attn.proj.weight": torch.zeros(3, 3)}
    if kind == "numbered":
        return {**whole, 3: torch.zeros(3)}
    if kind == "list":
        return [torch.zeros(3)]
    if kind == "flat":
        return {**whole, "patch_embed.proj.weight": torch.zeros(3, 4)}
    if kind == "empty":
        return {**whole, "pos_embed": torch.zeros(1, 0, 32)}
    return {"state": whole}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("garbage", "is not a valid weights-only file"),
        ("truncated", "is not a valid weights-only file"),
        ("plain", "is not a valid weights-only file"),
        ("malicious", "is not a valid weights-only file"),
        ("nested", "must hold tensors by name, got OrderedDict by 'state'"),
        ("numbered", "must hold tensors by name, got Tensor by 3"),
        ("list", "must hold tensors by name, got list"),
        ("flat", "patch_embed.proj.weight must have 4 dimensions, got shape (3, 4)"),
        ("empty", "pos_embed must have 3 dimensions, got shape (1, 0, 32)"),
        ("resnet", "not the weights of a U-ViT: there is no tensor 'pos_embed'"),
        ("wider", "do not fit their config: "),
        ("heads", "num_heads must be given for embed_dim 32"),
    ],
)
def test_bad_published_files_are_one_line_each(kind, message, published, tmp_path, monkeypatch, capsys):
    path = published / "nnet_ema.pth"
    if kind in ("garbage", "truncated", "malicious"):
        whole = path.read_bytes()
        path.write_bytes({"garbage": b"garbage", "truncated": whole[: len(whole) // 2], "malicious": PICKLE}[kind])
    elif kind == "plain":
        path.write_bytes(pickle.dumps({"a": print}, protocol=4))
    elif kind != "heads":
        torch.save(bad_published(kind, torch.load(path, weights_only=True)), path)
    heads = [] if kind == "heads" else ["--num_heads", "4"]
    assert message in refused("convert", [path, tmp_path / "out", *heads], monkeypatch, capsys)
    assert not (tmp_path / "out").exists()
