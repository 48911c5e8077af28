"""Class-conditional digits in one to four evaluations: an average velocity, with the network of configs/digits.py.

Half of each batch has intervals, whose derivatives make a step take 2.1 times one of configs/digits.py: it takes twice
its time (`python benchmarks/few_steps.py`). What else was tried is in docs/few_steps.md.
"""

from dataclasses import replace
from pathlib import Path

from uvit.config import load_config

digits = load_config(Path(__file__).with_name("digits.py"))
config = replace(
    digits,
    model=replace(digits.model, takes_interval=True),
    process=replace(digits.process, objective="average", logit_std=1.2, derivative="differences"),
    optim=replace(digits.optim, lr=1.5e-2),
    train=replace(digits.train, num_steps=1_400, batch_size=96, ema_decay=0.994, sample_every=350, save_every=350),
    sample=replace(digits.sample, sampler="average", num_steps=2, guidance=1.0, reuse="none"),
)
