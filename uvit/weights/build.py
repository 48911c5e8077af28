"""The networks that users import, which can load and save, and the choice of a network by its config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from uvit.common.errors import InputError
from uvit.config import NetworkConfig
from uvit.networks import unet, uvit
from uvit.networks.contract import Network
from uvit.weights.pretrained import PretrainedMixin, read_pretrained, restore


class UViT(PretrainedMixin, uvit.UViT):
    __doc__ = uvit.UViT.__doc__


class UNet(PretrainedMixin, unet.UNet):
    __doc__ = unet.UNet.__doc__


NETWORKS: dict[type[NetworkConfig], type[UViT] | type[UNet]] = {
    network.config_class: network for network in (UViT, UNet)
}
"""The network class for each config class."""


def build_network(config: NetworkConfig) -> UViT | UNet:
    """Builds the network of a config, with initial weights.

    Raises:
        InputError: (a ValueError) something else than the config of a network.
    """
    if type(config) not in NETWORKS:
        names = " or ".join(each.__name__ for each in NETWORKS)
        raise InputError(f"the config of a network must be a {names}, got a {type(config).__name__}")
    return cast(Any, NETWORKS[type(config)])(config)


def load_network(path: Path, fields: Mapping[str, Any], expected: type[NetworkConfig] = NetworkConfig) -> Network:
    """Loads the network in a folder or a published file, of whatever class, in eval mode.

    Args:
        path: as returned by `find_pretrained`.
        fields: fields of its config to replace.
        expected: the kind of network; by default any.

    Raises:
        InputError: as `from_pretrained`.
    """
    config, weights = read_pretrained(path, fields, expected)
    return restore(NETWORKS[type(config)], config, weights, str(path))
