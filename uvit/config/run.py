"""The config of a run, as frozen dataclasses: each default is defined once, here.

A config file defines one value, `config = Config(...)`; the command line overrides single fields; `config.json` in a
run folder is the same value written out. Each section checks its types and values on construction.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from uvit.common.errors import InputError
from uvit.config.section import Section
from uvit.config.unet import UNetConfig
from uvit.config.uvit import UViTConfig

ScheduleName = Literal["vp", "ldm", "ddpm", "iddpm", "cosine", "flow"]
Kind = Literal["noise", "data", "v", "flow"]
SolverName = Literal[
    "ddim", "heun", "dpmpp_2m", "unipc", "dpmpp_fast", "dpm_solver_fast", "euler", "euler_maruyama", "average"
]
Spacing = Literal["uniform", "log_snr"]
Precision = Literal["auto", "no", "bf16", "fp16"]
Compile = Literal["no", "blocks", "model", "graphs"]
Alignment = Literal["none", "layersync", "dispersive", "repa", "irepa"]
AnyNetworkConfig = UViTConfig | UNetConfig
TIMM = "timm:"
"""What the name of a network of timm begins with."""
AVERAGE_TIME_SCALE = 3.0
"""The network's time with objective `average`, as a multiple of t: the derivative by 1000 t is mostly noise."""
GUIDANCE_MIDDLE = 0.5
"""Time in the middle of every interval of guidance that a network takes."""
ALIGNMENT_WEIGHTS: dict[Alignment, float] = {
    "none": 0.0,
    "layersync": 0.2,
    "dispersive": 0.25,
    "repa": 0.5,
    "irepa": 0.5,
}
"""Weight of each alignment in the loss, as published: LayerSync's paper, DispLoss's code, REPA's paper and iREPA's."""
TO_AN_ENCODER: tuple[Alignment, ...] = ("repa", "irepa")
"""Alignments to the features of a frozen encoder."""
CONTINUOUS: tuple[ScheduleName, ...] = ("vp", "cosine", "flow")
"""Schedules without a table, whose network time is a multiple of t."""

# Limits that are checked before memory is allocated; each is far beyond what anyone has trained or drawn.
MAX_WORKERS = MAX_THREADS = 1_024
MAX_BATCH = MAX_IMAGES = 10**7
MAX_SAMPLER_STEPS = 100_000
MAX_GUIDANCE = 10_000

MIN_WIDTH, MAX_WIDTH = 0.001, 0.288
"""Relative widths of averages; that of all updates alike is 1/√12 = 0.2887."""


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
class DataConfig(Section):
    """The images."""

    name: str = "digits"
    """`digits` or `photos` (built in), a folder on disk (of images, one subfolder per class where they have labels; a
    saved data set; or IDX files, as MNIST's), or a hub name."""
    train_split: str = "train"
    """Split to train on; the built-in data sets have their own."""
    test_split: str = "test"
    """Split held out for evaluation."""
    flip: bool = False
    """Mirror every image with probability 1/2."""
    crop: Literal["center", "random"] = "center"
    """How images are cropped to the model's shape: at the centre, or at random, at least 0.8 of their shorter side."""
    on_error: Literal["stop", "skip"] = "stop"
    """When an image cannot be read: stop, or use another one and list it in the run's skipped.txt."""
    num_workers: int = 0
    """Loader processes; 0 loads in the training process."""
    class_names: tuple[str, ...] = ()
    """Names of the labels; read from the data where empty."""
    label_column: str | None = None
    """Column of labels, where a data set has several; a folder's are its classes."""
    caption_column: str | None = None
    """Column of captions for a text model, each a text or a list of texts; None is the only text column, or the one
    named `text`, `caption`, `captions` or `prompt`."""
    text_encoder: str = "openai/clip-vit-large-patch14"
    """Frozen CLIP text encoder from captions to the context, for a model that takes one: a folder or a hub name."""
    autoencoder: str | None = None
    """Frozen AutoencoderKL between images and the model's latents: a folder or a hub name, optionally with a folder
    inside it (`user/model/vae`); None is a model of pixels."""
    scale_factor: float = 0.18215
    """Factor from the autoencoder's latents to the model's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("name", bool(self.name.strip()), "the name of a data set or a folder")
        self._require("scale_factor", self.scale_factor > 0, "above 0")
        self._require("num_workers", self.num_workers >= 0, "at least 0")
        self._require_at_most(num_workers=MAX_WORKERS)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """The optimizer and its learning rate."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for the matrices inside the blocks with AdamW for the rest."""
    lr: float = 2e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.99, 0.999)
    """AdamW's moment decays."""
    momentum: float = 0.95
    """Muon's momentum."""
    weight_decay: float = 0.03
    """Decoupled weight decay, on every parameter as in the paper."""
    fallback_lr_scale: float = 1.0
    """With Muon, the learning rate of its AdamW part as a multiple of lr."""
    warmup_steps: int = 0
    """Linear warm-up from 0; the first update has learning rate 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up; `linear` and `cosine` reach 0 at the last step."""
    grad_clip: float = 0.0
    """Maximum gradient norm; 0 is no clipping."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "fallback_lr_scale"):
            self._require(name, getattr(self, name) > 0, "above 0")
        for name in ("weight_decay", "warmup_steps", "grad_clip"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("betas", all(0 <= beta < 1 for beta in self.betas), "in [0, 1)")
        self._require("momentum", 0 <= self.momentum < 1, "in [0, 1)")


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
        trained = f"objective {process.objective!r} and instant_share {process.instant_share:g}"
        raise InputError(f"sampler must be one of {', '.join(solvers)} for {trained}, got {sampler!r}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """The training loop."""

    run_dir: str | None = None
    """Folder of the run; None is runs/NAME for configs/NAME.py."""
    init: str | None = None
    """Weights to start from: a run folder, weights or a hub name. An interval and a guidance that they lack start as if
    absent, and as tokens fade in over optim.warmup_steps."""
    num_steps: int = 100_000
    """Optimizer steps."""
    batch_size: int = 128
    """Images per optimizer step, over all processes and accumulation steps."""
    accumulation_steps: int = 1
    """Parts that a batch is split into, to fit in memory; their gradients are accumulated."""
    num_threads: int = 0
    """CPU threads; 0 is PyTorch's choice. A tiny network is as fast on one, which other programs slow down less."""
    mixed_precision: Precision = "auto"
    """Precision of matrix products; weights, loss and EMA stay in fp32. `auto` is bf16 where the device is faster in
    it: on CUDA, and on a CPU with bf16 instructions for all but narrow models."""
    compile: Compile = "no"
    """Compile the model: block by block (the fastest to start), whole, or whole in CUDA graphs."""
    shard: bool = False
    """Shard weights, gradients, optimizer state and EMA across processes (FSDP2), to fit a model in memory; training
    and saved files stay the same."""
    label_dropout: float = 0.0
    """Fraction of labels (or captions) replaced by the null class (or the empty caption), for guidance."""
    token_keep: float = 1.0
    """Share of the patches that the blocks inside model.outer_pairs see (SPRINT), for less time."""
    token_choice: Literal["structured", "random"] = "structured"
    """Which patches those are: as many at random in each 2x2 of them, or in the whole image."""
    path_drop: float = 0.1
    """With model.outer_pairs, share of images for which the blocks inside are left out: for sample.guidance_path."""
    dense_share: float = 0.2
    """With token_keep below 1, share of the steps, the last ones, in which all blocks see all patches."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights; the average starts as a copy of the weights."""
    average_widths: tuple[float, ...] = ()
    """Relative widths, such as 0.05 and 0.1, of averages that are kept beside that of ema_decay, with snapshots in
    averages/, from which `python -m uvit average` rebuilds any other width (EDM2)."""
    average_every: int | None = None
    """Steps between these snapshots, beside one at the end; None is a 32nd of num_steps."""
    alignment: Alignment = "none"
    """What is added to the loss for better features inside the network: a shallow block's tokens become like a deeper
    one's (layersync), images unlike each other at a quarter of the depth (dispersive), or the middle block's tokens
    like the patches of a frozen encoder (repa, irepa). The loss that is logged is without it."""
    alignment_weight: float | None = None
    """Weight of what alignment adds; None is the method's published one, 0 is no alignment."""
    alignment_encoder: str | None = None
    """With `repa` and `irepa`, the encoder: `timm:MODEL`, such as timm:vit_base_patch14_dinov2."""
    alignment_encoder_weights: str | None = None
    """File of the encoder's weights (safetensors); None downloads them once."""
    seed: int = 0
    """Seed of the weights, data order, times, noise and dropout."""
    log_every: int = 50
    """Steps between log lines."""
    sample_every: int = 5_000
    """Steps between sample grids; 0 is never."""
    save_every: int = 5_000
    """Steps between checkpoints; one is always written at the end."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    resume_anyway: bool = False
    """Resume a run with this config even where it changes the result of training; weights and optimizer state must
    still fit."""
    max_bad_steps: int = 20
    """Stop after this many steps in a row with a loss or gradient that is not finite; each of them is skipped."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where metrics and grids go, in addition to metrics.jsonl and samples/."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "num_steps",
            "batch_size",
            "accumulation_steps",
            "log_every",
            "save_every",
            "keep",
            "max_bad_steps",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("sample_every", "seed", "num_threads"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require_at_most(batch_size=MAX_BATCH, num_threads=MAX_THREADS)
        self._require("label_dropout", 0 <= self.label_dropout <= 1, "in [0, 1]")
        self._require("token_keep", 0 < self.token_keep <= 1, "above 0 and at most 1")
        self._require("path_drop", 0 <= self.path_drop < 1, "in [0, 1)")
        self._require("dense_share", 0 <= self.dense_share <= 1, "in [0, 1]")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        self._check_alignment()
        widths = self.average_widths
        in_range = all(MIN_WIDTH <= width <= MAX_WIDTH for width in widths) and len({*widths}) == len(widths)
        self._require("average_widths", in_range, f"different widths of {MIN_WIDTH} to {MAX_WIDTH}")
        self._require("average_every", self.average_every is None or self.average_every >= 1, "None or at least 1")
        if self.shard:
            self._require("compile", self.compile != "graphs", "another with shard True")
            self._require("mixed_precision", self.mixed_precision != "fp16", "another with shard True")
        if self.accumulation_steps > 1:  # graphs overwrite the first part's gradients with the second's: pytorch#169545
            self._require("compile", self.compile != "graphs", "another with accumulation_steps above 1")
        if self.batch_size % self.accumulation_steps:
            raise InputError(
                f"batch_size {self.batch_size} must be divisible by accumulation_steps {self.accumulation_steps}"
            )

    def _check_alignment(self) -> None:
        kind, weight = self.alignment, self.alignment_weight
        self._require("alignment_weight", weight is None or weight >= 0, "None or at least 0")
        if kind in TO_AN_ENCODER:
            is_timm = self.alignment_encoder is not None and self.alignment_encoder.startswith(TIMM)
            self._require("alignment_encoder", is_timm, f"'{TIMM}MODEL' with alignment {kind!r}")
        else:
            for name in ("alignment_encoder", "alignment_encoder_weights"):
                self._require(name, getattr(self, name) is None, f"None with alignment {kind!r}")
        if kind == "none":
            self._require("alignment_weight", weight is None, "None with alignment 'none'")
        else:  # graphs would overwrite what is kept of the blocks
            self._require("compile", self.compile != "graphs", f"another with alignment {kind!r}")

    @property
    def alignment_factor(self) -> float:
        """The weight of the alignment in the loss; 0 where there is none."""
        return ALIGNMENT_WEIGHTS[self.alignment] if self.alignment_weight is None else self.alignment_weight


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """The config of one run."""

    model: AnyNetworkConfig = field(default_factory=UViTConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        names, count = self.data.class_names, self.model.num_classes
        if names and count and len(names) != count:
            raise InputError(f"data.class_names must have model.num_classes {count} names, got {len(names)}")
        if count and self.model.context_dim:
            raise InputError(
                "a run has labels or captions, got both model.num_classes "
                f"{count} and model.context_dim {self.model.context_dim}"
            )
        if self.sample.reused and self.sample.reused[0] > self.model.reusable_pairs:
            given = f"got {self.sample.reuse}"
            if not self.model.has_skips:
                raise InputError(f"sample.reuse needs a model with long skips, {given} and one without")
            raise InputError(
                f"sample.reuse must have K of at most {self.model.reusable_pairs} pairs of blocks, {given}"
            )
        self._check_average()
        self._check_sparse()
        self._check_alignment()
        if self.train.label_dropout > 0 and not self._has_empty_condition:
            raise InputError(f"train.label_dropout {self.train.label_dropout} needs model.null_class, got False")

    @property
    def _has_empty_condition(self) -> bool:
        """Whether a condition means "none": the null class, or the context of an empty caption."""
        return self.model.null_class or bool(self.model.context_dim)

    def check_guidance(self) -> None:
        """Checks that guidance has an empty condition to lead away from, where it has no other network for that.

        Raises:
            InputError: it has none.
        """
        if self.sample.guidance != 1 and not self._has_empty_condition:
            raise InputError(f"sample.guidance {self.sample.guidance} needs model.null_class, got False")

    def _check_average(self) -> None:
        """Checks that network, objective and solver are of one kind, and that there is one guidance."""
        model, process, sample = self.model, self.process, self.sample
        average = process.objective == "average"
        if model.takes_interval != average:
            raise InputError(
                f"model.takes_interval must be {average} with process.objective {process.objective!r}, "
                f"got {model.takes_interval}"
            )
        check_solver(process, sample.sampler)
        if sample.sampler == "average" and sample.reused:
            raise InputError(f"sample.reuse must be 'none' with sample.sampler 'average', got {sample.reuse!r}")
        if model.takes_guidance:
            if not average:
                raise InputError("model.takes_guidance needs process.objective 'average', got 'instant'")
            if not self._has_empty_condition:
                raise InputError("model.takes_guidance needs model.null_class or a context, got neither")
            if not 1 <= sample.guidance <= process.guidance_max:
                most = f"process.guidance_max {process.guidance_max:g}"
                raise InputError(f"sample.guidance must be 1 to {most}, got {sample.guidance:g}")
            low, high = sample.guidance_interval
            if not low <= GUIDANCE_MIDDLE <= high:
                around = f"around {GUIDANCE_MIDDLE:g} for a network that takes guidance"
                raise InputError(f"sample.guidance_interval must be {around}, got {low:g} to {high:g}")

    def _check_sparse(self) -> None:
        """Checks that blocks which see a part of the patches see some, and that there are such blocks."""
        model, keep = self.model, self.train.token_keep
        if keep == 1:
            return
        if not model.sparse_pairs:
            raise InputError(f"train.token_keep {keep:g} needs a U-ViT with model.outer_pairs above 0, got 0")
        rows, columns = model.grid_shape
        if self.train.token_choice == "structured":
            if rows % 2 or columns % 2 or keep * 4 != round(keep * 4):
                needs = "needs a grid of 2x2s and a train.token_keep of 0.25, 0.5 or 0.75"
                raise InputError(f"train.token_choice 'structured' {needs}, got {rows}x{columns} patches and {keep:g}")
        elif not round(keep * rows * columns):
            raise InputError(f"train.token_keep must leave one of {rows * columns} patches, got {keep:g}")

    def _check_alignment(self) -> None:
        """Checks that the network has the tokens that an alignment compares, and an encoder the pixels that it sees."""
        kind, autoencoder = self.train.alignment, self.data.autoencoder
        if kind == "layersync" and self.model.num_extra_tokens is None:
            raise InputError(
                f"train.alignment 'layersync' needs blocks that all give tokens of one size, got a {self.model.title}: "
                "use 'dispersive' or 'repa'"
            )
        if kind in TO_AN_ENCODER and autoencoder is not None:
            raise InputError(f"train.alignment {kind!r} needs a model of pixels, got data.autoencoder {autoencoder!r}")
        if kind == "irepa" and self.train.token_keep < 1:
            raise InputError(
                f"train.alignment 'irepa' needs train.token_keep 1, got {self.train.token_keep:g}: use 'repa'"
            )

    def flattened(self) -> dict[str, str]:
        """Returns every value under `section.field`, as trackers take them."""
        sections = dataclasses.asdict(self).items()
        return {f"{section}.{field}": str(value) for section, fields in sections for field, value in fields.items()}
