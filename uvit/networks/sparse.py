"""Some of the patches, taken out for the inner blocks of a U-ViT and put back among gaps (SPRINT, arXiv 2510.21986)."""

from __future__ import annotations

import torch
from torch import Tensor


def take_tokens(h: Tensor, kept: Tensor, num_extra: int) -> Tensor:
    """Returns the extra tokens and the kept patches.

    Args:
        h: (B, L, D) all tokens, of which the first `num_extra` are no patches.
        kept: (B, M) numbers of patches, each once per image.
        num_extra: tokens that are always taken.

    Returns:
        (B, num_extra + M, D).
    """
    batch, length, _ = h.shape
    rows = _positions(kept, num_extra) + length * torch.arange(batch, device=h.device)[:, None]
    return h.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, (batch, -1))


def put_tokens(part: Tensor, kept: Tensor, gap: Tensor, num_extra: int, length: int) -> Tensor:
    """Puts tokens back where `take_tokens` took them, among gaps.

    Args:
        part: (B, num_extra + M, D).
        kept: (B, M), as for `take_tokens`.
        gap: (1, 1, D), what stands where no token was taken.
        num_extra: tokens that were always taken.
        length: L, tokens in all.

    Returns:
        (B, L, D).
    """
    batch, _, width = part.shape
    index = _positions(kept, num_extra)[..., None].expand(-1, -1, width)  # (B, num_extra + M, D)
    return gap.to(part.dtype).expand(batch, length, width).scatter(1, index, part)


def _positions(kept: Tensor, num_extra: int) -> Tensor:
    """Returns the positions of the extra tokens and the kept patches among all tokens, (B, num_extra + M)."""
    extra = torch.arange(num_extra, device=kept.device).expand(kept.shape[0], -1)
    return torch.cat([extra, num_extra + kept], dim=1)
