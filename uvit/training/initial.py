"""The weights that a run starts with: random ones, or another run's (`train.init`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from uvit.common.errors import InputError
from uvit.common.messages import warn
from uvit.config import CONFIG_FILE, Config, ProcessConfig, config_kind, load_config, read_json
from uvit.diffusion.process import schedule_of
from uvit.networks.contract import Network
from uvit.training.checkpoint import find_config
from uvit.weights.build import build_network
from uvit.weights.pretrained import find_mismatch, find_pretrained, read_pretrained

MAY_DIFFER = {"takes_interval", "takes_guidance", "attention", "gradient_checkpointing"}
"""Fields of a network's config that may change when its weights are taken on."""
ADDED = "interval_embed.", "guidance_embed."
"""Names of the weights that the one taken on may lack."""


def initial_network(config: Config, run_dir: Path, device: torch.device) -> tuple[Network, int]:
    """Builds a run's network on the device, with the weights of `train.init` unless the run has a checkpoint.

    Returns:
        The network, and how many of its tokens are absent until they have faded in.

    Raises:
        InputError: as take_on.
    """
    network = build_network(config.model).to(device)
    if config.train.init is not None and find_config(run_dir) is None:
        return network, take_on(network, config)
    return network, 0


def take_on(network: Network, config: Config) -> int:
    """Loads the weights of `train.init`; an interval and a guidance that they lack start as if absent.

    Args:
        network: with initial weights.
        config: of the run.

    Returns:
        How many tokens are absent until they have faded in.

    Raises:
        InputError: no such run or weights, or ones of another network, or of another process.
    """
    name = config.train.init or ""
    path = find_pretrained(name)
    found, weights = read_pretrained(path, {}, type(config.model))
    for each in dataclasses.fields(found):
        if each.name in MAY_DIFFER:
            continue
        field = "image_shape" if each.name == "img_size" else each.name
        was, now = (getattr(model, field) for model in (found, config.model))
        if was != now:
            raise InputError(f"train.init {name} must have model.{each.name} {now!r}, got {was!r}")
    for field in ("takes_interval", "takes_guidance"):
        if getattr(found, field) and not getattr(config.model, field):
            raise InputError(f"train.init {name} must have model.{field} False, got True")
    if path.is_dir() and config_kind(read_json(path / CONFIG_FILE)) == "run":
        _check_process(name, load_config(path / CONFIG_FILE).process, config.process)
    else:
        unit = schedule_of(config.process).network_time(1.0)
        warn(f"train.init {name} does not say how it was trained: its times must be those of this run, up to {unit:g}")
    own = {key: value.cpu() for key, value in cast(nn.Module, network).state_dict().items()}
    missing = {key: value for key, value in own.items() if key.startswith(ADDED) and key not in weights}
    if "pos_embed" in own and "pos_embed" in weights:
        weights["pos_embed"] = _with_first_rows(own["pos_embed"], weights["pos_embed"])
    if mismatch := find_mismatch(own, {**weights, **missing}):
        raise InputError(f"train.init {name} does not fit the model: {mismatch}")
    network.load_state_dict({**weights, **missing})
    return network.start_absent(sorted({key.partition("_")[0] for key in missing}))


def _check_process(name: str, given: ProcessConfig, expected: ProcessConfig) -> None:
    """Checks that weights were trained to predict the same, at times of the same unit.

    Raises:
        InputError: the first difference.
    """
    values = [
        {
            "schedule": process.schedule,
            "prediction": process.prediction,
            "time_scale": f"{schedule_of(process).network_time(1.0):g}",
        }
        for process in (given, expected)
    ]
    for field, was in values[0].items():
        if was != (now := values[1][field]):
            raise InputError(f"train.init {name} must have process.{field} {now}, got {was}: train it with that one")


def _with_first_rows(own: Tensor, given: Tensor) -> Tensor:
    """Returns the given positions, (1, L, D), after as many of the network's own as they lack: those of new tokens."""
    return torch.cat([own[:, : own.shape[1] - given.shape[1]].to(given), given], dim=1)
