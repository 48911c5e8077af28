"""A U-Net under the commands that the other tests try with a U-ViT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.runs import TINY_UNET
from PIL import Image

from uvit import UNet
from uvit.commands import evaluate, sample, train
from uvit.training.checkpoint import load_checkpoint


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The config file of a small U-Net, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(TINY_UNET)
    return "small.py"


@pytest.mark.parametrize("compared", [[], ["--model.gradient_checkpointing", "True"]], ids=["resumed", "checkpointing"])
def test_a_resumed_run_equals_an_uninterrupted_one(config, compared):
    train.main([config])
    for steps in ("2", "4"):
        train.main([config, "--train.run_dir", "parts", "--train.num_steps", steps, *compared])
    parts, whole = load_checkpoint(Path("parts")), load_checkpoint(Path("runs/small"))
    assert parts["step"] == whole["step"] == 4
    for part in ("model", "ema"):
        assert all(torch.equal(parts[part][name], tensor) for name, tensor in whole[part].items())


def test_the_commands_take_a_run_of_a_unet(config, capsys):
    train.main([config, "--model.model_channels", "64"])
    assert json.loads(Path("runs/small/config.json").read_text())["model"]["backbone"] == "unet"
    network, ema = UNet.from_pretrained("runs/small"), load_checkpoint(Path("runs/small"))["ema"]
    assert network.config.model_channels == 64
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in ema.items())
    shared = ["--checkpoint", "runs/small", "--num_per_class", "1", "--steps", "8", "--output"]
    sample.main([*shared, "grid.png"])
    sample.main([*shared, "reused.png", "--reuse", "1:2"])
    whole, reused = Image.open("grid.png"), Image.open("reused.png")
    assert whole.size == reused.size and whole.tobytes() != reused.tobytes()
    evaluate.main(["--checkpoint", "runs/small", "--num_images", "20"])
    assert "recognised " in capsys.readouterr().out
