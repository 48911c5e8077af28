"""Class-conditional Fashion-MNIST, 28x28 grey: clothes in ten classes.

It is downloaded from the hub, or read from a folder of its IDX files: `--data.name FOLDER`. The README has
the results. Of what was tried, most of it with a third of the steps, wider, deeper or more finely cut networks, other
learning rates, smaller batches and data prediction were worse for the time, and so are the ideas measured in
docs/recipe.md. For another network give `--model.conv none`, too: an unlucky start of the convolution's nine weights is
slow (with patches of 2x2 in two of three seeds).
"""

from dataclasses import replace
from pathlib import Path

from uvit.config import DataConfig, load_config

digits = load_config(Path(__file__).with_name("digits.py"))
config = replace(
    digits,
    model=replace(digits.model, img_size=28, patch_size=4, embed_dim=128),
    data=DataConfig(
        name="zalando-datasets/fashion_mnist",
        class_names=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
    ),
    optim=replace(digits.optim, lr=5e-3),
    train=replace(digits.train, num_steps=12_000, num_threads=0, ema_decay=0.998, sample_every=2_000, save_every=2_000),
    # At all times guidance makes images alike, and their distribution another; reuse is not measured here.
    sample=replace(digits.sample, guidance=1.5, guidance_interval=(0.2, 0.8), reuse="none"),
)
