"""Which patches the inner blocks see in a training step (SPRINT, arXiv 2510.21986, section 3)."""

from __future__ import annotations

import dataclasses

import torch
from einops import rearrange
from torch import Tensor

from uvit.config import Config

SIDE = 2
"""Of the squares in which `structured` keeps as many patches each."""


def num_sparse_steps(config: Config) -> int:
    """Returns in how many steps, the first ones, the inner blocks see some of the patches."""
    train = config.train
    return round((1 - train.dense_share) * train.num_steps) if train.token_keep < 1 else 0


def at_step(config: Config, step: int) -> Config:
    """Returns the config of a step (from 0): in the last ones, all blocks see all patches."""
    if config.train.token_keep == 1 or step < num_sparse_steps(config):
        return config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, token_keep=1.0))


def sparse_inputs(
    config: Config, batch: int, device: torch.device, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Draws which patches the inner blocks see, and for which images they are left out.

    Args:
        config: of the step, see `at_step`.
        batch: B, number of images.
        device: of the generator and the results.
        generator: source of random numbers.

    Returns:
        Inputs of the network: `kept`, (B, M) numbers of patches, unless it is all; and `dropped`, (B,) of bool. None
        for a network whose blocks all see all.
    """
    train, inputs = config.train, {}
    if not config.model.sparse_pairs:
        return {}
    if train.token_keep < 1:
        choose = structured_patches if train.token_choice == "structured" else random_patches
        inputs["kept"] = choose(config.model.grid_shape, train.token_keep, batch, device, generator)
    # Without any, too: each step gives the gap token a gradient, for which several processes would wait.
    dropped = torch.zeros(batch, dtype=torch.bool, device=device)
    if train.path_drop > 0:
        dropped = torch.rand(batch, device=device, generator=generator) < train.path_drop
    return {**inputs, "dropped": dropped}


def random_patches(
    grid: tuple[int, int], keep: float, batch: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Returns (batch, M) numbers of patches, each once, of a share of a grid of (rows, columns)."""
    rows, columns = grid
    scores = torch.rand(batch, rows * columns, device=device, generator=generator)
    return scores.topk(round(keep * rows * columns)).indices


def structured_patches(
    grid: tuple[int, int], keep: float, batch: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Returns (batch, M) numbers of patches, as many in each 2x2 of a grid of (rows, columns)."""
    rows, columns = grid
    numbers = torch.arange(rows * columns, device=device)
    squares = rearrange(numbers, "(h p w q) -> (h w) (p q)", h=rows // SIDE, p=SIDE, q=SIDE)  # (rows * columns / 4, 4)
    scores = torch.rand(batch, *squares.shape, device=device, generator=generator)
    chosen = scores.topk(round(keep * SIDE**2)).indices  # (batch, rows * columns / 4, 4 * keep)
    return squares.expand(batch, -1, -1).gather(2, chosen).flatten(1)
