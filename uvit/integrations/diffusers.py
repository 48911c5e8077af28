"""A backbone in a pipeline of Hugging Face's diffusers, and our processes as its schedulers.

Guidance is w in w · cond + (1 - w) · uncond here as everywhere: diffusers' `guidance_scale` is the same number, and 1
is none. `UViT2DModel` of diffusers is another model.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
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
    read_json,
)
from uvit.diffusion import LDM, SCHEDULES, TIME_MARGIN, shift_time
from uvit.errors import InputError, did_you_mean, shown
from uvit.generate import Condition, batch_conditions, find_conditions, load_run
from uvit.hub import find_folder
from uvit.latents import (
    EMPTY_CAPTION,
    IMAGE_CHANNELS,
    check_encoders,
    decode_latents,
    encode_captions,
    load_encoders,
    loading,
)
from uvit.reuse import reuse_deep_features
from uvit.samplers import guide, sampling_times

INDEX_FILE = "model_index.json"
READING_OPTIONS = {
    *("use_safetensors", "low_cpu_mem_usage", "disable_mmap"),
    *("max_memory", "offload_folder", "offload_state_dict", "use_flashpack"),
}
"""Arguments of diffusers of how weights are read, which change nothing in them."""
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
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


def check_dtype(dtype: Any) -> None:
    """Checks what weights are to be loaded as, which diffusers passes over where it does not know it.

    Raises:
        InputError: no floating point dtype of PyTorch, and not None.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"torch_dtype must be a floating point dtype such as torch.float16, got {shown(dtype)}")


class UViTModel(UViT, ModelMixin):
    """A UViT as diffusers loads and saves the parts of a pipeline; its folder is an ordinary one of weights."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Predicts as UViT does; with `outer` as its forward_reusing: what moves weights acts on this method alone."""
        if "outer" in named:
            return self.forward_reusing(*inputs, **named)
        return super().forward(*inputs, **named)

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
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device_map: str | torch.device | None = None,
        **options: Any,
    ) -> UViTModel:
        """Loads as UViT does, with the arguments of diffusers.

        Args:
            name_or_path: folder, or hub name.
            subfolder: the folder inside, such as the `transformer` of a pipeline.
            torch_dtype: of the weights; None is float32.
            dtype: the same.
            device_map: device to load to; None is the CPU.
            **options: as UViT.from_pretrained's, and READING_OPTIONS, which do nothing.

        Raises:
            InputError: as UViT.from_pretrained, or a choice of several devices.
        """
        try:
            device = None if device_map is None else torch.device(device_map)
        except (RuntimeError, TypeError):
            given = shown(device_map)
            raise InputError(f"device_map must be a device for a UViT, such as 'cuda', got {given}") from None
        check_dtype(dtype or torch_dtype)
        options = {name: value for name, value in options.items() if value is not None and name not in READING_OPTIONS}
        model = super().from_pretrained(f"{name_or_path}/{subfolder}" if subfolder else name_or_path, **options)
        return model.to(device, dtype or torch_dtype)  # type: ignore[return-value]


def _listed(given: Any) -> list[Any]:
    """What a call was given one or several of, in a list: None is nothing, and arrays are their numbers."""
    given = given.tolist() if hasattr(given, "tolist") else given
    if given is None:
        return []
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]


def _find_conditions(
    config: Config, labels: Sequence[int | str], batch_size: int | None, num_images_per_prompt: int
) -> list[Condition]:
    """What a call draws, a condition for each image; prompts are the config's."""
    model = config.model
    if model.num_classes and not labels:
        raise InputError(f"a model with num_classes {model.num_classes} takes class_labels, got none")
    if batch_size is not None and (model.num_classes or model.context_dim):
        raise InputError(
            "batch_size must be None for a model that takes class_labels or a prompt, "
            f"got {shown(batch_size)}: give num_images_per_prompt"
        )
    for name, number in (("batch_size", batch_size), ("num_images_per_prompt", num_images_per_prompt)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise InputError(f"{name} must be a whole number from 1, got {shown(number)}")
    rows = find_conditions(config, labels, config.sample.prompts) * (batch_size or 1)
    return [row for row in rows for _ in range(num_images_per_prompt)]


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
        model = getattr(transformer, "config", None)
        if not isinstance(model, UViTConfig):
            raise InputError(f"the transformer must be a UViT, got {type(transformer).__name__}")
        Config(model=model, data=DataConfig(class_names=tuple(class_names or ())))  # checks how many names there are
        self.register_to_config(schedule=schedule, prediction=prediction, class_names=list(class_names or ()))
        if model.context_dim and (text_encoder is None or tokenizer is None):
            raise InputError(
                f"a model with context_dim {model.context_dim} needs a text encoder and a tokenizer, got none"
            )
        check_encoders(model, text_encoder if model.context_dim else None, vae)
        if isinstance(transformer, UViT) and not isinstance(transformer, UViTModel):
            transformer = UViTModel.of(transformer)
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self._check_scheduler()
        self.image_processor = VaeImageProcessor()

    @property
    def process(self) -> ProcessConfig:
        """The part of the process that sampling needs."""
        return from_dict(ProcessConfig, {name: self.config[name] for name in ("schedule", "prediction")})

    def _check_scheduler(self) -> None:
        latents = self.vae is not None or self.transformer.config.in_chans not in IMAGE_CHANNELS
        check_scheduler(self.scheduler, self.process, latents)

    @classmethod
    def from_run(
        cls, checkpoint: str, sampler: SolverName | None = None, config_file: str | None = None
    ) -> UViTPipeline:
        """Makes a pipeline of a run, with its encoders where it has them, on the CPU.

        Steps, guidance and reuse are a call's. Of the run's other settings of sampling, the pipeline has none: its grid
        is uniform in time and ends at 0, and its precision is that of its weights.

        Args:
            checkpoint: run folder, or hub name of one; with `config_file` also weights alone.
            sampler: solver; None is the run's own.
            config_file: the run's config, for weights that do not come with one.

        Raises:
            InputError: as load_run, load_encoders and make_scheduler.
        """
        config, model = load_run(checkpoint, "auto", torch.device("cpu"), config_file)
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
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> UViTPipeline:
        """Loads what `save_pretrained` wrote, from a folder or the hub.

        Args:
            pretrained_model_name_or_path: folder, or hub name.
            revision: as for uvit.hub.find_folder, like the next three.
            token: of the hub.
            cache_dir: where the hub's files are kept.
            local_files_only: whether to take only what was fetched before.
            **kwargs: a part to take instead of the saved one, or of DiffusionPipeline's arguments dtype, torch_dtype,
                device_map and READING_OPTIONS.

        Raises:
            InputError: no pipeline there, one of another kind, parts that do not fit together, or another argument.
        """
        known = {*inspect.signature(cls).parameters, *READING_OPTIONS, "dtype", "torch_dtype", "device_map"}
        for option in kwargs:
            if option not in known:
                raise InputError(f"from_pretrained takes no argument {option!r}{did_you_mean(option, known)}")
        for option in {"dtype", "torch_dtype"} & kwargs.keys():  # one for all, or one for each part
            given = kwargs[option]
            for dtype in given.values() if isinstance(given, dict) else [given]:
                check_dtype(dtype)
        name, what = str(pretrained_model_name_or_path), "pipeline"
        of_hub: dict[str, Any] = {"revision": revision, "token": token}
        of_hub |= {"cache_dir": cache_dir, "local_files_only": local_files_only}
        index = find_folder(name, what, [INDEX_FILE], **of_hub) / INDEX_FILE  # before gigabytes of another kind
        if not isfile(index):
            raise InputError(f"{name} is no pipeline, it has no {INDEX_FILE}: make one of a run with from_run")
        raw, expected = read_json(index), [UViTModel.__module__, UViTModel.__name__]
        given = raw.get("transformer") if isinstance(raw, dict) else raw
        if given != expected:
            raise InputError(
                f"{name} is a pipeline of another kind, expected transformer {expected}, got {shown(given)}"
            )
        folder = find_folder(name, what, ["*.json", "*.safetensors", "*.txt"], **of_hub)
        with loading(f"pipeline {name!r}", "diffusers"):
            return super().from_pretrained(folder, **kwargs)

    def _encode(self, captions: Sequence[str]) -> Tensor:
        length, device = self.transformer.config.num_context_tokens, self._execution_device
        return encode_captions(self.text_encoder, self.tokenizer, captions, length, device).to(self.transformer.dtype)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        batch_size: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        reuse: str = "none",
        callback_on_step_end: Callable[[UViTPipeline, int, Any, dict[str, Tensor]], Any] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws images.

        Args:
            class_labels: numbers or names, for a network with labels.
            prompt: texts, for a network with a context.
            guidance_scale: w in w · cond + (1 - w) · uncond; 1 is none. The same w as sample.py's --guidance.
            num_inference_steps: steps of the scheduler.
            generator: source of the noise, or one for each image.
            latents: (B, C, H, W) standard normal noise to begin with instead of drawn one.
            batch_size: images to draw from a network without labels or context; None is 1.
            guidance_interval: times in [0, 1] between which guidance acts.
            output_type: `pil`, `np` (B, H, W, C) or `pt` (B, C, H, W) in [0, 1], or `latent`: what the network draws.
            return_dict: an ImagePipelineOutput, or a tuple of the images.
            negative_prompt: text that guidance leads away from, in place of the empty caption.
            num_images_per_prompt: images for each label or prompt, next to each other.
            reuse: K:EVERY reuses deep features, which is faster; `none` does not. The same as sample.py's --reuse.
            callback_on_step_end: called after each step with the pipeline, the step's number, its timestep and
                {"latents": x}; what it returns of this, if anything, goes on.

        Raises:
            InputError: conditions that the network does not take, guidance without a null class, a scheduler that does
                not fit, numbers out of range, or latents that nothing decodes.
        """
        self._check_scheduler()
        process, scheduler, model = self.process, self.scheduler, self.transformer.config
        sampling = {
            "num_steps": num_inference_steps,
            "guidance": guidance_scale,
            "guidance_interval": guidance_interval,
            "reuse": reuse,
            "prompts": _listed(prompt),
        }
        config = Config(
            model=model,
            data=DataConfig(class_names=tuple(self.config["class_names"])),
            sample=from_dict(SampleConfig, sampling),
        )
        if negative_prompt is not None and not (model.context_dim and isinstance(negative_prompt, str)):
            raise InputError(
                f"negative_prompt must be one text, for a model that takes prompts, got {shown(negative_prompt)}"
            )
        conditions = _find_conditions(config, _listed(class_labels), batch_size, num_images_per_prompt)
        if self.vae is None and output_type != "latent" and model.in_chans not in IMAGE_CHANNELS:
            raise InputError(f"a model with in_chans {model.in_chans} needs a vae to make images, got None")
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {shown(output_type)}")
        shape = (len(conditions), model.in_chans, *model.image_shape)
        if latents is not None and tuple(latents.shape) != shape:
            raise InputError(f"latents must be {shape}, got {tuple(latents.shape)}")
        if isinstance(generator, list | tuple) and len(generator) != len(conditions):
            raise InputError(
                f"generator must be one, or one for each of {len(conditions)} images, got {len(generator)}"
            )

        device, dtype, reused = self._execution_device, self.transformer.dtype, config.sample.reused
        cond, uncond = batch_conditions(conditions, model, self._encode, device, negative_prompt or EMPTY_CAPTION)
        network = self.transformer if reused is None else reuse_deep_features(self.transformer, *reused)

        def predict(x: Tensor, timesteps: Tensor, **condition: Tensor) -> Tensor:
            return network(x.to(dtype), timesteps, **condition).float()

        interval = config.sample.guidance_interval
        output = guide(predict, SCHEDULES[process.schedule], cond, uncond, guidance_scale, interval)
        times = set_times(scheduler, process, num_inference_steps, device)
        drawn = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        noise = randn_tensor(shape, generator, device, torch.float32) if latents is None else latents.to(device).float()
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        with self.progress_bar(total=len(times)) as progress:
            for step, (timestep, t) in enumerate(zip(scheduler.timesteps, times)):
                scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
                x = scheduler.step(output(scaled, t), timestep, x, **drawn, return_dict=False)[0]
                if callback_on_step_end is not None:
                    x = (callback_on_step_end(self, step, timestep, {"latents": x}) or {}).get("latents", x)
                progress.update()
        if self.vae is not None and output_type != "latent":
            x = decode_latents(self.vae, x, self.vae.config.scaling_factor)
        images = self.image_processor.postprocess(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
