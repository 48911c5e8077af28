"""Everything that describes a run, as frozen dataclasses: each default stands here once.

A config file holds one value, `config = Config(...)`; the command line overrides single fields of it; `config.json` in
a run folder is the same value written out. Every section checks its own types and values when it is made.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import runpy
import sys
import types
from collections import Counter
from dataclasses import dataclass, field
from glob import glob
from os.path import isfile
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from uvit.errors import UNPRINTABLE, InputError, did_you_mean, shown

ScheduleName = Literal["vp", "ldm", "cosine", "flow"]
Kind = Literal["noise", "data", "v", "flow"]
Backend = Literal["auto", "xformers", "sdpa", "math"]
SolverName = Literal["ddim", "heun", "dpmpp_2m", "unipc", "dpmpp_fast", "dpm_solver_fast", "euler", "euler_maruyama"]
Spacing = Literal["uniform", "log_snr"]
Precision = Literal["auto", "no", "bf16", "fp16"]
Compile = Literal["no", "blocks", "model", "graphs"]

CONFIG_FILE = "config.json"
MAX_JSON_BYTES = 2**26
# What a config may ask for, checked before memory is taken; each is far beyond what anyone has trained or drawn.
INT_LIMIT = 2**63
MAX_PARAMETERS = 10**11
MAX_DEPTH = 1_000
MAX_TOKENS = 2**19
MAX_SIDE = 2**14
MAX_WORKERS = MAX_THREADS = 1_024
MAX_BATCH = MAX_IMAGES = 10**7
MAX_SAMPLER_STEPS = 100_000

NO_TEXT = re.compile(r"[\x00\ud800-\udfff]")
"""What no file system, tokenizer or font takes."""


def _fits(value: Any, hint: Any) -> bool:
    """Tells whether `value` is of the annotated type; an int is a float, a bool is not a number."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in args and isinstance(value, str)
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if args[-1] is Ellipsis:
            return all(_fits(item, args[0]) for item in value)
        return len(value) == len(args) and all(map(_fits, value, args))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _choices(hint: Any) -> list[str]:
    """Lists the words that a type takes."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [word for arg in get_args(hint) for word in _choices(arg)]


def _expected(hint: Any) -> str:
    """Names a type for a person: `one of 'a', 'b'` or `int`."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    return getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint).replace("typing.", "")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a config whose fields are checked against their annotations when it is made.

    Raises:
        InputError: a field of the wrong type, or outside its choices.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, hint):
                near = did_you_mean(value, _choices(hint)) if isinstance(value, str) else ""
                raise InputError(f"{name} must be {_expected(hint)}, got {shown(value)}{near}")
            # Names are printed and may become paths; captions and names of classes come from data as they are.
            self._require(name, not isinstance(value, str) or not UNPRINTABLE.search(value), "plain text in one line")
            for item in value if isinstance(value, tuple) else (value,):
                self._require(name, not isinstance(item, str) or not NO_TEXT.search(item), "text in whole characters")
                self._require(name, not isinstance(item, int) or abs(item) < INT_LIMIT, f"below {INT_LIMIT} in size")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise InputError(f"{name} must be {expected}, got {shown(getattr(self, name))}")

    def _require_at_most(self, **limits: int) -> None:
        for name, limit in limits.items():
            self._require(name, getattr(self, name) <= limit, f"at most {limit:,}")


@dataclass(frozen=True, kw_only=True)
class UViTConfig(Section):
    """The backbone. Defaults are the paper's choices, at its size S/2 for 32x32 images (arXiv 2209.12152, table 1)."""

    img_size: int | tuple[int, int] = 32
    """Side of the image (or latent) in pixels, or (height, width)."""
    patch_size: int = 2
    """Side of a patch in pixels."""
    in_chans: int = 3
    """Channels of the image (or latent)."""
    embed_dim: int = 512
    """Width D of a token."""
    depth: int = 12
    """Even: depth / 2 shallow blocks, one in the middle, depth / 2 deep blocks."""
    num_heads: int = 8
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Width of the MLP's hidden layer over embed_dim."""
    qkv_bias: bool = False
    """Bias of the query, key and value projection."""
    qk_norm: bool = False
    """RMS norm of queries and keys before attention; steadier at high learning rates."""
    mlp_time_embed: bool = False
    """An MLP on the sinusoidal time embedding."""
    num_classes: int = 0
    """Real labels; 0 is a model without labels."""
    null_class: bool = False
    """One more label, at index num_classes, for "no label": what guidance needs."""
    context_dim: int = 0
    """Width of the context tokens (such as CLIP's 768); 0 is a model without context."""
    num_context_tokens: int = 0
    """Length of the context (such as CLIP's 77)."""
    skip: Literal["concat", "add", "linear_add", "add_linear", "none"] = "concat"
    """How a long skip is merged: Linear(Concat(m, s)), m + s, m + Linear(s), Linear(m + s), or not at all."""
    time_conditioning: Literal["token", "adaln"] = "token"
    """Time as a token, or as scale and shift of every block's layer norms."""
    conv: Literal["image", "tokens", "none"] = "image"
    """The last 3x3 convolution: on the image, on the grid of tokens before the linear projection, or none."""
    patch_embed: Literal["linear", "conv"] = "linear"
    """One linear projection of each patch, or a stack of 3x3 convolutions and a 1x1."""
    pos_embed: Literal["learned", "sincos2d"] = "learned"
    """Learned for every token, or fixed two-dimensional sinusoids for the patches."""
    gradient_checkpointing: bool = False
    """Recompute every block in the backward pass: less memory, about a third more time."""
    attention: Backend = "auto"
    """Attention backend; `auto` is xformers on CUDA where it can run, otherwise PyTorch's SDPA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch_size", "in_chans", "embed_dim", "num_heads"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("num_classes", "context_dim", "num_context_tokens"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("mlp_ratio", self.embed_dim * self.mlp_ratio >= 1, "at least 1 / embed_dim")
        self._require("depth", self.depth >= 2 and self.depth % 2 == 0, "even and at least 2")
        for side in self.image_shape:
            if side < 1 or side % self.patch_size:
                raise InputError(f"img_size must be divisible by patch_size {self.patch_size}, got {self.img_size}")
        if self.embed_dim % self.num_heads:
            raise InputError(f"embed_dim {self.embed_dim} must be divisible by num_heads {self.num_heads}")
        self._require("embed_dim", self.embed_dim % 2 == 0, "even (the time embedding is half cosines, half sines)")
        self._require("null_class", not self.null_class or self.num_classes > 0, "False where num_classes is 0")
        if (self.context_dim > 0) != (self.num_context_tokens > 0):
            raise InputError(
                "context_dim and num_context_tokens must both be 0 or both be above 0, "
                f"got {self.context_dim} and {self.num_context_tokens}"
            )
        if self.pos_embed == "sincos2d":
            self._require("embed_dim", self.embed_dim % 4 == 0, "divisible by 4 with pos_embed 'sincos2d'")
        if self.patch_embed == "conv":
            self._require(
                "patch_size", self.patch_size & (self.patch_size - 1) == 0, "a power of 2 with patch_embed 'conv'"
            )
            if self.embed_dim % self.patch_size:
                sizes = f"embed_dim {self.embed_dim} must be divisible by patch_size {self.patch_size}"
                raise InputError(f"{sizes} with patch_embed 'conv'")
        self._require_at_most(depth=MAX_DEPTH)
        if self.num_tokens > MAX_TOKENS:
            raise InputError(
                f"img_size, patch_size and num_context_tokens must give at most {MAX_TOKENS:,} tokens, "
                f"got {self.num_tokens:,}"
            )
        if self.most_parameters > MAX_PARAMETERS:
            raise InputError(
                f"the sizes of a model must give at most {MAX_PARAMETERS:,} parameters, "
                f"got up to {self.most_parameters:.2g}"
            )

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_extra_tokens(self) -> int:
        """Tokens before the patches: label, time and context."""
        return int(self.num_classes > 0) + int(self.time_conditioning == "token") + self.num_context_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens in all."""
        return self.num_extra_tokens + math.prod(self.grid_shape)

    @property
    def most_parameters(self) -> float:
        """A bound of the number of parameters, at any choice of options."""
        dim, pixels = self.embed_dim, self.patch_size**2 * self.in_chans
        per_block = dim * (10 * dim + 2 * dim * self.mlp_ratio)  # attention, adaptive norms, skip; MLP
        per_token = pixels * 2 + self.num_tokens + self.num_classes + self.context_dim
        return (self.depth + 1) * per_block + dim * per_token + 30 * dim**2 + 9 * self.in_chans**2

    @property
    def null_label(self) -> int | None:
        """The label that means "no label", or None where the model has none."""
        return self.num_classes if self.null_class else None


@dataclass(frozen=True, kw_only=True)
class ProcessConfig(Section):
    """The diffusion process, and how a loss is drawn from it."""

    schedule: ScheduleName = "flow"
    """Signal and noise over time: the paper's pixels (vp), the paper's latents (ldm), cosine, or rectified flow."""
    prediction: Kind = "flow"
    """What the network's output is."""
    loss_space: Kind | None = None
    """Space in which the squared error is taken; None is the prediction's own."""
    time_distribution: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of training times."""
    logit_mean: float = 0.0
    """Mean of logit(t) for `logit_normal`."""
    logit_std: float = 1.0
    """Standard deviation of logit(t) for `logit_normal`."""
    time_shift: float = 1.0
    """s in t -> s t / (1 + (s - 1) t): above 1 moves training, and sampling on a grid uniform in t, towards noise."""
    weighting: Literal["none", "min_snr"] = "none"
    """Weight of a training time: none, or min(SNR, gamma) on the error of x_0."""
    min_snr_gamma: float = 5.0
    """gamma of `min_snr`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("logit_std", "time_shift", "min_snr_gamma"):
            self._require(name, getattr(self, name) > 0, "above 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The images."""

    name: str = "digits"
    """`digits` or `photos` (embedded), a folder on disk (images, in a folder a class where they have labels, or a saved
    data set), or a hub name."""
    train_split: str = "train"
    """Split to train on; the embedded data sets have their own."""
    test_split: str = "test"
    """Split held out for evaluation."""
    flip: bool = False
    """Mirror every image with probability 1/2."""
    crop: Literal["center", "random"] = "center"
    """What images are cut to the model's shape: their centre, or any part of at least 0.8 of their shorter side."""
    on_error: Literal["stop", "skip"] = "stop"
    """At an image that cannot be read: stop, or take another one and list it in the run's skipped.txt."""
    num_workers: int = 0
    """Loader processes; 0 loads in the training process."""
    class_names: tuple[str, ...] = ()
    """Names of the labels; read from the data where empty."""
    caption_column: str | None = None
    """Column of captions for a text model, of texts or lists of texts; None is the only one, or that named `text`,
    `caption`, `captions` or `prompt`."""
    text_encoder: str = "openai/clip-vit-large-patch14"
    """Frozen CLIP text encoder between captions and the context of a model that takes one: a folder or a hub name."""
    autoencoder: str | None = None
    """Frozen AutoencoderKL between images and the latents that the model sees: a folder or a hub name, which may go
    on to a folder inside (`user/model/vae`); None is a model of pixels."""
    scale_factor: float = 0.18215
    """The model sees the autoencoder's latents times this."""

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
    """With Muon, the learning rate of its AdamW part over lr."""
    warmup_steps: int = 0
    """Linear warm-up from 0; the first update has learning rate 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up; `linear` and `cosine` reach 0 at the last step."""
    grad_clip: float = 0.0
    """Largest norm of the gradient; 0 is no clipping."""

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
    """How images are drawn: for the grids of training, and the default of sample.py and evaluate.py."""

    sampler: SolverName = "dpmpp_2m"
    """Solver."""
    num_steps: int = 20
    """Steps of the solver, each one evaluation of the network; `heun` alone takes two."""
    spacing: Literal["auto", Spacing] = "auto"
    """Grid of times: uniform in t, or in log-SNR; `auto` is the solver's own."""
    t_end: float = 0.0
    """Last time; solvers that end in log-SNR, which is infinite at 0, take 0.001 for 0."""
    guidance: float = 1.0
    """w in w * cond + (1 - w) * uncond; 1 is none."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times between which guidance acts; outside, only cond is computed."""
    mixed_precision: Precision = "no"
    """Precision of matrix products; `auto` is bf16 where the device multiplies it faster. Images change a little."""
    reuse: str = "none"
    """`K:EVERY` computes the blocks inside the K outermost in/out pairs at every so manyth evaluation alone, and
    extrapolates what comes out of them between: faster, with other images than `none`."""
    prompts: tuple[str, ...] = ()
    """Captions to draw from a text model where none are given; the data's first where empty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("num_steps", self.num_steps >= 1, "at least 1")
        self._require_at_most(num_steps=MAX_SAMPLER_STEPS)
        self._require("t_end", 0 <= self.t_end < 0.5, "in [0, 0.5)")
        low, high = self.guidance_interval
        self._require("guidance_interval", 0 <= low <= high <= 1, "two times with 0 <= low <= high <= 1")
        fits = self.reuse == "none" or re.fullmatch(r"[1-9]\d{0,3}:([2-9]|[1-9]\d{1,3})", self.reuse)
        self._require("reuse", bool(fits), "'none' or K:EVERY with K at least 1 and EVERY at least 2, such as '1:3'")

    @property
    def reused(self) -> tuple[int, int] | None:
        """(K, EVERY) of `reuse`; None for none."""
        outer, _, every = self.reuse.partition(":")
        return (int(outer), int(every)) if every else None


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """The loop."""

    run_dir: str | None = None
    """Folder of the run; None is runs/NAME for configs/NAME.py."""
    num_steps: int = 100_000
    """Optimizer steps."""
    batch_size: int = 128
    """Images of one optimizer step, over all processes and accumulated parts."""
    accumulation_steps: int = 1
    """Parts that a batch is split into, to fit in memory."""
    num_threads: int = 0
    """CPU threads; 0 is PyTorch's choice. A tiny network is as fast on one, and other programs do not slow it."""
    mixed_precision: Precision = "auto"
    """Precision of matrix products; weights, loss and EMA stay in fp32. `auto` is bf16 where the device multiplies it
    faster: on CUDA, and for models of some width on a CPU with instructions for it."""
    compile: Compile = "no"
    """Compile the model: block by block (the shortest start), whole, or whole in CUDA graphs."""
    shard: bool = False
    """Share weights, gradients, moments and average out between the processes (FSDP2), to fit a model in their memory;
    what is trained and saved is the same."""
    label_dropout: float = 0.0
    """Share of labels (or captions) replaced by the null class (or the empty caption), for guidance."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights; the average starts as a copy."""
    seed: int = 0
    """Seed of weights, order of data, times, noise and dropout."""
    log_every: int = 50
    """Steps between log lines."""
    sample_every: int = 5_000
    """Steps between sample grids; 0 is never."""
    save_every: int = 5_000
    """Steps between checkpoints; one is always written at the end."""
    keep: int = 2
    """Newest checkpoints kept for resuming."""
    resume_anyway: bool = False
    """Go on with a run whose config differs in what makes it another run, with this config's values; the weights and
    the optimizer's state must still fit."""
    max_bad_steps: int = 20
    """Steps in a row with a loss or gradient that is not finite, each left out, after which the run stops."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where metrics and grids go, besides metrics.jsonl and samples/."""

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
        self._require("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        if self.shard:
            self._require("compile", self.compile != "graphs", "another with shard True")
            self._require("mixed_precision", self.mixed_precision != "fp16", "another with shard True")
        if self.accumulation_steps > 1:  # graphs write the second part's gradients over the first's: pytorch#169545
            self._require("compile", self.compile != "graphs", "another with accumulation_steps above 1")
        if self.batch_size % self.accumulation_steps:
            raise InputError(
                f"batch_size {self.batch_size} must be divisible by accumulation_steps {self.accumulation_steps}"
            )


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """One run."""

    model: UViTConfig = field(default_factory=UViTConfig)
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
        if self.sample.reused and self.sample.reused[0] > self.model.depth // 2:
            given = f"got K {self.sample.reused[0]}"
            raise InputError(f"sample.reuse must have K of model.depth / 2 = {self.model.depth // 2} at most, {given}")
        # Guidance needs a condition that means "none": the null class, or the context of an empty caption.
        if not self.model.null_class and not self.model.context_dim:
            if self.train.label_dropout > 0:
                raise InputError(f"train.label_dropout {self.train.label_dropout} needs model.null_class, got False")
            if self.sample.guidance != 1:
                raise InputError(f"sample.guidance {self.sample.guidance} needs model.null_class, got False")


SectionT = TypeVar("SectionT", bound=Section)


def from_dict(cls: type[SectionT], raw: Any) -> SectionT:
    """Builds a section from what JSON holds: nested sections are dicts, tuples are lists.

    Raises:
        InputError: not a dict, an unknown field, one that is missing, or a value that the section refuses.
    """
    if not isinstance(raw, dict):
        raise InputError(f"{cls.__name__} must be a JSON object, got {shown(raw)}")
    hints = get_type_hints(cls)
    for each in dataclasses.fields(cls):
        if each.name not in raw and each.default is each.default_factory is dataclasses.MISSING:
            raise InputError(f"{cls.__name__} must have a field {each.name!r}, got {', '.join(raw) or 'none'}")
    values = {}
    for name, value in raw.items():
        if name not in hints:
            raise InputError(f"{cls.__name__} has no field {shown(name)}{did_you_mean(name, hints)}")
        if isinstance(hints[name], type) and issubclass(hints[name], Section):
            value = from_dict(hints[name], value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def to_json(section: Section) -> str:
    """Returns the section as JSON, every default written out."""
    return json.dumps(dataclasses.asdict(section), indent=2) + "\n"


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        InputError: no such file, a huge one, or not JSON.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if len(text) > MAX_JSON_BYTES:
        raise InputError(f"{path} must have at most {MAX_JSON_BYTES:,} bytes, got more")
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{shown(name)} is there twice")
    return made


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def load_config(path: str | Path) -> Config:
    """Loads a run's config from a Python file that defines `config`, or from a run's config.json.

    Raises:
        InputError: no such file, a file without a Config named `config`, or values that a section refuses.
    """
    path = Path(path)
    if not isfile(path):
        known = [str(path.parent / name) for name in sorted(glob("*.py", root_dir=path.parent))]
        raise InputError(f"config file not found: {path}{did_you_mean(str(path), known)}")
    if path.suffix == ".json":
        return from_dict(Config, read_json(path))
    try:
        config = runpy.run_path(str(path)).get("config")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # a user's Python file may fail in any way
        raise InputError(f"{path} cannot be read as Python: {type(error).__name__}: {error}") from None
    if not isinstance(config, Config):
        raise InputError(f"{path} must define `config = Config(...)`, got {type(config).__name__}")
    return config
