"""ImageNet 512x512 in latents, class-conditional, U-ViT-H/4: the published run (FID 4.05, guided)."""

from dataclasses import replace
from pathlib import Path

from uvit.config import load_config
from uvit.weights.published import PUBLISHED

base = load_config(Path(__file__).with_name("imagenet256_uvit_huge.py"))
config = replace(
    base,
    model=PUBLISHED["imagenet512_uvit_huge"],
    data=replace(base.data, name="data/imagenet512_latents"),
    sample=replace(base.sample, guidance=1.7),
)
