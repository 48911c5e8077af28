"""ImageNet 64x64, class-conditional, U-ViT-M/4 in pixels: the published run (FID 5.85)."""

from dataclasses import replace

from uvit.config import Config, DataConfig, SampleConfig, TrainConfig, UViTConfig
from uvit.published import ADAMW, IMAGENET_CLASSES, SIZES, VP_NOISE

config = Config(
    model=UViTConfig(**SIZES["mid"], img_size=64, patch_size=4, in_chans=3, num_classes=IMAGENET_CLASSES),
    process=VP_NOISE,
    data=DataConfig(name="ILSVRC/imagenet-1k", flip=True, num_workers=16),
    optim=replace(ADAMW, lr=3e-4),
    train=TrainConfig(num_steps=300_000, batch_size=1024),
    sample=SampleConfig(sampler="dpm_solver_fast", num_steps=50, spacing="log_snr", t_end=1e-4),
)
