"""Our processes as schedulers of Hugging Face's diffusers, and checks that a scheduler fits a process."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from uvit.common.errors import InputError, one_line
from uvit.config import Kind, ProcessConfig, SampleConfig, SolverName
from uvit.diffusion.process import NUM_STEPS, SCHEDULES, TIME_MARGIN, Discrete, shift_time
from uvit.diffusion.samplers import sampling_times

BETA_SCHEDULES = {"ldm": "scaled_linear", "ddpm": "linear"}
"""Names that diffusers and other tools have for our tables."""
TABLE_STEPS = 1000
"""diffusers' tables of a process hold time t at index 1000 t - 1."""
TABLE_TOLERANCE = 1e-3
"""Largest allowed difference of a scheduler's α from the process's; rounding of its table is far below."""
PREDICTION_TYPES: dict[Kind, str] = {
    "noise": "epsilon",
    "data": "sample",
    "v": "v_prediction",
    "flow": "flow_prediction",
}
Scheduler = Any
"""diffusers' schedulers have no base class that declares their methods."""
TABLE_SCHEDULERS: dict[SolverName, Scheduler] = {
    "ddim": DDIMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
FLOW_SCHEDULERS: dict[SolverName, Scheduler] = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "heun": FlowMatchHeunDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
DRAWING_TABLES = (
    *(DDIMScheduler, DDIMParallelScheduler, DDPMScheduler, DDPMParallelScheduler, DEISMultistepScheduler),
    *(DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, UniPCMultistepScheduler, SASolverScheduler),
    *(EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, LMSDiscreteScheduler),
    *(KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler, PNDMScheduler),
)
"""Schedulers that draw right images of a process with a table. Others go from images to noise, take a network that was
distilled for them, or need more than its prediction."""
WITHOUT_DATA = (EulerAncestralDiscreteScheduler, KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler, PNDMScheduler)
"""Those of them that take no network that predicts data."""
DRAWING_FLOW = (*FLOW_SCHEDULERS.values(), DPMSolverSinglestepScheduler)
"""Those that draw right images of `flow`: others of `use_flow_sigmas` end before the noise does."""
STRIDING = (DDIMScheduler, DDIMParallelScheduler, PNDMScheduler)
"""Those whose steps all go down by the same whole number of entries, wherever their grid says that the next one is."""
STRIDE_TOLERANCE = 0.05
"""Largest share of a table that such steps may leave out: noise is left in the images then."""
START_TOLERANCE = 0.05
"""Largest α of a grid's first time, above the process's own at its end, at which noise may stand for a noisy image."""
OWN_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "shift_terminal")
"""Options of a scheduler for grids that are not uniform in time."""


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
    singular = SCHEDULES[process.schedule].singular_start and process.prediction == "noise"
    return 1 - TIME_MARGIN if singular else 1.0


def _alphas_cumprod(process: ProcessConfig, num_steps: int) -> Tensor:
    """Returns ᾱ = α² at diffusers' first `num_steps` steps, in double precision."""
    t = torch.arange(1, num_steps + 1, dtype=torch.float64) / TABLE_STEPS
    return SCHEDULES[process.schedule].alpha_sigma(t)[0].square()


def _table(process: ProcessConfig) -> dict[str, Any]:
    """Returns the fields of a scheduler's config that define a variance-preserving schedule."""
    schedule = SCHEDULES[process.schedule]
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


def _option(scheduler: Scheduler, name: str) -> Any:
    """Returns an option of a scheduler's own class; None for those that `from_config` kept from another class."""
    return scheduler.config.get(name) if name in inspect.signature(type(scheduler).__init__).parameters else None


def _is_flow(scheduler: Scheduler) -> bool:
    """Returns whether a scheduler's sigmas are times of rectified flow."""
    return type(scheduler).__name__.startswith("FlowMatch") or bool(_option(scheduler, "use_flow_sigmas"))


def check_scheduler(scheduler: Scheduler, process: ProcessConfig, latents: bool = False) -> None:
    """Checks that a scheduler's process and prediction are those that a network was trained with.

    Args:
        scheduler: one of diffusers.
        process: what the network was trained on.
        latents: whether it draws latents, which are unbounded, so that estimates of them must not be clipped.

    Raises:
        InputError: they differ, with both values.
    """
    expected, name = _prediction_type(process), type(scheduler).__name__
    advice = "make_scheduler gives those that fit"
    if _is_flow(scheduler):
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
    drawing = DRAWING_FLOW if process.schedule == "flow" else DRAWING_TABLES
    if not isinstance(scheduler, drawing):
        known = ", ".join(cls.__name__.removesuffix("Scheduler") for cls in drawing)
        raise InputError(f"{name} does not draw images of schedule {process.schedule!r}, expected one of {known}")
    if process.prediction == "data" and isinstance(scheduler, WITHOUT_DATA):
        raise InputError(f"{name} takes networks that predict noise or v, got one that predicts data: {advice}")
    if not _is_flow(scheduler) and SCHEDULES[process.schedule].singular_start:
        # Others divide by α in their first step, or interpolate σ / α there.
        begins_at_zero = _option(scheduler, "rescale_betas_zero_snr")
        if begins_at_zero is None or (scheduler.alphas_cumprod[-1] == 0 and not begins_at_zero):
            raise InputError(f"{name} cannot begin where α is 0, as on schedule {process.schedule!r}: {advice}")
    given = _option(scheduler, "prediction_type") or ("flow_prediction" if _is_flow(scheduler) else "epsilon")
    if given != expected:
        reason = f"expected {expected!r} for a network that predicts {process.prediction!r}"
        raise InputError(f"{name} takes prediction_type {given!r}, {reason}: {advice}")
    # diffusers derives these grids from a table of alphas, even with the times of flow.
    grid_options = OWN_GRIDS if _option(scheduler, "use_flow_sigmas") else ()
    clip_options = ("clip_sample", "thresholding") if latents else ()
    for option in ("use_dynamic_shifting", "invert_sigmas", *grid_options, *clip_options):
        if _option(scheduler, option):
            raise InputError(f"{name} must have {option} False for this pipeline, got True")
    if (end := _option(scheduler, "final_sigmas_type")) not in (None, "zero"):
        raise InputError(f"{name} must have final_sigmas_type 'zero', or noise is left in the images, got {end!r}")


def set_times(
    scheduler: Scheduler, process: ProcessConfig, num_steps: int, device: torch.device | None = None
) -> list[float]:
    """Prepares a scheduler for sampling from noise, and returns the times in [0, 1] at which it needs predictions.

    The network's times are Schedule.network_time of these; diffusers' `timesteps` are off by up to one. On `flow`, the
    grid is that of sample.py for the same solver; with tables, the scheduler's own, in multiples of 1/1000.

    Args:
        scheduler: one that fits the process.
        process: what the network was trained on.
        num_steps: number of steps.
        device: of the images.

    Returns:
        A time for each of `scheduler.timesteps`.

    Raises:
        InputError: more steps than a table has entries, fewer than the scheduler needs, or a grid that begins where
            images are not noise yet.
    """
    if not _is_flow(scheduler):
        name = type(scheduler).__name__
        if num_steps > (entries := len(scheduler.alphas_cumprod)):
            raise InputError(f"num_inference_steps must be at most {entries}, the entries of a table, got {num_steps}")
        try:
            scheduler.set_timesteps(num_steps, device=device)
        except ValueError as error:  # the first steps of PNDM take four
            raise InputError(f"{name} has no grid of {num_steps} steps, take more: {one_line(error)}") from None
        if scheduler.timesteps[-1] < 0 and scheduler.order == 1:  # their np.arange may give one timestep too many
            scheduler.timesteps = scheduler.timesteps[:-1]
            if hasattr(scheduler, "sigmas"):
                scheduler.sigmas = torch.cat([scheduler.sigmas[:-2], scheduler.sigmas[-1:]])
        covered = entries // num_steps * num_steps
        if isinstance(scheduler, STRIDING) and covered < (1 - STRIDE_TOLERANCE) * entries:
            strides = f"{name} strides {entries // num_steps} entries a step, so that {num_steps} steps cover {covered}"
            raise InputError(f"{strides} of {entries}: take fewer steps, or a number that divides {entries}")
        times = ((scheduler.timesteps.double() + 1) / TABLE_STEPS).tolist()
        alpha, last = (SCHEDULES[process.schedule].at(t)[0] for t in (times[0], entries / TABLE_STEPS))
        if alpha > last + START_TOLERANCE:
            begins = f"{name} begins {num_steps} steps at time {times[0]:g}, where the image's share α is {alpha:.2g}"
            raise InputError(f"{begins}, expected {last:.2g} as in noise: timestep_spacing 'trailing' begins there")
    else:
        samplers = [name for name, cls in FLOW_SCHEDULERS.items() if isinstance(scheduler, cls)]
        shift = _option(scheduler, "flow_shift") or _option(scheduler, "shift") or 1.0
        grid = sampling_times(
            dataclasses.replace(process, time_shift=shift),
            SampleConfig(num_steps=num_steps, sampler=samplers[0] if samplers else "ddim"),
        )
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            before_shift = shift_time(torch.tensor(grid[:-1], dtype=torch.float64), 1 / shift)
            scheduler.set_timesteps(sigmas=before_shift.numpy(), num_inference_steps=num_steps, device=device)
        else:
            scheduler.set_timesteps(num_steps, device=device)
            if samplers and not any(_option(scheduler, option) for option in OWN_GRIDS):
                # Its own grid starts at 0.999, or ends with a step of 0.001, and set_timesteps accepts no other.
                sigmas = torch.tensor(grid)
                inner = sigmas[1:-1].repeat_interleave(scheduler.order)  # Heun's method evaluates twice there
                scheduler.sigmas = torch.cat([sigmas[:1], inner, sigmas[-1:]])
                scheduler.timesteps = (scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps).to(device)
        times = scheduler.sigmas[: len(scheduler.timesteps)].tolist()
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return times
