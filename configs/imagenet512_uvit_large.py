"""ImageNet 512x512 in latents, class-conditional, U-ViT-L/4: the published run (FID 4.67, guided)."""

from dataclasses import replace
from pathlib import Path

from uvit.config import load_config
from uvit.weights.published import PUBLISHED

base = load_config(Path(__file__).with_name("imagenet256_uvit_large.py"))
config = replace(
    base,
    model=PUBLISHED["imagenet512_uvit_large"],
    data=replace(base.data, name="data/imagenet512_latents"),
    train=replace(base.train, num_steps=500_000),
    sample=replace(base.sample, guidance=1.7),
)
