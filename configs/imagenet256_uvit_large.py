"""ImageNet 256x256 in latents, class-conditional, U-ViT-L/2: the published run (FID 3.40, guided)."""

from uvit.config import Config, DataConfig, SampleConfig, TrainConfig
from uvit.weights.published import ADAMW, PUBLISHED, SD_AUTOENCODER, VP_NOISE

config = Config(
    model=PUBLISHED["imagenet256_uvit_large"],
    process=VP_NOISE,
    data=DataConfig(name="data/imagenet256_latents", flip=True, num_workers=8, autoencoder=SD_AUTOENCODER),
    optim=ADAMW,
    train=TrainConfig(num_steps=300_000, batch_size=1024, label_dropout=0.15),
    sample=SampleConfig(sampler="dpm_solver_fast", num_steps=50, spacing="log_snr", t_end=1e-4, guidance=1.4),
)
