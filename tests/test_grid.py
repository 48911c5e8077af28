from __future__ import annotations

import numpy as np
import torch

from uvit.sampling.grid import GAP, NAME_LINES, image_grid

IMAGES = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 8, 8) * 40


def test_images_are_laid_out_in_rows_and_enlarged():
    picture = np.asarray(image_grid(IMAGES, columns=3))
    cell = 64 + GAP
    assert picture.shape == (GAP + 2 * cell, GAP + 3 * cell, 3)
    for number in range(5):
        row, column = divmod(number, 3)
        top, left = GAP + row * cell, GAP + column * cell
        assert (picture[top : top + 64, left : left + 64] == 40 * number).all()
    assert (picture[GAP + cell :, GAP + 2 * cell :] == 255).all()  # the last row is shorter


def test_large_images_keep_their_size_and_colour_its_channels():
    image = torch.tensor([10, 20, 30], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 100, 150)
    picture = np.asarray(image_grid(image, columns=1))
    assert picture.shape == (100 + 2 * GAP, 150 + 2 * GAP, 3)
    assert picture[GAP + 50, GAP + 75].tolist() == [10, 20, 30]


def test_names_are_drawn_at_the_left_and_cut():
    bare, short, long = (image_grid(IMAGES[:1], 1, names) for names in ([], ["a"], ["word " * 100]))
    assert bare.width < short.width < long.width
    assert bare.height == short.height == long.height
    (name,) = np.nonzero((np.asarray(long)[:, : long.width - 66] < 128).any(axis=(1, 2)))
    assert len(name) <= NAME_LINES * 24
