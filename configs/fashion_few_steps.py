"""Fashion-MNIST in one to four evaluations: an average velocity, with the network of configs/fashion.py.

Batches and learning rate are those of configs/digits_few_steps.py, in proportion. A quarter of its steps gives much
worse images than configs/fashion.py in the same time (docs/few_steps.md); all of them, 1.3 times its time, were not
tried.
"""

from dataclasses import replace
from pathlib import Path

from uvit.config import load_config

fashion = load_config(Path(__file__).with_name("fashion.py"))
config = replace(
    fashion,
    model=replace(fashion.model, takes_interval=True),
    process=replace(fashion.process, objective="average", logit_std=1.2, derivative="differences"),
    optim=replace(fashion.optim, lr=7.5e-3),
    train=replace(fashion.train, num_steps=5_400, batch_size=96, ema_decay=0.996, sample_every=900, save_every=900),
    sample=replace(fashion.sample, sampler="average", num_steps=2, guidance=1.0),
)
