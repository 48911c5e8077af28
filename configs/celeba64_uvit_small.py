"""CelebA 64x64, unconditional, U-ViT-S/4 in pixels: the published run (FID 2.87)."""

from uvit.config import Config, DataConfig, SampleConfig, TrainConfig, UViTConfig
from uvit.published import ADAMW, SIZES, VP_NOISE

config = Config(
    model=UViTConfig(**SIZES["small"], img_size=64, patch_size=4, in_chans=3),
    process=VP_NOISE,
    data=DataConfig(name="data/celeba", flip=True, num_workers=8),
    optim=ADAMW,
    train=TrainConfig(num_steps=500_000, batch_size=128),
    sample=SampleConfig(sampler="euler_maruyama", num_steps=1_000),
)
