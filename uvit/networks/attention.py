"""Scaled dot-product attention on (B, L, H, D) tensors, with a choice of backend."""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from uvit.common.errors import InputError, one_line
from uvit.common.libraries import quiet

# Up to this length the plain formula is faster than PyTorch's bf16 kernel on a CPU: benchmarks/attention.py.
CPU_BF16_MATH_TOKENS = 512


@functools.cache
def _ask_xformers(head_dim: int, dtype: torch.dtype | None) -> str:
    if importlib.util.find_spec("xformers") is None:
        return "is not installed"
    if dtype is None:
        return ""
    try:
        with quiet("xformers"):
            from xformers.ops import fmha
    except ImportError as error:  # for example because of an installed FlashAttention of an unsupported version
        return f"cannot be imported ({one_line(error, 200)})"
    # xformers means FlashAttention here: its CUTLASS kernel, for fp32, is in PyTorch too, and cannot be compiled.
    query = torch.empty(1, 1, 1, head_dim, dtype=dtype, device="cuda")
    inputs = fmha.Inputs(query, query, query)
    reasons = [reason for op in (fmha.flash.FwOp, fmha.flash.BwOp) for reason in op.not_supported_reasons(inputs)]
    return f"has no kernel for these tensors ({'; '.join(dict.fromkeys(reasons)):.200})" if reasons else ""


@torch.compiler.assume_constant_result  # Dynamo would trace into imports
def xformers_obstacle(head_dim: int = 0, dtype: torch.dtype | None = None) -> str:
    """Returns why xformers cannot run, or "": it may be installed without a kernel for this GPU and PyTorch.

    Args:
        head_dim: width of one attention head.
        dtype: of queries, keys and values; with None, xformers is not imported and the GPU not used.
    """
    return _ask_xformers(head_dim, dtype)


def resolve_backend(
    backend: str, device_type: str, head_dim: int = 0, num_tokens: int = 0, dtype: torch.dtype | None = None
) -> str:
    """Returns the backend that will run: resolves `auto`, and checks an explicit name.

    Args:
        backend: `auto`, `xformers`, `sdpa` or `math`.
        device_type: `cuda`, `cpu`, `mps` ….
        head_dim: width of one attention head.
        num_tokens: length of the sequence.
        dtype: of queries, keys and values; None where it is not known yet: then no device is used.

    Raises:
        InputError: an explicit backend that cannot run there; says why, and what to use instead.
    """
    if backend not in ("auto", "xformers", "sdpa", "math"):
        raise InputError(f"attention must be one of 'auto', 'xformers', 'sdpa', 'math', got {backend!r}")
    if backend == "auto" and device_type == "cpu" and dtype == torch.bfloat16 and num_tokens <= CPU_BF16_MATH_TOKENS:
        return "math"
    if backend in ("sdpa", "math"):
        return backend
    obstacle = f"needs a CUDA device, got {device_type!r}"
    if device_type == "cuda":
        obstacle = xformers_obstacle(head_dim, dtype)
    if not obstacle:
        return "xformers"
    if backend == "auto":
        return "sdpa"
    raise InputError(f"attention 'xformers' {obstacle}: use 'sdpa' or 'auto'")


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """Softmax(q kᵀ / √D) v.

    Args:
        q: queries, (B, L, H, D).
        k: keys, (B, M, H, D) of the same dtype; M is L but for cross-attention.
        v: values, of the shape and dtype of k.
        backend: `auto`, `xformers`, `sdpa` or `math`; `math` is the plain formula and needs O(L M) memory, so `auto`
            uses it only for short sequences, where it was measured to be the fastest. In forward-mode derivatives,
            which the kernels do not have, all are `math`.

    Returns:
        (B, L, H, D).

    Raises:
        InputError: an explicit backend that cannot run on these tensors.
    """
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(q).tangent is not None:
        backend = "math"
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
