"""MS-COCO 256x256 in latents, text to image, U-ViT-S/2: the published run (FID 5.95, guided)."""

from dataclasses import replace

from uvit.config import Config, DataConfig, SampleConfig, TrainConfig
from uvit.weights.published import ADAMW, LDM_NOISE, PUBLISHED, SD_AUTOENCODER

config = Config(
    model=PUBLISHED["mscoco_uvit_small"],
    process=LDM_NOISE,
    data=DataConfig(name="data/mscoco256_latents", num_workers=8, autoencoder=SD_AUTOENCODER, scale_factor=0.23010),
    optim=replace(ADAMW, betas=(0.9, 0.9)),
    train=TrainConfig(num_steps=1_000_000, batch_size=256, label_dropout=0.1),
    sample=SampleConfig(sampler="dpmpp_fast", num_steps=50, t_end=1e-3, guidance=2.0),
)
