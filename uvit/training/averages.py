"""Power-function averages that are kept during training, of which `uvit.weights.averages` rebuilds any width."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uvit.common.errors import InputError, one_line
from uvit.common.files import remove_leftovers
from uvit.common.messages import warn_on_failure
from uvit.config import TrainConfig, average_files, average_path, step_of
from uvit.networks.contract import Network
from uvit.training.sharding import unshard
from uvit.weights.averages import UPDATES, decay_at
from uvit.weights.tensors import write_tensors

NUM_SNAPSHOTS = 32
"""Of a run at most, by default: widths between those kept are then rebuilt to a thousandth."""


class Averages:
    """The averages of `train.average_widths`, none by default; they are sharded as the network is.

    Args:
        network: whose weights they are of.
        config: their widths, and the steps between snapshots.
        run_dir: folder of the run.
    """

    def __init__(self, network: Network, config: TrainConfig, run_dir: Path) -> None:
        self.run_dir, self.updates = run_dir, 0
        self.every = config.average_every or math.ceil(config.num_steps / NUM_SNAPSHOTS)
        self.averages: dict[float, dict[str, Tensor]] = {
            width: {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
            for width in config.average_widths
        }

    @property
    def stateful(self) -> dict[str, Any]:
        """The part of the run's state that this is, by its name; none without averages."""
        return {"averages": self} if self.averages else {}

    @torch.no_grad()
    def update(self, network: Network) -> None:
        """Takes the weights after an update into the averages; the first ones replace them."""
        self.updates += 1
        weights = list(network.state_dict().values()) if self.averages else []
        for width, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), weights, weight=1 - decay_at(width, self.updates))

    def snapshot(self, step: int, is_end: bool, is_main: bool) -> None:
        """Writes RUN/averages/step_00000100.safetensors if due; all processes must call it.

        Snapshots are in float32: rebuilding takes differences of them, which would multiply the rounding of fp16.

        Args:
            step: optimizer steps done.
            is_end: whether it is the last one.
            is_main: whether this process writes.
        """
        if not self.updates or not self.averages or (step % self.every and not is_end):
            return
        tensors = unshard(self.state_dict(), keep=is_main)
        if not is_main:
            return
        path = average_path(self.run_dir, step)
        with warn_on_failure(str(path)):
            remove_leftovers(path.with_stem("step_*"))
            write_tensors(path, tensors)

    def forget_after(self, step: int) -> None:
        """Removes snapshots of later steps: of the run as it went on before it resumed from an earlier checkpoint.

        Raises:
            InputError: one cannot be removed; an average would be fitted to it.
        """
        for path in average_files(self.run_dir):
            if (step_of(path.name) or 0) > step:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise InputError(f"cannot remove a snapshot of a later step: {one_line(error)}") from None

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averages by WIDTH/NAME and the number of updates: what a checkpoint and a snapshot hold."""
        state = {f"{width}/{name}": value for width, part in self.averages.items() for name, value in part.items()}
        return {**state, UPDATES: torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the averages from a checkpoint.

        Raises:
            ValueError: other widths, or weights of other names or shapes.
        """
        own = self.state_dict()
        shapes = [{name: tensor.shape for name, tensor in each.items()} for each in (own, state)]
        if shapes[0] != shapes[1]:
            raise ValueError("averages of other widths or weights")
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.updates = int(state[UPDATES])
