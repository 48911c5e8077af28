"""Our processes as schedulers of Hugging Face's diffusers, and which of its schedulers fit a process."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from uvit.common.errors import InputError
from uvit.config import Kind, ProcessConfig, SampleConfig, SolverName
from uvit.diffusion.process import LDM, SCHEDULES, TIME_MARGIN, shift_time
from uvit.diffusion.samplers import sampling_times

TABLE_STEPS = 1000
"""diffusers' tables of a process hold time t at index 1000 t - 1."""
TABLE_TOLERANCE = 1e-3
"""How far α may be from the process's in a scheduler that fits it; the rounding of its table is far below."""
PREDICTION_TYPES: dict[Kind, str] = {
    "noise": "epsilon",
    "data": "sample",
    "v": "v_prediction",
    "flow": "flow_prediction",
}
Scheduler = Any
"""diffusers' schedulers share no base class that says what they have."""
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
OWN_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "shift_terminal")
"""Options of a scheduler by which it chooses another grid than one uniform in time."""


def _prediction_type(process: ProcessConfig) -> str:
    """Names what the network predicts as diffusers does.

    Raises:
        InputError: its schedulers do not know that prediction on that schedule.
    """
    flow = process.schedule == "flow"
    # Its v takes α² + σ² = 1 for granted, its flow α + σ = 1.
    if process.prediction == ("v" if flow else "flow"):
        expected = "'noise', 'data' or 'flow'" if flow else "'noise', 'data' or 'v'"
        given = f"prediction {process.prediction!r}"
        raise InputError(f"diffusers' schedulers take {expected} on schedule {process.schedule!r}, got {given}")
    return PREDICTION_TYPES[process.prediction]


def _first_time(process: ProcessConfig) -> float:
    """Where sampling begins: noise tells nothing of an image where α = 0."""
    singular = SCHEDULES[process.schedule].singular_start and process.prediction == "noise"
    return 1 - TIME_MARGIN if singular else 1.0


def _alphas_cumprod(process: ProcessConfig, num_steps: int) -> Tensor:
    """ᾱ = α² at diffusers' first steps, in double precision."""
    t = torch.arange(1, num_steps + 1, dtype=torch.float64) / TABLE_STEPS
    return SCHEDULES[process.schedule].alpha_sigma(t)[0].square()


def _table(process: ProcessConfig) -> dict[str, Any]:
    """The fields of a scheduler's config that hold a variance-preserving schedule."""
    if process.schedule == "ldm":
        # the published name of it, which other tools know too
        betas: dict[str, Any] = {"beta_schedule": "scaled_linear"}
        return {**betas, "beta_start": LDM.beta_first, "beta_end": LDM.beta_last, "num_train_timesteps": LDM.num_steps}
    num_steps = round(_first_time(process) * TABLE_STEPS)
    alphas_cumprod = _alphas_cumprod(process, num_steps)
    kept = alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    table: dict[str, Any] = {"trained_betas": (1 - kept).tolist(), "num_train_timesteps": num_steps}
    # It lets solvers begin where α = 0.
    return table | ({"rescale_betas_zero_snr": True} if alphas_cumprod[-1] == 0 else {})


def make_scheduler(process: ProcessConfig, sampler: SolverName = "dpmpp_2m") -> Scheduler:
    """Expresses a process and a solver as a scheduler of diffusers, whose `config` saves and loads.

    UViTPipeline draws with it what sample.py draws from the same noise with the same settings, to rounding, on a grid
    uniform in time down to 0; and of a table where the number of steps divides that of its entries, to which diffusers
    rounds times. Two differ a little in the first steps, which are infinite in log-SNR: `unipc` begins `flow` at
    1 - 1e-6, and the multistep solvers begin `cosine` at α = 2⁻¹² in place of 0.

    Args:
        process: `ldm` is diffusers' `scaled_linear`; `vp` and `cosine` are tables of 1000 betas (999 for a
            `cosine` network of noise, which sample.py begins at 0.999 too); `flow` is flow matching, with time_shift
            as its shift.
        sampler: `ddim`, `dpmpp_2m` or `unipc`; on `flow` also `euler` and `heun`. Another scheduler of diffusers for
            the same process is `Other.from_config(make_scheduler(process).config)`.

    Raises:
        InputError: a process or a solver that diffusers has no counterpart of, and why.
    """
    prediction_type = _prediction_type(process)
    flow = process.schedule == "flow"
    if process.time_shift != 1 and not flow:
        raise InputError(
            f"diffusers' schedulers shift times of schedule 'flow' alone, "
            f"got time_shift {process.time_shift:g} on {process.schedule!r}"
        )
    known = FLOW_SCHEDULERS if flow else TABLE_SCHEDULERS
    if flow and process.prediction != "flow":  # the FlowMatch schedulers know no other prediction
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
    # Some clip unless told otherwise: a config keeps this for those made of it, where its own class does not know it.
    settings = {"timestep_spacing": "trailing", "prediction_type": prediction_type, "clip_sample": False}
    return cls.from_config({**_table(process), **settings})


def _option(scheduler: Scheduler, name: str) -> Any:
    """A scheduler's option; None where its class has none, though `from_config` may have kept another class's."""
    return scheduler.config.get(name) if name in inspect.signature(type(scheduler).__init__).parameters else None


def _is_flow(scheduler: Scheduler) -> bool:
    """Tells whether a scheduler's sigmas are times of rectified flow."""
    return type(scheduler).__name__.startswith("FlowMatch") or bool(_option(scheduler, "use_flow_sigmas"))


def check_scheduler(scheduler: Scheduler, process: ProcessConfig, latents: bool = False) -> None:
    """Checks that a scheduler's process and prediction are those that a network was trained for.

    Args:
        scheduler: one of diffusers.
        process: what the network was trained on.
        latents: whether it draws latents, which have no bounds that estimates of them could be clipped to.

    Raises:
        InputError: they are not; says what both are.
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
    given = _option(scheduler, "prediction_type") or ("flow_prediction" if _is_flow(scheduler) else "epsilon")
    if given != expected:
        wanted = f"expected {expected!r} for a network that predicts {process.prediction!r}"
        raise InputError(f"{name} takes prediction_type {given!r}, {wanted}: {advice}")
    # diffusers makes these grids of a table of alphas even where the times are those of flow.
    grids = OWN_GRIDS if _option(scheduler, "use_flow_sigmas") else ()
    of_images = ("clip_sample", "thresholding") if latents else ()
    for option in ("use_dynamic_shifting", "invert_sigmas", *grids, *of_images):
        if _option(scheduler, option):
            raise InputError(f"{name} must have {option} False for this pipeline, got True")


def set_times(
    scheduler: Scheduler, process: ProcessConfig, num_steps: int, device: torch.device | None = None
) -> list[float]:
    """Prepares a scheduler for a run from noise, and returns the times in [0, 1] at which it asks for predictions.

    The network's own times are these times Schedule.network_scale; diffusers' `timesteps` are off by up to one. On
    `flow` the grid is that of sample.py for the same solver; tables keep the scheduler's own, in whole thousandths.

    Args:
        scheduler: one that fits the process.
        process: what the network was trained on.
        num_steps: steps.
        device: of the images.

    Returns:
        A time for each of `scheduler.timesteps`.

    Raises:
        InputError: more steps than a table has entries.
    """
    if not _is_flow(scheduler):
        if num_steps > (entries := len(scheduler.alphas_cumprod)):
            raise InputError(f"num_inference_steps must be at most {entries}, the entries of a table, got {num_steps}")
        scheduler.set_timesteps(num_steps, device=device)
        times = ((scheduler.timesteps.double() + 1) / TABLE_STEPS).tolist()
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
                # Its own begins at 0.999, or ends with a step of 0.001, and it takes no other.
                sigmas = torch.tensor(grid)
                inner = sigmas[1:-1].repeat_interleave(scheduler.order)  # Heun's method asks twice there
                scheduler.sigmas = torch.cat([sigmas[:1], inner, sigmas[-1:]])
                scheduler.timesteps = (scheduler.sigmas[:-1] * scheduler.config.num_train_timesteps).to(device)
        times = scheduler.sigmas[: len(scheduler.timesteps)].tolist()
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return times
