"""A model shared out between processes (FSDP2): each keeps a part of every tensor, checkpoints hold whole ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only


def share_out(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device, num_processes: int) -> None:
    """Leaves each process a part of every parameter; a block is put together when it runs, and let go after.

    Args:
        model: the same in all processes, on the device; changed in place.
        blocks: its parts that run one after the other.
        device: of the process.
        num_processes: all of the group, which must be there.
    """
    mesh = init_device_mesh(device.type, (num_processes,))
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh)


def cut(whole: Tensor, like: Tensor) -> Tensor:
    """Returns a whole tensor cut as another of its shape is; itself, where that one is not shared out."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def cut_all(whole: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Cuts what a state dict holds as a model's own state dict is cut."""
    return {
        name: cut(value, like[name]) if isinstance(value, Tensor) and name in like else value
        for name, value in whole.items()
    }


def gather(state: Any, keep: bool) -> Any:
    """Puts the tensors of a state dict together; every process must call it, with the same keys.

    Args:
        state: nested dicts and lists.
        keep: whether this process wants them; if not, it gets empty tensors instead.

    Returns:
        The same with whole tensors in memory, where they were shared out; others as they are.
    """

    def whole(part: DTensor) -> Tensor:
        tensor = part.full_tensor()
        return tensor.cpu() if keep else torch.empty(0)

    return tree_map_only(DTensor, whole, state)
