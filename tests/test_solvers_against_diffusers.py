"""Our solvers against diffusers' schedulers, an independent implementation."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from uvit.diffusion.process import SCHEDULES, shift_time
from uvit.diffusion.samplers import denoiser
from uvit.diffusion.solvers import ddim, dpmpp_2m, unipc

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
X_INIT = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(x, t):
    """Any smooth function of image and time in [0, 1]."""
    return 0.6 * x + 0.2 * torch.sin(3 * x + 5 * t)


def theirs(scheduler, time_of):
    x = X_INIT
    for step in scheduler.timesteps:
        x = scheduler.step(network(x, time_of(step.item())), step, x).prev_sample
    return x


def ours(solver, schedule, times, prediction):
    def denoise(x, t):
        alpha, sigma = schedule.at(t)
        output = network(x, t)
        if prediction == "noise":
            return (x - sigma * output) / alpha, output
        return denoiser(lambda x, t: output, schedule, prediction)(x, t)

    return solver(denoise, X_INIT, schedule, times)


def time_of_ldm(step):
    """diffusers counts the steps from 0, the paper from 1."""
    return (step + 1) / 1000


@pytest.mark.parametrize(
    ("solver", "scheduler"),
    [
        (ddim, DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, timestep_spacing="trailing")),
        (
            dpmpp_2m,
            DPMSolverMultistepScheduler(
                **STABLE_DIFFUSION, timestep_spacing="trailing", final_sigmas_type="zero", lower_order_final=False
            ),
        ),
        (unipc, UniPCMultistepScheduler(**STABLE_DIFFUSION, timestep_spacing="trailing", final_sigmas_type="zero")),
    ],
    ids=["ddim", "dpmpp_2m", "unipc"],
)
@pytest.mark.parametrize("num_steps", [5, 20])
def test_discrete_solvers(solver, scheduler, num_steps):
    scheduler.set_timesteps(num_steps)
    times = [time_of_ldm(step) for step in scheduler.timesteps.tolist()] + [0.0]
    reached = ours(solver, SCHEDULES["ldm"], times, "noise")
    torch.testing.assert_close(reached, theirs(scheduler, time_of_ldm), rtol=1e-4, atol=1e-4)


def test_flow_is_eulers_method_on_shifted_times():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(12)
    sigmas = scheduler.sigmas.double().tolist()
    reached = ours(ddim, SCHEDULES["flow"], sigmas, "flow")
    torch.testing.assert_close(reached, theirs(scheduler, lambda step: step / 1000), rtol=1e-4, atol=1e-4)
    whole = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.double()
    steps = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(shift_time(steps, 3.0), whole[:1000], rtol=1e-5, atol=1e-6)
