"""Sharding a network across processes (FSDP2): each keeps a part of every tensor; checkpoints have whole tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from uvit.networks.contract import Network
from uvit.weights.build import build_network


def shard(network: Network | nn.Module, device: torch.device, num_processes: int) -> None:
    """Shards the parameters of a network across processes; each block is gathered when it runs, and freed after.

    Args:
        network: the same in all processes, on the device; changed in place. One without blocks is gathered whole.
        device: of the process.
        num_processes: of the default process group, which must be initialised.
    """
    mesh = init_device_mesh(device.type, (num_processes,))
    for module in (*getattr(network, "blocks", ()), cast(nn.Module, network)):
        fully_shard(module, mesh=mesh)


def _reshard_tensor(whole: Tensor, like: Tensor) -> Tensor:
    """Shards a whole tensor like another of the same shape; returns it unchanged if that one is not sharded."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def reshard(whole: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Shards the tensors of a state dict like those of another.

    Args:
        whole: tensors by name, each the same in all processes.
        like: sharded tensors by name, such as the model's own state dict.
    """
    return {
        name: _reshard_tensor(value, like[name]) if isinstance(value, Tensor) and name in like else value
        for name, value in whole.items()
    }


def unshard(state: Any, keep: bool) -> Any:
    """Gathers the sharded tensors of a state dict; all processes must call it, with the same keys.

    Args:
        state: nested dicts and lists.
        keep: whether this process needs the tensors; otherwise it gets empty ones.

    Returns:
        The same with whole tensors on the CPU in place of sharded ones; other values are unchanged.
    """

    def whole(part: DTensor) -> Tensor:
        tensor = part.full_tensor()
        return tensor.cpu() if keep else torch.empty(0)

    return tree_map_only(DTensor, whole, state)


def unshard_network(network: Network, keep: bool) -> Network:
    """Gathers a sharded network into a copy; all processes must call it.

    Args:
        network: sharded.
        keep: whether this process needs the copy; otherwise it gets the network itself.
    """
    weights = unshard(network.state_dict(), keep)
    if not keep:
        return network
    copy = build_network(network.config)
    copy.load_state_dict(weights)
    return copy.to(next(network.parameters()).device)
