"""How time and memory of a training step grow: `python benchmarks/scaling.py`.

Against the number of tokens (64 to 4096), the depth and the batch; and what one attention keeps for the backward pass
by each backend. Fits time and memory as c · x^p over the upper half of each range: p = 1 is linear. Memory is what
autograd keeps, counted from the tensors themselves, so that it is exact and the same on a CPU. Writes
benchmarks/results/scaling.json and .png and prints the exponents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import torch
from measure import best_device, median_times, save_result
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

from uvit import UViT
from uvit.common.cli import parse, run
from uvit.common.errors import InputError
from uvit.networks.attention import attention, resolve_backend

SIDES = (16, 24, 32, 48, 64, 96, 128)  # of patches of 2: 64 to 4096 of them
DEPTHS = (2, 4, 8, 16)
BATCHES = (1, 2, 4, 8, 16)
BACKENDS = ("math", "sdpa", "xformers")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    embed_dim: int = 256
    """Width of the model."""
    num_heads: int = 4
    """Its heads."""
    depth: int = 4
    """Its depth, where that does not vary."""
    batch: int = 1
    """Images, where they do not vary; more keep a GPU busy."""
    rounds: int = 5
    """Timings of each size, of which the median counts."""


def kept_bytes(call: Callable[[], object], parameters: frozenset[int]) -> int:
    """Counts what autograd keeps for the backward pass, without the parameters themselves; each storage once."""
    storages: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address comes twice
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(size for size, _ in storages.values())


def measure(given: Arguments, side: int, depth: int, batch: int, device: torch.device) -> dict[str, float]:
    """Measures gradients of one size of model and batch."""
    model = UViT(img_size=side, embed_dim=given.embed_dim, depth=depth, num_heads=given.num_heads, num_classes=10).to(
        device
    )
    x, timesteps = torch.randn(batch, 3, side, side, device=device), torch.full((batch,), 500.0, device=device)
    y = torch.zeros(batch, dtype=torch.long, device=device)

    def forward() -> Tensor:
        return model(x, timesteps, y).square().mean()

    def step() -> None:
        model.zero_grad()
        forward().backward()

    parameters = frozenset(parameter.untyped_storage().data_ptr() for parameter in model.parameters())
    seconds = median_times({"": step}, given.rounds)[""]
    return {"seconds": seconds, "bytes": kept_bytes(forward, parameters)}


def measure_attention(side: int, backend: str, given: Arguments, device: torch.device) -> dict[str, float] | None:
    """Measures one attention alone; None where the backend does not run."""
    head_dim, tokens = given.embed_dim // given.num_heads, (side // 2) ** 2
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        resolve_backend(backend, device.type, head_dim, dtype=dtype)
    except InputError:
        return None
    projected = torch.randn(
        given.batch, tokens, 3, given.num_heads, head_dim, device=device, dtype=dtype, requires_grad=True
    )

    def forward() -> Tensor:
        return attention(*projected.unbind(dim=2), backend)

    def step() -> None:
        output = forward()
        torch.autograd.grad(output, projected, output)

    return {"seconds": median_times({"": step}, given.rounds)[""], "bytes": kept_bytes(forward, frozenset())}


def exponent(sizes: list[float], values: list[float]) -> float:
    """Fits p of c · x^p over the upper half of the sizes."""
    half = len(sizes) // 2
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


def main(arguments: list[str]) -> None:
    """Measures all sizes and writes the figures."""
    given = parse(Arguments, arguments, __doc__)
    device = best_device()
    torch.manual_seed(0)
    plan: dict[str, list[tuple[int, Callable[[], dict[str, float] | None]]]] = {
        "tokens": [
            ((side // 2) ** 2, lambda side=side: measure(given, side, given.depth, given.batch, device))
            for side in SIDES
        ],
        "depth": [(depth, lambda depth=depth: measure(given, 32, depth, given.batch, device)) for depth in DEPTHS],
        "batch": [(batch, lambda batch=batch: measure(given, 32, given.depth, batch, device)) for batch in BATCHES],
        **{
            f"tokens, attention {backend} alone": [
                ((side // 2) ** 2, lambda side=side, backend=backend: measure_attention(side, backend, given, device))
                for side in SIDES
            ]
            for backend in BACKENDS
        },
    }
    growth = {}
    with tqdm(total=sum(map(len, plan.values())), unit="size") as bar:
        for name, sizes in plan.items():
            points = []
            for size, call in sizes:
                if (figures := call()) is not None:
                    points.append({"size": size, **figures})
                bar.update()
            if points:
                exponents = {
                    what: exponent([each["size"] for each in points], [each[what] for each in points])
                    for what in ("seconds", "bytes")
                }
                growth[name] = {"points": points, "exponents": exponents}

    path = save_result("scaling", {"model": vars(given), "growth": growth})
    figure, axes = plt.subplots(1, len(growth), figsize=(3 * len(growth), 3), constrained_layout=True)
    for axis, (name, found) in zip(axes, growth.items()):
        for what, unit, color in (("seconds", 1e-3, "tab:blue"), ("bytes", 2**20, "tab:orange")):
            label = f"{'ms' if what == 'seconds' else 'MiB kept'}, p = {found['exponents'][what]:.2f}"
            values = [point[what] / unit for point in found["points"]]
            axis.loglog([point["size"] for point in found["points"]], values, "o-", color=color, label=label)
        axis.set(title=name, xlabel=name.partition(",")[0])
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.savefig(path.with_suffix(".png"), dpi=100)
    print("| against | time grows as | memory grows as |\n|---|---|---|")
    for name, found in growth.items():
        seconds, kept = (found["exponents"][what] for what in ("seconds", "bytes"))
        largest = found["points"][-1]
        sizes = f"{largest['size']}: {1e3 * largest['seconds']:.0f} ms, {math.ceil(largest['bytes'] / 2**20)} MiB"
        print(f"| {name} (at {sizes}) | x^{seconds:.2f} | x^{kept:.2f} |")


if __name__ == "__main__":
    run(main)
