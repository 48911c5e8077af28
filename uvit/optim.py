"""The optimizer and its learning rate over steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from uvit.config import OptimConfig
from uvit.sharding import cut_all

# Muon orthogonalises the matrices inside the blocks; what maps to or from tokens is left to its AdamW.
MUON_FALLBACK = (
    "patch_embed.*",
    "time_embed.*",
    "label_emb.*",
    "context_embed.*",
    "pos_embed",
    "decoder_pred.*",
    "final_layer.*",
)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Builds the optimizer for every parameter of a model, weight decay on all of them as in the paper."""
    shared: dict[str, Any] = dict(
        lr=config.lr, weight_decay=config.weight_decay, filter_bias_and_bn=False, betas=config.betas
    )
    if config.name == "adamw":
        return create_optimizer_v2(model, "adamw", fused=True, **shared)
    return create_optimizer_v2(
        model,
        "muon",
        momentum=config.momentum,
        nesterov=True,
        fallback_list=MUON_FALLBACK,
        fallback_lr_scale=config.fallback_lr_scale,
        **shared,
    )


def lr_factor(step: int, num_steps: int, config: OptimConfig) -> float:
    """Returns the learning rate of update `step` (from 0) over its peak: linear warm-up from 0, then the decay."""
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


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, num_steps: int, done: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Builds the learning-rate schedule over `num_steps` updates, `done` of which were made."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, num_steps, config), last_epoch=done - 1
    )


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads the moments of a saved optimizer; learning rates and the like stay those that this one was built with.

    Raises:
        ValueError: the state is that of another optimizer.
    """
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    saved = [group.keys() - {"params", "initial_lr"} for group in state["param_groups"]]
    if saved != [group.keys() for group in own]:
        raise ValueError("its optimizer is another one")
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if state["state"] and state["state"].keys() != set(numbers):
        raise ValueError(f"its optimizer has state of {len(state['state'])} parameters, expected {len(numbers)}")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shares = {
        number: cut_all(state["state"][number], dict.fromkeys(state["state"][number], parameter))
        for number, parameter in zip(numbers, parameters)
        if number in state["state"]
    }
    optimizer.load_state_dict({**state, "state": shares})
    for group, values in zip(optimizer.param_groups, own):
        group.update(values)
