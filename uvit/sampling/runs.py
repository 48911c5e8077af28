"""Loading a trained run to draw from, and the options shared by all commands that draw."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch

from uvit.common.cli import process_state
from uvit.common.errors import InputError
from uvit.common.messages import warn
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
    check_solver,
    config_kind,
    from_dict,
    load_config,
    read_json,
)
from uvit.diffusion.process import schedule_of
from uvit.diffusion.samplers import sampling_times
from uvit.networks.attention import resolve_backend
from uvit.networks.contract import Network
from uvit.networks.encoders import Encoders, load_encoders
from uvit.networks.runtime import check_compile, compile_model, resolve_precision, set_up_process
from uvit.weights.build import load_network
from uvit.weights.pretrained import find_pretrained


@dataclass(frozen=True, kw_only=True)
class DrawArguments(Section):
    """The options of all commands that draw images from a run."""

    checkpoint: str
    """Run folder, such as runs/digits, or hub name of one (`user/model`, or `user/model@REVISION`); with --config also
    a folder or file of weights."""
    config: str | None = None
    """The run's config, for weights without one, such as configs/imagenet256_uvit_huge.py for a published file."""
    guidance: float | None = None
    """w in w * cond + (1 - w) * uncond, 1 is none."""
    guide: str | None = None
    """Run folder or hub name of a worse network, or an earlier checkpoint of this run, such as
    runs/digits/checkpoints/step_00000500: guidance leads away from it instead of the null class (autoguidance)."""
    guidance_path: bool | None = None
    """The unconditional pass of guidance leaves out the blocks inside model.outer_pairs: less time."""
    paper_scale: float | None = None
    """The paper's s in cond + s * (cond - uncond), instead of --guidance: w = 1 + s."""
    guidance_interval: tuple[float, float] | None = None
    """Times in [0, 1] between which guidance is applied; by default the run's, as for the options below."""
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
    """Images at a time; by default as many as fit a CPU's cache, or a GPU's memory."""
    mixed_precision: Precision | None = None
    """Precision of matrix products, which changes images a little; by default the run's."""
    compile: Compile = "no"
    """Compile the network, for many images: the first ones are slow."""
    attention: Backend = "auto"
    """Attention backend."""
    text_encoder: str | None = None
    """Folder or hub name of a text model's CLIP; by default the run's."""
    autoencoder: str | None = None
    """Folder or hub name of a latent model's AutoencoderKL; by default the run's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("seed", self.seed >= 0, "at least 0")
        if self.batch_size is not None:
            self._require("batch_size", self.batch_size >= 1, "at least 1")
            self._require_at_most(batch_size=MAX_BATCH)
        if self.guidance is not None and self.paper_scale is not None:
            raise InputError(f"give --guidance or --paper_scale, got both: {self.guidance:g} and {self.paper_scale:g}")

    def load(self, default_guidance: float | None = None) -> tuple[Config, Network, Encoders]:
        """Loads the run's network and encoders, and its config with these options applied.

        Args:
            default_guidance: w if none is given; None is the run's.

        Raises:
            InputError: as load_run and load_encoders, or options that do not fit the run.
        """
        device = process_state().device
        given = self.guidance if self.paper_scale is None else 1 + self.paper_scale
        config, model = load_run(self.checkpoint, self.attention, device, self.config)
        sampling = _replace_given(
            config.sample,
            guidance=default_guidance if given is None else given,
            guidance_interval=self.guidance_interval,
            guidance_path=self.guidance_path,
            num_steps=self.steps,
            sampler=self.sampler,
            spacing=self.spacing,
            t_end=self.t_end,
            reuse=self.reuse,
            mixed_precision=self.mixed_precision,
        )
        if self.guidance_path and sampling.guidance == 1:
            raise InputError("--guidance_path has no effect with guidance 1: give --guidance, such as 2")
        if self.text_encoder is not None and not config.model.context_dim:
            raise InputError(f"--text_encoder is for a model with a context, got {self.text_encoder!r} for one without")
        resolve_precision(sampling.mixed_precision, device.type, config.model.width)
        check_compile(self.compile, device.type)
        # Reuse and guidance by path call parts of the network, so it is compiled block by block.
        by_blocks = self.compile != "no" and (sampling.reused is not None or sampling.guidance_path)
        compile_model(model, "blocks" if by_blocks else self.compile)
        data = _replace_given(config.data, text_encoder=self.text_encoder, autoencoder=self.autoencoder)
        config = dataclasses.replace(config, sample=sampling, data=data)
        if self.guide is None:
            config.check_guidance()
            if config.lacks_null and self.config is None:
                warn("train.label_dropout 0 never showed the network the empty condition that guidance leads away from")
        sampling_times(config.process, config.sample)  # raises for an invalid grid before the long work
        set_up_process(config.train.num_threads, device.type)
        return config, model, load_encoders(config.data, config.model).to(device)

    def load_guide(self, config: Config) -> Network | None:
        """Loads the network that guidance leads away from, which must be of the run's kind; None for the null class.

        Args:
            config: of the run that is drawn from, as `load` returns it.

        Raises:
            InputError: as load_run, guidance that would have no effect, or a run of other images or another process.
        """
        if self.guide is None:
            return None
        if config.model.takes_guidance:
            raise InputError(f"--guide is for a network that takes no guidance itself, got {self.checkpoint}")
        if config.sample.guidance == 1:
            raise InputError(f"--guide has no effect with guidance 1, got {self.guide}: give --guidance, such as 2")
        if config.sample.guidance_path:
            fault = f"guidance leads away from one network, got guidance_path True and --guide {self.guide}"
            raise InputError(f"{fault}: give --guidance_path False")
        wanted = "name its run, or a checkpoint of one"
        found, network = load_run(self.guide, self.attention, process_state().device, advice=wanted)
        expected = _kind(config)
        for name, value in _kind(found).items():
            if value != expected[name]:
                raise InputError(f"--guide {self.guide} must have {name} {expected[name]}, got {value}")
        check_solver(found.process, config.sample.sampler)
        compile_model(network, self.compile)
        return network


def _kind(config: Config) -> dict[str, Any]:
    """Returns what a run must have in common with another whose prediction is to be compared with its own."""
    model, process, data = config.model, config.process, config.data
    return {
        "model.in_chans": model.in_chans,
        "model.image_shape": model.image_shape,
        "model.num_classes": model.num_classes,
        "model.context_dim": model.context_dim,
        "model.num_context_tokens": model.num_context_tokens,
        "data.scale_factor": None if data.autoencoder is None else data.scale_factor,
        "process.schedule": process.schedule,
        "process.prediction": process.prediction,
        "process.objective": process.objective,
        "process.time_scale": f"{schedule_of(process).network_time(1.0):g}",
    }


def _replace_given(section: SectionT, **values: Any) -> SectionT:
    """Replaces the fields for which a value other than None is given."""
    return dataclasses.replace(section, **{name: value for name, value in values.items() if value is not None})


def load_run(
    checkpoint: str,
    attention: Backend,
    device: torch.device,
    config_file: str | None = None,
    advice: str = "give the run's config with --config",
) -> tuple[Config, Network]:
    """Loads a run's config, and its network with the averaged weights, in eval mode.

    Args:
        checkpoint: run folder, or hub name of one; with `config_file` also a folder of weights or published weights.
        attention: attention backend.
        device: where the network goes.
        config_file: the run's config, for weights without one.
        advice: what to do where there are only weights.

    Raises:
        InputError: no run there, invalid files, weights that are not finite, or a backend that cannot run there.
    """
    path = find_pretrained(checkpoint)
    if config_file is not None:
        config = load_config(config_file)
    else:
        raw = {} if path.is_file() else read_json(path / CONFIG_FILE)
        if isinstance(raw, dict) and config_kind(raw) != "run":
            raise InputError(f"{checkpoint} holds only weights, expected a run: {advice}")
        config = from_dict(Config, raw, path / CONFIG_FILE)
    resolve_backend(attention, device.type)
    known = dataclasses.asdict(config.model) if path.is_file() else {}  # not all can be inferred from a published file
    model = load_network(path, {**known, "attention": attention}, type(config.model))
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
