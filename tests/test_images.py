from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from uvit.common.errors import InputError
from uvit.data.images import fit_image, open_image, random_flip, to_uint8, to_unit_range


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
    patches = Image.fromarray(COLOUR).resize((64, 48), Image.Resampling.NEAREST)
    found = pixels_of(patches.convert("CMYK"), 3, "JPEG", quality=100).astype(int)
    assert np.abs(found - np.asarray(patches)).max() <= 2
    assert np.array_equal(pixels_of(Image.fromarray(GREY > 20), 1), np.where(GREY > 20, 255, 0))


def test_palettes():
    image = Image.fromarray(COLOUR).quantize(16)
    assert np.array_equal(pixels_of(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(form):
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    found = pixels_of(Image.fromarray(levels), 1, form)
    assert np.array_equal(found, np.round(levels / 257).astype(np.uint8)) and found.max() == 255


def png(levels, transparent, bits=16, extra=()):
    """A grey PNG with a transparent level, which Pillow does not write; extra chunks follow the header."""
    height, width = levels.shape

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def packed(row):
        text = "".join(f"{level:0{bits}b}" for level in row)
        return bytes(int(text[start : start + 8].ljust(8, "0"), 2) for start in range(0, len(text), 8))

    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)),
        *extra,
        (b"tRNS", struct.pack(">H", transparent)),
        (b"IDAT", zlib.compress(b"".join(b"\0" + packed(row) for row in levels))),
        (b"IEND", b""),
    ]
    return {"bytes": b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts), "path": None}


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_shallow_grey_with_each_transparent_level(bits):
    """Of the levels of so many bits, scaled to 0 to 255, the transparent one is white."""
    highest = 2**bits - 1
    levels = np.arange(2**bits).reshape(1, -1)[:, :: -1 if bits == 1 else 1]
    for transparent in {0, 1, highest // 2, highest}:
        expected = np.where(levels == transparent, 255, levels * (255 // highest))
        assert np.array_equal(np.asarray(open_image(png(levels, transparent, bits), 1)), expected)
        assert np.array_equal(np.asarray(open_image(png(levels, transparent, bits), 3))[..., 2], expected)


def test_sixteen_bits_with_a_transparent_level():
    """Levels beside it, which look the same in 8 bits, stay."""
    levels = np.arange(1000, 1064, dtype=np.uint16).reshape(8, 8)
    expected = np.where(levels == 1001, 255, np.round(levels / 257))
    assert np.array_equal(np.asarray(open_image(png(levels, 1001), 1)), expected)
    assert np.array_equal(np.asarray(open_image(png(levels, 1001), 3)), expected[..., None].repeat(3, axis=2))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (GREY.astype(np.float32) / 64, "its pixels are floats, expected integers of 8 or 16 bits"),
        (GREY.astype(np.int32) * 2000, "its pixels are 0 to 126000, expected integers of 8 or 16 bits"),
        (GREY.astype(np.int32) - 5, "its pixels are -5 to 58, expected integers of 8 or 16 bits"),
    ],
)
def test_pixels_whose_range_is_not_known(pixels, message):
    with pytest.raises(InputError, match=message):
        pixels_of(Image.fromarray(pixels), form="TIFF")


def test_a_file_that_is_no_image_gives_the_same_message_each_time():
    for _ in range(2):
        with pytest.raises(InputError, match=r"^not an image of a known format$"):
            open_image({"bytes": b"nothing", "path": None}, 3)


def test_a_decoders_warnings_are_not_printed(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels_of(Image.fromarray(GREY), 1).shape == (8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(Image.DecompressionBombError):
        pixels_of(Image.fromarray(GREY), 1)


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
    solid = np.asarray(palette.convert("RGB")).astype(float)
    found = pixels_of(palette, transparency=bytes([51] * 16))  # a fifth of the colour, the rest white
    assert np.abs(found - (0.2 * solid + 0.8 * 255)).max() <= 1
    assert np.array_equal(pixels_of(palette.convert("PA"), form="TIFF"), solid)


# What EXIF's values say of rows and columns: row 0 and column 0 of the file are these sides of the picture.
ORIENTATIONS = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", [*ORIENTATIONS, 0, 9])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_rotated_files_are_upright(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = ORIENTATIONS.get(orientation, ORIENTATIONS[1])(COLOUR)
    assert np.array_equal(pixels_of(Image.fromarray(COLOUR), 3, form, exif=exif), expected)


def test_a_transparent_level_is_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    levels = np.arange(4).reshape(2, 2)
    found = np.asarray(open_image(png(levels, 1, bits=2, extra=[(b"eXIf", content)]), 1))
    assert found.tolist() == [[170, 0], [255, 255]]


@pytest.mark.parametrize(
    "content", [b"", b"MM", b"II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 30]
)
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_malformed_exif_is_ignored(content, form):
    grey = Image.fromarray(GREY)
    assert np.array_equal(pixels_of(grey, 1, form, exif=content), pixels_of(grey, 1, form))


def test_a_text_that_fills_the_memory_is_an_error_in_one_line():
    bomb = zlib.compress(b"x" * 10**7)
    with pytest.raises(ValueError, match=r"^[^\n]*too large[^\n]*$"):
        open_image(png(np.zeros((2, 2), int), 1, bits=8, extra=[(b"zTXt", b"Comment\0\0" + bomb)]), 1)


def resize_at_once(image, size, kind):
    return image.resize(size, kind)


def resize_rows_first(image, size, kind):
    """What a single call did in every version of Pillow up to 12."""
    return image.resize((size[0], image.height), kind).resize(size, kind)


def adm_centre_crop(image, size, resize=resize_rows_first):
    """Square centre crops, from the description of ADM's preprocessing."""
    while min(image.size) >= 2 * size:
        image = resize(image, (image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = np.asarray(resize(image, (round(image.width * scale), round(image.height * scale)), Image.BICUBIC))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(64, 64), (333, 257), (65, 129), (31, 500), (20, 21)])
def test_centre_crops_equal_those_of_adm(shape):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8))
    assert np.array_equal(fit_image(image, 32, 32).transpose(1, 2, 0), adm_centre_crop(image, 32))


def test_crops_equal_those_of_the_whole_scaled_image():
    """In the first order of Pillow; in the other, only roundings differ (levels here are too near for clipping)."""
    sides = np.random.default_rng(1).integers(1, 200, (150, 2))
    for shape in sides:
        image = Image.fromarray(np.random.default_rng(0).integers(96, 160, (*shape, 3)).astype(np.uint8))
        found = fit_image(image, 24, 24).transpose(1, 2, 0)
        assert np.array_equal(found, adm_centre_crop(image, 24)), shape
        at_once = adm_centre_crop(image, 24, resize_at_once).astype(int)
        assert np.abs(found - at_once).max() <= 2, shape


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1)])
def test_a_strip_does_not_fill_the_memory(shape):
    with pytest.raises(InputError, match="its {}x{} pixels are too narrow a strip to show 256x256 of".format(*shape)):
        fit_image(Image.new("RGB", shape[::-1]), 256, 256)


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
