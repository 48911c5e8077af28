"""What the rest of the package knows of a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from uvit.config import NetworkConfig

if TYPE_CHECKING:
    from typing import Self


class Network(Protocol):
    """A `torch.nn.Module` that training, sampling, sharding and exports can work with.

    A second network is a file in `uvit.networks`, a config in `uvit.config.network`, and an entry in
    `uvit.weights.build`. What is listed last are the methods of `torch.nn.Module` that the package calls.
    """

    config: NetworkConfig
    """Its own sizes and options. `config.reusable_pairs` says whether deep features can be reused: where it is above
    0, there is `forward_reusing`."""

    @property
    def config_class(self) -> type[NetworkConfig]:
        """The dataclass of its sizes and options, from which alone its class builds it."""
        ...

    @property
    def muon_fallback(self) -> Sequence[str]:
        """Patterns of the parameters that Muon leaves to AdamW: what is no matrix inside a block."""
        ...

    @property
    def num_parameters(self) -> int:
        """Parameters in all."""
        ...

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Its blocks in the order in which they run: what is compiled, sharded and recomputed one by one."""
        ...

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Predicts noise, data, v or flow, whichever it was trained for.

        Args:
            x: (B, in_chans, *image_shape) noisy images, of about unit variance.
            timesteps: (B,) times in the network's units (Schedule.network_scale times t), or one time for all.
            y: (B,) integer labels; `config.null_label` means none.
            context: (B, num_context_tokens, context_dim).

        Returns:
            The prediction, of the shape of x.

        Raises:
            InputError: (a ValueError) shapes that it was not built for, or a condition that is missing or not taken.
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
    ) -> tuple[Tensor, Tensor]:
        """Predicts as `forward`, in parts; only where `config.reusable_pairs` is above 0.

        Args:
            x: as for `forward`, like the next three.
            timesteps: (B,).
            y: (B,).
            context: (B, num_context_tokens, context_dim).
            outer: the outermost pairs of blocks, which always run.
            deep: what the blocks inside returned in an earlier call; None computes it.

        Returns:
            The prediction, and what the blocks inside returned.
        """
        ...

    def reset_buffers(self) -> None:
        """Computes the buffers that its state dict does not hold, as after loading weights into one on `meta`."""
        ...

    def resize(self, img_size: int | tuple[int, int]) -> Network:
        """Changes the side, or (height, width), of the images in place, and returns itself.

        Raises:
            InputError: (a ValueError) a size that it cannot have.
        """
        ...

    def require_whole(self) -> None:
        """Checks that it is all there.

        Raises:
            InputError: (a ValueError) blocks were removed, so that it can neither predict nor be saved.
        """
        ...

    def __call__(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any: ...

    def to(self, device: torch.device) -> Self: ...

    def train(self, mode: bool = True) -> Self: ...

    def eval(self) -> Self: ...
