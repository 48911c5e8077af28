"""The config of the diffusion process: what is predicted and how that is trained, and how images are drawn."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from uvit.common.errors import InputError
from uvit.config.network import Precision
from uvit.config.section import Section

ScheduleName = Literal["vp", "ldm", "ddpm", "iddpm", "cosine", "flow"]
Kind = Literal["noise", "data", "v", "flow"]
SolverName = Literal[
    "ddim", "heun", "dpmpp_2m", "unipc", "dpmpp_fast", "dpm_solver_fast", "euler", "euler_maruyama", "average"
]
Spacing = Literal["uniform", "log_snr"]
Derivative = Literal["forward", "differences"]
AVERAGE_TIME_SCALE = 3.0
"""The network's time with objective `average`, as a multiple of t: the derivative by 1000 t is mostly noise."""
GUIDANCE_MIDDLE = 0.5
"""Time in the middle of every interval of guidance that a network takes."""
CONTINUOUS: tuple[ScheduleName, ...] = ("vp", "cosine", "flow")
"""Schedules without a table, whose network time is a multiple of t."""

# Limits that are checked before memory is allocated; each is far beyond what anyone has drawn.
MAX_SAMPLER_STEPS = 100_000
MAX_GUIDANCE = 10_000


@dataclass(frozen=True, kw_only=True)
class ProcessConfig(Section):
    """The diffusion process, and the loss on it."""

    schedule: ScheduleName = "flow"
    """Signal and noise over time: the paper's for pixels (vp), the paper's for latents (ldm), ADM's (ddpm, or iddpm
    for its 64x64 model), cosine, or rectified flow."""
    prediction: Kind = "flow"
    """What the network predicts."""
    objective: Literal["instant", "average"] = "instant"
    """Whether the prediction is of an instant, or its velocity the average over an interval, for drawing in one or a
    few evaluations (MeanFlow): on `flow`, by a network that takes intervals."""
    time_scale: float | None = None
    """The network's time is this times t; None is the schedule's own (1000, for `vp` 999), and 3 with `average`."""
    instant_share: float = 0.5
    """With `average`, share of a batch whose interval is an instant, for which it is flow matching."""
    interval_start: Literal["uniform", "pair"] = "uniform"
    """With `average`, where an interval starts that ends at a training time: uniform before it, or at another training
    time, and the later one is the end (MeanFlow's)."""
    derivative: Derivative = "forward"
    """With `average`, how the network's derivative along its path is computed: exactly, in forward mode, or as a
    difference over a short time, 0.01, or 0.04 in bf16 and fp16, which takes less (Transition Models)."""
    adaptive_power: float = 0.25
    """With `average`, p of the loss's weights 1 / (error + 0.01)^p, of each image; 0 is none, MeanFlow's 1."""
    guidance_max: float = 8.0
    """With `average` and a network that takes guidance, the largest scale w that it is trained for."""
    loss_space: Kind | None = None
    """Space of the squared error; None is that of the prediction."""
    min_divisor: float = 0.0
    """Least divisor where the error of `data` (divided by the noise's amplitude, on `flow` t) or of `noise` (by the
    signal's) is converted to another loss_space, such as 0.05 (JiT's); 0 instead keeps times 0.001 from both ends."""
    time_distribution: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of training times."""
    logit_mean: float = 0.0
    """Mean of logit(t) for `logit_normal`."""
    logit_std: float = 1.0
    """Standard deviation of logit(t) for `logit_normal`."""
    time_shift: float = 1.0
    """s in t -> s t / (1 + (s - 1) t): above 1 shifts training times, and uniform sampling grids, towards noise."""
    weighting: Literal["none", "min_snr"] = "none"
    """Loss weight over time: none, or min(SNR, gamma) on the error of x_0."""
    min_snr_gamma: float = 5.0
    """gamma of `min_snr`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("logit_std", "time_shift", "min_snr_gamma"):
            self._require(name, getattr(self, name) > 0, "above 0")
        self._require("min_divisor", 0 <= self.min_divisor < 1, "in [0, 1)")
        self._require("time_scale", self.time_scale is None or self.time_scale > 0, "None or above 0")
        self._require("instant_share", 0 <= self.instant_share < 1, "in [0, 1)")
        self._require("adaptive_power", self.adaptive_power >= 0, "at least 0")
        self._require("guidance_max", 1 < self.guidance_max <= MAX_GUIDANCE, f"above 1, and at most {MAX_GUIDANCE:,}")
        if self.time_scale is not None:
            self._require("schedule", self.schedule in CONTINUOUS, f"one of {', '.join(CONTINUOUS)} with a time_scale")
        if self.objective == "average":
            self._require("schedule", self.schedule == "flow", "'flow' with objective 'average'")
            self._require(
                "prediction", self.prediction in ("flow", "data"), "'flow' or 'data' with objective 'average'"
            )
            self._require("loss_space", self.loss_space is None, "None with objective 'average'")
            self._require("weighting", self.weighting == "none", "'none' with objective 'average'")
            # There it is 0.05 and in sampling, too: it is part of what the network's output means.
            self._require("min_divisor", self.min_divisor == 0, "0 with objective 'average'")
        if self.min_divisor:
            divides = self.prediction in ("data", "noise") and self.loss_space not in (None, self.prediction)
            self._require(
                "min_divisor", divides, "0 unless the error of 'data' or 'noise' is converted to another loss_space"
            )
            self._require("weighting", self.weighting == "none", "'none' with a min_divisor")

    @property
    def unit_of_time(self) -> float | None:
        """The network's time at t = 1; None is the schedule's own."""
        return AVERAGE_TIME_SCALE if self.time_scale is None and self.objective == "average" else self.time_scale


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Section):
    """How images are drawn in the grids of training, and by default in sample.py and evaluate.py."""

    sampler: SolverName = "dpmpp_2m"
    """Solver."""
    num_steps: int = 20
    """Steps of the solver, with one evaluation of the network each, two for `heun`."""
    spacing: Literal["auto", Spacing] = "auto"
    """Grid of times: uniform in t or in log-SNR; `auto` is the solver's default."""
    t_end: float = 0.0
    """Last time; solvers that end in log-SNR, which is infinite at 0, use 0.001 instead of 0."""
    guidance: float = 1.0
    """w in w * cond + (1 - w) * uncond; 1 is none."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times between which guidance is applied; outside, only cond is computed."""
    guidance_path: bool = False
    """The unconditional pass of guidance leaves out the blocks inside model.outer_pairs (SPRINT): less time."""
    mixed_precision: Precision = "no"
    """Precision of matrix products; `auto` is bf16 where the device multiplies it faster. Images change a little."""
    reuse: str = "none"
    """`K:EVERY` computes the blocks inside the K outermost pairs of shallow and deep blocks only at every EVERY-th
    evaluation, and extrapolates their output in between: faster, but the images differ from those of `none`."""
    prompts: tuple[str, ...] = ()
    """Default prompts of a text model; the first captions of the data where empty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("num_steps", self.num_steps >= 1, "at least 1")
        self._require_at_most(num_steps=MAX_SAMPLER_STEPS)
        self._require("t_end", 0 <= self.t_end < 0.5, "in [0, 0.5)")
        self._require("guidance", abs(self.guidance) <= MAX_GUIDANCE, f"at most {MAX_GUIDANCE:,} in size")
        low, high = self.guidance_interval
        self._require("guidance_interval", 0 <= low <= high <= 1, "two times with 0 <= low <= high <= 1")
        fits = self.reuse == "none" or re.fullmatch(r"[1-9]\d{0,3}:([2-9]|[1-9]\d{1,3})", self.reuse)
        self._require("reuse", bool(fits), "'none' or K:EVERY with K at least 1 and EVERY at least 2, such as '1:3'")

    @property
    def reused(self) -> tuple[int, int] | None:
        """(K, EVERY) of `reuse`; None for `none`."""
        outer, _, every = self.reuse.partition(":")
        return (int(outer), int(every)) if every else None


def solvers_of(process: ProcessConfig) -> list[SolverName]:
    """Returns the solvers that suit a network of a process: that of an average velocity, those of an instant's."""
    instant = process.objective == "instant" or process.instant_share > 0
    average = process.objective == "average"
    return [name for name in get_args(SolverName) if (average if name == "average" else instant)]


def check_solver(process: ProcessConfig, sampler: SolverName) -> None:
    """Checks that a network was trained to predict what a solver needs.

    Raises:
        InputError: an average velocity where it predicts an instant's, or the reverse.
    """
    if sampler not in (solvers := solvers_of(process)):
        trained = f"objective {process.objective!r}"
        if process.objective == "average":
            trained += f" and instant_share {process.instant_share:g}"
        raise InputError(f"sampler must be one of {', '.join(solvers)} for {trained}, got {sampler!r}")
