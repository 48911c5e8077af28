"""ImageNet 256x256 in latents, class-conditional, U-ViT-H/2: the published run (FID 2.29, guided)."""

from uvit.config import Config, DataConfig, SampleConfig, TrainConfig
from uvit.weights.published import ADAMW, LDM_NOISE, PUBLISHED, SD_AUTOENCODER_EMA

config = Config(
    model=PUBLISHED["imagenet256_uvit_huge"],
    process=LDM_NOISE,
    data=DataConfig(name="data/imagenet256_latents", flip=True, num_workers=8, autoencoder=SD_AUTOENCODER_EMA),
    optim=ADAMW,
    train=TrainConfig(num_steps=500_000, batch_size=1024, label_dropout=0.1),
    sample=SampleConfig(sampler="dpmpp_fast", num_steps=50, t_end=1e-3, guidance=1.4),
)
