"""Image files to pixels, and pixels to a network's range and back."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageMode, UnidentifiedImageError
from torch import Tensor

from uvit.common.errors import InputError

MIN_RANDOM_CROP = 0.8
"""Smallest random crop, as a fraction of the image's shorter side."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by the value of EXIF's orientation."""
SHALLOW_GREY = {"L;2": 85, "L;4": 17}
"""What Pillow multiplies pixels of 2 and 4 bits by."""
MAX_CUT_AWAY = 256
"""How many times larger than its crop a scaled image may be, since scaling a narrow strip could fill the memory."""


def open_image(stored: dict[str, Any], channels: int) -> Image.Image:
    """Decodes an image upright, in 8 bits, with transparent parts over white.

    Args:
        stored: has `bytes`, or None there and a `path`, as `datasets` stores images that it does not decode.
        channels: 1 for grey, 3 for RGB.

    Raises:
        InputError: a file that is not an image, or pixels of unknown range.
        Exception: of any type, from the decoder of a broken file.
    """
    with warnings.catch_warnings():
        image = _to_eight_bits(_upright(_identify(stored)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("L" if channels == 1 else "RGB")


def is_grey(stored: dict[str, Any]) -> bool:
    """Returns whether a file holds an image without colours, by its header.

    Args:
        stored: as for open_image.

    Raises:
        InputError: a file that is not an image.
    """
    with warnings.catch_warnings(), _identify(stored) as image:
        return ImageMode.getmode(image.mode).basemode == "L"


def _identify(stored: dict[str, Any]) -> Image.Image:
    """Opens an image by its header, inside of a catch_warnings."""
    warnings.simplefilter("ignore")  # decoders warn of odd metadata, for example; the pixels are right
    try:
        image = Image.open(stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"]))
    except UnidentifiedImageError:  # its message shows a memory address
        raise InputError("not an image of a known format") from None
    packing = image.tile[0].args if image.format == "PNG" and image.tile else None
    if packing in SHALLOW_GREY and 0 < image.info.get("transparency", 0) < SHALLOW_GREY[packing]:
        image.info["transparency"] *= SHALLOW_GREY[packing]  # Pillow scales the pixels alone
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Turns an image as its EXIF tag says; a tag that cannot be read says nothing."""
    image.load()  # which turns TIFF files
    try:
        turned = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # for malformed EXIF, Pillow may raise any type
        return image
    return image if turned is None else image.transpose(turned)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey, which Pillow would clip; keeps its transparent level as an alpha channel."""
    if image.mode == "F":
        raise InputError("its pixels are floats, expected integers of 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    levels = np.asarray(image)
    if levels.min() < 0 or levels.max() > 65535:
        raise InputError(f"its pixels are {levels.min()} to {levels.max()}, expected integers of 8 or 16 bits")
    grey = Image.fromarray((levels / 257).round().astype(np.uint8))
    if "transparency" not in image.info:
        return grey
    opaque = np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(opaque)))


def fit_image(image: Image.Image, height: int, width: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Scales an image to cover a size and crops it, as ADM does (arXiv 2105.05233).

    It is halved by box filters while it is at least twice too large, then scaled by bicubic interpolation.

    Args:
        image: grey or RGB.
        height: rows of the crop.
        width: columns of the crop.
        rng: chooses size and position of the crop; None takes the centre.

    Returns:
        (C, height, width) uint8.

    Raises:
        InputError: a narrow strip, of which the crop would show almost nothing.
    """
    rows, columns = height, width  # the size to cover, which is larger than the crop where that is random
    if rng is not None:
        largest = math.ceil(min(height, width) / MIN_RANDOM_CROP)
        more = int(rng.integers(min(height, width), largest + 1)) / min(height, width)
        rows, columns = round(height * more), round(width * more)
    while image.height >= 2 * rows and image.width >= 2 * columns:
        image = _resize_rows(image, image.width // 2, Image.Resampling.BOX)
        image = _resize_columns(image, image.height // 2, Image.Resampling.BOX)
    scale = max(rows / image.height, columns / image.width)
    scaled_height, scaled_width = round(image.height * scale), round(image.width * scale)
    if scaled_height * scaled_width > MAX_CUT_AWAY * height * width:
        raise InputError(f"its {image.height}x{image.width} pixels are too narrow a strip to show {height}x{width} of")
    spare = scaled_height - height, scaled_width - width
    top, left = (each // 2 for each in spare) if rng is None else (int(rng.integers(each + 1)) for each in spare)
    image = _resize_rows(image, scaled_width, Image.Resampling.BICUBIC)
    image = image.crop((left, 0, left + width, image.height))  # drops what is not shown
    image = _resize_columns(image, scaled_height, Image.Resampling.BICUBIC)
    pixels = np.asarray(image.crop((0, top, width, top + height)))
    return rearrange(pixels, "H W -> 1 H W" if pixels.ndim == 2 else "H W C -> C H W")


# Width first, as in the Pillow behind ADM's pixels: since version 13 it may scale height first, and rounds otherwise.
def _resize_rows(image: Image.Image, width: int, kind: Image.Resampling) -> Image.Image:
    return image.resize((width, image.height), kind)


def _resize_columns(image: Image.Image, height: int, kind: Image.Resampling) -> Image.Image:
    return image.resize((image.width, height), kind)


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
