"""A network in a pipeline of Hugging Face's diffusers, which samples with diffusers' schedulers.

Guidance is w in w · cond + (1 - w) · uncond, as everywhere in this package: diffusers' `guidance_scale` is the same
number, and 1 is no guidance. `UViT2DModel` of diffusers is a different model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from os.path import isfile
from typing import Any, ClassVar, cast

import torch
from diffusers import ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from typing_extensions import Unpack

from uvit.common.errors import InputError, did_you_mean, short_repr
from uvit.common.hub import find_folder
from uvit.common.options import HubOptions
from uvit.config import (
    Config,
    DataConfig,
    NetworkConfig,
    ProcessConfig,
    SampleConfig,
    SolverName,
    UNetConfig,
    UViTConfig,
    from_dict,
    read_json,
)
from uvit.diffusion.process import schedule_of
from uvit.diffusion.reuse import reuse_deep_features
from uvit.diffusion.samplers import guide
from uvit.integrations.pipeline_call import check_latents, latents_of, listed, resolve_call
from uvit.integrations.pipeline_part import READING_OPTIONS, PipelinePart, check_dtype
from uvit.integrations.scheduler_steps import (
    Scheduler,
    as_instant,
    average_output,
    run_scheduler,
    set_times,
    steps_are_averages,
)
from uvit.integrations.schedulers import check_scheduler, make_scheduler
from uvit.networks.backbone import Backbone
from uvit.networks.encoders import (
    EMPTY_CAPTION,
    IMAGE_CHANNELS,
    check_encoder_sizes,
    decode_latents,
    encode_captions,
    load_encoders,
    loading,
)
from uvit.sampling.conditions import batch_conditions, guidance_condition
from uvit.sampling.runs import load_run
from uvit.weights.build import UNet, UViT

INDEX_FILE = "model_index.json"
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PROCESS_FIELDS = ("schedule", "prediction", "time_scale", "instant_share", "guidance_max")
"""The part of the process that sampling needs, besides the objective, which the network tells."""


class UViTModel(PipelinePart, UViT, ModelMixin):  # type: ignore[misc]  # counts parameters by a method, as diffusers
    """A UViT as a part of a pipeline."""


class UNetModel(PipelinePart, UNet, ModelMixin):  # type: ignore[misc]  # as above
    """A UNet as a part of a pipeline."""

    # its first weight tells the dtype of the embedded time
    _skip_layerwise_casting_patterns: ClassVar[tuple[str, ...]] = ("time_embed",)


PARTS: dict[type[NetworkConfig], type[UViTModel] | type[UNetModel]] = {UViTConfig: UViTModel, UNetConfig: UNetModel}
"""The part for each kind of network."""


class PipelineOptions(HubOptions, total=False):
    """Keyword arguments of UViTPipeline.from_pretrained."""

    transformer: Any
    """Replaces the saved part, like the next four."""
    scheduler: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    schedule: str
    """Replaces the saved value, like the next two."""
    prediction: str
    time_scale: float | None
    instant_share: float
    guidance_max: float
    class_names: list[str]
    dtype: torch.dtype | dict[str, torch.dtype]
    """Of the weights, one for all or one per part; None is float32."""
    torch_dtype: torch.dtype | dict[str, torch.dtype]
    """The same."""
    device_map: Any
    """As for DiffusionPipeline."""


class UViTPipeline(DiffusionPipeline):
    """Draws images with a network, U-ViT or U-Net, and a scheduler of diffusers.

    Args:
        transformer: the network, whichever it is; a plain UViT or UNet is copied.
        scheduler: one that fits the process, for example from make_scheduler.
        vae: the AutoencoderKL of a network of latents; its config's scaling_factor must be that of training.
        text_encoder: the CLIP text model of a network that takes a context.
        tokenizer: its tokenizer.
        schedule: as in ProcessConfig: what the network was trained on.
        prediction: as in ProcessConfig: what the network predicts; of a network that takes intervals, an average.
        time_scale: as in ProcessConfig.
        instant_share: as in ProcessConfig.
        guidance_max: as in ProcessConfig.
        class_names: names of the labels, if they have any.

    Raises:
        InputError: parts that do not fit together.

    Example:
        >>> import torch
        >>> pipe = UViTPipeline.from_run("runs/digits")
        >>> image = pipe(class_labels=[3], guidance_scale=2.0, generator=torch.manual_seed(0)).images[0]
    """

    transformer: Any
    scheduler: Scheduler
    vae: Any
    text_encoder: Any
    tokenizer: Any

    _interrupt = False
    _num_timesteps = 0
    _callback_tensor_inputs = ("latents",)
    model_cpu_offload_seq = "text_encoder->transformer->vae"  # type: ignore[assignment]
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012 (diffusers' name and type)

    def __init__(
        self,
        transformer: Backbone,
        scheduler: Scheduler,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        schedule: str = "flow",
        prediction: str = "flow",
        class_names: list[str] | None = None,
        time_scale: float | None = None,
        instant_share: float = ProcessConfig.instant_share,
        guidance_max: float = ProcessConfig.guidance_max,
    ) -> None:
        super().__init__()
        model: Any = getattr(transformer, "config", None)
        if type(model) not in PARTS:
            raise InputError(f"the transformer must be a UViT or a UNet, got {type(transformer).__name__}")
        process = {
            "schedule": schedule,
            "prediction": prediction,
            "time_scale": time_scale,
            "instant_share": instant_share,
            "guidance_max": guidance_max,
        }
        self.register_to_config(**process, class_names=list(class_names or ()))
        names = DataConfig(class_names=tuple(class_names or ()))
        Config(model=model, process=self._process_of(model), data=names)  # checks the number of names
        if model.context_dim and (text_encoder is None or tokenizer is None):
            raise InputError(
                f"a model with context_dim {model.context_dim} needs a text encoder and a tokenizer, got none"
            )
        check_encoder_sizes(model, text_encoder if model.context_dim else None, vae)
        if isinstance(transformer, Backbone) and not isinstance(transformer, PipelinePart):
            transformer = PARTS[type(model)].of(transformer)
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self._check_scheduler()
        self.image_processor = VaeImageProcessor()

    @property
    def process(self) -> ProcessConfig:
        """The part of the process that sampling needs."""
        return self._process_of(self.transformer.config)

    def _process_of(self, model: NetworkConfig) -> ProcessConfig:
        saved = {name: self.config[name] for name in PROCESS_FIELDS}
        return from_dict(ProcessConfig, {**saved, "objective": "average" if model.takes_interval else "instant"})

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`: the steps after it are left out, and images are made from there."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Number of the network's evaluations in the last call, or in the one under way."""
        return self._num_timesteps

    @classmethod
    def _get_signature_types(cls) -> dict[str, Any]:
        # from_pipe takes a part over whose class is among these
        return {**super()._get_signature_types(), "transformer": tuple(PARTS.values())}

    def _check_scheduler(self, *num_steps: int) -> None:
        latents = self.vae is not None or self.transformer.config.in_chans not in IMAGE_CHANNELS
        check_scheduler(self.scheduler, as_instant(self.process), latents, *num_steps)

    @classmethod
    def from_run(
        cls, checkpoint: str, sampler: SolverName | None = None, config_file: str | None = None
    ) -> UViTPipeline:
        """Makes a pipeline from a run, with its encoders if it has any, on the CPU.

        Steps, guidance and reuse are arguments of a call. The run's other sampling settings are not used: the grid is
        uniform in time and ends at 0, and the precision is that of the weights.

        Args:
            checkpoint: run folder, or hub name of one; with `config_file` also a folder or file of weights.
            sampler: solver; None is the run's.
            config_file: the run's config, for weights without one.

        Raises:
            InputError: as load_run, load_encoders and make_scheduler.
        """
        config, model = load_run(checkpoint, "auto", torch.device("cpu"), config_file)
        sampler = sampler or config.sample.sampler
        scheduler = make_scheduler(as_instant(config.process), "euler" if sampler == "average" else sampler)
        encoders = load_encoders(config.data, config.model)
        vae = None if encoders.image is None else encoders.image.network
        if vae is not None:
            vae.register_to_config(scaling_factor=config.data.scale_factor)
        return cls(
            transformer=cast(Backbone, model),
            scheduler=scheduler,
            vae=vae,
            text_encoder=None if encoders.text is None else encoders.text.network,
            tokenizer=None if encoders.text is None else encoders.text.tokenizer,
            schedule=config.process.schedule,
            prediction=config.process.prediction,
            time_scale=config.process.time_scale,
            instant_share=config.process.instant_share,
            guidance_max=config.process.guidance_max,
            class_names=list(config.data.class_names),
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]  # that of diffusers takes any arguments, and ignores unknown ones
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Unpack[PipelineOptions]
    ) -> UViTPipeline:
        """Loads a pipeline that `save_pretrained` wrote, from a folder or the hub.

        Args:
            pretrained_model_name_or_path: folder, or hub name.
            **kwargs: PipelineOptions, and READING_OPTIONS.

        Raises:
            InputError: no pipeline there, one of another class, parts that do not fit together, or an unknown argument.
        """
        options: dict[str, Any] = dict(kwargs)
        known = {*PipelineOptions.__annotations__, *READING_OPTIONS}
        for option in options:
            if option not in known:
                raise InputError(f"from_pretrained takes no argument {option!r}{did_you_mean(option, known)}")
        for option in {"dtype", "torch_dtype"} & options.keys():  # one for all, or one per part
            given = options[option]
            for dtype in given.values() if isinstance(given, dict) else [given]:
                check_dtype(dtype)
        name, what = str(pretrained_model_name_or_path), "pipeline"
        hub_options: Any = {option: options.pop(option) for option in HubOptions.__annotations__ if option in options}
        index = find_folder(name, what, [INDEX_FILE], **hub_options) / INDEX_FILE  # first, as the rest may be gigabytes
        if not isfile(index):
            raise InputError(f"{name} is not a pipeline, it has no {INDEX_FILE}: make one from a run with from_run")
        raw, expected = read_json(index), [[part.__module__, part.__name__] for part in PARTS.values()]
        given = raw.get("transformer") if isinstance(raw, dict) else raw
        if given not in expected:
            kinds = " or ".join(map(str, expected))
            raise InputError(
                f"{name} is a pipeline of another kind, expected transformer {kinds}, got {short_repr(given)}"
            )
        folder = find_folder(name, what, ["*.json", "*.safetensors", "*.txt"], **hub_options)
        with loading(f"pipeline {name!r}", "diffusers"):
            return super().from_pretrained(folder, **options)

    def _encode(self, captions: Sequence[str]) -> Tensor:
        length, device = self.transformer.config.num_context_tokens, self._execution_device
        return encode_captions(self.text_encoder, self.tokenizer, captions, length, device).to(self.transformer.dtype)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> UViTPipeline:
        """Makes a pipeline of another's parts, which both then share.

        Args:
            pipeline: the other.
            **kwargs: parts and values that replace its own, and `dtype` for all of them; None is float32.

        Raises:
            InputError: parts that do not fit together, or no floating point dtype.
        """
        for option in {"dtype", "torch_dtype"} & kwargs.keys():
            check_dtype(kwargs[option])
        return super().from_pipe(pipeline, **kwargs)

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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws images.

        Args:
            class_labels: numbers or names, for a network with labels.
            prompt: texts, for a network with a context.
            guidance_scale: w in w · cond + (1 - w) · uncond; 1 is none. The same w as sample.py's --guidance, but never
                by path: the empty condition sees the whole network.
            num_inference_steps: steps of the scheduler.
            generator: source of the noise, or one for each image.
            latents: (B, C, H, W) standard normal noise to start from, instead of random noise.
            batch_size: number of images, for a network without labels or context; None is 1.
            guidance_interval: times in [0, 1] between which guidance is applied.
            output_type: `pil`, `np` (B, H, W, C) or `pt` (B, C, H, W) in [0, 1], or `latent`: the network's own output.
            return_dict: whether to return an ImagePipelineOutput, rather than a tuple of the images.
            negative_prompt: text that guidance leads away from, instead of the empty caption.
            num_images_per_prompt: images per label or prompt, next to each other.
            reuse: `K:EVERY` reuses deep features, which is faster; `none` does not. As for sample.py's --reuse.
            callback_on_step_end: called after each step with the pipeline, the step's number, its timestep and a dict
                of tensors; sampling continues with the `latents` that it returns, if any, and ends early where it sets
                the pipeline's `_interrupt`.
            callback_on_step_end_tensor_inputs: the tensors that it gets: `latents` is the only one.

        Raises:
            InputError: conditions that the network does not take, guidance without a null class, a scheduler that does
                not fit, numbers out of range, or latents without a vae to decode them.
        """
        process, scheduler, model = self.process, self.scheduler, self.transformer.config
        sampling = {
            "num_steps": num_inference_steps,
            "guidance": guidance_scale,
            "guidance_interval": guidance_interval,
            "reuse": reuse,
            "prompts": listed(prompt),
            "sampler": "average" if steps_are_averages(process, self.scheduler) else SampleConfig.sampler,
        }
        config = Config(
            model=model,
            process=process,
            data=DataConfig(class_names=tuple(self.config["class_names"])),
            sample=from_dict(SampleConfig, sampling),
        )
        config.check_guidance()
        sample = config.sample
        self._check_scheduler(sample.num_steps)
        if negative_prompt is not None and not (model.context_dim and isinstance(negative_prompt, str)):
            raise InputError(
                f"negative_prompt must be one text, for a model that takes prompts, got {short_repr(negative_prompt)}"
            )
        conditions = resolve_call(config, listed(class_labels), batch_size, num_images_per_prompt)
        if self.vae is None and output_type != "latent" and model.in_chans not in IMAGE_CHANNELS:
            raise InputError(f"a model with in_chans {model.in_chans} needs a vae to make images, got None")
        tensor_inputs = listed(getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs))
        for name in tensor_inputs:
            if name not in self._callback_tensor_inputs:
                takes = f"callback_on_step_end_tensor_inputs must be of {', '.join(self._callback_tensor_inputs)}"
                raise InputError(f"{takes}, got {short_repr(name)}")
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {short_repr(output_type)}")
        shape = (len(conditions), model.in_chans, *model.image_shape)
        if latents is not None:
            check_latents(latents, shape)
        generators = listed(generator)
        if len(generators) != len(conditions) and isinstance(generator, list | tuple):
            raise InputError(
                f"generator must be one, or one for each of {len(conditions)} images, got {len(generators)}"
            )
        for each in generators:
            if not isinstance(each, torch.Generator):
                raise InputError(f"generator must be a torch.Generator, got {short_repr(each)}")

        device, dtype, reused = self._execution_device, self.transformer.dtype, sample.reused
        cond, uncond = batch_conditions(conditions, model, self._encode, device, negative_prompt or EMPTY_CAPTION)
        own = guidance_condition(model, sample, len(conditions), device)
        cond, scale = {**cond, **own}, 1.0 if own else sample.guidance
        network = self.transformer if reused is None else reuse_deep_features(self.transformer, *reused)

        def predict(x: Tensor, timesteps: Tensor, **condition: Tensor) -> Tensor:
            return network(x.to(dtype), timesteps, **condition)[:, : model.in_chans].float()

        output = guide(predict, schedule_of(process), cond, uncond, scale, sample.guidance_interval)
        times = set_times(scheduler, as_instant(process), sample.num_steps, device)
        if process.objective == "average":
            output = average_output(output, process, scheduler, times)
        noise = randn_tensor(shape, generator, device, torch.float32) if latents is None else latents.to(device).float()
        self._interrupt, self._num_timesteps = False, len(times)
        with self.progress_bar(total=len(times)) as progress:

            def on_step(step: int, timestep: Any, x: Tensor) -> tuple[Tensor, bool]:
                progress.update()
                if callback_on_step_end is not None:
                    returned = callback_on_step_end(self, step, timestep, dict.fromkeys(tensor_inputs, x))
                    x = latents_of(returned, x)
                return x, not self.interrupt

            x = run_scheduler(scheduler, times, output, noise, generator, on_step)
        if self.vae is not None and output_type != "latent":
            x = decode_latents(self.vae, x, self.vae.config.scaling_factor)
        images = self.image_processor.postprocess(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
