"""What the config of every network has: the images and conditions it takes, and what the rest of the package asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from uvit.common.errors import InputError
from uvit.config.section import Section

Backend = Literal["auto", "xformers", "sdpa", "math"]
Precision = Literal["auto", "no", "bf16", "fp16"]

# Limits that are checked before memory is allocated; each is far beyond what anyone has trained.
MAX_PARAMETERS = 10**11
MAX_DEPTH = 1_000
MAX_TOKENS = 2**19
MAX_SIDE = 2**14
NUM_GUIDANCE = 3
"""Numbers of a guidance: its scale, and the times between which it acts."""
BLOCK_WIDTHS = 16
"""Memory that a block works in, in units of its input: queries, keys, values, the MLP's hidden layer, products."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(Section):
    """The config of any network that a run can have; each network has its own kind, with its sizes and options."""

    title: ClassVar[str] = "network"
    """What this kind is called in words."""
    backbone: str
    """Which network it is."""
    img_size: int | tuple[int, int] = 32
    """Side of the image (or latent) in pixels, or (height, width)."""
    in_chans: int = 3
    """Channels of the image (or latent)."""
    num_classes: int = 0
    """Number of classes, not counting the null class; 0 is a model without labels."""
    null_class: bool = False
    """One more label, at index num_classes, for "no label"; guidance needs it."""
    context_dim: int = 0
    """Width of the context tokens (such as CLIP's 768); 0 is a model without context."""
    num_context_tokens: int = 0
    """Length of the context (such as CLIP's 77)."""
    takes_interval: bool = False
    """Takes the length of an interval of time besides its end, to predict the average velocity over it."""
    takes_guidance: bool = False
    """Takes a guidance scale and its interval, to predict what is guided in one evaluation."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""
    attention: Backend = "auto"
    """Attention backend; `auto` is xformers where it can run (CUDA only), otherwise PyTorch's SDPA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("in_chans", self.in_chans >= 1, "at least 1")
        for name in ("num_classes", "context_dim", "num_context_tokens"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        self._require("img_size", min(self.image_shape) >= 1, "at least 1")
        self._require("null_class", not self.null_class or self.num_classes > 0, "False where num_classes is 0")
        if (self.context_dim > 0) != (self.num_context_tokens > 0):
            raise InputError(
                "context_dim and num_context_tokens must both be 0 or both be above 0, "
                f"got {self.context_dim} and {self.num_context_tokens}"
            )

    def _check_parameters(self) -> None:
        if self.most_parameters > MAX_PARAMETERS:
            raise InputError(
                f"the sizes of a model must give at most {MAX_PARAMETERS:,} parameters, "
                f"got up to {self.most_parameters:.2g}"
            )

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(rows, columns) of what its outermost blocks see: patches, or pixels."""
        return self.image_shape

    @property
    def null_label(self) -> int | None:
        """The label that means "no label", or None where the model has none."""
        return self.num_classes if self.null_class else None

    @property
    def predicted_chans(self) -> int:
        """Channels of the network's output; the prediction is the first in_chans."""
        return self.in_chans

    @property
    def embedded_numbers(self) -> int:
        """Numbers that condition it besides the time: of the interval, and of the guidance."""
        return self.takes_interval + NUM_GUIDANCE * self.takes_guidance

    @property
    def most_parameters(self) -> float:
        """An upper bound on the number of parameters, whatever the options."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Width of the matrix products: wide ones gain from half precision."""
        raise NotImplementedError

    @property
    def has_skips(self) -> bool:
        """Whether long skips join shallow blocks to deep ones."""
        raise NotImplementedError

    @property
    def num_pairs(self) -> int:
        """Pairs of a shallow and a deep block, which long skips can join."""
        raise NotImplementedError

    @property
    def reusable_pairs(self) -> int:
        """The most pairs of blocks that can be outer ones when deep features are reused; 0 where they cannot be."""
        return self.num_pairs if self.has_skips else 0  # without skips, the outer blocks' output reaches no other

    @property
    def sparse_pairs(self) -> int:
        """Outermost pairs of blocks inside which a part of the patches, or nothing, can take the place of all."""
        return 0

    @property
    def num_extra_tokens(self) -> int | None:
        """Tokens before the patches in what every block gives; None where blocks give maps of several sizes."""
        raise NotImplementedError

    @property
    def middle_shape(self) -> tuple[int, int, int]:
        """(width, rows, columns) of what the middle block gives of an image: the patches on their grid, or a map."""
        raise NotImplementedError

    @property
    def activation_size(self) -> int:
        """Number of values that the largest block outputs per image."""
        raise NotImplementedError

    @property
    def live_activations(self) -> int:
        """How many times that is in memory at once while sampling: the long skips, and what a block works in."""
        raise NotImplementedError

    @property
    def description(self) -> str:
        """The sizes in words."""
        raise NotImplementedError
