"""Faster sampling: deep features change slowly from step to step, so they are computed only at some steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

NetworkInParts = Callable[..., tuple[Tensor, Tensor]]
"""network(x, timesteps, outer=…, deep=…, **condition) -> (prediction, deep features), as `forward_reusing`."""


def reuse_deep_features(network: NetworkInParts, outer: int, every: int) -> Callable[..., Tensor]:
    """Returns a network that computes its deep features only at every N-th call, and extrapolates them in between.

    The outer blocks run at every call. The output of the blocks inside them is extrapolated linearly in time from the
    last two that were computed; reused unchanged, as in DeepCache (arXiv 2312.00858), images lose variety. The first
    two calls compute it, and so does a call with a different batch size, as where an interval of guidance begins or
    ends.

    Args:
        network: the network, which returns and accepts deep features.
        outer: number of outermost pairs of blocks, which run at every call.
        every: compute at every N-th call; at least 2.

    Returns:
        network(x, timesteps, **condition) for one batch and one run of a solver.
    """
    computed: list[tuple[Tensor, Tensor]] = []  # time and features of the last two computations
    since = 0

    def call(x: Tensor, timesteps: Tensor, **condition: Any) -> Tensor:
        nonlocal since
        if computed and len(computed[-1][1]) != len(x):
            computed.clear()
        time, since = timesteps[0], since + 1
        if len(computed) == 2 and since < every:
            (time_before, before), (time_last, last) = computed
            deep = last + (last - before) * ((time - time_last) / (time_last - time_before)).to(last.dtype)
            return network(x, timesteps, outer=outer, deep=deep, **condition)[0]
        prediction, deep = network(x, timesteps, outer=outer, **condition)
        computed.append((time, deep))
        del computed[:-2]
        since = 0
        return prediction

    return call
