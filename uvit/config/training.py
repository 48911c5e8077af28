"""The config of training: the optimizer, the loop, and what is added to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from uvit.common.errors import InputError
from uvit.config.network import Precision
from uvit.config.section import Section

Compile = Literal["no", "blocks", "model", "graphs"]
Alignment = Literal["none", "layersync", "dispersive", "repa", "irepa"]
TIMM = "timm:"
"""What the name of a network of timm begins with."""
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
MIN_WIDTH, MAX_WIDTH = 0.001, 0.288
"""Relative widths of averages; that of all updates alike is 1/√12 = 0.2887."""
WIDTHS = f"different widths of {MIN_WIDTH} to {MAX_WIDTH}"
"""What `are_widths` tells, for an error."""

# Limits that are checked before memory is allocated; each is far beyond what anyone has trained.
MAX_THREADS = 1_024
MAX_BATCH = 10**7


def are_widths(values: Sequence[float]) -> bool:
    """Tells whether all are different relative widths of averages."""
    return all(MIN_WIDTH <= width <= MAX_WIDTH for width in values) and len({*values}) == len(values)


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
        self._require("average_widths", are_widths(self.average_widths), WIDTHS)
        self._require("average_every", self.average_every is None or self.average_every >= 1, "None or at least 1")
        if not self.average_widths:
            self._require("average_every", self.average_every is None, "None without average_widths")
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
            is_timm = (self.alignment_encoder or "").startswith(TIMM) and self.alignment_encoder != TIMM
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
