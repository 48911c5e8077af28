"""What makes a network a part of a pipeline of Hugging Face's diffusers: the arguments and methods of its models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor
from typing_extensions import Self, Unpack

from uvit.common.errors import InputError, short_repr
from uvit.networks.backbone import Backbone
from uvit.weights.pretrained import PretrainedMixin, PretrainedOptions

READING_OPTIONS = {
    *("use_safetensors", "low_cpu_mem_usage", "disable_mmap"),
    *("max_memory", "offload_folder", "offload_state_dict", "use_flashpack"),
}
"""Arguments of diffusers for how weights are read; they are accepted and have no effect."""


def check_dtype(dtype: Any) -> None:
    """Checks the dtype to load weights in, since diffusers ignores invalid ones.

    Raises:
        InputError: neither a floating point dtype of PyTorch nor None.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"torch_dtype must be a floating point dtype such as torch.float16, got {short_repr(dtype)}")


class PipelinePart(PretrainedMixin):
    """Lets diffusers load and save a network as a part of a pipeline; its folder is an ordinary folder of weights."""

    _supports_gradient_checkpointing = True

    def forward(
        self: Any,
        x: Tensor,
        timesteps: Tensor | float,
        y: Tensor | None = None,
        context: Tensor | None = None,
        outer: int | None = None,
        deep: Tensor | None = None,
        interval: Tensor | float | None = None,
        guidance: Tensor | None = None,
    ) -> Any:
        """Predicts as the network, or as its forward_reusing if `outer` is given: hooks wrap only `forward`."""
        both = self.forward_reusing(x, timesteps, y, context, outer or 0, deep, interval, guidance)
        return both[0] if outer is None else both

    def to(self: Any, *arguments: Any, **named: Any) -> Any:
        """Moves or casts the model; that of ModelMixin warns of modules to keep in float32, of which there are none."""
        return torch.nn.Module.to(self, *arguments, **named)

    def num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Returns the number of parameters: a method, as in diffusers.

        Args:
            only_trainable: whether to count only those that take gradients.
            exclude_embeddings: whether to leave out those of `nn.Embedding`.
        """
        return ModelMixin.num_parameters(self, only_trainable, exclude_embeddings)

    @property
    def is_gradient_checkpointing(self: Any) -> bool:
        """Whether blocks are recomputed in the backward pass: `gradient_checkpointing` of the network's config."""
        return self.config.gradient_checkpointing

    def enable_gradient_checkpointing(self: Any, gradient_checkpointing_func: None = None) -> None:
        """Recomputes blocks in the backward pass, which takes less memory and more time; its config says so then.

        Args:
            gradient_checkpointing_func: as in diffusers; only PyTorch's own, None, is supported.

        Raises:
            InputError: another one.
        """
        if gradient_checkpointing_func is not None:
            given = short_repr(gradient_checkpointing_func)
            raise InputError(f"gradient_checkpointing_func must be None, for PyTorch's own, got {given}")
        self.config = replace(self.config, gradient_checkpointing=True)

    def disable_gradient_checkpointing(self: Any) -> None:
        """Keeps the activations of blocks for the backward pass."""
        self.config = replace(self.config, gradient_checkpointing=False)

    @classmethod
    def of(cls: Any, network: Backbone) -> Any:
        """Copies a network, with its device and dtype, in eval mode."""
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
        **options: Unpack[PretrainedOptions],
    ) -> Self:
        """Loads as the network does, with the arguments of diffusers.

        Args:
            name_or_path: folder, or hub name.
            subfolder: a folder inside it, such as the `transformer` of a pipeline.
            torch_dtype: of the weights; None is float32.
            dtype: the same.
            device_map: device to load to; None is the CPU.
            **options: as for PretrainedMixin.from_pretrained, and READING_OPTIONS, which have no effect.

        Raises:
            InputError: as PretrainedMixin.from_pretrained, or a device_map with several devices.
        """
        try:
            device = None if device_map is None else torch.device(device_map)
        except (RuntimeError, TypeError):
            given = short_repr(device_map)
            raise InputError(f"device_map must be one device for a network, such as 'cuda', got {given}") from None
        check_dtype(dtype or torch_dtype)
        known: Any = dict(options)
        known = {name: value for name, value in known.items() if value is not None and name not in READING_OPTIONS}
        model = super().from_pretrained(f"{name_or_path}/{subfolder}" if subfolder else name_or_path, **known)
        return model.to(device, dtype or torch_dtype)
