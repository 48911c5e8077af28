"""Class-conditional digits in one to four evaluations: average velocity, in twice the time of configs/digits.py."""

from dataclasses import replace
from pathlib import Path

from uvit.config import load_config

digits = load_config(Path(__file__).with_name("digits.py"))
config = replace(
    digits,
    model=replace(digits.model, takes_interval=True),
    process=replace(digits.process, objective="average", adaptive_power=0.5),
    sample=replace(digits.sample, sampler="average", num_steps=2, guidance=1.0, reuse="none"),
)
