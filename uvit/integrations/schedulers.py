"""Our processes as schedulers of Hugging Face's diffusers, and checks that a scheduler fits a process."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from uvit.common.errors import InputError
from uvit.config import Kind, ProcessConfig, SolverName
from uvit.diffusion.process import NUM_STEPS, TIME_MARGIN, Discrete, schedule_of
from uvit.integrations.scheduler_steps import FLOW_SCHEDULERS, OWN_GRIDS, TABLE_STEPS, Scheduler, is_flow, option_of
from uvit.integrations.scheduler_trial import CLIPPING, TRIAL_STEPS, check_by_trial

BETA_SCHEDULES = {"ldm": "scaled_linear", "ddpm": "linear"}
"""Names that diffusers and other tools have for our tables."""
TABLE_TOLERANCE = 1e-3
"""Largest allowed difference of a scheduler's α from the process's; rounding of its table is far below."""
PREDICTION_TYPES: dict[Kind, str] = {
    "noise": "epsilon",
    "data": "sample",
    "v": "v_prediction",
    "flow": "flow_prediction",
}
TABLE_SCHEDULERS: dict[SolverName, Scheduler] = {
    "ddim": DDIMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}


def _prediction_type(process: ProcessConfig) -> str:
    """Returns diffusers' name of what the network predicts.

    Raises:
        InputError: its schedulers do not support that prediction on that schedule.
    """
    flow = process.schedule == "flow"
    # Its v assumes α² + σ² = 1, its flow α + σ = 1.
    if process.prediction == ("v" if flow else "flow"):
        expected = "'noise', 'data' or 'flow'" if flow else "'noise', 'data' or 'v'"
        given = f"prediction {process.prediction!r}"
        raise InputError(f"diffusers' schedulers take {expected} on schedule {process.schedule!r}, got {given}")
    return PREDICTION_TYPES[process.prediction]


def _first_time(process: ProcessConfig) -> float:
    """Returns the first time of sampling: where α is about 0, a prediction of noise gives no estimate of the image."""
    singular = schedule_of(process).singular_start and process.prediction == "noise"
    return 1 - TIME_MARGIN if singular else 1.0


def _alphas_cumprod(process: ProcessConfig, num_steps: int) -> Tensor:
    """Returns ᾱ = α² at diffusers' first `num_steps` steps, in double precision."""
    t = torch.arange(1, num_steps + 1, dtype=torch.float64, device="cpu") / TABLE_STEPS
    return schedule_of(process).alpha_sigma(t)[0].square()


def _table(process: ProcessConfig) -> dict[str, Any]:
    """Returns the fields of a scheduler's config that define a variance-preserving schedule."""
    schedule = schedule_of(process)
    if isinstance(schedule, Discrete) and process.schedule in BETA_SCHEDULES:
        first, last = (round(schedule.betas[end].item(), 10) for end in (0, -1))  # ldm's are squares of roots
        named: dict[str, Any] = {"beta_schedule": BETA_SCHEDULES[process.schedule]}
        return {**named, "beta_start": first, "beta_end": last, "num_train_timesteps": NUM_STEPS}
    num_steps = round(_first_time(process) * TABLE_STEPS)
    alphas_cumprod = _alphas_cumprod(process, num_steps)
    kept = alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    table: dict[str, Any] = {"trained_betas": (1 - kept).tolist(), "num_train_timesteps": num_steps}
    # This lets solvers start where α = 0.
    return table | ({"rescale_betas_zero_snr": True} if alphas_cumprod[-1] == 0 else {})


def make_scheduler(process: ProcessConfig, sampler: SolverName = "dpmpp_2m") -> Scheduler:
    """Returns the diffusers scheduler of a process and a solver, whose `config` can be saved and loaded.

    With it, UViTPipeline draws the same images as sample.py from the same noise with the same settings, up to rounding,
    on a grid uniform in time down to 0; with tables, if the number of steps divides the number of entries, to which
    diffusers rounds times. There are two small differences in the first step, which is infinite in log-SNR: `unipc`
    starts `flow` at 1 - 1e-6, and the multistep solvers start `cosine` at α = 2⁻¹² instead of 0.

    Args:
        process: `ldm` and `ddpm` are diffusers' `scaled_linear` and `linear`; `vp`, `iddpm` and `cosine` are tables of
            1000 betas (999 for an `iddpm` or `cosine` network that predicts noise, which sample.py starts at 0.999
            too); `flow` is flow matching, with time_shift as its shift.
        sampler: `ddim`, `dpmpp_2m` or `unipc`; on `flow` also `euler` and `heun`. For another scheduler of diffusers
            and the same process, use `Other.from_config(make_scheduler(process).config)`.

    Raises:
        InputError: a process or a solver without a counterpart in diffusers, with the reason.
    """
    prediction_type = _prediction_type(process)
    flow = process.schedule == "flow"
    if process.time_shift != 1 and not flow:
        raise InputError(
            f"diffusers' schedulers only shift times of schedule 'flow', "
            f"got time_shift {process.time_shift:g} on {process.schedule!r}"
        )
    known = FLOW_SCHEDULERS if flow else TABLE_SCHEDULERS
    if flow and process.prediction != "flow":  # the FlowMatch schedulers support no other prediction
        known = {name: cls for name, cls in known.items() if not cls.__name__.startswith("FlowMatch")}
    if sampler not in known:
        of = f"prediction {process.prediction!r} on schedule {process.schedule!r}"
        takes = f"diffusers' schedulers for {of} are {', '.join(known)}"
        raise InputError(f"{takes}, got sampler {sampler!r}: give one of these as sampler")
    cls = known[sampler]
    if flow and cls.__name__.startswith("FlowMatch"):
        return cls(shift=process.time_shift)
    if flow:
        return cls(use_flow_sigmas=True, flow_shift=process.time_shift, prediction_type=prediction_type)
    # Some schedulers clip by default: clip_sample stays in the config for those made from it, even if unused here.
    settings = {"timestep_spacing": "trailing", "prediction_type": prediction_type, "clip_sample": False}
    return cls.from_config({**_table(process), **settings})


def check_scheduler(
    scheduler: Scheduler, process: ProcessConfig, latents: bool = False, num_steps: int = TRIAL_STEPS
) -> None:
    """Checks that a scheduler's process and prediction are those that a network was trained with, and tries it.

    Args:
        scheduler: one of diffusers.
        process: what the network was trained on.
        latents: whether it draws latents, which are unbounded, so that estimates of them must not be clipped.
        num_steps: steps in which it must draw right images, besides TRIAL_STEPS.

    Raises:
        InputError: they differ, with both values, or it draws other images than it should.
    """
    expected, name = _prediction_type(process), type(scheduler).__name__
    advice = "make_scheduler gives those that fit"
    if is_flow(scheduler):
        follows, fits = "flow", process.schedule == "flow"
    elif getattr(scheduler, "alphas_cumprod", None) is None:
        follows, fits = "an unknown process, without a table of alphas", False
    else:
        alphas_cumprod = scheduler.alphas_cumprod.double().cpu()
        follows, fits = "another table of alphas", len(alphas_cumprod) <= TABLE_STEPS and process.schedule != "flow"
        if fits:
            distance = alphas_cumprod.sqrt() - _alphas_cumprod(process, len(alphas_cumprod)).sqrt()
            fits = distance.abs().max().item() <= TABLE_TOLERANCE
    if not fits:
        raise InputError(f"{name} follows {follows}, expected the process of schedule {process.schedule!r}: {advice}")
    given = option_of(scheduler, "prediction_type") or ("flow_prediction" if is_flow(scheduler) else "epsilon")
    if given != expected:
        reason = f"expected {expected!r} for a network that predicts {process.prediction!r}"
        raise InputError(f"{name} takes prediction_type {given!r}, {reason}: {advice}")
    # diffusers derives these grids from a table of alphas, even with the times of flow.
    grid_options = OWN_GRIDS if option_of(scheduler, "use_flow_sigmas") else ()
    clip_options = CLIPPING if latents else ()
    for option in ("use_dynamic_shifting", "invert_sigmas", *grid_options, *clip_options):
        if option_of(scheduler, option):
            raise InputError(f"{name} must have {option} False for this pipeline, got True")
    for steps in dict.fromkeys((TRIAL_STEPS, num_steps)):
        check_by_trial(scheduler, process, steps)
