"""Class-conditional CIFAR-10, U-ViT-S/2, in today's style; `--data.name FOLDER` takes a local copy of the data set."""

from uvit.config import Config, DataConfig, OptimConfig, ProcessConfig, SampleConfig, TrainConfig, UViTConfig
from uvit.weights.published import SIZES

config = Config(
    model=UViTConfig(**SIZES["small"], img_size=32, patch_size=2, num_classes=10, null_class=True, qk_norm=True),
    process=ProcessConfig(schedule="flow", prediction="flow", time_distribution="logit_normal"),
    data=DataConfig(name="uoft-cs/cifar10", flip=True, num_workers=4),
    optim=OptimConfig(name="muon", lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, warmup_steps=1_000, decay="cosine"),
    train=TrainConfig(num_steps=100_000, batch_size=256, mixed_precision="bf16", label_dropout=0.1, ema_decay=0.9995),
    sample=SampleConfig(sampler="dpmpp_2m", num_steps=25, guidance=1.5),
)
