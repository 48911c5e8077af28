"""What every backbone shares: checked inputs, blocks joined by nested long skips, and reuse of their deep features."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from uvit.config import NUM_GUIDANCE, InputError, NetworkConfig
from uvit.networks.layers import NumberEmbed, zeroed

INDEX_DTYPES = (torch.int64, torch.int32)
NUMBER_UNITS = 1000.0
"""In which 1 - 1 / w and times between 0 and 1 are embedded, as times are."""


class Backbone(nn.Module):
    """A network whose shallow blocks are joined to its deep ones by long skips, the first block to the last one.

    A subclass has `blocks`: its shallow ones, a middle one and as many deep ones. It maps inputs to what the first of
    them takes, and what the last one gives to the prediction.
    """

    config: Any

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return count_parameters(self.parameters())

    @property
    def weight_dtype(self) -> torch.dtype:
        """Data type of the weights that inputs are multiplied with."""
        return next(self.parameters()).dtype

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """All blocks, in the order in which they run."""
        raise NotImplementedError

    def _embed(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None,
        context: Tensor | None,
        interval: Tensor | None,
        guidance: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Returns the input of the first block, and the conditions that every block takes."""
        raise NotImplementedError

    def _add_number_embeds(self, sinusoids: int, width: int) -> None:
        """Adds the layers that embed an interval and a guidance, where the config has them."""
        if self.config.takes_interval:
            self.interval_embed = NumberEmbed(1, sinusoids, width)
        if self.config.takes_guidance:
            self.guidance_embed = NumberEmbed(NUM_GUIDANCE, sinusoids, width)

    def _embed_numbers(self, x: Tensor, interval: Tensor | None, guidance: Tensor | None) -> list[Tensor]:
        """Returns the embedded interval and guidance, (B, D) each, of those that the config has."""
        batch, embeds = x.shape[0], []
        if self.config.takes_interval:
            interval = torch.zeros(1, device=x.device) if interval is None else interval
            embeds.append(self.interval_embed(interval.reshape(-1, 1).expand(batch, -1)))
        if self.config.takes_guidance:
            if guidance is None:  # scale 1 at all times, without a copy that waits for the device
                one = torch.ones(batch, 1, device=x.device)
                guidance = torch.cat([one, 0 * one, one], dim=1)
            scale, ends = guidance.tensor_split([1], dim=1)
            embeds.append(self.guidance_embed(NUMBER_UNITS * torch.cat([1 - 1 / scale.clamp(min=1), ends], dim=1)))
        return embeds

    def start_absent(self, names: Sequence[str]) -> int:
        """Makes inputs act as if they were absent, at first: to take on weights without them.

        Args:
            names: `interval` or `guidance`, or both.

        Returns:
            How many tokens are absent until they have faded in; what is added to the time needs no such thing.
        """
        for name in names:
            zeroed(getattr(self, f"{name}_embed").mlp.fc2)
        return 0

    def fade_in(self, presence: float, num_tokens: int) -> None:
        """Sets how much of the first tokens is present in attention: 0 is nothing, 1 is all."""

    def _to_image(self, h: Tensor) -> Tensor:
        """Maps the output of the last block to the prediction, (B, predicted_chans, H, W)."""
        raise NotImplementedError

    def reset_buffers(self) -> None:
        """Computes the buffers that are not in its state dict; there are none unless a subclass says so."""

    def require_whole(self) -> None:
        """Checks that no block was removed; only subclasses can remove some.

        Raises:
            InputError: (a ValueError) some were.
        """

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | float,
        y: Tensor | None = None,
        context: Tensor | None = None,
        interval: Tensor | float | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predicts what the model was trained to (noise, data, v, flow, or average velocity) from noisy images.

        Args:
            x: (B, C, H, W) noisy images, of about unit variance.
            timesteps: (B,) times in the network's units (Schedule.network_time), or one time for all.
            y: (B,) integer labels below num_classes, or num_classes for the null class.
            context: (B, num_context_tokens, context_dim), such as text features.
            interval: (B,) lengths of the intervals that end at the timesteps, in the same units, or one for all, for a
                model that takes them; None is 0, an instant.
            guidance: (B, 3) scales w, at least 1, and the times in [0, 1] between which they act, for a model that
                takes them; None is w = 1, no guidance.

        Returns:
            (B, predicted_chans, H, W), of which the first C channels are the prediction.

        Raises:
            InputError: (a ValueError) types or shapes that do not fit the weights or the config, an unknown label, or a
                missing or unexpected condition.
        """
        return self.forward_reusing(x, timesteps, y, context, interval=interval, guidance=guidance)[0]

    def forward_reusing(
        self,
        x: Tensor,
        timesteps: Tensor | float,
        y: Tensor | None = None,
        context: Tensor | None = None,
        outer: int = 0,
        deep: Tensor | None = None,
        interval: Tensor | float | None = None,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predicts as `forward` does; given deep features from an earlier call, it runs only the outer blocks.

        The long skips are nested, so the blocks inside the outer pairs act on the prediction only through their output,
        which changes little between neighbouring steps of a solver (DeepCache, arXiv 2312.00858).

        Args:
            x: as for `forward`, like the next three.
            timesteps: (B,).
            y: (B,).
            context: (B, num_context_tokens, context_dim).
            outer: number of outermost pairs of shallow and deep blocks, which always run: 0 to config.reusable_pairs.
            deep: deep features from an earlier call with the same `outer`; None computes them.
            interval: as for `forward`, like the next one.
            guidance: (B, 3).

        Returns:
            The prediction, and the deep features: the output of the blocks inside the outer ones.

        Raises:
            InputError: (a ValueError) as forward, or more outer blocks than it has.
        """
        self.require_whole()
        if not 0 <= outer <= self.config.reusable_pairs:
            raise InputError(f"outer blocks must be 0 to {self.config.reusable_pairs}, got {outer}")
        timesteps = check_inputs(self.config, self.weight_dtype, x, timesteps, y, context)
        interval = check_numbers(self.config, x, interval, guidance)
        h, conditions = self._embed(x, timesteps, y, context, interval, guidance)
        skips: list[Tensor] = []
        end = len(self.blocks)
        h = self._run(range(outer), h, conditions, skips)
        h = deep = self._run(range(outer, end - outer), h, conditions, skips) if deep is None else deep
        if skips and _joint_shape(deep) != _joint_shape(skips[-1]):
            raise InputError(f"deep must fit to {tuple(skips[-1].shape)}, got {tuple(deep.shape)}")
        h = self._run(range(end - outer, end), h, conditions, skips)
        return self._to_image(h), deep

    def _run(self, numbers: range, h: Tensor, conditions: tuple[Tensor | None, ...], skips: list[Tensor]) -> Tensor:
        """Runs blocks by number; a shallow one pushes its output to `skips`, from which its deep partner pops it."""
        blocks, middle, joined = self.blocks, self.config.num_pairs, self.config.has_skips
        for number in numbers:
            inputs = (h, *conditions, skips.pop()) if joined and number > middle else (h, *conditions)
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(blocks[number], *inputs, use_reentrant=False)
            else:
                h = blocks[number](*inputs)
            if joined and number < middle:
                skips.append(h)
        return h


def count_parameters(parameters: Iterable[Tensor]) -> int:
    """Returns how many numbers some parameters have."""
    return sum(parameter.numel() for parameter in parameters)


def check_inputs(
    config: NetworkConfig,
    dtype: torch.dtype,
    x: Tensor,
    timesteps: Tensor | float,
    y: Tensor | None,
    context: Tensor | None,
) -> Tensor:
    """Checks types and shapes of a network's inputs, and that it has the conditions that its config asks for.

    Args:
        config: of the network.
        dtype: of its weights; autocast takes other inputs too.
        x: (B, C, H, W).
        timesteps: (B,), (1,), () or a number.
        y: (B,).
        context: (B, num_context_tokens, context_dim).

    Returns:
        The timesteps as a tensor.

    Raises:
        InputError: (a ValueError) what was given, and what was expected.
    """
    expected = (config.in_chans, *config.image_shape)
    _check_tensor("x", x, dtype)
    if x.ndim != 4 or tuple(x.shape[1:]) != expected:
        raise InputError(f"x must be (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
    batch = x.shape[0]  # an exporter would take len(x) for a constant
    timesteps = _as_times("timesteps", timesteps, x)
    if (y is None) != (config.num_classes == 0):
        given = "none" if y is None else "labels"
        takes = "y" if y is None else "no y"
        raise InputError(f"a model with num_classes {config.num_classes} takes {takes}, got {given}")
    if y is not None:
        if not isinstance(y, Tensor) or y.dtype not in INDEX_DTYPES:
            raise InputError(f"y must be a tensor of int64 or int32, got {_kind_of(y)}")
        if tuple(y.shape) != (batch,):
            raise InputError(f"y must be ({batch},), got {tuple(y.shape)}")
    if (context is None) != (config.context_dim == 0):
        given = "none" if context is None else "context"
        takes = "context" if context is None else "no context"
        raise InputError(f"a model with context_dim {config.context_dim} takes {takes}, got {given}")
    if context is not None:
        _check_tensor("context", context, dtype)
        expected = (batch, config.num_context_tokens, config.context_dim)
        if tuple(context.shape) != expected:
            raise InputError(f"context must be {expected}, got {tuple(context.shape)}")
    return timesteps


def check_numbers(
    config: NetworkConfig, x: Tensor, interval: Tensor | float | None, guidance: Tensor | None
) -> Tensor | None:
    """Checks an interval and a guidance, which only some networks take.

    Args:
        config: of the network.
        x: (B, C, H, W).
        interval: (B,), (1,), () or a number.
        guidance: (B, 3).

    Returns:
        The interval as a tensor.

    Raises:
        InputError: (a ValueError) what was given, and what was expected.
    """
    for name, given, takes in (
        ("interval", interval, config.takes_interval),
        ("guidance", guidance, config.takes_guidance),
    ):
        if given is not None and not takes:
            raise InputError(f"a model with takes_{name} False takes no {name}, got one")
    if guidance is not None:
        if not isinstance(guidance, Tensor) or not guidance.is_floating_point():
            raise InputError(f"guidance must be a floating point tensor, got {_kind_of(guidance)}")
        if tuple(guidance.shape) != (x.shape[0], NUM_GUIDANCE):
            raise InputError(f"guidance must be {(x.shape[0], NUM_GUIDANCE)}, got {tuple(guidance.shape)}")
    return None if interval is None else _as_times("interval", interval, x)


def _as_times(name: str, given: Any, x: Tensor) -> Tensor:
    """Returns (B,), (1,) or () times as a tensor, for images of (B, C, H, W)."""
    batch = x.shape[0]
    if not isinstance(given, Tensor) and isinstance(given, Real) and not isinstance(given, bool):
        given = torch.tensor(given, dtype=torch.float32, device=x.device)
    if not isinstance(given, Tensor) or given.dtype == torch.bool or given.is_complex():
        raise InputError(f"{name} must be a tensor of real numbers, or one of them, got {_kind_of(given)}")
    if tuple(given.shape) not in ((batch,), (1,), ()):
        raise InputError(f"{name} must be ({batch},), got {tuple(given.shape)}")
    return given


def _joint_shape(h: Tensor) -> tuple[int, ...]:
    """Returns the part of a shape that is the same in features that a long skip joins: maps may differ in channels."""
    return tuple(h.shape) if h.ndim == 3 else (h.shape[0], *h.shape[2:])


def _check_tensor(name: str, given: Any, dtype: torch.dtype) -> None:
    if not isinstance(given, Tensor) or not given.is_floating_point():
        raise InputError(f"{name} must be a floating point tensor, got {_kind_of(given)}")
    if given.dtype != dtype and (given.is_meta or not torch.is_autocast_enabled(given.device.type)):
        raise InputError(f"{name} must be {dtype}, as the weights are, or under autocast, got {given.dtype}")


def _kind_of(given: Any) -> str:
    return f"one of {given.dtype}" if isinstance(given, Tensor) else type(given).__name__


def embed_labels(embedding: nn.Embedding, y: Tensor) -> Tensor:
    """Looks labels up.

    Raises:
        InputError: (a ValueError) one that is out of range. A GPU, or a compiled network, has errors of its own.
    """
    try:
        return embedding(y)  # (B, D)
    except IndexError:
        low, high = y.min().item(), y.max().item()
        raise InputError(f"y must be 0 to {embedding.num_embeddings - 1}, got {low} to {high}") from None
