"""ImageNet 64x64, class-conditional, U-ViT-M/4 in pixels: the published run (FID 5.85)."""

from dataclasses import replace

from uvit.config import Config, DataConfig, SampleConfig, TrainConfig
from uvit.weights.published import ADAMW, PUBLISHED, VP_NOISE

config = Config(
    model=PUBLISHED["imagenet64_uvit_mid"],
    process=VP_NOISE,
    data=DataConfig(name="ILSVRC/imagenet-1k", flip=True, num_workers=16),
    optim=replace(ADAMW, lr=3e-4),
    train=TrainConfig(num_steps=300_000, batch_size=1024),
    sample=SampleConfig(sampler="dpm_solver_fast", num_steps=50, spacing="log_snr", t_end=1e-4),
)
