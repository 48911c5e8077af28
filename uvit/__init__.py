"""U-ViT, the vision-transformer backbone for diffusion models with long skip connections."""

from uvit.backbone import UViT
from uvit.config import Config, UViTConfig

__all__ = ["Config", "UViT", "UViTConfig"]
__version__ = "0.1.0"
