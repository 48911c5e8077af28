"""The configs of the networks: every size and option, with its default and valid range."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from uvit.common.errors import InputError
from uvit.config.section import Section

Backend = Literal["auto", "xformers", "sdpa", "math"]

# Limits that are checked before memory is allocated; each is far beyond what anyone has trained.
MAX_PARAMETERS = 10**11
MAX_DEPTH = 1_000
MAX_TOKENS = 2**19
MAX_SIDE = 2**14
BLOCK_WIDTHS = 16
"""Memory that a block works in, in units of its input: queries, keys, values, the MLP's hidden layer, products."""


@dataclass(frozen=True, kw_only=True)
class UViTConfig(Section):
    """A U-ViT. Defaults are the paper's choices, for its size S/2 on 32x32 images (arXiv 2209.12152, table 1)."""

    img_size: int | tuple[int, int] = 32
    """Side of the image (or latent) in pixels, or (height, width)."""
    patch_size: int = 2
    """Side of a patch in pixels."""
    in_chans: int = 3
    """Channels of the image (or latent)."""
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
    num_classes: int = 0
    """Number of classes, not counting the null class; 0 is a model without labels."""
    null_class: bool = False
    """One more label, at index num_classes, for "no label"; guidance needs it."""
    context_dim: int = 0
    """Width of the context tokens (such as CLIP's 768); 0 is a model without context."""
    num_context_tokens: int = 0
    """Length of the context (such as CLIP's 77)."""
    skip: Literal["concat", "add", "linear_add", "add_linear", "none"] = "concat"
    """How a long skip s joins the main branch m: Linear(Concat(m, s)), m + s, m + Linear(s), Linear(m + s), or none."""
    time_conditioning: Literal["token", "adaln"] = "token"
    """Time as a token, or as scale and shift in every block's layer norms."""
    conv: Literal["image", "tokens", "none"] = "image"
    """Final 3x3 convolution: on the image, on the grid of tokens before the linear projection, or none."""
    patch_embed: Literal["linear", "conv"] = "linear"
    """One linear projection per patch, or a stack of 3x3 convolutions and a 1x1."""
    pos_embed: Literal["learned", "sincos2d"] = "learned"
    """Learned for every token, or fixed two-dimensional sinusoids for the patches."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    attention: Backend = "auto"
    """Attention backend; `auto` is xformers where it can run (CUDA only), otherwise PyTorch's SDPA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch_size", "in_chans", "embed_dim", "num_heads"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("num_classes", "context_dim", "num_context_tokens"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("mlp_ratio", self.embed_dim * self.mlp_ratio >= 1, "at least 1 / embed_dim")
        self._require("depth", self.depth >= 2 and self.depth % 2 == 0, "even and at least 2")
        for side in self.image_shape:
            if side < 1 or side % self.patch_size:
                raise InputError(f"img_size must be divisible by patch_size {self.patch_size}, got {self.img_size}")
        if self.embed_dim % self.num_heads:
            raise InputError(f"embed_dim {self.embed_dim} must be divisible by num_heads {self.num_heads}")
        self._require("embed_dim", self.embed_dim % 2 == 0, "even (the time embedding is half cosines, half sines)")
        self._require("null_class", not self.null_class or self.num_classes > 0, "False where num_classes is 0")
        if (self.context_dim > 0) != (self.num_context_tokens > 0):
            raise InputError(
                "context_dim and num_context_tokens must both be 0 or both be above 0, "
                f"got {self.context_dim} and {self.num_context_tokens}"
            )
        if self.pos_embed == "sincos2d":
            self._require("embed_dim", self.embed_dim % 4 == 0, "divisible by 4 with pos_embed 'sincos2d'")
        if self.patch_embed == "conv":
            self._require(
                "patch_size", self.patch_size & (self.patch_size - 1) == 0, "a power of 2 with patch_embed 'conv'"
            )
            if self.embed_dim % self.patch_size:
                sizes = f"embed_dim {self.embed_dim} must be divisible by patch_size {self.patch_size}"
                raise InputError(f"{sizes} with patch_embed 'conv'")
        self._require_at_most(depth=MAX_DEPTH)
        if self.num_tokens > MAX_TOKENS:
            raise InputError(
                f"img_size, patch_size and num_context_tokens must give at most {MAX_TOKENS:,} tokens, "
                f"got {self.num_tokens:,}"
            )
        if self.most_parameters > MAX_PARAMETERS:
            raise InputError(
                f"the sizes of a model must give at most {MAX_PARAMETERS:,} parameters, "
                f"got up to {self.most_parameters:.2g}"
            )

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_extra_tokens(self) -> int:
        """Tokens before the patches: label, time and context."""
        return int(self.num_classes > 0) + int(self.time_conditioning == "token") + self.num_context_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens in all."""
        return self.num_extra_tokens + math.prod(self.grid_shape)

    @property
    def most_parameters(self) -> float:
        """An upper bound on the number of parameters, whatever the options."""
        dim, pixels = self.embed_dim, self.patch_size**2 * self.in_chans
        per_block = dim * (10 * dim + 2 * dim * self.mlp_ratio)  # attention, adaptive norms, skip; MLP
        per_token = pixels * 2 + self.num_tokens + self.num_classes + self.context_dim
        return (self.depth + 1) * per_block + dim * per_token + 30 * dim**2 + 9 * self.in_chans**2

    @property
    def null_label(self) -> int | None:
        """The label that means "no label", or None where the model has none."""
        return self.num_classes if self.null_class else None

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.embed_dim // self.num_heads

    @property
    def width(self) -> int:
        """Width of the matrix products: wide ones gain from half precision."""
        return self.embed_dim

    @property
    def reusable_pairs(self) -> int:
        """The most pairs of blocks that can be outer ones when deep features are reused; 0 where they cannot be."""
        return self.depth // 2

    @property
    def activation_size(self) -> int:
        """Number of values that a block outputs per image."""
        return self.num_tokens * self.embed_dim

    @property
    def live_activations(self) -> int:
        """How many times that is in memory at once while sampling: the long skips, and what a block works in."""
        return self.depth // 2 + BLOCK_WIDTHS

    @property
    def description(self) -> str:
        """The sizes in words."""
        return (
            f"{self.depth + 1} blocks of width {self.embed_dim}, {self.num_heads} heads, "
            f"{math.prod(self.grid_shape)} patches of {self.patch_size}x{self.patch_size}"
        )


NetworkConfig = UViTConfig
"""The config of any network that a run can have; with a second kind this becomes a union.

Every kind has `img_size`, `image_shape`, `in_chans`, `num_classes`, `null_class`, `null_label`, `context_dim`,
`num_context_tokens`, `gradient_checkpointing`, `attention`, and the properties from `head_dim` on.
"""
