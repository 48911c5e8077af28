"""Average velocity, for drawing in one or a few evaluations: its training loss, and the way from predictions to it.

u(x_t, s, t) is the mean of the velocity over [s, t] on the way of the probability-flow ODE through x_t, so that
x_s = x_t - (t - s) u (MeanFlow, arXiv 2505.13447, section 4). On `flow`, dx_t/dt at x_0 and ε is ε - x_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from einops import rearrange
from torch import Tensor

from uvit.common.errors import InputError
from uvit.config import GUIDANCE_MIDDLE, Derivative, Kind, ProcessConfig
from uvit.diffusion.process import sample_times, schedule_of

MIN_DIVISOR = 0.05
"""Least t that the difference of x_t and an image is divided by (pixel MeanFlow)."""
DIFFERENCE_STEPS: Mapping[str, float] = {"no": 5e-3, "bf16": 2e-2, "fp16": 2e-2}
"""Times this far before and after give a difference, by precision; with less, rounding outgrows what it misses."""
ADAPTIVE_FLOOR = 0.01
"""Added to an image's error in the loss's weights."""

Number = TypeVar("Number", float, Tensor)


def average_velocity(prediction: Kind, output: Tensor, x_t: Tensor, t: Number) -> Tensor:
    """Returns the velocity u of a prediction.

    Args:
        prediction: `flow`, which is u; or `data`, the image x for u = (x_t - x) / max(t, 0.05).
        output: the network's output, (B, C, H, W).
        x_t: what it was computed from, (B, C, H, W).
        t: the end of the interval, a number or a broadcastable tensor.
    """
    if prediction == "flow":
        return output
    return (x_t - output) / (t.clamp(min=MIN_DIVISOR) if isinstance(t, Tensor) else max(t, MIN_DIVISOR))


def num_intervals(process: ProcessConfig, batch: int) -> int:
    """Returns for how many images of a batch the interval is none of an instant; they come first."""
    return batch - math.floor(process.instant_share * batch + 0.5)


def check_shares(process: ProcessConfig, batch: int) -> None:
    """Checks that a batch, or a process's share of one of its parts, has intervals, and instants where it should.

    Raises:
        InputError: it has none.
    """
    number = num_intervals(process, batch)
    if number == 0 or (number == batch and process.instant_share > 0):
        lacking = "interval" if number == 0 else "instant"
        share = f"process.instant_share {process.instant_share:g}"
        raise InputError(f"{share} must leave an {lacking} among the images of a part, got {batch} images")


def sample_intervals(
    process: ProcessConfig, batch: int, device: torch.device, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draws intervals [s, t] for training; those of an instant, for which s = t, come last.

    Returns:
        (s, t), (batch,) each on the device.
    """
    t, number = sample_times(process, batch, device, generator), num_intervals(process, batch)
    if process.interval_start == "uniform":
        s = t * torch.rand(batch, device=device, generator=generator)
    else:
        other = sample_times(process, batch, device, generator)
        s, t = torch.minimum(t, other), torch.maximum(t, other)
    return torch.cat([s[:number], t[number:]]), t


def sample_guidance(
    process: ProcessConfig, batch: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Draws guidance for training: (batch, 3), log-uniform scales in [1, guidance_max], and times around the middle."""
    scale, low, high = torch.rand(3, batch, device=device, generator=generator)
    return torch.stack([process.guidance_max**scale, GUIDANCE_MIDDLE * low, 1 - (1 - GUIDANCE_MIDDLE) * high], dim=1)


def scale_at(guidance: Tensor, t: Tensor) -> Tensor:
    """Returns the scales (B,) of guidance (B, 3) at times (B,): 1 outside its interval."""
    scale, low, high = guidance.unbind(1)
    return torch.where((low <= t) & (t <= high), scale, 1.0)


def derivative(
    velocity: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_t: Tensor,
    t: Tensor,
    length: Tensor,
    along: Tensor,
    how: Derivative = "forward",
    step: float = DIFFERENCE_STEPS["no"],
) -> Tensor:
    """Returns d u(x_t, s, t) / dt at fixed s where dx_t/dt is `along`.

    Args:
        velocity: velocity(x_t, t, length) -> u, for intervals [t - length, t].
        x_t: (B, C, H, W).
        t: (B,).
        length: (B,).
        along: (B, C, H, W).
        how: by forward-mode differentiation, or by central differences over a short time, which may reach a little out
            of [0, 1], and of lengths from 0 (as in Transition Models, arXiv 2509.04394).
        step: half of that time.
    """
    if how == "differences":
        ahead, behind = (velocity(x_t + h * along, t + h, length + h) for h in (step, -step))
        return (ahead - behind) / (2 * step)
    with forward_ad.dual_level():
        moving = (
            forward_ad.make_dual(value, rate.to(value.dtype))
            for value, rate in ((x_t, along), (t, torch.ones_like(t)), (length, torch.ones_like(length)))
        )
        change = forward_ad.unpack_dual(velocity(*moving)).tangent
    return torch.zeros_like(x_t) if change is None else change


def average_loss(
    network: Callable[..., Tensor],
    x0: Tensor,
    process: ProcessConfig,
    generator: torch.Generator | None = None,
    *,
    cond: Mapping[str, Tensor] | None = None,
    guidance: Tensor | None = None,
    uncond: Mapping[str, Tensor] | None = None,
    bare: Callable[..., Tensor] | None = None,
    difference_step: float = DIFFERENCE_STEPS["no"],
    intervals: tuple[Tensor, Tensor] | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Squared error of u + (t - s) sg(du/dt) as a velocity (improved MeanFlow, arXiv 2512.02012, section 4).

    du/dt is the derivative along the ODE, in which the velocity is the network's own, of an instant. It takes no
    gradient, so that only one ordinary call does: what wraps, compiles or shards the network works as ever. With
    guidance w, the target is v + (1 - 1/w) (u_cond - u_uncond) instead of v.

    Args:
        network: network(x, timesteps, interval=…, **cond), and guidance=… if it is given, with a gradient.
        x0: (B, C, H, W) clean images in [-1, 1], or latents of about unit variance.
        process: what is predicted, the intervals and the weights.
        generator: source of times and noise, on the device of x0.
        cond: keyword arguments of the network, batches of B.
        guidance: (B, 3) scales w, and the times between which they act, for a network that takes them.
        uncond: the empty condition, as `cond`, needed with guidance.
        bare: the same network as it is written, uncompiled and without wrappers, for what takes no gradient; None is
            `network`.
        difference_step: half of the time that a difference is over: `DIFFERENCE_STEPS` of the precision of `bare`.
        intervals: (s, t), (B,) each, with 0 <= s <= t <= 1, to use instead of random ones.
        noise: noise of the shape of x0 to use instead of random noise.

    Returns:
        The mean squared error, a float32 scalar, whose gradient has the weights of `adaptive_power`.

    Raises:
        InputError: (a ValueError) guidance without an empty condition, or an output of another shape than x0.
    """
    if guidance is not None and uncond is None:
        raise InputError("guidance in training needs an empty condition, got none")
    schedule, bare, cond = schedule_of(process), bare or network, cond or {}
    number = len(x0) if intervals is not None else num_intervals(process, len(x0))
    s, t = sample_intervals(process, len(x0), x0.device, generator) if intervals is None else intervals
    if noise is None:
        noise = torch.randn(x0.shape, device=x0.device, dtype=x0.dtype, generator=generator)

    def velocity(
        call: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        length: Tensor,
        cond: Mapping[str, Tensor],
        guidance: Tensor | None = guidance,
    ) -> Tensor:
        chosen = {} if guidance is None else {"guidance": guidance[: len(x)]}
        chosen |= {name: value[: len(x)] for name, value in cond.items()}
        times = {"timesteps": schedule.network_time(t), "interval": schedule.time_scale * length}
        output = call(x, **times, **chosen).float()
        if output.shape != x.shape:
            raise InputError(f"the network must predict {tuple(x.shape)} as x0 has, got {tuple(output.shape)}")
        return average_velocity(process.prediction, output, x, rearrange(t, "B -> B 1 1 1"))

    end, length = (rearrange(value, "B -> B 1 1 1") for value in (t, t - s))
    x_t, target = (1 - end) * x0 + end * noise, noise - x0
    change = torch.zeros_like(target)
    with torch.no_grad():
        instant = torch.zeros_like(t)
        if guidance is not None and uncond is not None:
            share = 1 - 1 / rearrange(scale_at(guidance, t), "B -> B 1 1 1")
            along = velocity(bare, x_t, t, instant, cond)
            target = target + share * (along - velocity(bare, x_t, t, instant, uncond, guidance=None))
        elif number:
            along = velocity(bare, x_t[:number], t[:number], instant[:number], cond)
        if number:
            inner = partial(velocity, bare, cond=cond)
            change[:number] = derivative(
                inner,
                x_t[:number],
                t[:number],
                (t - s)[:number],
                along[:number],
                process.derivative,
                difference_step,
            )
    u = velocity(network, x_t, t, t - s, cond)
    errors = (u + length * change - target).square().mean(dim=(1, 2, 3))  # (B,)
    weights = (errors.detach() + ADAPTIVE_FLOOR) ** -process.adaptive_power
    weighted, plain = (weights * errors).mean(), errors.mean().detach()
    return weighted + (plain - weighted.detach())  # the error is what people can read; its weights are about 1 / error
