from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from uvit.images import fit_image, open_image, random_flip, to_uint8, to_unit_range


def stored(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return {"bytes": file.getvalue(), "path": None}


def pixels_of(image, channels=3, form="PNG", **options):
    return np.asarray(open_image(stored(image, form, **options), channels))


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
COLOUR = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)


def test_grey_and_colour():
    assert np.array_equal(pixels_of(Image.fromarray(GREY), 1), GREY)
    assert np.array_equal(pixels_of(Image.fromarray(GREY), 3), GREY[..., None].repeat(3, axis=2))
    assert np.array_equal(pixels_of(Image.fromarray(COLOUR), 3), COLOUR)
    assert np.array_equal(pixels_of(Image.fromarray(COLOUR), 1), np.asarray(Image.fromarray(COLOUR).convert("L")))
    assert pixels_of(Image.fromarray(COLOUR).convert("CMYK"), 3, "JPEG").shape == (6, 8, 3)
    assert np.array_equal(pixels_of(Image.fromarray(GREY > 20), 1), np.where(GREY > 20, 255, 0))


def test_palettes():
    image = Image.fromarray(COLOUR).quantize(16)
    assert np.array_equal(pixels_of(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(form):
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    found = pixels_of(Image.fromarray(levels), 1, form)
    assert np.array_equal(found, np.round(levels / 257).astype(np.uint8)) and found.max() == 255


def test_transparent_parts_are_white():
    """Whatever colour lies under them."""
    alpha = np.full((6, 8, 1), 255, np.uint8)
    alpha[:, :4] = 0
    found = pixels_of(Image.fromarray(np.concatenate([COLOUR, alpha], axis=2)))
    assert (found[:, :4] == 255).all() and np.array_equal(found[:, 4:], COLOUR[:, 4:])
    both = Image.fromarray(np.stack([GREY, np.where(GREY < 32, 0, 255).astype(np.uint8)], axis=2), "LA")
    assert np.array_equal(pixels_of(both, 1), np.where(GREY < 32, 255, GREY))
    palette = Image.fromarray(COLOUR).quantize(16)
    index = np.asarray(palette)[0, 0]
    found = pixels_of(palette, transparency=int(index))
    assert (found[np.asarray(palette) == index] == 255).all()


def test_rotated_files_are_upright():
    """EXIF orientation 6: the camera was turned, the picture is to be turned clockwise."""
    exif = Image.Exif()
    exif[0x0112] = 6
    assert np.array_equal(pixels_of(Image.fromarray(COLOUR), exif=exif), np.rot90(COLOUR, -1))


def adm_centre_crop(image, size):
    """Square centre crops, from the description of ADM's preprocessing."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = np.asarray(image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(64, 64), (333, 257), (65, 129), (31, 500), (20, 21)])
def test_centre_crops_are_adms(shape):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8))
    assert np.array_equal(fit_image(image, 32, 32).transpose(1, 2, 0), adm_centre_crop(image, 32))


def test_shapes_that_are_not_square():
    wide = Image.fromarray(np.tile(np.arange(100, dtype=np.uint8), (40, 1)))
    found = fit_image(wide, 10, 20)
    assert found.shape == (1, 10, 20)
    assert found.min() >= 8 and found.max() <= 91  # 80 of 100 columns are shown


def test_random_crops_show_different_parts_of_the_asked_size():
    ramp = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    crops = [fit_image(Image.fromarray(ramp), 16, 16, np.random.default_rng(seed)) for seed in range(50)]
    spans = [int(crop[0, -1, -1]) - int(crop[0, 0, 0]) for crop in crops]
    assert {crop.shape for crop in crops} == {(1, 16, 16)} and len({crop.tobytes() for crop in crops}) > 20
    assert min(spans) >= 0.7 * 120 and max(spans) >= 0.95 * 120 > min(spans)
    again = fit_image(Image.fromarray(ramp), 16, 16, np.random.default_rng(7))
    assert np.array_equal(again, crops[7])
    tall = fit_image(Image.fromarray(ramp), 16, 8, np.random.default_rng(0))
    assert tall.shape == (1, 16, 8)


def test_unit_range_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit_range(levels)), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_random_flip_mirrors_half():
    images = torch.arange(12.0).reshape(1, 1, 3, 4).expand(1000, -1, -1, -1)
    flipped = random_flip(images, torch.Generator().manual_seed(0))
    mirrored = (flipped == images.flip(-1)).all(dim=(1, 2, 3))
    assert torch.equal(flipped[~mirrored], images[~mirrored])
    assert 450 < mirrored.sum() < 550
