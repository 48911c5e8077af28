"""The weights that a run starts with: random ones, or another run's (`train.init`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from uvit.common.errors import InputError
from uvit.config import CONFIG_FILE, Config, config_kind, load_config, read_json
from uvit.diffusion.process import schedule_of
from uvit.networks.contract import Network
from uvit.training.checkpoint import find_config
from uvit.weights.build import build_network
from uvit.weights.pretrained import find_mismatch, find_pretrained, read_pretrained

MAY_DIFFER = {"takes_interval", "takes_guidance", "attention", "gradient_checkpointing"}
"""Fields of a network's config that may change when its weights are taken on."""
ADDED = "interval_embed.", "guidance_embed."
"""Names of the weights that the one taken on may lack."""


def initial_network(config: Config, run_dir: Path) -> Network:
    """Builds a run's network, with the weights of `train.init` unless the run has a checkpoint, on the CPU.

    Raises:
        InputError: as take_on.
    """
    network = build_network(config.model)
    if config.train.init is not None and find_config(run_dir) is None:
        take_on(network, config)
    return network


def take_on(network: Network, config: Config) -> None:
    """Loads the weights of `train.init`; an interval and a guidance that they lack start as if absent.

    Args:
        network: with initial weights.
        config: of the run.

    Raises:
        InputError: no such run or weights, or ones of another network, or of other times.
    """
    name = config.train.init or ""
    path = find_pretrained(name)
    found, weights = read_pretrained(path, {}, type(config.model))
    for each in dataclasses.fields(found):
        was, now = (getattr(model, each.name) for model in (found, config.model))
        if was != now and each.name not in MAY_DIFFER:
            raise InputError(f"train.init {name} must have model.{each.name} {now!r}, got {was!r}")
    if path.is_dir() and config_kind(read_json(path / CONFIG_FILE)) == "run":
        was, now = (schedule_of(each.process).network_time(1.0) for each in (load_config(path / CONFIG_FILE), config))
        if was != now:
            raise InputError(f"train.init {name} must have process.time_scale {now:g}, got {was:g}")
    own = cast(nn.Module, network).state_dict()
    missing = {key: value for key, value in own.items() if key.startswith(ADDED) and key not in weights}
    if "pos_embed" in own and "pos_embed" in weights:
        weights["pos_embed"] = _with_first_rows(own["pos_embed"], weights["pos_embed"])
    if mismatch := find_mismatch(own, {**weights, **missing}):
        raise InputError(f"train.init {name} does not fit the model: {mismatch}")
    network.load_state_dict({**weights, **missing})
    if missing:
        network.start_absent()


def _with_first_rows(own: Tensor, given: Tensor) -> Tensor:
    """Returns the given positions, (1, L, D), after as many of the network's own as they lack: those of new tokens."""
    return torch.cat([own[:, : own.shape[1] - given.shape[1]].to(given), given], dim=1)
