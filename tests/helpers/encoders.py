"""Tiny encoders with random weights, made by the libraries' own config classes and saved in the layout of real ones."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from benchmarks.text_digits import make_text_encoder

__all__ = ["make_autoencoder", "make_text_encoder"]


def make_autoencoder(folder: Path, latent_channels: int = 4) -> AutoencoderKL:
    """Saves an autoencoder that halves the image's sides."""
    torch.manual_seed(0)
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
    ).eval()
    network.save_pretrained(folder)
    return network
