"""The optimizer and its learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from uvit.config import OptimConfig
from uvit.networks.contract import Network
from uvit.networks.runtime import cpu_has_bf16
from uvit.training.muon import update_together
from uvit.training.sharding import reshard


def build_optimizer(network: Network, config: OptimConfig, projector: nn.Module | None = None) -> torch.optim.Optimizer:
    """Builds the optimizer for all parameters of a network, all with weight decay as in the paper.

    Muon leaves the parameters that match the network's `muon_fallback` to its AdamW, which has Nesterov's momentum too.

    Args:
        network: whose parameters come first.
        config: the optimizer and its settings.
        projector: trained beside it, by AdamW with the same settings as what Muon leaves to it.
    """
    optimizer = _build_for_network(network, config)
    if projector is not None:
        own = {"use_fallback": True, "lr": config.lr * config.fallback_lr_scale} if config.name == "muon" else {}
        optimizer.add_param_group({"params": [*projector.parameters()], **own})
    return optimizer


def _build_for_network(network: Network, config: OptimConfig) -> torch.optim.Optimizer:
    module = cast(nn.Module, network)
    shared: dict[str, Any] = dict(
        lr=config.lr, weight_decay=config.weight_decay, filter_bias_and_bn=False, betas=config.betas
    )
    if config.name == "adamw":
        return create_optimizer_v2(module, "adamw", fused=True, **shared)
    optimizer = create_optimizer_v2(
        module,
        "muon",
        momentum=config.momentum,
        nesterov=True,
        fallback_list=network.muon_fallback,
        fallback_lr_scale=config.fallback_lr_scale,
        **shared,
    )
    # Emulated bf16 would take most of a small model's step.
    update_together(optimizer, cpu_dtype=torch.bfloat16 if cpu_has_bf16() else torch.float32)
    return optimizer


def lr_factor(step: int, num_steps: int, config: OptimConfig) -> float:
    """Returns the learning rate of update `step` (from 0) relative to its peak: linear warm-up from 0, then decay."""
    if step < config.warmup_steps:
        return step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    match config.decay:
        case "linear":
            return 1 - progress
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case _:
            return 1.0


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, num_steps: int) -> Callable[[int], float]:
    """Returns a function that sets the learning rates for update `step` (from 0), and returns the first of them.

    Args:
        optimizer: newly built, so that its learning rates are the peaks.
        config: warm-up and decay.
        num_steps: updates in the whole run.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]

    def set_learning_rate(step: int) -> float:
        factor = lr_factor(step, num_steps, config)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * factor
        return peaks[0] * factor

    return set_learning_rate


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads the moments of a saved optimizer; its settings, such as learning rates, stay as built.

    Raises:
        ValueError: the state of a different optimizer.
    """
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    saved = [group.keys() - {"params", "initial_lr"} for group in state["param_groups"]]
    if saved != [group.keys() for group in settings]:
        raise ValueError("its optimizer is a different one")
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if state["state"] and state["state"].keys() != set(numbers):
        raise ValueError(f"its optimizer has state of {len(state['state'])} parameters, expected {len(numbers)}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    resharded = {
        number: reshard(state["state"][number], dict.fromkeys(state["state"][number], parameter))
        for number, parameter in zip(numbers, parameters)
        if number in state["state"]
    }
    optimizer.load_state_dict({**state, "state": resharded})
    for group, values in zip(optimizer.param_groups, settings):
        group.update(values)
