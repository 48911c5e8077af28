"""The training loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from uvit.common.errors import InputError
from uvit.config import ProcessConfig
from uvit.diffusion.process import (
    TIME_MARGIN,
    combine,
    prediction_coefficients,
    sample_times,
    schedule_of,
    separate,
)


def diffusion_loss(
    network: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    process: ProcessConfig,
    generator: torch.Generator | None = None,
    times: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Weighted mean squared error of a prediction at random times.

    Args:
        network: network(x, timesteps), from noisy images (B, C, H, W) and network times (B,) to (B, C, H, W).
        x0: (B, C, H, W) clean images in [-1, 1], or latents of about unit variance.
        process: schedule, prediction, space and weighting of the loss, distribution of times.
        generator: source of times and noise, on the device of x0.
        times: (B,) times in [0, 1] to use instead of random ones.
        noise: noise of the shape of x0 to use instead of random noise.

    Returns:
        The loss, a float32 scalar.

    Raises:
        InputError: (a ValueError) the network's output has another shape than x0.
    """
    schedule = schedule_of(process)
    if times is None:
        times = sample_times(process, len(x0), x0.device, generator)
    if noise is None:
        noise = torch.randn(x0.shape, device=x0.device, dtype=x0.dtype, generator=generator)
    space = process.loss_space or process.prediction
    if space != process.prediction or process.weighting != "none":
        times = times.clamp(TIME_MARGIN, 1 - TIME_MARGIN)  # converting errors between spaces divides by α or σ
    alpha, sigma = (rearrange(value, "B -> B 1 1 1") for value in schedule.alpha_sigma(times))

    x_t = alpha * x0 + sigma * noise
    output = network(x_t, schedule.network_time(times)).float()
    if output.shape != x0.shape:  # as that of a network that predicts its variance, too
        raise InputError(f"the network must predict {tuple(x0.shape)} as x0 has, got {tuple(output.shape)}")
    if space != process.prediction:
        output = combine(space, *separate(process.prediction, output, x_t, alpha, sigma), alpha, sigma)
    error = (output - combine(space, x0, noise, alpha, sigma)).square()
    if process.weighting == "min_snr":
        # An error of δ in this space is an error of -σ δ / (α b - σ a) in x_0, whose weight is min(SNR, γ)
        # (Hang et al., arXiv 2303.09556).
        a, b = prediction_coefficients(space, alpha, sigma)
        snr = (alpha / sigma).square()
        error = error * snr.clamp(max=process.min_snr_gamma) * (sigma / (alpha * b - sigma * a)).square()
    return error.mean()
