"""The U-ViT of the paper written out in plain PyTorch, one formula a line, to compare the package with."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from uvit import UViTConfig


def sincos_positions(rows: int, columns: int, dim: int) -> Tensor:
    """(rows · columns, dim): sines of row and column, then cosines, at dim / 4 frequencies; row by row."""
    frequencies = 10_000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    places = [(row * frequencies, column * frequencies) for row in range(rows) for column in range(columns)]
    return torch.stack([torch.cat([r.sin(), c.sin(), r.cos(), c.cos()]) for r, c in places])


def plain_uvit(
    weights: Mapping[str, Tensor],
    config: UViTConfig,
    x: Tensor,
    timesteps: Tensor,
    y: Tensor | None = None,
    context: Tensor | None = None,
) -> Tensor:
    """Computes the output of a network with these weights, (B, C, H, W), without any code of the package."""
    dim, p, heads, (rows, columns) = config.embed_dim, config.patch_size, config.num_heads, config.grid_shape

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(1, dtype=h.dtype))

    def conv(name: str, image: Tensor, stride: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        return F.conv2d(image, weight, weights[f"{name}.bias"], stride, padding=weight.shape[-1] // 2)

    def normalise(h: Tensor) -> Tensor:
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()

    def norm(name: str, h: Tensor) -> Tensor:
        if f"{name}.proj.weight" in weights:  # scale and shift from the time
            scale_shift = linear(f"{name}.proj", time)[:, None]
            return scale_shift[..., :dim] * normalise(h) + scale_shift[..., dim:]
        return normalise(h) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def head_norm(name: str, h: Tensor) -> Tensor:
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[name] if config.qk_norm else h

    def attention(name: str, h: Tensor) -> Tensor:
        size, qkv, outputs = dim // heads, linear(f"{name}.qkv", h), []
        for head in range(heads):
            q, k, v = (qkv[..., part * dim + head * size :][..., :size] for part in range(3))  # (B, L, D / heads)
            q, k = head_norm(f"{name}.q_norm.weight", q), head_norm(f"{name}.k_norm.weight", k)
            scores = torch.einsum("bqd,bkd->bqk", q, k) / math.sqrt(size)
            outputs.append((scores.exp() / scores.exp().sum(-1, keepdim=True)) @ v)
        return linear(f"{name}.proj", torch.cat(outputs, dim=-1))

    def block(name: str, h: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            match config.skip:
                case "concat":
                    h = linear(f"{name}.skip_linear", torch.cat([h, skip], dim=-1))
                case "add":
                    h = h + skip
                case "linear_add":
                    h = h + linear(f"{name}.skip_linear", skip)
                case "add_linear":
                    h = linear(f"{name}.skip_linear", h + skip)
        h = h + attention(f"{name}.attn", norm(f"{name}.norm1", h))
        hidden = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", h))
        return h + linear(f"{name}.mlp.fc2", hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)

    frequencies = 10_000 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = timesteps[:, None] * frequencies
    time = torch.cat([angles.cos(), angles.sin()], dim=-1)
    if config.mlp_time_embed:
        hidden = linear("time_embed.0", time)
        time = linear("time_embed.2", hidden * torch.sigmoid(hidden))

    if config.patch_embed == "linear":
        patches = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        weight = weights["patch_embed.proj.weight"].flatten(1)
        if config.patch_bottleneck:
            patches, weight = patches @ weight.T, weights["patch_embed.expand.weight"].flatten(1)
        bias = weights["patch_embed.expand.bias" if config.patch_bottleneck else "patch_embed.proj.bias"]
        patches = patches @ weight.T + bias
    else:
        last = 2 * (int(math.log2(p)) + 1)
        image = F.gelu(conv("patch_embed.proj.0", x))
        for layer in range(2, last, 2):
            image = F.gelu(conv(f"patch_embed.proj.{layer}", image, stride=2))
        patches = conv(f"patch_embed.proj.{last}", image).flatten(2).mT
    extras = [weights["label_emb.weight"][y][:, None]] if y is not None else []
    extras += [time[:, None]] if config.time_conditioning == "token" else []
    extras += [linear("context_embed", context)] if context is not None else []
    h = torch.cat([*extras, patches], dim=1)
    num_extras = h.shape[1] - rows * columns
    if config.pos_embed == "learned":
        h = h + weights["pos_embed"]
    else:
        h[:, num_extras:] += sincos_positions(rows, columns, dim)

    skips = []
    for number in range(config.depth // 2):
        h = block(f"in_blocks.{number}", h)
        skips.append(h)
    h = block("mid_block", h)
    for number in range(config.depth // 2):
        h = block(f"out_blocks.{number}", h, skips.pop())
    h = norm("norm", h)[:, num_extras:]
    if config.conv == "tokens":
        h = conv("final_layer", h.mT.unflatten(2, (rows, columns))).flatten(2).mT
    image = torch.zeros_like(x)
    for number, patch in enumerate(linear("decoder_pred", h).unbind(1)):  # (B, p · p · C)
        top, left = p * (number // columns), p * (number % columns)
        image[:, :, top : top + p, left : left + p] = patch.unflatten(1, (p, p, -1)).permute(0, 3, 1, 2)
    return conv("final_layer", image) if config.conv == "image" else image
