"""CIFAR-10, unconditional, U-ViT-S/2 in pixels: the published run (FID 3.11)."""

from dataclasses import replace

from uvit.config import Config, DataConfig, SampleConfig, TrainConfig
from uvit.weights.published import ADAMW, PUBLISHED, VP_NOISE

config = Config(
    model=PUBLISHED["cifar10_uvit_small"],
    process=VP_NOISE,
    data=DataConfig(name="uoft-cs/cifar10", flip=True, num_workers=4),
    optim=replace(ADAMW, betas=(0.99, 0.999), warmup_steps=2_500),
    train=TrainConfig(num_steps=500_000, batch_size=128),
    sample=SampleConfig(sampler="euler_maruyama", num_steps=1_000),
)
