"""Conditions of images: labels, prompts, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from uvit.common.errors import InputError, did_you_mean
from uvit.config import Config, NetworkConfig, SampleConfig
from uvit.networks.encoders import EMPTY_CAPTION

Condition = int | str | None
"""What an image is conditioned on: a label, a prompt, or nothing."""


def class_names(config: Config) -> tuple[str, ...]:
    """Returns the names of a run's labels: those in its data, or else their numbers."""
    return config.data.class_names or tuple(map(str, range(config.model.num_classes)))


def resolve_classes(given: Sequence[int | str], config: Config) -> list[int]:
    """Returns the labels for a user's numbers or names; text such as '3' is a name if there is such a name.

    Raises:
        InputError: a label that the model does not have.
    """
    names, count = class_names(config), config.model.num_classes
    labels = []
    for each in given:
        text = str(each)
        if each in names:
            labels.append(names.index(text))
        elif text.isdecimal() and int(text) < count:
            labels.append(int(text))
        else:
            raise InputError(f"class must be 0 to {count - 1} or a class name, got {text!r}{did_you_mean(text, names)}")
    return labels


def resolve_conditions(
    config: Config, classes: Sequence[int | str] = (), prompts: Sequence[str] = ()
) -> list[Condition]:
    """Returns what to draw: the given classes or prompts, or else all classes, the run's prompts, or [None].

    Raises:
        InputError: unknown classes, classes for a model without labels, prompts for one without context, or no prompt
            for one with context.
    """
    model = config.model
    if classes and not model.num_classes:
        raise InputError(f"a model with num_classes {model.num_classes} takes no class, got {classes[0]!r}")
    if prompts and not model.context_dim:
        raise InputError(f"a model with context_dim {model.context_dim} takes no prompt, got {prompts[0]!r}")
    if model.num_classes:
        return [*resolve_classes(classes, config)] or [*range(model.num_classes)]
    if model.context_dim:
        if not prompts and not config.sample.prompts:
            raise InputError(f"a model with context_dim {model.context_dim} draws from prompts, got none")
        return [*prompts] or [*config.sample.prompts]
    return [None]


def condition_names(conditions: Sequence[Condition], config: Config) -> list[str]:
    """Returns the names of conditions as text, leaving out None."""
    names = class_names(config)
    return [names[each] if isinstance(each, int) else each for each in conditions if each is not None]


def batch_conditions(
    conditions: Sequence[Any],
    config: NetworkConfig,
    encode: Callable[[Sequence[str]], Tensor] | None,
    device: torch.device,
    negative: str = EMPTY_CAPTION,
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None]:
    """Returns the network's keyword arguments for conditions, and those for the empty condition (None if it has none).

    Args:
        conditions: B labels, B prompts, or None B times, whichever the model takes.
        config: of the model.
        encode: text encoder of a model that takes a context: B texts to (B, num_context_tokens, context_dim).
        device: where labels go.
        negative: text that guidance leads away from, for a model that takes a context; for labels it is the null class.

    Raises:
        InputError: no text encoder where the model needs one.
    """
    if config.num_classes:
        y = torch.tensor(conditions, device=device)
        null = None if config.null_label is None else {"y": torch.full_like(y, config.null_label)}
        return {"y": y}, null
    if config.context_dim:
        if encode is None:
            raise InputError(f"a model with context_dim {config.context_dim} needs a text encoder, got none")
        context = encode(conditions)
        return {"context": context}, {"context": encode([negative]).expand_as(context)}
    return {}, None


def guidance_condition(
    config: NetworkConfig, sample: SampleConfig, batch: int, device: torch.device
) -> dict[str, Tensor]:
    """Returns the guidance as a network takes it among its conditions, (batch, 3); {} for one that takes none."""
    if not config.takes_guidance:
        return {}
    return {"guidance": torch.tensor([[sample.guidance, *sample.guidance_interval]], device=device).expand(batch, -1)}
