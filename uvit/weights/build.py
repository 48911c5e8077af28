"""The networks as users import them, which also load and save; and the network of a config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uvit.config import NetworkConfig
from uvit.networks import uvit
from uvit.networks.contract import Network
from uvit.weights.pretrained import PretrainedMixin, read_pretrained, restore


class UViT(PretrainedMixin, uvit.UViT):
    __doc__ = uvit.UViT.__doc__


NETWORKS = {network.config_class: network for network in (UViT,)}
"""The class of each kind of config."""


def build_network(config: NetworkConfig) -> Network:
    """Builds the network of a config, with initial weights."""
    return NETWORKS[type(config)](config)


def load_network(path: Path, fields: Mapping[str, Any]) -> Network:
    """Loads whatever network a folder or a published file holds, in eval mode.

    Args:
        path: as `find_pretrained` returns it.
        fields: fields of its config to replace.

    Raises:
        InputError: as `from_pretrained`.
    """
    config, weights = read_pretrained(path, fields)
    return restore(NETWORKS[type(config)], config, weights, str(path))
