"""A trained run to images: what train.py's grids, sample.py and evaluate.py share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import Tensor

from uvit.attention import resolve_backend
from uvit.backbone import UViT
from uvit.config import CONFIG_FILE, Backend, Config, Section, SolverName, Spacing, from_dict, load_config, read_json
from uvit.data import to_uint8
from uvit.errors import InputError, did_you_mean
from uvit.samplers import ImageNoise, sample
from uvit.weights import find_pretrained


@dataclass(frozen=True, kw_only=True)
class DrawArguments(Section):
    """What every command that draws images from a run takes."""

    checkpoint: str
    """Run folder, such as runs/digits, or hub name of one; with --config also weights alone."""
    config: str | None = None
    """Config of weights that do not come with one, such as configs/imagenet256_uvit_huge.py for a published file."""
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
    seed: int = 0
    """The same seed draws the same images at any batch size."""
    batch_size: int = 200
    """Images at a time."""
    attention: Backend = "auto"
    """Attention backend."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("seed", self.seed >= 0, "at least 0")
        self._require("batch_size", self.batch_size >= 1, "at least 1")

    def load(self, guidance: float | None) -> tuple[Config, UViT]:
        """Loads the run, its config with these settings and this guidance, ready to draw from.

        Raises:
            InputError: as load_run, or settings that do not fit the run.
        """
        config, model = load_run(self.checkpoint, self.attention, PartialState().default_device, self.config)
        given: dict[str, Any] = {
            "guidance": guidance,
            "guidance_interval": self.guidance_interval,
            "num_steps": self.steps,
            "sampler": self.sampler,
            "spacing": self.spacing,
            "t_end": self.t_end,
        }
        given = {name: value for name, value in given.items() if value is not None}
        set_threads(config)
        return dataclasses.replace(config, sample=dataclasses.replace(config.sample, **given)), model


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
    return config, model.to(device)


def class_names(config: Config) -> tuple[str, ...]:
    """Returns the names of a run's labels: those of its data, or their numbers."""
    return config.data.class_names or tuple(map(str, range(config.model.num_classes)))


def find_classes(given: Sequence[str], config: Config) -> list[int]:
    """Returns the labels that a user's numbers or names mean; none given is all of them.

    Raises:
        InputError: a label that the model does not have.
    """
    names, count = class_names(config), config.model.num_classes
    if given and not count:
        raise InputError(f"the model has no classes, got class {given[0]}")
    labels = []
    for text in given:
        if text in names:
            labels.append(names.index(text))
        elif text.isdecimal() and int(text) < count:
            labels.append(int(text))
        else:
            raise InputError(f"class must be 0 to {count - 1} or a class name, got {text!r}{did_you_mean(text, names)}")
    return labels or list(range(count))


def generate(
    model: UViT,
    config: Config,
    labels: Sequence[int],
    seed: int,
    batch_size: int,
    on_evaluation: Callable[[int], object] | None = None,
) -> Tensor:
    """Draws one image for each label.

    The k-th image of a label depends on (seed, label, k) alone: not on the batch size, the device or the other labels.

    Args:
        model: the network, in eval mode.
        config: what it was trained on, and the solver, steps and guidance to draw with.
        labels: a label for each image; for a model without labels, any number for each.
        seed: seed of the set.
        batch_size: images at a time.
        on_evaluation: called with the number of images after each evaluation of the network, for a progress bar.

    Returns:
        (N, C, H, W) uint8 on the CPU.
    """
    device = next(model.parameters()).device
    shape = (config.model.in_chans, *config.model.image_shape)
    drawn: dict[int, int] = {}
    keys = []
    for label in labels:
        keys.append((seed, label, drawn.setdefault(label, 0)))
        drawn[label] += 1

    images = [torch.empty(0, *shape, dtype=torch.uint8)]
    for start in range(0, len(keys), batch_size):
        part = keys[start : start + batch_size]
        cond, uncond = {}, None
        if config.model.num_classes:
            y = torch.tensor([label for _, label, _ in part], device=device)
            cond = {"y": y}
            if config.model.null_label is not None:
                uncond = {"y": torch.full_like(y, config.model.null_label)}
        tick = None if on_evaluation is None else functools.partial(on_evaluation, len(part))
        noise = ImageNoise(part, shape, device)
        images.append(to_uint8(sample(model, config.process, config.sample, noise, cond, uncond, tick)).cpu())
    return torch.cat(images)


def set_threads(config: Config) -> None:
    """Gives PyTorch the CPU threads that a run asks for."""
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)


def describe_guidance(scale: float) -> str:
    """Names a guidance scale in both conventions, ours and the paper's."""
    return f"guidance w = {scale:g} (the paper's s = {scale - 1:g})"
