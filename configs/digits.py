"""Class-conditional digits, 8x8 grey: trains in about two minutes on two CPU cores, with nothing to download."""

from uvit.config import Config, DataConfig, OptimConfig, ProcessConfig, SampleConfig, TrainConfig, UViTConfig

config = Config(
    model=UViTConfig(
        img_size=8,
        patch_size=2,
        in_chans=1,
        embed_dim=64,
        depth=4,
        num_heads=4,
        num_classes=10,
        null_class=True,
        qk_norm=True,
    ),
    process=ProcessConfig(schedule="flow", prediction="flow", time_distribution="logit_normal"),
    data=DataConfig(name="digits"),
    optim=OptimConfig(
        name="muon",
        lr=1e-2,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fallback_lr_scale=3.0,
        warmup_steps=50,
        decay="cosine",
    ),
    train=TrainConfig(
        num_steps=1_500,
        batch_size=64,
        num_threads=1,
        label_dropout=0.1,
        ema_decay=0.99,
        log_every=50,
        sample_every=500,
        save_every=500,
    ),
    sample=SampleConfig(sampler="dpmpp_2m", num_steps=20, guidance=1.5, reuse="1:3"),
)
