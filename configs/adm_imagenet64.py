"""Class-conditional ImageNet 64x64 in pixels, with ADM's published U-Net, 64x64_diffusion.pt: for drawing."""

from uvit.config import Config, DataConfig, SampleConfig
from uvit.weights.adm import IDDPM_NOISE, PUBLISHED_ADM

config = Config(
    model=PUBLISHED_ADM["adm_imagenet64"],
    process=IDDPM_NOISE,
    data=DataConfig(name="data/imagenet"),
    sample=SampleConfig(sampler="dpmpp_2m", num_steps=25),
)
