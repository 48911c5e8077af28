"""What every backbone shares: checked inputs, blocks joined by nested long skips, and reuse of their deep features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from uvit.config import NUM_GUIDANCE, InputError
from uvit.networks.inputs import check_inputs, check_numbers, check_sparse
from uvit.networks.layers import NumberEmbed, zeroed

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
        kept: Tensor | None = None,
        dropped: Tensor | None = None,
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
            kept: (B, M) numbers of the patches that the blocks inside config.sparse_pairs see; None is all.
            dropped: (B,) whether an image's output of the blocks inside is left out.

        Returns:
            (B, predicted_chans, H, W), of which the first C channels are the prediction.

        Raises:
            InputError: (a ValueError) types or shapes that do not fit the weights or the config, an unknown label, or a
                missing or unexpected condition.
        """
        run_inner, outer = self._run_inner, 0
        if kept is not None or dropped is not None:
            check_sparse(self.config, x, kept, dropped)
            run_inner, outer = partial(self._run_sparse, kept=kept, dropped=dropped), self.config.sparse_pairs
        return self._predict(x, timesteps, y, context, interval, guidance, outer, run_inner)[0]

    def forward_outer(
        self,
        x: Tensor,
        timesteps: Tensor | float,
        y: Tensor | None = None,
        context: Tensor | None = None,
        interval: Tensor | float | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predicts as `forward` with all images `dropped`, by the outer pairs of blocks alone: the others don't run.

        The arguments are those of `forward`.

        Raises:
            InputError: (a ValueError) as forward, or config.sparse_pairs is 0.
        """
        if not self.config.sparse_pairs:
            raise InputError("a prediction by the outer pairs needs a network with sparse_pairs above 0, got 0")
        outer = self.config.sparse_pairs
        return self._predict(x, timesteps, y, context, interval, guidance, outer, self._leave_out)[0]

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
        if not 0 <= outer <= self.config.reusable_pairs:
            raise InputError(f"outer blocks must be 0 to {self.config.reusable_pairs}, got {outer}")
        run_inner = self._run_inner if deep is None else lambda *_: deep
        return self._predict(x, timesteps, y, context, interval, guidance, outer, run_inner)

    def _predict(
        self,
        x: Tensor,
        timesteps: Tensor | float,
        y: Tensor | None,
        context: Tensor | None,
        interval: Tensor | float | None,
        guidance: Tensor | None,
        outer: int,
        run_inner: Callable[..., Any],
    ) -> tuple[Tensor, Tensor]:
        """Runs the outer blocks around `run_inner`(h, conditions, outer); returns the prediction, and its output."""
        self.require_whole()
        timesteps = check_inputs(self.config, self.weight_dtype, x, timesteps, y, context)
        interval = check_numbers(self.config, x, interval, guidance)
        h, conditions = self._embed(x, timesteps, y, context, interval, guidance)
        skips: list[Tensor] = []
        end = len(self.blocks)
        h = self._run(range(outer), h, conditions, skips)
        h = deep = run_inner(h, conditions, outer)
        if skips and _joint_shape(deep) != _joint_shape(skips[-1]):
            raise InputError(f"deep must fit to {tuple(skips[-1].shape)}, got {tuple(deep.shape)}")
        h = self._run(range(end - outer, end), h, conditions, skips)
        return self._to_image(h), deep

    def _run_inner(self, h: Tensor, conditions: tuple[Tensor | None, ...], outer: int) -> Tensor:
        """Runs the blocks inside the outer pairs."""
        return self._run(range(outer, len(self.blocks) - outer), h, conditions, [])

    def _leave_out(self, h: Tensor, *_: Any) -> Tensor:
        """Returns what stands for the output of blocks that don't run; only where config.sparse_pairs is above 0."""
        raise NotImplementedError

    def _run_sparse(
        self,
        h: Tensor,
        conditions: tuple[Tensor | None, ...],
        outer: int,
        kept: Tensor | None,
        dropped: Tensor | None,
    ) -> Tensor:
        """Runs the blocks inside on some patches, for some images; only where config.sparse_pairs is above 0."""
        raise NotImplementedError

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


def _joint_shape(h: Tensor) -> tuple[int, ...]:
    """Returns the part of a shape that is the same in features that a long skip joins: maps may differ in channels."""
    return tuple(h.shape) if h.ndim == 3 else (h.shape[0], *h.shape[2:])


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
