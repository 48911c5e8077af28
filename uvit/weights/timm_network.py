"""Frozen networks of timm, with the preprocessing that each was trained with: features to measure or to align by."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from uvit.common.errors import InputError, one_line
from uvit.common.libraries import quiet
from uvit.config import TIMM, Config
from uvit.weights.tensors import read_weights


class TimmNetwork(nn.Module):
    """A frozen network of timm, in eval mode.

    Args:
        name: a model of timm, such as vit_small_patch14_dinov2.
        weights: file of its weights (safetensors); None downloads them once.
        classify: whether it gives logits instead of pooled features.

    Raises:
        InputError: no such model, or its weights cannot be downloaded or read.
    """

    network: Any
    mean: Tensor
    std: Tensor

    def __init__(self, name: str, weights: str | None, classify: bool = True) -> None:
        super().__init__()
        import timm

        try:
            with quiet("huggingface_hub"):  # which tells of each retry
                self.network = timm.create_model(name, pretrained=weights is None)
            if weights is not None:
                self.network.load_state_dict(read_weights(existing_file(weights)))
            if not classify:
                self.network.reset_classifier(0)
        except InputError:
            raise
        except Exception as error:  # an unknown name, no network, weights of another network
            given = "" if weights is None else f" from {weights}"
            raise InputError(f"timm model {name!r} cannot be loaded{given}: {one_line(error, 150)}") from None
        settings = timm.data.resolve_model_data_config(self.network)
        self.network.eval().requires_grad_(False)
        self.size: tuple[int, int] = tuple(settings["input_size"][1:])
        self.register_buffer("mean", torch.tensor(settings["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(settings["std"])[:, None, None])

    def prepare(self, images: Tensor) -> Tensor:
        """Returns (B, C, H, W) images in [0, 1], C 1 or 3, as the network takes them: of its size (bicubic)."""
        x = nn.functional.interpolate(images.expand(-1, 3, -1, -1), self.size, mode="bicubic", antialias=True)
        return (x.clamp(0, 1) - self.mean) / self.std


class PatchEncoder(TimmNetwork):
    """What a network of timm says of each part of an image: its last features, on the grid of another's patches.

    A transformer sees images of the size that gives it exactly this grid (REPA, arXiv 2410.06940, appendix); another
    network sees them at its own size, and its map is resampled (bilinear, averaging where it is larger).

    Args:
        name: a model of timm.
        weights: file of its weights (safetensors); None downloads them once.
        grid: (rows, columns) of the patches to describe.

    Raises:
        InputError: as TimmNetwork; a model without a map of features, or that cannot take images of that size.
    """

    def __init__(self, name: str, weights: str | None, grid: tuple[int, int]) -> None:
        super().__init__(name, weights)
        from timm.models.eva import Eva
        from timm.models.vision_transformer import VisionTransformer

        self.grid = grid
        try:
            if isinstance(self.network, (VisionTransformer, Eva)):
                rows, columns = self.network.patch_embed.patch_size
                self.size = rows * grid[0], columns * grid[1]
                self.network.set_input_size(img_size=self.size)
            self.width: int = self(torch.zeros(1, 3, *grid)).shape[-1]
        except Exception as error:  # timm's networks raise what they like
            size = "x".join(map(str, self.size))
            fault = f"timm model {name!r} gives no features of the patches of {size} images"
            raise InputError(f"{fault}: {one_line(error, 150)}") from None

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Returns (B, rows · columns, width) features of (B, C, H, W) images in [-1, 1], row by row."""
        x = self.prepare((images + 1) / 2)
        (found,) = self.network.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)  # (B, D, h, w)
        if found.shape[-2:] != self.grid:
            found = nn.functional.interpolate(found.float(), self.grid, mode="bilinear", antialias=True)
        return rearrange(found, "B D h w -> B (h w) D")


def existing_file(weights: str) -> Path:
    """Returns the path of a file of weights.

    Raises:
        InputError: there is none.
    """
    if not os.path.isfile(weights):
        raise InputError(f"no weights at {weights}")
    return Path(weights)


def load_patch_encoder(config: Config) -> PatchEncoder | None:
    """Loads the encoder that a run's tokens are aligned to, on the CPU; None where there is none.

    Raises:
        InputError: as PatchEncoder.
    """
    settings = config.train
    if settings.alignment_encoder is None or not settings.alignment_factor:
        return None
    name = settings.alignment_encoder.removeprefix(TIMM)
    return PatchEncoder(name, settings.alignment_encoder_weights, config.model.middle_shape[1:])
