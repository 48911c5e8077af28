"""A run as evaluate leaves it, without training: for publishing it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from uvit import Config, UViT, UViTConfig
from uvit.config import DataConfig, SampleConfig, TrainConfig, to_json
from uvit.weights.tensors import hash_weights

NAME = "me/digits"
"""What it is called on the hub."""
MODEL = UViTConfig(
    img_size=8, patch_size=2, in_chans=1, embed_dim=8, depth=2, num_heads=1, num_classes=3, null_class=True
)


def make_measured_run(folder: Path) -> Path:
    """Makes a run of data in a folder of this machine, measured, with grids and a checkpoint; returns its folder."""
    run_dir = folder / "My Runs" / "digits"
    torch.manual_seed(0)
    model = UViT(MODEL)
    model.save_pretrained(run_dir)
    (run_dir / "README.md").unlink()
    data = DataConfig(name=str(folder / "My Pictures" / "photos"), class_names=("a", "b", "c"))
    encoder = {
        "alignment_encoder": "timm:vit",
        "alignment_encoder_weights": str(folder / "My Weights" / "vit.safetensors"),
    }
    train = TrainConfig(run_dir=str(run_dir), num_steps=10, label_dropout=0.1, alignment="repa", **encoder)
    config = Config(model=MODEL, data=data, train=train, sample=SampleConfig(num_steps=2, guidance=1.5))
    (run_dir / "config.json").write_text(to_json(config))
    protocol = {
        "images": "20 drawn",
        "weights": f"EMA of {run_dir}, step_00000010, hash {hash_weights(model.state_dict())}",
        "reference": f"{folder / 'My Pictures'}/ref.npz: mu and sigma, hash 12",
        "guidance": f"w = 1.5 (the paper's s = 0.5) away from {run_dir}/checkpoints/step_00000005, hash 12",
        "features": "pixels",
    }
    results = {"recognised": 0.5, "frechet": 2.0, "frechet_real": 1.0, "protocol": protocol}
    (run_dir / "evaluation.json").write_text(json.dumps(results))
    (run_dir / "samples").mkdir()
    for step in (5, 10):
        Image.new("RGB", (step, step)).save(run_dir / "samples" / f"step_{step:08d}.png")
    (run_dir / "checkpoints" / "step_00000010").mkdir(parents=True)
    (run_dir / "checkpoints" / "step_00000010" / "training_state.pt").write_bytes(b"state")
    return run_dir
