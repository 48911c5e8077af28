"""The parts of a U-Net: group norm, residual blocks, changes of resolution, self- and cross-attention, stages."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from uvit.config import GROUPS, TIME_WIDTHS, UNetConfig
from uvit.networks.attention import attention
from uvit.networks.layers import zeroed


class GroupNorm(nn.GroupNorm):
    """Group norm computed in fp32, or fp64 as its input."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(GROUPS, channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        # F.group_norm refuses a single value in a group, as one image of a single pixel may have.
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return torch.group_norm(x.to(dtype), GROUPS, weight, bias, self.eps).to(x.dtype)


class Downsample(nn.Module):
    """Halves height and width by a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def repeat_pixels(x: Tensor) -> Tensor:
    """Doubles height and width: (B, C, H, W) to (B, C, 2 H, 2 W)."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def average_pixels(x: Tensor) -> Tensor:
    """Halves height and width: (B, C, H, W) to (B, C, H / 2, W / 2)."""
    return F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Doubles height and width by repeating pixels, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(repeat_pixels(x))


class ResBlock(nn.Module):
    """A residual block with the embedded time and label between its convolutions (ADM, arXiv 2105.05233, section 3).

    Args:
        config: of the network.
        in_channels: channels of its input.
        channels: channels of its output.
        resample: `repeat_pixels` or `average_pixels`, to change the resolution of branch and input; None keeps it.
    """

    def __init__(
        self,
        config: UNetConfig,
        in_channels: int,
        channels: int,
        resample: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift_norm, self.resample = config.scale_shift_norm, resample
        self.in_layers = nn.Sequential(
            GroupNorm(in_channels), nn.SiLU(), nn.Conv2d(in_channels, channels, 3, padding=1)
        )
        width = 2 * channels if config.scale_shift_norm else channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(TIME_WIDTHS * config.model_channels, width))
        last = zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        self.out_layers = nn.Sequential(GroupNorm(channels), nn.SiLU(), nn.Dropout(config.dropout), last)
        self.skip_connection = nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, silu, conv = self.in_layers
        h = silu(norm(x))  # (B, C_in, H, W)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)  # (B, C, H, W)
        embedded = rearrange(self.emb_layers(embedding), "B C -> B C 1 1")  # (B, C or 2 C, 1, 1)
        norm, silu, dropout, conv = self.out_layers
        if self.scale_shift_norm:
            scale, shift = embedded.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + embedded)
        return self.skip_connection(x) + conv(dropout(silu(h)))


class Pointwise(nn.Conv1d):
    """A linear map of tokens, (B, L, C), stored as a 1x1 convolution as in the published models."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(in_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.squeeze(-1), self.bias)


class AttentionBlock(nn.Module):
    """Self-attention between the pixels of a feature map (ADM, arXiv 2105.05233, section 3)."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.num_heads, self.backend = config.heads(channels), config.attention
        self.pattern = "B L (H K D) -> B L K H D" if config.qkv_order == "legacy" else "B L (K H D) -> B L K H D"
        self.norm = GroupNorm(channels)
        self.qkv = Pointwise(channels, 3 * channels)
        self.proj_out = zeroed(Pointwise(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "B C H W -> B (H W) C")  # (B, L, C), where L = H * W
        # Queries, keys and values in one piece each way: xformers' compiled backward pass knows no other strides.
        packed = rearrange(self.qkv(tokens), self.pattern, K=3, H=self.num_heads).contiguous()  # (B, L, 3, heads, D)
        q, k, v = packed.unbind(2)  # (B, L, heads, D) each
        tokens = self.proj_out(rearrange(attention(q, k, v, self.backend), "B L H D -> B L (H D)"))
        return x + rearrange(tokens, "B (H W) C -> B C H W", H=x.shape[2])


class Attention(nn.Module):
    """Attention from tokens to a context, or to themselves (latent diffusion, arXiv 2112.10752, section 3.3)."""

    def __init__(self, config: UNetConfig, channels: int, context_dim: int) -> None:
        super().__init__()
        self.num_heads, self.backend = config.heads(channels), config.attention
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            rearrange(tokens, "B L (H D) -> B L H D", H=self.num_heads)
            for tokens in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(rearrange(attention(q, k, v, self.backend), "B L H D -> B L (H D)"))


class GEGLU(nn.Module):
    """a · GELU(b) with (a, b) linear in the input (arXiv 2002.05202, equation 6)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """A gated MLP, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to a context, and a gated MLP, each after a layer norm."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(config, channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(config, channels, config.context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer block on the pixels of a feature map, which sees a context (arXiv 2112.10752, appendix E.2.1)."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(config, channels)])
        self.proj_out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = rearrange(self.proj_in(self.norm(x)), "B C H W -> B (H W) C")  # (B, L, C), where L = H * W
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(rearrange(tokens, "B (H W) C -> B C H W", H=x.shape[2]))


class Stage(nn.Sequential):
    """Layers that run as one block: a residual block, attention, a change of resolution, or the first convolution."""

    def forward(  # type: ignore[override]
        self, h: Tensor, embedding: Tensor, context: Tensor | None = None, skip: Tensor | None = None
    ) -> Tensor:
        """Runs the layers.

        Args:
            h: (B, C, H, W) feature maps.
            embedding: (B, 4 model_channels) embedded time and label.
            context: (B, num_context_tokens, context_dim).
            skip: feature maps of the encoder, of the same height and width, to join to h.

        Returns:
            (B, C', H', W').
        """
        if skip is not None:
            h = torch.cat([h, skip], dim=1)  # (B, C + C_skip, H, W)
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, embedding)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, context)
            else:
                h = layer(h)
        return h
