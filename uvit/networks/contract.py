"""The interface of a network: all that the rest of the package relies on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Self

from uvit.config import NetworkConfig


class Network(Protocol):
    """A `torch.nn.Module` that can be trained, sampled, sharded and exported.

    To add a network, write a file in `uvit.networks`, a config in `uvit.config`, and an entry in
    `uvit.weights.build`. The last members below are the methods of `torch.nn.Module` that the package calls.
    """

    config: NetworkConfig
    """Its sizes and options. Deep features can be reused, by `forward_reusing`, where `config.reusable_pairs` is above
    0, and blocks be left out, by `forward_outer`, where `config.sparse_pairs` is."""

    @property
    def config_class(self) -> type[NetworkConfig]:
        """The dataclass of its sizes and options; its class is constructed from one of these and nothing else."""
        ...

    @property
    def muon_fallback(self) -> Sequence[str]:
        """Name patterns of the parameters that Muon leaves to AdamW: all but the matrices inside the blocks."""
        ...

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        ...

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Its blocks in the order in which they run; they are compiled, sharded and recomputed one by one."""
        ...

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
        """Predicts noise, data, v, flow or average velocity, whichever it was trained to.

        Args:
            x: (B, in_chans, *image_shape) noisy images, of about unit variance.
            timesteps: (B,) times in the network's units (Schedule.network_time), or one time for all.
            y: (B,) integer labels; `config.null_label` means no label.
            context: (B, num_context_tokens, context_dim).
            interval: (B,) lengths of the intervals that end at the timesteps, if `config.takes_interval`; None is 0.
            guidance: (B, 3) scales, and the times between which they act, if `config.takes_guidance`; None is scale 1.
            kept: (B, M) numbers of the patches that the blocks inside `config.sparse_pairs` see; None is all.
            dropped: (B,) whether an image's output of these blocks is left out.

        Returns:
            (B, predicted_chans, *image_shape), of which the first in_chans channels are the prediction.

        Raises:
            InputError: (a ValueError) shapes that do not fit its config, or a missing or unexpected condition.
        """
        ...

    def forward_reusing(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        context: Tensor | None = None,
        outer: int = 0,
        deep: Tensor | None = None,
        interval: Tensor | float | None = None,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predicts as `forward`, optionally reusing deep features; only where `config.reusable_pairs` is above 0.

        Args:
            x: as for `forward`, like the next three.
            timesteps: (B,).
            y: (B,).
            context: (B, num_context_tokens, context_dim).
            outer: number of outermost pairs of blocks, which always run.
            deep: the output of the blocks inside them from an earlier call; None computes it.
            interval: as for `forward`, like the next one.
            guidance: (B, 3).

        Returns:
            The prediction, and the output of the blocks inside the outer ones.
        """
        ...

    def forward_outer(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        context: Tensor | None = None,
        interval: Tensor | float | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predicts as `forward` with all images `dropped`, without the blocks inside `config.sparse_pairs`."""
        ...

    def reset_buffers(self) -> None:
        """Computes the buffers that are not in its state dict, such as after loading weights into a `meta` model."""
        ...

    def start_absent(self, names: Sequence[str]) -> int:
        """Makes inputs, `interval` or `guidance`, act as if they were absent, to take on weights without them.

        Returns:
            How many tokens are absent until they have faded in.
        """
        ...

    def fade_in(self, presence: float, num_tokens: int) -> None:
        """Sets how much of the first tokens is present: 0 is nothing, 1 is all."""
        ...

    def resize(self, img_size: int | tuple[int, int]) -> Self:
        """Changes the side, or (height, width), of the images in place; returns itself.

        Raises:
            InputError: (a ValueError) a size that it does not support.
        """
        ...

    def require_whole(self) -> None:
        """Checks that no block was removed.

        Raises:
            InputError: (a ValueError) some were, so that it can neither predict nor be saved.
        """
        ...

    def __call__(
        self,
        x: Tensor,
        timesteps: Tensor,
        y: Tensor | None = None,
        context: Tensor | None = None,
        interval: Tensor | float | None = None,
        guidance: Tensor | None = None,
        kept: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Tensor: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any: ...

    def to(self, device: torch.device | str) -> Self: ...

    def train(self, mode: bool = True) -> Self: ...

    def eval(self) -> Self: ...
