"""Class-conditional ImageNet 256x256 in latents, U-ViT-L/2, in today's style."""

from uvit.config import Config, DataConfig, OptimConfig, ProcessConfig, SampleConfig, TrainConfig, UViTConfig
from uvit.weights.published import IMAGENET256_LATENTS, SD_AUTOENCODER_EMA, SIZES

config = Config(
    model=UViTConfig(**SIZES["large"], **IMAGENET256_LATENTS, qk_norm=True),
    process=ProcessConfig(schedule="flow", prediction="flow", time_distribution="logit_normal"),
    data=DataConfig(name="data/imagenet256_latents", flip=True, num_workers=8, autoencoder=SD_AUTOENCODER_EMA),
    optim=OptimConfig(name="muon", lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, warmup_steps=2_000, decay="cosine"),
    train=TrainConfig(num_steps=200_000, batch_size=1024, mixed_precision="bf16", label_dropout=0.1, ema_decay=0.9998),
    sample=SampleConfig(sampler="dpmpp_2m", num_steps=25, guidance=1.5, guidance_interval=(0.0, 0.8)),
)
