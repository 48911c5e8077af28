"""Trainers and losses for tests.

`python -m helpers.training CONFIG …` trains as the command does, with `deterministic_loss`, and leaves the gradients in
the run's folder: for tests of several processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from uvit.commands import train
from uvit.config import Config
from uvit.data.batch import Batch
from uvit.diffusion.average import average_loss
from uvit.networks.encoders import Encoders
from uvit.training.alignment import aligned
from uvit.training.step import as_written
from uvit.training.trainer import Trainer


def deterministic_loss(
    network: Callable[..., Tensor], config: Config, encoders: Encoders, batch: Batch, generator: torch.Generator
) -> Tensor:
    """A mean over the batch without randomness, so that parts of a batch add up to the whole."""
    x = batch.images.float() / 127.5 - 1
    with aligned(network, config, encoders, x) as add_alignment:
        if config.process.objective != "average":
            given = {"y": batch.labels}
            if config.model.sparse_pairs:  # what an image is decides which of its patches are seen
                first = 2 * (batch.labels[:, None] % 2) + torch.arange(6)
                given |= {"kept": first, "dropped": batch.labels % 3 == 0}
            return add_alignment((network(x, torch.full((len(x),), 500.0), **given) - x).square().mean())
        t = torch.full((len(x),), 0.9)
        bare = as_written(network, config.process.derivative)
        given = {"cond": {"y": batch.labels}, "intervals": (t / 3, t), "noise": x.flip(-1)}
        given["guidance"] = torch.tensor([[2.0, 0.0, 1.0]]).expand(len(x), -1)
        given["uncond"] = {"y": torch.full_like(batch.labels, config.model.num_classes)}
        return add_alignment(average_loss(network, x, config.process, bare=bare, **given))


class RecordingTrainer(Trainer):
    """Keeps the gradients that each update is made of.

    Args:
        gradients: gets one tensor for each update, of all parameters.
        local_sizes: gets how many of their values this process held.
        *arguments: as for `Trainer`, like the rest.
    """

    def __init__(self, gradients: list[Tensor], local_sizes: list[int], *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.gradients, self.local_sizes = gradients, local_sizes

    def build(self) -> None:
        super().build()
        self.optimizer.optimizer.register_step_pre_hook(self.record)

    def record(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Keeps the gradients that an optimizer is about to apply."""
        parts = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        whole = [part.full_tensor() if isinstance(part, DTensor) else part for part in parts]
        self.gradients.append(torch.cat([part.flatten() for part in whole]).clone())
        self.local_sizes.append(sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parts))


def main(arguments: list[str]) -> None:
    """Trains, and writes what this process saw to RUN/seen_RANK.pt."""
    gradients: list[Tensor] = []
    sizes: list[int] = []
    train.main(arguments, partial(RecordingTrainer, gradients, sizes, loss_of=deterministic_loss))
    folder = Path(arguments[arguments.index("--train.run_dir") + 1])
    torch.save({"grads": torch.stack(gradients), "size": sizes[0]}, folder / f"seen_{os.environ.get('RANK', 0)}.pt")


if __name__ == "__main__":
    main(sys.argv[1:])
