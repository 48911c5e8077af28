"""Image files to pixels, and pixels to what a network sees."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

MIN_RANDOM_CROP = 0.8
"""The smallest share of an image's shorter side that a random crop shows."""


def open_image(stored: dict[str, Any], channels: int) -> Image.Image:
    """Decodes an image upright, in 8 bits, with transparent parts over white.

    Args:
        stored: `bytes`, or None there and a `path`, as `datasets` keeps images that it does not decode.
        channels: 1 for grey, 3 for RGB.

    Raises:
        Exception: whatever the decoder of a broken file raises.
    """
    image: Image.Image = Image.open(stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"]))
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def fit_image(image: Image.Image, height: int, width: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Scales an image to cover a shape and cuts the shape out, as ADM does (arXiv 2105.05233).

    It is halved by box filters while it is twice too large, then scaled by bicubic interpolation.

    Args:
        image: grey or RGB.
        height: rows of the shape.
        width: columns of the shape.
        rng: chooses size and place of the crop; None cuts out the centre.

    Returns:
        (C, height, width) uint8.
    """
    rows, columns = height, width  # what is to be covered: for a random crop, some more than is cut out
    if rng is not None:
        largest = math.ceil(min(height, width) / MIN_RANDOM_CROP)
        more = int(rng.integers(min(height, width), largest + 1)) / min(height, width)
        rows, columns = round(height * more), round(width * more)
    while image.height >= 2 * rows and image.width >= 2 * columns:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(rows / image.height, columns / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    spare = image.height - height, image.width - width
    top, left = (each // 2 for each in spare) if rng is None else (int(rng.integers(each + 1)) for each in spare)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return rearrange(pixels, "H W -> 1 H W" if pixels.ndim == 2 else "H W C -> C H W")


def to_unit_range(images: Tensor) -> Tensor:
    """Maps uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Maps float images in [-1, 1] to uint8, clipped and rounded."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors each of (B, C, H, W) images with probability 1/2, on their device."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device, generator=generator) < 0.5
    return torch.where(mirrored, images.flip(-1), images)
