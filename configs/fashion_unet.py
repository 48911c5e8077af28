"""Class-conditional Fashion-MNIST by a U-Net: configs/fashion.py with the other backbone.

Neither its time nor its quality has been measured yet.
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
)
