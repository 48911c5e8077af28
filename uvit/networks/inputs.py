"""The inputs of a network, checked against its config."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from uvit.config import NUM_GUIDANCE, InputError, NetworkConfig

INDEX_DTYPES = (torch.int64, torch.int32)


def check_inputs(
    config: NetworkConfig,
    dtype: torch.dtype,
    x: Tensor,
    timesteps: Tensor | float,
    y: Tensor | None,
    context: Tensor | None,
) -> Tensor:
    """Checks types and shapes of a network's inputs, and that it has the conditions that its config asks for.

    Args:
        config: of the network.
        dtype: of its weights; autocast takes other inputs too.
        x: (B, C, H, W).
        timesteps: (B,), (1,), () or a number.
        y: (B,).
        context: (B, num_context_tokens, context_dim).

    Returns:
        The timesteps as a tensor.

    Raises:
        InputError: (a ValueError) what was given, and what was expected.
    """
    expected = (config.in_chans, *config.image_shape)
    _check_tensor("x", x, dtype)
    if x.ndim != 4 or tuple(x.shape[1:]) != expected:
        raise InputError(f"x must be (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
    batch = x.shape[0]  # an exporter would take len(x) for a constant
    timesteps = _as_times("timesteps", timesteps, x)
    if (y is None) != (config.num_classes == 0):
        given = "none" if y is None else "labels"
        takes = "y" if y is None else "no y"
        raise InputError(f"a model with num_classes {config.num_classes} takes {takes}, got {given}")
    if y is not None:
        if not isinstance(y, Tensor) or y.dtype not in INDEX_DTYPES:
            raise InputError(f"y must be a tensor of int64 or int32, got {_kind_of(y)}")
        if tuple(y.shape) != (batch,):
            raise InputError(f"y must be ({batch},), got {tuple(y.shape)}")
    if (context is None) != (config.context_dim == 0):
        given = "none" if context is None else "context"
        takes = "context" if context is None else "no context"
        raise InputError(f"a model with context_dim {config.context_dim} takes {takes}, got {given}")
    if context is not None:
        _check_tensor("context", context, dtype)
        expected = (batch, config.num_context_tokens, config.context_dim)
        if tuple(context.shape) != expected:
            raise InputError(f"context must be {expected}, got {tuple(context.shape)}")
    return timesteps


def check_numbers(
    config: NetworkConfig, x: Tensor, interval: Tensor | float | None, guidance: Tensor | None
) -> Tensor | None:
    """Checks an interval and a guidance, which only some networks take.

    Args:
        config: of the network.
        x: (B, C, H, W).
        interval: (B,), (1,), () or a number.
        guidance: (B, 3).

    Returns:
        The interval as a tensor.

    Raises:
        InputError: (a ValueError) what was given, and what was expected.
    """
    for name, given, takes in (
        ("interval", interval, config.takes_interval),
        ("guidance", guidance, config.takes_guidance),
    ):
        if given is not None and not takes:
            raise InputError(f"a model with takes_{name} False takes no {name}, got one")
    if guidance is not None:
        if not isinstance(guidance, Tensor) or not guidance.is_floating_point():
            raise InputError(f"guidance must be a floating point tensor, got {_kind_of(guidance)}")
        if tuple(guidance.shape) != (x.shape[0], NUM_GUIDANCE):
            raise InputError(f"guidance must be {(x.shape[0], NUM_GUIDANCE)}, got {tuple(guidance.shape)}")
    return None if interval is None else _as_times("interval", interval, x)


def check_sparse(config: NetworkConfig, x: Tensor, kept: Tensor | None, dropped: Tensor | None) -> None:
    """Checks which patches of which images the inner blocks see; that they are different ones is for the caller.

    Args:
        config: of the network.
        x: (B, C, H, W).
        kept: (B, M).
        dropped: (B,).

    Raises:
        InputError: what was given, and what was expected.
    """
    if not config.sparse_pairs:
        raise InputError("kept and dropped need a network with sparse_pairs above 0, got 0")
    batch = x.shape[0]
    for name, given, dtypes in (("kept", kept, INDEX_DTYPES), ("dropped", dropped, (torch.bool,))):
        if given is not None and (not isinstance(given, Tensor) or given.dtype not in dtypes):
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise InputError(f"{name} must be a tensor of {expected}, got {_kind_of(given)}")
    if kept is not None and (kept.ndim != 2 or kept.shape[0] != batch or kept.shape[1] < 1):
        raise InputError(f"kept must be ({batch}, M) with M at least 1, got {tuple(kept.shape)}")
    if dropped is not None and tuple(dropped.shape) != (batch,):
        raise InputError(f"dropped must be ({batch},), got {tuple(dropped.shape)}")


def _as_times(name: str, given: Any, x: Tensor) -> Tensor:
    """Returns (B,), (1,) or () times as a tensor, for images of (B, C, H, W)."""
    batch = x.shape[0]
    if not isinstance(given, Tensor) and isinstance(given, Real) and not isinstance(given, bool):
        given = torch.tensor(given, dtype=torch.float32, device=x.device)
    if not isinstance(given, Tensor) or given.dtype == torch.bool or given.is_complex():
        raise InputError(f"{name} must be a tensor of real numbers, or one of them, got {_kind_of(given)}")
    if tuple(given.shape) not in ((batch,), (1,), ()):
        raise InputError(f"{name} must be ({batch},), got {tuple(given.shape)}")
    return given


def _check_tensor(name: str, given: Any, dtype: torch.dtype) -> None:
    if not isinstance(given, Tensor) or not given.is_floating_point():
        raise InputError(f"{name} must be a floating point tensor, got {_kind_of(given)}")
    if given.dtype != dtype and (given.is_meta or not torch.is_autocast_enabled(given.device.type)):
        raise InputError(f"{name} must be {dtype}, as the weights are, or under autocast, got {given.dtype}")


def _kind_of(given: Any) -> str:
    return f"one of {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
