"""Time of every attention backend at the shapes of the published models: `python benchmarks/attention.py`.

Each shape is timed forward, and forward and backward together, with the backends in turn. Writes
benchmarks/results/attention.json and prints the table. `auto` in uvit/networks/attention.py follows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from measure import best_device, median_times, save_result
from torch import Tensor
from tqdm import tqdm

from uvit.common.cli import parse, run
from uvit.common.errors import InputError
from uvit.networks.attention import attention, resolve_backend

BACKENDS = ("math", "sdpa", "xformers")
SHAPES = {
    "digits": (18, 4, 16),
    "S/2": (257, 8, 64),
    "S/2 deep, text": (334, 8, 64),
    "M/4": (258, 12, 64),
    "L/2": (258, 16, 64),
    "H/2": (258, 16, 72),
    "S/2, 512 tokens": (512, 8, 64),
    "S/2, 1024 tokens": (1024, 8, 64),
    "S/2, 2048 tokens": (2048, 8, 64),
    "S/2, 4096 tokens": (4096, 8, 64),
}
"""Tokens, heads and width of a head."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    tokens_per_batch: int = 4_096
    """Tokens of a batch, so that each shape does about the same work."""
    rounds: int = 15
    """Timings of each arm, of which the median counts."""
    calls_per_round: int = 1
    """Calls of one timing: more, and a GPU does not wait for Python before each."""


def forward(backend: str, inputs: tuple[Tensor, ...], calls: int) -> None:
    """Runs a backend for its output alone."""
    with torch.no_grad():
        for _ in range(calls):
            attention(*inputs, backend)


def forward_backward(backend: str, inputs: tuple[Tensor, ...], calls: int) -> None:
    """Runs a backend for its output and the gradients of its inputs."""
    for _ in range(calls):
        output = attention(*inputs, backend)
        torch.autograd.grad(output, inputs, output)


def can_run(backend: str, device: torch.device, head_dim: int, dtype: torch.dtype) -> bool:
    """Tells whether a backend runs there."""
    try:
        return resolve_backend(backend, device.type, head_dim, dtype=dtype) == backend
    except InputError:
        return False


def main(arguments: list[str]) -> None:
    """Times all shapes and writes the figures."""
    given = parse(Arguments, arguments, __doc__)
    device = best_device()
    rows = []
    for (name, (tokens, heads, head_dim)), dtype in tqdm(
        [(shape, dtype) for shape in SHAPES.items() for dtype in (torch.float32, torch.bfloat16)], unit="shape"
    ):
        batch = max(1, given.tokens_per_batch // tokens)
        # Views of one tensor, as they come out of the model's projection.
        projected = torch.randn(batch, tokens, 3, heads, head_dim, device=device, dtype=dtype, requires_grad=True)
        inputs = projected.unbind(dim=2)
        arms: dict[str, Callable[[], None]] = {
            f"{backend}, {how.__name__}": partial(how, backend, inputs, given.calls_per_round)
            for backend in BACKENDS
            if can_run(backend, device, head_dim, dtype)
            for how in (forward, forward_backward)
        }
        times = median_times(arms, given.rounds)
        milliseconds = {arm: 1e3 * seconds / given.calls_per_round for arm, seconds in times.items()}
        auto = resolve_backend("auto", device.type, head_dim, tokens, dtype)
        sizes = {"batch": batch, "tokens": tokens, "heads": heads, "head_dim": head_dim}
        kind = {"shape": name, "dtype": str(dtype).removeprefix("torch."), "auto": auto}
        rows.append({**kind, **sizes, "milliseconds": milliseconds})

    save_result("attention", {"rows": rows})
    print("| shape | batch x tokens x heads x width | dtype | auto | forward, ms | forward and backward, ms |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        times = [
            ", ".join(
                f"{backend} {row['milliseconds'][key]:.2f}"
                for backend in BACKENDS
                if (key := f"{backend}, {how.__name__}") in row["milliseconds"]
            )
            for how in (forward, forward_backward)
        ]
        sizes = f"{row['batch']} x {row['tokens']} x {row['heads']} x {row['head_dim']}"
        print(f"| {row['shape']} | {sizes} | {row['dtype']} | {row['auto']} | {times[0]} | {times[1]} |")


if __name__ == "__main__":
    run(main)
