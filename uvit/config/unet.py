"""The config of a U-Net: every size and option, with its default and valid range."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from uvit.common.errors import InputError
from uvit.config.network import BLOCK_WIDTHS, MAX_DEPTH, MAX_SIDE, MAX_TOKENS, NetworkConfig

GROUPS = 32
"""Groups of channels that are normalised together."""
TIME_WIDTHS = 4
"""Width of the embedded time, in units of model_channels."""


class Level(NamedTuple):
    """One resolution of a U-Net."""

    channels: int
    """Width of its feature maps."""
    shape: tuple[int, int]
    """(height, width) of its feature maps."""
    attends: bool
    """Whether attention follows each of its residual blocks."""


@dataclass(frozen=True, kw_only=True)
class UNetConfig(NetworkConfig):
    """A diffusion U-Net. Defaults are ADM's choices (arXiv 2105.05233), in DDPM's size for 32x32 images."""

    title = "U-Net"
    backbone: Literal["unet"] = "unet"
    """Which network it is."""
    out_chans: int | None = None
    """Channels of the output; None is in_chans. Published models have 3 more, the variance, which nothing here uses."""
    model_channels: int = 128
    """Width C of a feature map, before it is multiplied."""
    channel_mult: tuple[float, ...] = (1, 2, 2, 2)
    """Width at each level, as a multiple of model_channels; each level has half the height and width of the one before
    it."""
    num_res_blocks: int = 2
    """Residual blocks at each level of the encoder; the decoder has one more."""
    attention_sizes: tuple[int, ...] = (16, 8)
    """Sides in pixels (the shorter ones) of the feature maps at whose levels attention follows each residual block; the
    middle always has attention."""
    num_heads: int = 4
    """Attention heads, where head_dim is 0."""
    head_dim: int = 64
    """Width of an attention head, so that wider levels have more of them; 0 is by num_heads."""
    qkv_order: Literal["legacy", "new"] = "legacy"
    """Order of the channels of queries, keys and values: within each head (all published models but that for 64x64), or
    one after the other."""
    scale_shift_norm: bool = True
    """Time and label as scale and shift after a group norm (AdaGN, FiLM), rather than added before it."""
    resblock_updown: bool = True
    """Change resolution within residual blocks, rather than by a convolution of stride 2 and one on repeated pixels."""
    skips: bool = True
    """Join each block of the decoder with its block of the encoder; False cuts these long skips, as in the ablation of
    pix2pix (arXiv 1611.07004, section 4.2)."""
    dropout: float = 0.0
    """Dropout inside residual blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model_channels", "num_res_blocks", "num_heads"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("out_chans", self.predicted_chans >= self.in_chans, f"None or at least in_chans {self.in_chans}")
        self._require("head_dim", self.head_dim >= 0, "at least 0")
        self._require("img_size", max(self.image_shape) <= MAX_SIDE, f"at most {MAX_SIDE:,}")
        self._require_at_most(num_context_tokens=MAX_TOKENS)
        self._require("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        self._require(
            "channel_mult", bool(self.channel_mult) and min(self.channel_mult) > 0, "one number or more, above 0"
        )
        self._require("model_channels", self.model_channels % 2 == 0, "even (the time embedding is half cosines)")
        if self.num_blocks > MAX_DEPTH:
            sizes = f"channel_mult and num_res_blocks must give at most {MAX_DEPTH:,} blocks"
            raise InputError(f"{sizes}, got {self.num_blocks:,}")
        self._check_parameters()
        halvings = len(self.channel_mult) - 1
        if any(side % 2**halvings for side in self.image_shape):
            named = f"{halvings + 1} levels of channel_mult"
            raise InputError(f"img_size must be divisible by {2**halvings} for {named}, got {self.img_size}")
        levels = self.levels
        for multiple, level in zip(self.channel_mult, levels):
            given = f"{level.channels} for {multiple:g} x model_channels {self.model_channels}"
            if level.channels < 1 or level.channels % GROUPS:
                raise InputError(f"channels must be divisible by {GROUPS} groups, got {given}")
            if (level.attends or level is levels[-1]) and level.channels % (self.head_dim or self.num_heads):
                divisor = f"head_dim {self.head_dim}" if self.head_dim else f"num_heads {self.num_heads}"
                raise InputError(f"channels with attention must be divisible by {divisor}, got {given}")
        sides = [min(level.shape) for level in levels]
        for side in self.attention_sizes:
            self._require(
                "attention_sizes", side in sides, f"among the sides of the levels, {', '.join(map(str, sides))}"
            )
        largest = max(math.prod(level.shape) for level in levels if level.attends or level is levels[-1])
        if largest > MAX_TOKENS:
            raise InputError(
                f"attention must see at most {MAX_TOKENS:,} pixels, got {largest:,}: smaller attention_sizes, or more "
                "levels of channel_mult"
            )

    @property
    def levels(self) -> list[Level]:
        """Its resolutions, the finest first."""
        height, width = self.image_shape
        levels = []
        for number, multiple in enumerate(self.channel_mult):
            shape = height >> number, width >> number
            attends = min(shape) in self.attention_sizes
            levels.append(Level(int(multiple * self.model_channels), shape, attends))
        return levels

    @property
    def num_blocks(self) -> int:
        """Blocks of the encoder, as many as of the decoder: residual blocks, changes of resolution, and the stem."""
        return len(self.channel_mult) * (self.num_res_blocks + 1)

    @property
    def predicted_chans(self) -> int:
        return self.in_chans if self.out_chans is None else self.out_chans

    @property
    def most_parameters(self) -> float:
        widest = max(self.channel_mult) * self.model_channels
        time = TIME_WIDTHS * self.model_channels
        per_block = 60 * widest * widest + widest * (
            2 * time + 2 * self.context_dim
        )  # convolutions, attention, MLP; embedding
        ends = 9 * widest * (self.in_chans + self.predicted_chans)
        embedded = self.num_classes + 1 + (2 + 2 * self.embedded_numbers) * time
        return (2 * self.num_blocks + 3) * per_block + time * embedded + ends

    def heads(self, channels: int) -> int:
        """Returns the number of attention heads at this width."""
        return channels // self.head_dim if self.head_dim else self.num_heads

    @property
    def width(self) -> int:
        return self.model_channels

    @property
    def has_skips(self) -> bool:
        return self.skips

    @property
    def num_pairs(self) -> int:
        return self.num_blocks

    @property
    def num_extra_tokens(self) -> None:
        return None

    @property
    def middle_shape(self) -> tuple[int, int, int]:
        *_, coarsest = self.levels
        return (coarsest.channels, *coarsest.shape)

    @property
    def activation_size(self) -> int:
        return max(level.channels * math.prod(level.shape) for level in self.levels)

    @property
    def live_activations(self) -> int:
        return self.num_blocks + BLOCK_WIDTHS

    @property
    def description(self) -> str:
        widths = ", ".join(str(level.channels) for level in self.levels)
        sizes = ", ".join(map(str, self.attention_sizes)) or "the smallest size"
        return f"{self.num_res_blocks} residual blocks at each of the widths {widths}, attention at {sizes}"
