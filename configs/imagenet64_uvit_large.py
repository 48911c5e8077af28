"""ImageNet 64x64, class-conditional, U-ViT-L/4 in pixels: the published run (FID 4.26)."""

from dataclasses import replace
from pathlib import Path

from uvit.config import load_config
from uvit.weights.published import PUBLISHED

base = load_config(Path(__file__).with_name("imagenet64_uvit_mid.py"))
config = replace(base, model=PUBLISHED["imagenet64_uvit_large"])
