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
    determinant,
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

    An error of δ in a prediction is one of δ D' / D in another space, with the determinants D of the prediction and D'
    of the space. With min_divisor m that is δ D' / max(D, m), as in JiT (arXiv 2511.13720): for `data` on `flow`, whose
    D is t, the mean of (x - x_0)^2 / max(t, m)^2. This only weights times, so that sampling does not change: the best
    prediction of x_0 is its mean given x_t whatever the weights, and the velocity of the ODE is (x_t - x) / t. JiT
    divides by max(t, m) there, too: where it ends at t = 0, some noise is left; the solvers here end in x itself.

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
    space, least = process.loss_space or process.prediction, process.min_divisor
    converts = space != process.prediction
    if (converts and not least) or process.weighting != "none":
        times = times.clamp(TIME_MARGIN, 1 - TIME_MARGIN)  # converting errors between spaces divides by α or σ
    alpha, sigma = (rearrange(value, "B -> B 1 1 1") for value in schedule.alpha_sigma(times))

    x_t = alpha * x0 + sigma * noise
    output = network(x_t, schedule.network_time(times)).float()
    if output.shape != x0.shape:  # as that of a network that predicts its variance, too
        raise InputError(f"the network must predict {tuple(x0.shape)} as x0 has, got {tuple(output.shape)}")
    if least:
        divisor = determinant(process.prediction, alpha, sigma).abs().clamp(min=least)
        error = output - combine(process.prediction, x0, noise, alpha, sigma)
        error = error * (determinant(space, alpha, sigma) / divisor)
    else:
        if converts:
            output = combine(space, *separate(process.prediction, output, x_t, alpha, sigma), alpha, sigma)
        error = output - combine(space, x0, noise, alpha, sigma)
    error = error.square()
    if process.weighting == "min_snr":
        # An error of δ in this space is an error of -σ δ / (α b - σ a) in x_0, whose weight is min(SNR, γ)
        # (Hang et al., arXiv 2303.09556).
        snr = (alpha / sigma).square()
        weight = (sigma / determinant(space, alpha, sigma)).square()
        error = error * snr.clamp(max=process.min_snr_gamma) * weight
    return error.mean()
