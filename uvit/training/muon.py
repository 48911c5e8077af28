"""timm's Muon with matrices of one shape orthogonalised as a batch: it updates them one after the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.optim import muon as timm_muon
from torch import Tensor
from torch.distributed.tensor import DTensor

# The functions of timm's module that others stand in for during a step.
update_each = timm_muon.muon
orthogonalise = timm_muon.zeropower_via_newtonschulz
MAX_STACKED = 2**22
"""Numbers in a stack of matrices; of larger ones the copies would cost what fewer operations save."""


def update_together(optimizer: torch.optim.Optimizer, cpu_dtype: torch.dtype) -> None:
    """Makes a Muon of timm's update matrices of one shape together, to the same values up to rounding.

    Args:
        optimizer: changed in place; timm's module is as before when a step has ended.
        cpu_dtype: to orthogonalise in on a CPU, for which timm has no option; elsewhere it is bf16, as always there.
    """

    def orthogonalise_in_dtype(matrix: Tensor, steps: int, coefficients: Any, **options: Any) -> Tensor:
        dtype = cpu_dtype if matrix.device.type == "cpu" else torch.bfloat16
        return orthogonalise(matrix, steps, coefficients, dtype=dtype, **options)

    def use(functions: Mapping[str, Any]) -> None:
        for name, function in functions.items():
            setattr(timm_muon, name, function)

    stand_ins = {"muon": _update_stacks, "zeropower_via_newtonschulz": orthogonalise_in_dtype}
    own = {"muon": update_each, "zeropower_via_newtonschulz": orthogonalise}
    optimizer.register_step_pre_hook(lambda *_: use(stand_ins))
    optimizer.register_step_post_hook(lambda *_: use(own))


def _update_stacks(
    params: Sequence[Tensor], grads: Sequence[Tensor], momentum_bufs: Sequence[Tensor], **settings: Any
) -> None:
    """Updates as timm's `muon`, with whose arguments it is called."""
    for stacked in _stacks(params):
        tensors = [[of_all[n] for n in stacked] for of_all in (params, grads, momentum_bufs)]
        if len(stacked) == 1:
            update_each(*tensors, **settings)
            continue
        # timm flattens kernels likewise, and takes matrices of a batch for those at the positions of one kernel.
        matrices = [[tensor.flatten(1) for tensor in each] for each in tensors]  # each (O, I)
        stacks = [torch.stack(each).permute(1, 2, 0) for each in matrices]  # (O, I, N)
        update_each(*([stack] for stack in stacks), **{**settings, "conv_mode": "batched", "normalize_spatial": False})
        for each, stack in ((matrices[0], stacks[0]), (matrices[2], stacks[2])):
            torch._foreach_copy_(each, stack.unbind(-1))


def _stacks(params: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yields positions of parameters to update together; one that is sharded, or has no like, is alone."""
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for n, param in enumerate(params):
        # Only a contiguous one has a flat view, to write into.
        is_alone = isinstance(param, DTensor) or not param.is_contiguous()
        alike[n if is_alone else (param.device, param.dtype, len(param), param.numel())].append(n)
    for positions in alike.values():
        size = max(1, MAX_STACKED // params[positions[0]].numel())
        yield from (positions[start : start + size] for start in range(0, len(positions), size))
