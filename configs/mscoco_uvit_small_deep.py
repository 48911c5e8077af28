"""MS-COCO 256x256 in latents, text to image, U-ViT-S/2 deep: the published run (FID 5.48, guided)."""

from dataclasses import replace
from pathlib import Path

from uvit.config import load_config
from uvit.weights.published import PUBLISHED

base = load_config(Path(__file__).with_name("mscoco_uvit_small.py"))
config = replace(base, model=PUBLISHED["mscoco_uvit_small_deep"])
