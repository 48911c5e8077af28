"""Fashion-MNIST in one to four evaluations: an average velocity, with nearly the network of configs/fashion.py.

It has no final convolution: one channel's nine weights start at random, and an unlucky start is slow. Where little is
learned yet, most of a batch should be instants; docs/few_steps.md has what was tried.
"""

from dataclasses import replace
from pathlib import Path

from uvit.config import load_config

fashion = load_config(Path(__file__).with_name("fashion.py"))
config = replace(
    fashion,
    model=replace(fashion.model, takes_interval=True, conv="none"),
    process=replace(fashion.process, objective="average", instant_share=0.875, logit_std=1.2, derivative="differences"),
    sample=replace(fashion.sample, sampler="average", num_steps=2, guidance=1.0, guidance_interval=(0.0, 1.0)),
)
