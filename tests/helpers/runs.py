"""The tiny run that most tests train, and what run folders hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent

TINY = """
from uvit.config import *

config = Config(
    model=UViTConfig(img_size=8, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=10, null_class=True),
    optim=OptimConfig(name="muon", lr=1e-2, warmup_steps=2, grad_clip=1.0),
    train=TrainConfig(
        num_steps=4, batch_size=8, label_dropout=0.2, ema_decay=0.5, log_every=2, sample_every=4, save_every=2
    ),
    sample=SampleConfig(num_steps=2, guidance=1.5),
)
"""
"""A config file of a network that learns digits in some seconds."""
TINY_UNET = (
    TINY
    + """
from dataclasses import replace

fields = dict(model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention_sizes=(4,), head_dim=16)
config = replace(config, model=UNetConfig(img_size=8, in_chans=1, num_classes=10, null_class=True, **fields))
"""
)
"""The same with a U-Net."""
TINY_AVERAGE = (
    TINY
    + """
from dataclasses import replace

config = replace(
    config,
    model=replace(config.model, takes_interval=True, takes_guidance=True),
    process=replace(config.process, objective="average"),
    sample=replace(config.sample, sampler="average"),
)
"""
)
"""The same of an average velocity, with guidance as an input."""
TINY_DIFFERENCES = TINY_AVERAGE.replace('"average")', '"average", derivative="differences")', 1)
"""The same with differences instead of derivatives."""
TINY_REPA = (
    TINY
    + """
from dataclasses import replace

encoder = dict(alignment_encoder="timm:test_vit", alignment_encoder_weights="WEIGHTS")
config = replace(config, train=replace(config.train, alignment="repa", **encoder))
"""
)
"""The same, aligned to an encoder whose file of weights takes the place of WEIGHTS."""
TINY_LAYERSYNC = (
    TINY
    + """
from dataclasses import replace

config = replace(config, train=replace(config.train, alignment="layersync"))
"""
)
"""The same, aligned within itself."""
TINY_SPARSE = (
    TINY
    + """
from dataclasses import replace

config = replace(
    config,
    model=replace(config.model, outer_pairs=1, depth=4),
    train=replace(config.train, token_keep=0.5, dense_share=0.25, path_drop=0.3),
)
"""
)
"""The same with some of the patches for the inner blocks."""
TEXT = "--model.num_classes 0 --model.null_class False --model.context_dim 8 --model.num_context_tokens 24".split()
"""What makes a text model of it."""


def files_of(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file in a folder; folders inside it are listed as empty."""
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in found}


def lines_of_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses_of(run_dir: Path) -> list[float]:
    """Returns the loss of each line of metrics.jsonl."""
    return [line["loss"] for line in lines_of_metrics(run_dir)]
