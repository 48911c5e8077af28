"""The parts of a U-ViT: time embedding, attention, norms, long skips, blocks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn

from uvit.config import UViTConfig
from uvit.networks.attention import attention

MAX_PERIOD = 10_000


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding of times, cosines first.

    Args:
        timesteps: (B,) times in the network's units, usually in [0, 1000].
        dim: even width.

    Returns:
        (B, dim) in float32, or float64 as the times: half precision would merge neighbouring times.
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(MAX_PERIOD) / half * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    )
    timesteps = timesteps.to(torch.promote_types(timesteps.dtype, torch.float32))
    angles = timesteps[:, None] * frequencies  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, dim)


def zeroed(module: nn.Module) -> nn.Module:
    """Sets all parameters of a module to zero, so that its branch starts as nothing; returns it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class NumberEmbed(nn.Module):
    """Embeds numbers that condition a network besides its time.

    Args:
        count: how many numbers.
        sinusoids: width of each number's sinusoidal embedding.
        width: of the embedding of all.
    """

    def __init__(self, count: int, sinusoids: int, width: int) -> None:
        super().__init__()
        self.sinusoids = sinusoids
        self.mlp = Mlp(count * sinusoids, width, width, act_layer=nn.SiLU)

    def forward(self, numbers: Tensor) -> Tensor:
        batch = numbers.shape[0]
        waves = timestep_embedding(rearrange(numbers, "B N -> (B N)"), self.sinusoids)  # (B * N, sinusoids)
        waves = rearrange(waves, "(B N) D -> B (N D)", B=batch)
        return self.mlp(waves.to(self.mlp.fc1.weight.dtype))  # (B, width)


class HeadNorm(nn.RMSNorm):
    """RMS norm of queries or keys in their own precision, which autocast makes different from the weight's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head self-attention over tokens, with optional RMS norm of queries and keys (`qk_norm`).

    Its first `num_fading` tokens can fade in: where `presence` is 0, the others are as without them.
    """

    num_fading: int
    presence: Tensor | None

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        dim, head_dim = config.embed_dim, config.embed_dim // config.num_heads
        self.num_heads = config.num_heads
        self.backend = config.attention
        self.qkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.q_norm = HeadNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.num_fading, self.presence = 0, None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "B L (K H D) -> K B L H D", K=3, H=self.num_heads)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        x = attention(q, k, v, self.backend)  # (B, L, H, D)
        if self.presence is not None:
            without = attention(q, k[:, self.num_fading :], v[:, self.num_fading :], self.backend)
            x = torch.lerp(without, x, self.presence.to(x.dtype))
        return self.proj(rearrange(x, "B L H D -> B L (H D)"))


class LayerNorm(nn.LayerNorm):
    """LayerNorm with the signature of AdaLayerNorm; it ignores the time embedding."""

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        return super().forward(x)


class AdaLayerNorm(nn.Module):
    """y_s · LayerNorm(h) + y_b with (y_s, y_b) linear in the time embedding (paper, section 3.1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.proj = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.proj(time)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        return scale * self.norm(x) + shift


class ConcatLinear(nn.Linear):
    """Linear(Concat(x, skip)) as two products with halves of its weight, so that the concatenation is never stored."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        x_weight, skip_weight = self.weight.chunk(2, dim=1)  # (D, D) each; einops on parameters breaks compiled graphs
        return F.linear(x, x_weight, self.bias) + F.linear(skip, skip_weight)


class Block(nn.Module):
    """Pre-norm transformer block; a deep one first merges its long skip."""

    def __init__(self, config: UViTConfig, deep: bool = False) -> None:
        super().__init__()
        dim = config.embed_dim
        norm = AdaLayerNorm if config.time_conditioning == "adaln" else LayerNorm
        self.skip = config.skip if deep else "none"
        if self.skip not in ("add", "none"):
            self.skip_linear = ConcatLinear(2 * dim, dim) if self.skip == "concat" else nn.Linear(dim, dim)
        self.norm1 = norm(dim)
        self.attn = Attention(config)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, hidden_features=int(dim * config.mlp_ratio))

    def merge(self, x: Tensor, skip: Tensor) -> Tensor:
        """Merges the main branch and the long skip, (B, L, D) each (paper, section 3.1 and figure 2a)."""
        match self.skip:
            case "concat":
                return self.skip_linear(x, skip)
            case "add":
                return x + skip
            case "linear_add":
                return x + self.skip_linear(skip)
            case "add_linear":
                return self.skip_linear(x + skip)
            case _:
                return x

    def forward(self, x: Tensor, time: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = self.merge(x, skip)
        x = x + self.attn(self.norm1(x, time))
        return x + self.mlp(self.norm2(x, time))


class NarrowPatchEmbed(PatchEmbed):
    """Two linear projections of each patch, the first one without bias to few numbers (JiT, arXiv 2511.13720)."""

    def __init__(self, config: UViTConfig) -> None:
        width = config.patch_bottleneck
        super().__init__(
            config.image_shape, config.patch_size, config.in_chans, width, bias=False, strict_img_size=False
        )
        self.expand = nn.Conv2d(width, config.embed_dim, 1)  # a convolution for its initial weights: PyTorch's

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.expand(self.proj(x)), "B D h w -> B (h w) D")


class ConvPatchEmbed(nn.Module):
    """A stack of 3x3 convolutions that downsamples to one pixel per patch, then a 1x1 (paper, figure 2d)."""

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        width = config.embed_dim // config.patch_size
        layers: list[nn.Module] = [nn.Conv2d(config.in_chans, width, 3, padding=1), nn.GELU()]
        while width < config.embed_dim:
            layers += [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GELU()]
            width *= 2
        self.proj = nn.Sequential(*layers, nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "B D h w -> B (h w) D")
