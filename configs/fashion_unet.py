"""Class-conditional Fashion-MNIST by a U-Net: configs/fashion.py with the other backbone, as long to train and as good.

The README has the results.
"""

from dataclasses import replace
from pathlib import Path

from uvit.config import UNetConfig, load_config

fashion = load_config(Path(__file__).with_name("fashion.py"))
config = replace(
    fashion,
    model=UNetConfig(
        img_size=28,
        in_chans=1,
        num_classes=10,
        null_class=True,
        model_channels=32,
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        attention_sizes=(14, 7),
        head_dim=32,
    ),
    optim=replace(fashion.optim, lr=2e-3),  # the best in the search of benchmarks/backbones.py
    train=replace(fashion.train, num_steps=3_000, ema_decay=0.992, sample_every=1_000, save_every=1_000),
    sample=replace(fashion.sample, guidance=1.25, guidance_interval=(0.0, 1.0)),  # an interval is not measured here
)
