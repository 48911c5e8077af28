"""Kills, full disks and wrong numbers at exact moments of a run.

Moments in the middle of file operations are those of Python's audit events, which interpreters raise right before each
of them. An audit hook stays to the end of its process, so these are for processes that tests fork.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import signal
import sys
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from uvit.training.step import Loss, training_loss

Event = Literal["read", "write", "os.mkdir", "os.rename", "shutil.rmtree"]
"""`write` is an open that makes a file where there is none, `read` any other; `os.rename` is told by the new path."""


def on_event(
    event: Event, matches: Callable[[Path], bool], act: Callable[[Path], object], count: int | None = 1
) -> None:
    """Acts right before the count-th file operation of a kind on a path that matches.

    Args:
        event: the kind.
        matches: which paths are meant.
        act: gets the path; what it raises, the operation raises.
        count: from 1; None is all.
    """
    numbers = itertools.count(1)

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open":
            name = "write" if arguments[2] & os.O_CREAT else "read"
        if name != event:
            return
        path = arguments[1 if event == "os.rename" else 0]
        if isinstance(path, (str, os.PathLike)) and matches(Path(path)) and count in (None, next(numbers)):
            act(Path(path))

    sys.addaudithook(hook)


def die(*_: object) -> None:
    """Kills this process, which cannot do anything about it."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_leaving(content: str) -> Callable[[Path], None]:
    """Returns what adds some content to a file and kills this process."""

    def write_and_die(path: Path) -> None:
        with open(path, "a") as file:
            file.write(content)
        die()

    return write_and_die


def no_room(path: Path) -> NoReturn:
    """Raises what a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_room_for_the_rest(path: Path) -> NoReturn:
    """Leaves half a file, and raises what a full disk does."""
    path.write_bytes(b"half")
    no_room(path)


def read_only(path: Path) -> NoReturn:
    """Raises what a file system does that cannot be written to."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def acting_loss(step: int, act: Callable[[], object], parts: int, loss_of: Loss = training_loss) -> Loss:
    """Returns a loss that acts in the middle of a step, before its update.

    Args:
        step: from 1, counted from the start of the process.
        act: what happens.
        parts: of a batch.
        loss_of: what the loss is.
    """
    calls = itertools.count(1)

    def loss(*arguments: Any) -> Tensor:
        value = loss_of(*arguments)
        if next(calls) == step * parts:
            act()
        return value

    return loss


def spoiled_loss(numbers: Container[int], factor: float = math.nan, loss_of: Loss = training_loss) -> Loss:
    """Returns a loss that is multiplied by a factor in some calls, numbered from 1."""
    calls = itertools.count(1)

    def loss(*arguments: Any) -> Tensor:
        return loss_of(*arguments) * (factor if next(calls) in numbers else 1)

    return loss


def steep_loss(number: int) -> Loss:
    """Returns the loss with 0 added whose gradient is infinite, in one call, numbered from 1."""
    calls = itertools.count(1)

    def loss(network: torch.nn.Module, *arguments: Any) -> Tensor:
        value = training_loss(network, *arguments)
        root = next(network.parameters()).flatten()[0]
        return value + ((root - root.detach()).abs().sqrt() if next(calls) == number else 0)

    return loss
