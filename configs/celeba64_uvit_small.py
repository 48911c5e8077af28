"""CelebA 64x64, unconditional, U-ViT-S/4 in pixels: the published run (FID 2.87)."""

from uvit.config import Config, DataConfig, SampleConfig, TrainConfig
from uvit.weights.published import ADAMW, PUBLISHED, VP_NOISE

config = Config(
    model=PUBLISHED["celeba64_uvit_small"],
    process=VP_NOISE,
    data=DataConfig(name="data/celeba", flip=True, num_workers=8),
    optim=ADAMW,
    train=TrainConfig(num_steps=500_000, batch_size=128),
    sample=SampleConfig(sampler="euler_maruyama", num_steps=1_000),
)
