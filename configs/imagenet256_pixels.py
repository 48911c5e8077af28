"""Class-conditional ImageNet 256x256 in pixels, with patches of 16x16: JiT's regime (arXiv 2511.13720) on a U-ViT.

Of JiT-B/16 it has the width, heads, number of patches, the bottleneck of 128 and the norm of queries and keys; its
depth of 12 is here 6 shallow blocks and 6 deep ones, joined by long skips, and the middle one: 101M parameters. What
else is a U-ViT's stays so: time and label are tokens, the MLP has GELU, and a last 3x3 convolution smooths the edges of
patches. Its process, optimizer, guidance and solver are JiT's, whose time is 1 - t: their mean of logit(t) is -0.8, and
they guide from 0.1 on. They train for 200 epochs, as here, or 600, which is train.num_steps 750000.

It has not been trained here.
"""

from uvit.config import Config, DataConfig, OptimConfig, ProcessConfig, SampleConfig, TrainConfig, UViTConfig

config = Config(
    model=UViTConfig(
        img_size=256,
        patch_size=16,
        patch_bottleneck=128,
        embed_dim=768,
        depth=12,
        num_heads=12,
        num_classes=1_000,
        null_class=True,
        qk_norm=True,
    ),
    process=ProcessConfig(
        schedule="flow",
        prediction="data",
        loss_space="flow",
        min_divisor=0.05,
        time_distribution="logit_normal",
        logit_mean=0.8,
        logit_std=0.8,
    ),
    data=DataConfig(name="ILSVRC/imagenet-1k", flip=True, num_workers=16),
    optim=OptimConfig(name="adamw", lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0, warmup_steps=6_250),
    train=TrainConfig(num_steps=250_000, batch_size=1024, mixed_precision="bf16", label_dropout=0.1),
    sample=SampleConfig(sampler="heun", num_steps=50, guidance=2.9, guidance_interval=(0.0, 0.9)),
)
