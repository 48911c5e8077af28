"""ImageNet 512x512 in latents, class-conditional, U-ViT-L/4: the published run (FID 4.67, guided)."""

from uvit.config import Config, DataConfig, SampleConfig, TrainConfig, UViTConfig
from uvit.published import ADAMW, IMAGENET_CLASSES, SD_AUTOENCODER, SIZES, VP_NOISE

config = Config(
    model=UViTConfig(
        **SIZES["large"], img_size=64, patch_size=4, in_chans=4, num_classes=IMAGENET_CLASSES, null_class=True
    ),
    process=VP_NOISE,
    data=DataConfig(name="data/imagenet512_latents", num_workers=8, autoencoder=SD_AUTOENCODER),
    optim=ADAMW,
    train=TrainConfig(num_steps=500_000, batch_size=1024, label_dropout=0.15),
    sample=SampleConfig(sampler="dpm_solver_fast", num_steps=50, spacing="log_snr", t_end=1e-4, guidance=1.7),
)
