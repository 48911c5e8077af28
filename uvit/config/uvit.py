"""The config of a U-ViT: every size and option, with its default and valid range."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from uvit.common.errors import InputError
from uvit.config.network import BLOCK_WIDTHS, MAX_DEPTH, MAX_TOKENS, NetworkConfig


@dataclass(frozen=True, kw_only=True)
class UViTConfig(NetworkConfig):
    """A U-ViT. Defaults are the paper's choices, for its size S/2 on 32x32 images (arXiv 2209.12152, table 1)."""

    title = "U-ViT"
    backbone: Literal["uvit"] = "uvit"
    """Which network it is."""
    patch_size: int = 2
    """Side of a patch in pixels."""
    embed_dim: int = 512
    """Width D of a token."""
    depth: int = 12
    """Blocks besides the middle one, even: depth / 2 shallow ones before it, depth / 2 deep ones after."""
    num_heads: int = 8
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Width of the MLP's hidden layer, as a multiple of embed_dim."""
    qkv_bias: bool = False
    """Bias of the query, key and value projection."""
    qk_norm: bool = False
    """RMS norm of queries and keys before attention; more stable at high learning rates."""
    mlp_time_embed: bool = False
    """An MLP on the sinusoidal time embedding."""
    skip: Literal["concat", "add", "linear_add", "add_linear", "none"] = "concat"
    """How a long skip s joins the main branch m: Linear(Concat(m, s)), m + s, m + Linear(s), Linear(m + s), or none."""
    time_conditioning: Literal["token", "adaln"] = "token"
    """Time as a token, or as scale and shift in every block's layer norms; interval and guidance likewise."""
    conv: Literal["image", "tokens", "none"] = "image"
    """Final 3x3 convolution: on the image, on the grid of tokens before the linear projection, or none."""
    patch_embed: Literal["linear", "conv"] = "linear"
    """One linear projection per patch, or a stack of 3x3 convolutions and a 1x1."""
    patch_bottleneck: int = 0
    """Width of a narrow linear projection of a patch before the one to embed_dim, for patches of many pixels (JiT: 128
    for 768 values); 0 is none."""
    pos_embed: Literal["learned", "sincos2d"] = "learned"
    """Learned for every token, or fixed two-dimensional sinusoids for the patches."""
    outer_pairs: int = 0
    """Outermost pairs of shallow and deep blocks that see all patches in training, where the blocks inside them see a
    part (train.token_keep) or are left out (train.path_drop); 0 is a network without such an inner part."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch_size", "embed_dim", "num_heads"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("mlp_ratio", self.embed_dim * self.mlp_ratio >= 1, "at least 1 / embed_dim")
        self._require("depth", self.depth >= 2 and self.depth % 2 == 0, "even and at least 2")
        for side in self.image_shape:
            if side % self.patch_size:
                raise InputError(f"img_size must be divisible by patch_size {self.patch_size}, got {self.img_size}")
        if self.embed_dim % self.num_heads:
            raise InputError(f"embed_dim {self.embed_dim} must be divisible by num_heads {self.num_heads}")
        self._require("embed_dim", self.embed_dim % 2 == 0, "even (the time embedding is half cosines, half sines)")
        if self.pos_embed == "sincos2d":
            self._require("embed_dim", self.embed_dim % 4 == 0, "divisible by 4 with pos_embed 'sincos2d'")
        self._require("patch_bottleneck", self.patch_bottleneck >= 0, "at least 0")
        if self.patch_embed == "conv":
            self._require("patch_bottleneck", self.patch_bottleneck == 0, "0 with patch_embed 'conv'")
            self._require(
                "patch_size", self.patch_size & (self.patch_size - 1) == 0, "a power of 2 with patch_embed 'conv'"
            )
            if self.embed_dim % self.patch_size:
                sizes = f"embed_dim {self.embed_dim} must be divisible by patch_size {self.patch_size}"
                raise InputError(f"{sizes} with patch_embed 'conv'")
        self._require("outer_pairs", 0 <= self.outer_pairs <= self.num_pairs, f"0 to {self.num_pairs}, depth / 2")
        self._require("outer_pairs", not self.outer_pairs or self.has_skips, "0 with skip 'none', which fills no gaps")
        self._require_at_most(depth=MAX_DEPTH)
        if self.num_tokens > MAX_TOKENS:
            raise InputError(
                f"img_size, patch_size and num_context_tokens must give at most {MAX_TOKENS:,} tokens, "
                f"got {self.num_tokens:,}"
            )
        self._check_parameters()

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_number_tokens(self) -> int:
        """The first tokens: guidance and interval, where time is a token; otherwise they are added to the time."""
        return (self.takes_guidance + self.takes_interval) * (self.time_conditioning == "token")

    @property
    def num_extra_tokens(self) -> int:
        """Tokens before the patches: guidance, interval, label, time and context."""
        is_token = self.time_conditioning == "token"
        return self.num_number_tokens + int(self.num_classes > 0) + int(is_token) + self.num_context_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens in all."""
        return self.num_extra_tokens + math.prod(self.grid_shape)

    @property
    def most_parameters(self) -> float:
        dim, pixels = self.embed_dim, self.patch_size**2 * self.in_chans
        per_block = dim * (10 * dim + 2 * dim * self.mlp_ratio)  # attention, adaptive norms, skip; MLP
        per_token = pixels * 2 + self.num_tokens + self.num_classes + self.context_dim
        around = (31 + 2 * self.embedded_numbers) * dim**2 + 9 * self.in_chans**2
        around += self.patch_bottleneck * (pixels + dim)
        return (self.depth + 1) * per_block + dim * per_token + around

    @property
    def width(self) -> int:
        return self.embed_dim

    @property
    def has_skips(self) -> bool:
        return self.skip != "none"

    @property
    def num_pairs(self) -> int:
        return self.depth // 2

    @property
    def sparse_pairs(self) -> int:
        return self.outer_pairs

    @property
    def middle_shape(self) -> tuple[int, int, int]:
        return (self.embed_dim, *self.grid_shape)

    @property
    def activation_size(self) -> int:
        return self.num_tokens * self.embed_dim

    @property
    def live_activations(self) -> int:
        return self.depth // 2 + BLOCK_WIDTHS

    @property
    def description(self) -> str:
        return (
            f"{self.depth + 1} blocks of width {self.embed_dim}, {self.num_heads} heads, "
            f"{math.prod(self.grid_shape)} patches of {self.patch_size}x{self.patch_size}"
        )
