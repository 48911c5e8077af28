"""Scaled dot-product attention on (B, L, H, D) tensors, with a choice of backend."""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from uvit.errors import InputError

# xformers' kernels read 16-byte rows, hence its head dimensions are multiples of 8.
XFORMERS_HEAD_DIM_MULTIPLE = 8
# Up to here the formula itself beats PyTorch's bf16 kernel on a CPU: benchmarks/attention.py.
CPU_BF16_MATH_TOKENS = 512


@functools.cache
def has_xformers() -> bool:
    """Tells whether xformers is installed, without importing it (its import prints)."""
    return importlib.util.find_spec("xformers") is not None


def resolve_backend(
    backend: str, device_type: str, head_dim: int, num_tokens: int = 0, dtype: torch.dtype = torch.float32
) -> str:
    """Returns the backend that will run, for `auto` as for an explicit name.

    Args:
        backend: `auto`, `xformers`, `sdpa` or `math`.
        device_type: `cuda`, `cpu`, `mps` ….
        head_dim: width of one attention head.
        num_tokens: length of the sequence.
        dtype: of queries, keys and values.

    Raises:
        InputError: an explicit backend that cannot run there; says why and what to use.
    """
    obstacle = ""
    if device_type != "cuda":
        obstacle = f"needs a CUDA device, got {device_type!r}"
    elif not has_xformers():
        obstacle = "is not installed"
    elif head_dim % XFORMERS_HEAD_DIM_MULTIPLE:
        obstacle = f"needs a head dimension divisible by {XFORMERS_HEAD_DIM_MULTIPLE}, got {head_dim}"
    if backend == "auto" and device_type == "cpu" and dtype == torch.bfloat16 and num_tokens <= CPU_BF16_MATH_TOKENS:
        return "math"
    if backend == "auto":
        return "sdpa" if obstacle else "xformers"
    if backend == "xformers" and obstacle:
        raise InputError(f"attention 'xformers' {obstacle}: use 'sdpa' or 'auto'")
    if backend not in ("xformers", "sdpa", "math"):
        raise InputError(f"attention must be one of 'auto', 'xformers', 'sdpa', 'math', got {backend!r}")
    return backend


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """Softmax(q kᵀ / √D) v.

    Args:
        q: queries, (B, L, H, D).
        k: keys, of the same shape and dtype.
        v: values, of the same shape and dtype.
        backend: `auto`, `xformers`, `sdpa` or `math`; `math` is the formula itself and needs O(L²) memory, so
            that `auto` takes it for short sequences alone, and only where it was measured to be the fastest.

    Returns:
        (B, L, H, D).

    Raises:
        InputError: an explicit backend that cannot run on these tensors.
    """
    backend = resolve_backend(backend, q.device.type, q.shape[-1], q.shape[1], q.dtype)
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v)
    q, k, v = (rearrange(tensor, "B L H D -> B H L D") for tensor in (q, k, v))
    if backend == "sdpa":
        output = F.scaled_dot_product_attention(q, k, v)
    else:
        scores = (q * q.shape[-1] ** -0.5) @ rearrange(k, "B H L D -> B H D L")  # (B, H, L, L)
        output = scores.softmax(dim=-1) @ v
    return rearrange(output, "B H L D -> B L H D")
