"""A backbone in a pipeline of Hugging Face's diffusers, and our processes as its schedulers.

Guidance is w in w · cond + (1 - w) · uncond here as everywhere: diffusers' `guidance_scale` is the same number, and 1
is none. `UViT2DModel` of diffusers is another model.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Mapping, Sequence
from os.path import isfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ImagePipelineOutput,
    ModelMixin,
    UniPCMultistepScheduler,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from uvit.backbone import UViT
from uvit.config import (
    Config,
    DataConfig,
    Kind,
    ProcessConfig,
    SampleConfig,
    SolverName,
    UViTConfig,
    from_dict,
)
from uvit.diffusion import LDM, SCHEDULES, TIME_MARGIN, shift_time
from uvit.errors import InputError, shown
from uvit.generate import find_classes, load_run
from uvit.hub import find_folder
from uvit.latents import DECODED_AT_ONCE, EMPTY_CAPTION, IMAGE_CHANNELS, encode_captions, load_encoders
from uvit.samplers import guide, sampling_times

INDEX_FILE = "model_index.json"
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
    """ᾱ = α² at diffusers' first so many steps, in double precision."""
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

    UViTPipeline draws with it what sample.py draws, to rounding, where the number of steps divides that of the table,
    to whose entries diffusers rounds times. Two differ a little in the first steps, which are infinite in log-SNR:
    `unipc` begins `flow` at 1 - 1e-6, and the multistep solvers begin `cosine` at α = 2⁻¹² in place of 0.

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
        raise InputError(f"diffusers' schedulers for {of} are {', '.join(known)}, got sampler {sampler!r}")
    cls = known[sampler]
    if not flow:
        settings: dict[str, Any] = {**_table(process), "timestep_spacing": "trailing"}
        settings |= {"clip_sample": False} if cls is DDIMScheduler else {}
    elif cls.__name__.startswith("FlowMatch"):
        return cls(shift=process.time_shift)
    else:
        settings = {"use_flow_sigmas": True, "flow_shift": process.time_shift}
    return cls(**settings, prediction_type=prediction_type)


def _is_flow(scheduler: Scheduler) -> bool:
    """Tells whether a scheduler's sigmas are times of rectified flow."""
    return type(scheduler).__name__.startswith("FlowMatch") or bool(scheduler.config.get("use_flow_sigmas"))


def check_scheduler(scheduler: Scheduler, process: ProcessConfig) -> None:
    """Checks that a scheduler's process and prediction are those that a network was trained for.

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
    given = scheduler.config.get("prediction_type", "flow_prediction" if _is_flow(scheduler) else "epsilon")
    if given != expected:
        wanted = f"expected {expected!r} for a network that predicts {process.prediction!r}"
        raise InputError(f"{name} takes prediction_type {given!r}, {wanted}: {advice}")
    for option in ("use_dynamic_shifting", "invert_sigmas"):
        if scheduler.config.get(option):
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
    """
    settings = scheduler.config
    if not _is_flow(scheduler):
        scheduler.set_timesteps(num_steps, device=device)
        times = ((scheduler.timesteps.double() + 1) / TABLE_STEPS).tolist()
    else:
        samplers = [name for name, cls in FLOW_SCHEDULERS.items() if isinstance(scheduler, cls)]
        shift = settings.get("flow_shift") or settings.get("shift") or 1.0
        grid = sampling_times(
            dataclasses.replace(process, time_shift=shift),
            SampleConfig(num_steps=num_steps, sampler=samplers[0] if samplers else "ddim"),
        )
        if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
            before_shift = shift_time(torch.tensor(grid[:-1], dtype=torch.float64), 1 / shift)
            scheduler.set_timesteps(sigmas=before_shift.numpy(), num_inference_steps=num_steps, device=device)
        else:
            scheduler.set_timesteps(num_steps, device=device)
            if samplers and not any(settings.get(option) for option in OWN_GRIDS):
                # Its own begins at 0.999, or ends with a step of 0.001, and it takes no other.
                sigmas = torch.tensor(grid)
                inner = sigmas[1:-1].repeat_interleave(scheduler.order)  # Heun's method asks twice there
                scheduler.sigmas = torch.cat([sigmas[:1], inner, sigmas[-1:]])
                scheduler.timesteps = (scheduler.sigmas[:-1] * settings.num_train_timesteps).to(device)
        times = scheduler.sigmas[: len(scheduler.timesteps)].tolist()
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return times


class UViTModel(UViT, ModelMixin):
    """A UViT as diffusers loads and saves the parts of a pipeline; its folder is an ordinary one of weights."""

    def to(self, *arguments: Any, **named: Any) -> UViTModel:
        """Moves or casts the model; ModelMixin's own warns of modules to keep in float32, of which there are none."""
        return torch.nn.Module.to(self, *arguments, **named)

    @classmethod
    def of(cls, network: UViT) -> UViTModel:
        """Copies a backbone, in eval mode, on its device and in its dtype."""
        weight = next(network.parameters())
        model = cls(network.config).to(weight.device, weight.dtype)
        model.load_state_dict(network.state_dict())
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> UViTModel:
        """Loads as UViT does, in float32 or the dtype given by either name.

        Fields of UViTConfig change the model; diffusers' other options, of how a file is read, do nothing.

        Raises:
            InputError: as UViT.from_pretrained, or a choice of devices or variant of the weights.
        """
        for name in ("device_map", "variant"):
            if options.get(name) is not None:
                raise InputError(
                    f"{name} must be None for a UViT, got {options[name]!r}: move it by .to(device, dtype)"
                )
        fields = {field.name for field in dataclasses.fields(UViTConfig)}
        model = super().from_pretrained(name_or_path, **{name: options[name] for name in options if name in fields})
        return model.to(dtype or torch_dtype)  # type: ignore[return-value]


class UViTPipeline(DiffusionPipeline):
    """Draws images with a U-ViT and a scheduler of diffusers.

    Args:
        transformer: the backbone; a plain UViT is copied.
        scheduler: one that fits the process, such as make_scheduler gives.
        vae: the AutoencoderKL of a network of latents, whose config's scaling_factor is the one trained with.
        text_encoder: the CLIP text model of a network that takes a context.
        tokenizer: its tokenizer.
        schedule: ProcessConfig's, what the network was trained on.
        prediction: ProcessConfig's, what the network's output is.
        class_names: names of the labels, where they have any.

    Raises:
        InputError: parts that do not fit together.

    Example:
        >>> pipe = UViTPipeline.from_run("runs/digits")
        >>> image = pipe(class_labels=[3], guidance_scale=2.0, generator=torch.manual_seed(0)).images[0]
    """

    transformer: Any
    scheduler: Scheduler
    vae: Any
    text_encoder: Any
    tokenizer: Any

    model_cpu_offload_seq = "text_encoder->transformer->vae"  # type: ignore[assignment]
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012 (diffusers' name and type)

    def __init__(
        self,
        transformer: UViT,
        scheduler: Scheduler,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        schedule: str = "flow",
        prediction: str = "flow",
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__()
        model = transformer.config
        Config(model=model, data=DataConfig(class_names=tuple(class_names or ())))  # checks how many names there are
        self.register_to_config(schedule=schedule, prediction=prediction, class_names=list(class_names or ()))
        check_scheduler(scheduler, self.process)
        if vae is not None and vae.config.latent_channels != model.in_chans:
            channels = f"latents of {vae.config.latent_channels} channels"
            raise InputError(f"the vae has {channels}, expected the network's in_chans {model.in_chans}")
        if model.context_dim:
            if text_encoder is None or tokenizer is None:
                raise InputError(
                    f"a model with context_dim {model.context_dim} needs a text encoder and a tokenizer, got none"
                )
            sizes = text_encoder.config.max_position_embeddings, text_encoder.config.hidden_size
            if sizes != (model.num_context_tokens, model.context_dim):
                expected = f"{model.num_context_tokens} of {model.context_dim}"
                raise InputError(f"the text encoder gives {sizes[0]} tokens of width {sizes[1]}, expected {expected}")
        if isinstance(transformer, UViT) and not isinstance(transformer, UViTModel):
            transformer = UViTModel.of(transformer)
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.image_processor = VaeImageProcessor()

    @property
    def process(self) -> ProcessConfig:
        """The part of the process that sampling needs."""
        return from_dict(ProcessConfig, {name: self.config[name] for name in ("schedule", "prediction")})

    @classmethod
    def from_run(cls, checkpoint: str, sampler: SolverName | None = None) -> UViTPipeline:
        """Makes a pipeline of a run, with its encoders where it has them, on the CPU; steps and guidance are a call's.

        Args:
            checkpoint: run folder, or hub name of one.
            sampler: solver; None is the run's own.

        Raises:
            InputError: as load_run, load_encoders and make_scheduler.
        """
        config, model = load_run(checkpoint, "auto", torch.device("cpu"))
        scheduler = make_scheduler(config.process, sampler or config.sample.sampler)
        encoders = load_encoders(config.data, config.model)
        vae = None if encoders.image is None else encoders.image.network
        if vae is not None:
            vae.register_to_config(scaling_factor=config.data.scale_factor)
        return cls(
            transformer=model,
            scheduler=scheduler,
            vae=vae,
            text_encoder=None if encoders.text is None else encoders.text.network,
            tokenizer=None if encoders.text is None else encoders.text.tokenizer,
            schedule=config.process.schedule,
            prediction=config.process.prediction,
            class_names=list(config.data.class_names),
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> UViTPipeline:
        """Loads what `save_pretrained` wrote, from a folder or the hub.

        Args:
            pretrained_model_name_or_path: folder, or hub name.
            **kwargs: as DiffusionPipeline's, such as torch_dtype or a part to take instead of the saved one.

        Raises:
            InputError: no pipeline there, or parts that do not fit together.
        """
        name = str(pretrained_model_name_or_path)
        folder = find_folder(name, "pipeline", ("*.json", "*.safetensors", "*.txt"))
        if not isfile(folder / INDEX_FILE):
            raise InputError(f"{name} is no pipeline, it has no {INDEX_FILE}: make one of a run with from_run")
        return super().from_pretrained(folder, **kwargs)

    def _labels(self, given: Sequence[int | str]) -> list[int]:
        """The labels meant by numbers and names."""
        data = DataConfig(class_names=tuple(self.config["class_names"]))
        config = Config(model=self.transformer.config, data=data)
        numbers = dataclasses.replace(config, data=DataConfig())  # a class may be named like another's number
        return [find_classes([str(each)], config if isinstance(each, str) else numbers)[0] for each in given]

    def _encode(self, captions: Sequence[str]) -> Tensor:
        length = self.transformer.config.num_context_tokens
        return encode_captions(self.text_encoder, self.tokenizer, captions, length).to(self.transformer.dtype)

    def _conditions(
        self, class_labels: Sequence[int | str] | None, prompt: Sequence[str] | None, batch_size: int
    ) -> tuple[int, Mapping[str, Tensor], Mapping[str, Tensor] | None]:
        """How many images, the network's arguments for them, and for the empty condition where the model knows one."""
        model = self.transformer.config
        takes = [("class_labels", class_labels, model.num_classes), ("prompt", prompt, model.context_dim)]
        for name, given, size in takes:
            if bool(given) != bool(size):
                field = "num_classes" if name == "class_labels" else "context_dim"
                wanted = name if size else f"no {name}"
                raise InputError(f"a model with {field} {size} takes {wanted}, got {shown(given) if given else 'none'}")
        if class_labels:
            y = torch.tensor(self._labels(class_labels), device=self._execution_device)
            null = None if model.null_label is None else {"y": torch.full_like(y, model.null_label)}
            return len(y), {"y": y}, null
        if prompt:
            context = self._encode(prompt)
            return len(context), {"context": context}, {"context": self._encode([EMPTY_CAPTION]).expand_as(context)}
        return batch_size, {}, None

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        prompt: str | Sequence[str] | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        batch_size: int = 1,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws images.

        Args:
            class_labels: numbers or names, for a network with labels; an image for each.
            prompt: texts, for a network with a context; an image for each.
            guidance_scale: w in w · cond + (1 - w) · uncond; 1 is none. The same w as sample.py's --guidance.
            num_inference_steps: steps of the scheduler.
            generator: source of the noise, or one for each image.
            latents: (B, C, H, W) standard normal noise to begin with instead of drawn one.
            batch_size: images to draw from a network without labels or context.
            guidance_interval: times in [0, 1] between which guidance acts.
            output_type: `pil`, `np` (B, H, W, C) or `pt` (B, C, H, W) in [0, 1], or `latent`: what the network draws.
            return_dict: an ImagePipelineOutput, or a tuple of the images.

        Raises:
            InputError: conditions that the network does not take, guidance without a null class, a scheduler that does
                not fit, or latents that nothing decodes.
        """
        process, network, scheduler = self.process, self.transformer, self.scheduler
        check_scheduler(scheduler, process)
        class_labels = [class_labels] if isinstance(class_labels, int | str) else class_labels
        prompt = [prompt] if isinstance(prompt, str) else prompt
        count, cond, uncond = self._conditions(class_labels, prompt, batch_size)
        in_chans = network.config.in_chans
        if output_type != "latent" and self.vae is None and in_chans not in IMAGE_CHANNELS:
            raise InputError(f"a model with in_chans {in_chans} needs a vae to make images, got None")
        shape = (count, in_chans, *network.config.image_shape)
        if latents is not None and tuple(latents.shape) != shape:
            raise InputError(f"latents must be {shape}, got {tuple(latents.shape)}")
        if num_inference_steps < 1:
            raise InputError(f"num_inference_steps must be at least 1, got {num_inference_steps}")

        def predict(x: Tensor, timesteps: Tensor, **condition: Tensor) -> Tensor:
            return network(x.to(network.dtype), timesteps, **condition).float()

        output = guide(predict, SCHEDULES[process.schedule], cond, uncond, guidance_scale, guidance_interval)
        device = self._execution_device
        times = set_times(scheduler, process, num_inference_steps, device)
        drawn = "generator" in inspect.signature(scheduler.step).parameters
        noise = randn_tensor(shape, generator, device, torch.float32) if latents is None else latents.to(device).float()
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        with self.progress_bar(total=len(times)) as progress:
            for timestep, t in zip(scheduler.timesteps, times):
                scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
                prediction = output(scaled, t)
                more = {"generator": generator} if drawn else {}
                x = scheduler.step(prediction, timestep, x, **more, return_dict=False)[0]
                progress.update()
        if self.vae is not None and output_type != "latent":
            parts = (x / self.vae.config.scaling_factor).to(self.vae.dtype).split(DECODED_AT_ONCE)
            x = torch.cat([self.vae.decode(part).sample.float() for part in parts])
        images = self.image_processor.postprocess(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
