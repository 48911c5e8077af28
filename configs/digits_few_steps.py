"""Class-conditional digits in one to four evaluations: an average velocity, with the network of configs/digits.py.

It is not measured to the end yet, and takes more than twice the time of configs/digits.py. Of what was tried for one
seed, times nearer to the middle or to noise, two of the training times as an interval's ends, heavier weights
(adaptive_power) and fewer intervals were worse.
"""

from dataclasses import replace
from pathlib import Path

from uvit.config import load_config

digits = load_config(Path(__file__).with_name("digits.py"))
config = replace(
    digits,
    model=replace(digits.model, takes_interval=True),
    process=replace(digits.process, objective="average", logit_std=1.2),
    optim=replace(digits.optim, lr=1.5e-2),
    train=replace(digits.train, num_steps=1_800, ema_decay=0.995, sample_every=600, save_every=600),
    sample=replace(digits.sample, sampler="average", num_steps=2, guidance=1.0, reuse="none"),
)
