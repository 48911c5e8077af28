"""What a call of a pipeline is given, in the forms that diffusers takes: conditions, and latents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

from uvit.common.errors import InputError, short_repr
from uvit.config import Config
from uvit.sampling.conditions import Condition, resolve_conditions


def listed(given: Any) -> list[Any]:
    """Returns an argument that is one value or several as a list: empty for None, the numbers of an array."""
    given = given.tolist() if hasattr(given, "tolist") else given
    if given is None:
        return []
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]


def resolve_call(
    config: Config, labels: Sequence[int | str], batch_size: int | None, num_images_per_prompt: int
) -> list[Condition]:
    """Returns the condition of each image that a call draws; prompts are taken from the config."""
    model = config.model
    if model.num_classes and not labels:
        raise InputError(f"a model with num_classes {model.num_classes} takes class_labels, got none")
    if batch_size is not None and (model.num_classes or model.context_dim):
        raise InputError(
            "batch_size must be None for a model that takes class_labels or a prompt, "
            f"got {short_repr(batch_size)}: give num_images_per_prompt"
        )
    for name, number in (("batch_size", batch_size), ("num_images_per_prompt", num_images_per_prompt)):
        whole = isinstance(number, Integral) and not isinstance(number, bool)
        if number is not None and (not whole or number < 1):
            raise InputError(f"{name} must be a whole number from 1, got {short_repr(number)}")
    rows = resolve_conditions(config, labels, config.sample.prompts) * (batch_size or 1)
    return [row for row in rows for _ in range(num_images_per_prompt)]


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    """Checks latents that a user or a callback gives.

    Raises:
        InputError: no tensor, or one of another shape.
    """
    if not isinstance(latents, Tensor):
        raise InputError(f"latents must be a tensor, got {type(latents).__name__}")
    if tuple(latents.shape) != shape:
        raise InputError(f"latents must be {shape}, got {tuple(latents.shape)}")


def latents_of(returned: Any, x: Tensor) -> Tensor:
    """Returns the latents that a callback returned, or those that it was given if it returned none.

    Raises:
        InputError: neither a dict nor None, or latents that do not fit.
    """
    if not isinstance(returned, dict | None):
        raise InputError(f"callback_on_step_end must return a dict or None, got {type(returned).__name__}")
    latents = (returned or {}).get("latents", x)
    check_latents(latents, tuple(x.shape))
    return latents
