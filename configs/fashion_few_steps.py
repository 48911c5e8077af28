"""Fashion-MNIST in one to four evaluations: an average velocity, with the network of configs/fashion.py.

Neither its time nor its quality has been measured yet.
"""

from dataclasses import replace
from pathlib import Path

from uvit.config import load_config

fashion = load_config(Path(__file__).with_name("fashion.py"))
config = replace(
    fashion,
    model=replace(fashion.model, takes_interval=True),
    process=replace(fashion.process, objective="average", logit_std=1.2),
    sample=replace(fashion.sample, sampler="average", num_steps=2, guidance=1.0),
)
