"""ImageNet 256x256 in latents, class-conditional, U-ViT-L/2: the published run (FID 3.40, guided)."""

from uvit.config import Config, DataConfig, SampleConfig, TrainConfig, UViTConfig
from uvit.published import ADAMW, IMAGENET_CLASSES, SD_AUTOENCODER, SIZES, VP_NOISE

config = Config(
    model=UViTConfig(
        **SIZES["large"], img_size=32, patch_size=2, in_chans=4, num_classes=IMAGENET_CLASSES, null_class=True
    ),
    process=VP_NOISE,
    data=DataConfig(name="data/imagenet256_latents", flip=True, num_workers=8, autoencoder=SD_AUTOENCODER),
    optim=ADAMW,
    train=TrainConfig(num_steps=300_000, batch_size=1024, label_dropout=0.15),
    sample=SampleConfig(sampler="dpm_solver_fast", num_steps=50, spacing="log_snr", t_end=1e-4, guidance=1.4),
)
