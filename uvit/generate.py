"""A trained run to images: what train.py's grids, sample.py and evaluate.py share."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from uvit.attention import resolve_backend
from uvit.backbone import UViT
from uvit.cli import process_state
from uvit.config import (
    CONFIG_FILE,
    MAX_BATCH,
    Backend,
    Compile,
    Config,
    Precision,
    Section,
    SectionT,
    SolverName,
    Spacing,
    UViTConfig,
    from_dict,
    load_config,
    read_json,
)
from uvit.errors import InputError, did_you_mean
from uvit.grid import image_grid
from uvit.images import to_uint8
from uvit.latents import EMPTY_CAPTION, NO_ENCODERS, Encoders, load_encoders
from uvit.precision import check_compile, compile_model, resolve_precision, tf32
from uvit.reuse import reuse_deep_features
from uvit.samplers import ImageNoise, sample, sampling_times
from uvit.weights import find_pretrained

CPU_TOKEN_BYTES = 2**20  # benchmarks/sample.py: more at a time is slower
MIN_FITTING_BATCH = 4  # fewer read (and in bf16 round) the weights of a large model too often
MAX_FITTING_BATCH = 512
ALIVE_WIDTHS = 16

Condition = int | str | None
"""What an image is drawn for: a label, a prompt, or nothing."""

UNLABELLED_COLUMNS = 8
"""Images of a row where rows stand for no condition."""


@dataclass(frozen=True, kw_only=True)
class DrawArguments(Section):
    """What every command that draws images from a run takes."""

    checkpoint: str
    """Run folder, such as runs/digits, or hub name of one (`user/model`, or `user/model@REVISION`); with --config also
    weights alone."""
    config: str | None = None
    """Config of weights that do not come with one, such as configs/imagenet256_uvit_huge.py for a published file."""
    guidance: float | None = None
    """w in w * cond + (1 - w) * uncond, 1 is none."""
    paper_scale: float | None = None
    """The paper's s in cond + s * (cond - uncond), instead of --guidance: w = 1 + s."""
    guidance_interval: tuple[float, float] | None = None
    """Times in [0, 1] between which guidance acts; the run's own where not given, as all below."""
    steps: int | None = None
    """Steps of the sampler."""
    sampler: SolverName | None = None
    """Solver."""
    spacing: Literal["auto", Spacing] | None = None
    """Grid of times."""
    t_end: float | None = None
    """Last time of the grid."""
    reuse: str | None = None
    """K:EVERY reuses deep features, which is faster; none does not."""
    seed: int = 0
    """The same seed draws the same images at any batch size."""
    batch_size: int | None = None
    """Images at a time; where not given, what fits a processor's cache, or a GPU's memory."""
    mixed_precision: Precision | None = None
    """Precision of matrix products, which changes images a little; the run's own where not given."""
    compile: Compile = "no"
    """Compile the network, for many images: the first take long."""
    attention: Backend = "auto"
    """Attention backend."""
    text_encoder: str | None = None
    """Folder or hub name of a text model's CLIP; the run's own where not given."""
    autoencoder: str | None = None
    """Folder or hub name of a latent model's AutoencoderKL; the run's own where not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("seed", self.seed >= 0, "at least 0")
        if self.batch_size is not None:
            self._require("batch_size", self.batch_size >= 1, "at least 1")
            self._require_at_most(batch_size=MAX_BATCH)
        if self.guidance is not None and self.paper_scale is not None:
            raise InputError(f"give --guidance or --paper_scale, got both: {self.guidance:g} and {self.paper_scale:g}")

    def load(self, default_guidance: float | None = None) -> tuple[Config, UViT, Encoders]:
        """Loads the run, its config with these settings, ready to draw from.

        Args:
            default_guidance: w where none is given; None is the run's own.

        Raises:
            InputError: as load_run and load_encoders, or settings that do not fit the run.
        """
        device = process_state().device
        given = self.guidance if self.paper_scale is None else 1 + self.paper_scale
        config, model = load_run(self.checkpoint, self.attention, device, self.config)
        sampling = _replace_given(
            config.sample,
            guidance=default_guidance if given is None else given,
            guidance_interval=self.guidance_interval,
            num_steps=self.steps,
            sampler=self.sampler,
            spacing=self.spacing,
            t_end=self.t_end,
            reuse=self.reuse,
            mixed_precision=self.mixed_precision,
        )
        resolve_precision(sampling.mixed_precision, device.type, config.model.embed_dim)
        check_compile(self.compile, device.type)
        # A network that is called in parts is compiled in parts.
        in_parts = self.compile != "no" and sampling.reused is not None
        compile_model(model, model.blocks, "blocks" if in_parts else self.compile)
        data = _replace_given(config.data, text_encoder=self.text_encoder, autoencoder=self.autoencoder)
        config = dataclasses.replace(config, sample=sampling, data=data)
        sampling_times(config.process, config.sample)  # a grid that cannot be made is found before the long work
        set_threads(config)
        return config, model, load_encoders(config.data, config.model).to(device)


def _replace_given(section: SectionT, **values: Any) -> SectionT:
    """Replaces the fields whose value is not None."""
    return dataclasses.replace(section, **{name: value for name, value in values.items() if value is not None})


def load_run(
    checkpoint: str, attention: Backend, device: torch.device, config_file: str | None = None
) -> tuple[Config, UViT]:
    """Loads a run's config and its averaged weights, ready to sample.

    Args:
        checkpoint: run folder, or hub name of one; with `config_file` also a backbone alone or published weights.
        attention: backend to run with.
        device: where to.
        config_file: the run's config, for weights that do not come with one.

    Raises:
        InputError: no run there, files that are not what they should be, or a backend that cannot run there.
    """
    path = find_pretrained(checkpoint)
    if config_file is not None:
        config = load_config(config_file)
    else:
        raw = {} if path.is_file() else read_json(path / CONFIG_FILE)
        if isinstance(raw, dict) and "process" not in raw:
            raise InputError(f"{checkpoint} holds weights alone, expected a run: give the run's config with --config")
        config = from_dict(Config, raw)
    resolve_backend(attention, device.type, config.model.embed_dim // config.model.num_heads)
    known = dataclasses.asdict(config.model) if path.is_file() else {}  # a published file's tensors do not tell all
    model = UViT.from_pretrained(path, **{**known, "attention": attention})
    if dataclasses.replace(model.config, attention=config.model.attention) != config.model:
        different = [
            f"{name} {value!r} and {getattr(config.model, name)!r}"
            for name, value in dataclasses.asdict(model.config).items()
            if name != "attention" and value != getattr(config.model, name)
        ]
        raise InputError(f"{checkpoint} is not the model of {config_file}: {', '.join(different)}")
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise InputError(f"weights of {checkpoint} must be finite, got NaN or infinity: its training went wrong")
    return config, model.to(device)


def class_names(config: Config) -> tuple[str, ...]:
    """Returns the names of a run's labels: those of its data, or their numbers."""
    return config.data.class_names or tuple(map(str, range(config.model.num_classes)))


def find_classes(given: Sequence[int | str], config: Config) -> list[int]:
    """Returns the labels that a user's numbers or names mean; text is a name first, a number is never one.

    Raises:
        InputError: a label that the model does not have.
    """
    names, count = class_names(config), config.model.num_classes
    labels = []
    for each in given:
        text = str(each)
        if each in names:
            labels.append(names.index(text))
        elif text.isdecimal() and int(text) < count:
            labels.append(int(text))
        else:
            raise InputError(f"class must be 0 to {count - 1} or a class name, got {text!r}{did_you_mean(text, names)}")
    return labels


def find_conditions(config: Config, classes: Sequence[int | str] = (), prompts: Sequence[str] = ()) -> list[Condition]:
    """Returns what to draw: the classes or prompts given, or else all classes, the run's own prompts, or [None].

    Raises:
        InputError: classes for a model without labels, prompts for one without context, or no prompt at all.
    """
    model = config.model
    if classes and not model.num_classes:
        raise InputError(f"a model with num_classes {model.num_classes} takes no class, got {classes[0]!r}")
    if prompts and not model.context_dim:
        raise InputError(f"a model with context_dim {model.context_dim} takes no prompt, got {prompts[0]!r}")
    if model.num_classes:
        return [*find_classes(classes, config)] or [*range(model.num_classes)]
    if model.context_dim:
        if not prompts and not config.sample.prompts:
            raise InputError(f"a model with context_dim {model.context_dim} draws from prompts, got none")
        return [*prompts] or [*config.sample.prompts]
    return [None]


def condition_names(conditions: Sequence[Condition], config: Config) -> list[str]:
    """Names conditions for people; without labels and prompts there is nothing to name."""
    names = class_names(config)
    return [names[each] if isinstance(each, int) else each for each in conditions if each is not None]


def batch_conditions(
    conditions: Sequence[Any],
    config: UViTConfig,
    encode: Callable[[Sequence[str]], Tensor] | None,
    device: torch.device,
    negative: str = EMPTY_CAPTION,
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None]:
    """Returns the network's arguments for conditions, and for what guidance leads away from, where the model knows it.

    Args:
        conditions: B labels, B prompts, or None B times, as the model takes.
        config: of the model.
        encode: text encoder of a model that takes a context: B texts to (B, num_context_tokens, context_dim).
        device: where labels go.
        negative: text that guidance leads away from, for a model that takes a context; labels have the null class.

    Raises:
        InputError: no text encoder where the model needs one.
    """
    if config.num_classes:
        y = torch.tensor(conditions, device=device)
        null = None if config.null_label is None else {"y": torch.full_like(y, config.null_label)}
        return {"y": y}, null
    if config.context_dim:
        if encode is None:
            raise InputError(f"a model with context_dim {config.context_dim} needs a text encoder, got none")
        context = encode(conditions)
        return {"context": context}, {"context": encode([negative]).expand_as(context)}
    return {}, None


def fitting_batch_size(config: Config, device: torch.device) -> int:
    """Returns how many images to draw at a time: a processor's cache holds their tokens, or a GPU its activations."""
    model = config.model
    passes = 1 if config.sample.guidance == 1 else 2
    tokens = passes * model.num_tokens * model.embed_dim * torch.float32.itemsize  # bytes of one image
    if device.type != "cuda":
        return max(MIN_FITTING_BATCH, CPU_TOKEN_BYTES // tokens)
    free, _ = torch.cuda.mem_get_info(device)
    alive = model.depth // 2 + ALIVE_WIDTHS  # a long skip of each shallow block, and what a block works on
    return max(1, min(MAX_FITTING_BATCH, free // 2 // (tokens * alive)))


def decode_images(x: Tensor, encoders: Encoders) -> Tensor:
    """Makes images of what a model draws, pixels in [-1, 1] or latents: (B, C, H, W) uint8."""
    return to_uint8(x if encoders.image is None else encoders.image.decode(x))


def generate_batches(
    model: UViT,
    config: Config,
    conditions: Sequence[Condition],
    seed: int,
    batch_size: int | None = None,
    encoders: Encoders = NO_ENCODERS,
    on_evaluation: Callable[[Tensor], object] | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Tensor]:
    """Draws one image for each condition, a batch at a time.

    The k-th image of a condition depends on (seed, condition, k) alone: not on the batch size, the device, the other
    conditions or the number of processes.

    Args:
        model: the network, in eval mode.
        config: what it was trained on, and the solver, steps and guidance to draw with.
        conditions: a label, a prompt or None for each image, as the model takes.
        seed: seed of the set.
        batch_size: images at a time; None is what fits.
        encoders: the run's text encoder, where the model takes a context, and its autoencoder, where it draws latents.
        on_evaluation: called with a batch's x_t after each evaluation of the network, for a progress bar;
            `decode_images` makes images of it.
        share: (process, processes); each draws every so manyth image.

    Yields:
        (B, C, H, W) uint8 on the device of the model.
    """
    device = next(model.parameters()).device
    shape = (config.model.in_chans, *config.model.image_shape)
    drawn: dict[Condition, int] = {}
    items = []
    for condition in conditions:
        number = zlib.crc32(condition.encode()) if isinstance(condition, str) else condition or 0
        items.append(((seed, number, drawn.setdefault(condition, 0)), condition))
        drawn[condition] += 1

    mine = items[share[0] :: share[1]]
    batch_size = batch_size or fitting_batch_size(config, device)
    precision = resolve_precision(config.sample.mixed_precision, device.type, config.model.embed_dim)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    for start in range(0, len(mine), batch_size):
        keys, part = zip(*mine[start : start + batch_size])
        cond, uncond = batch_conditions(part, config.model, encoders.text, device)
        reused = config.sample.reused
        network = model if reused is None else reuse_deep_features(model.forward_reusing, *reused)
        noise = ImageNoise(keys, shape, device)
        with tf32(), torch.autocast(device.type, dtype, enabled=precision != "no"):
            x = sample(network, config.process, config.sample, noise, cond, uncond, on_evaluation)
        yield decode_images(x, encoders)


def generate(*arguments: Any, **named: Any) -> Tensor:
    """Draws images as generate_batches does, and returns them all: (N, C, H, W) uint8 on the CPU."""
    return torch.cat([images.cpu() for images in generate_batches(*arguments, **named)])


def sample_grid(images: Tensor, rows: Sequence[Condition], columns: int, config: Config) -> Image.Image:
    """Lays images out as one picture: a named row for each condition, or plain rows where there is none."""
    return image_grid(images, UNLABELLED_COLUMNS if rows == [None] else columns, condition_names(rows, config))


def set_threads(config: Config) -> None:
    """Gives PyTorch the CPU threads that a run asks for."""
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)


def describe_guidance(scale: float) -> str:
    """Names a guidance scale in both conventions, ours and the paper's."""
    return f"guidance w = {scale:g} (the paper's s = {scale - 1:g})"
