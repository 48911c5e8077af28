"""Class-conditional digits in one to four evaluations: an average velocity, with the network of configs/digits.py.

A third of each batch has intervals, whose derivatives make a step take 2.2 times one of configs/digits.py: it takes
twice its time (`python benchmarks/few_steps.py`). With batches of 64 and half of them intervals, drawing in four
evaluations was worse for the same time. So were, for one seed each, learning rates of 1.2e-2 and 2e-2, a logit_std of
1.0 and 1.4, times nearer to noise, two of the training times as an interval's ends, heavier weights (adaptive_power),
and targets that are the network's own velocity instead of the data's.
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
