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

TABLES = {
    "ldm": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"},
    "ddpm": {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "timestep_spacing": "trailing"},
    # Trailing steps begin at the last one, where α is 5e-5: the rounding of diffusers' table is divided by it.
    "iddpm": {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading"},
}
X_INIT = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(x, timestep):
    """Any smooth function of image and network time."""
    return 0.6 * x + 0.2 * torch.sin(3 * x + 0.005 * timestep)


def theirs(scheduler, first=0):
    """Samples by a scheduler, whose steps count from 0, with a network whose time begins at `first`."""
    x = X_INIT
    for step in scheduler.timesteps:
        x = scheduler.step(network(x, step.item() + first), step, x).prev_sample
    return x


def ours(solver, schedule, times, prediction):
    def denoise(x, t):
        alpha, sigma = schedule.at(t)
        output = network(x, schedule.network_time(t))
        if prediction == "noise":
            return (x - sigma * output) / alpha, output
        return denoiser(lambda x, t: output, schedule, prediction)(x, t)

    return solver(denoise, X_INIT, schedule, times)


@pytest.mark.parametrize(
    ("solver", "cls", "options"),
    [
        (ddim, DDIMScheduler, {"clip_sample": False}),
        (dpmpp_2m, DPMSolverMultistepScheduler, {"final_sigmas_type": "zero", "lower_order_final": False}),
        (unipc, UniPCMultistepScheduler, {"final_sigmas_type": "zero"}),
    ],
    ids=["ddim", "dpmpp_2m", "unipc"],
)
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("num_steps", [5, 20])
def test_discrete_solvers(name, solver, cls, options, num_steps):
    scheduler = cls(**TABLES[name], **options)
    scheduler.set_timesteps(num_steps)
    times = [(step + 1) / 1000 for step in scheduler.timesteps.tolist()] + [0.0]
    reached = ours(solver, SCHEDULES[name], times, "noise")
    expected = theirs(scheduler, first=1 if name == "ldm" else 0)
    assert (reached - expected).abs().max() < 1e-5 * expected.abs().max()


def test_flow_is_eulers_method_on_shifted_times():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(12)
    sigmas = scheduler.sigmas.double().tolist()
    reached = ours(ddim, SCHEDULES["flow"], sigmas, "flow")
    torch.testing.assert_close(reached, theirs(scheduler), rtol=1e-4, atol=1e-4)
    whole = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.double()
    steps = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    torch.testing.assert_close(shift_time(steps, 3.0), whole[:1000], rtol=1e-5, atol=1e-6)
