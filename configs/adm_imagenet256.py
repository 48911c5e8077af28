"""Class-conditional ImageNet 256x256 in pixels, with ADM's published U-Net, 256x256_diffusion.pt: for drawing."""

from uvit.config import Config, DataConfig, SampleConfig
from uvit.weights.adm import DDPM_NOISE, PUBLISHED_ADM

config = Config(
    model=PUBLISHED_ADM["adm_imagenet256"],
    process=DDPM_NOISE,
    data=DataConfig(name="data/imagenet"),
    sample=SampleConfig(sampler="dpmpp_2m", num_steps=25),
)
