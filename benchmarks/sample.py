"""Quality and speed of sampling a digits run: `python benchmarks/sample.py --checkpoint runs/digits`.

Every arm draws the same labels from the same noise with the same guidance, one round after the other, so that what
else the machine does falls on all alike. The first arm is what the reference code does: 50 evaluations in fp32, with
and without the label in two calls, 500 images at a time. Then the speed of S/2 with random weights, at equal
evaluations: what its images are like does not matter there. Writes benchmarks/results/sample.json, prints the tables.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measure import best_device, median_times, save_result
from quality import Judge
from torch import Tensor, nn
from tqdm import tqdm

from uvit import Config, UViT, UViTConfig
from uvit.common.cli import parse, run
from uvit.config import Compile, SampleConfig
from uvit.networks.runtime import compile_model, set_up_process
from uvit.sampling.generate import generate
from uvit.sampling.runs import load_run
from uvit.weights.published import SIZES


@dataclass(frozen=True, kw_only=True)
class Arguments:
    checkpoint: str = "runs/digits"
    """Run of the digits."""
    guidance: float = 1.5
    """Guidance w of every arm."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of drawing, a round for each."""
    num_images: int = 2000
    """Images of the digits of an arm and a round; 0 leaves them out."""
    large_images: int = 8
    """Images of S/2 of an arm and a round; 0 leaves it out."""
    large_rounds: int = 5
    """Rounds of S/2's arms."""
    threads: int = 0
    """CPU threads for S/2; 0 is PyTorch's choice."""


@dataclass(frozen=True)
class Arm:
    name: str
    sampling: dict[str, Any]
    apart: bool = False
    """Whether the network is called with and without the label apart."""
    batch_size: int | None = None
    """Images at a time; None is our choice."""
    compile: Compile = "no"
    """How the network is compiled."""


PAPER = {"sampler": "dpm_solver_fast", "num_steps": 50, "reuse": "none"}
ARMS = (
    Arm("the paper's: 50 x 2 calls", PAPER, apart=True, batch_size=500),
    Arm("the same in one call, our batches", PAPER),
    Arm("the same, compiled", PAPER, compile="model"),
    Arm("50 steps", {"num_steps": 50, "reuse": "none"}),
    *(Arm(f"{steps} steps", {"num_steps": steps, "reuse": "none"}) for steps in (20, 10, 8)),
    *(
        Arm(f"{steps} steps, reuse {reuse}", {"num_steps": steps, "reuse": reuse})
        for steps, reuse in (
            (20, "1:3"),
            (14, "1:2"),
            (14, "1:3"),
            (10, "1:2"),
            (10, "1:3"),
            (8, "1:2"),
        )
    ),
    *(
        Arm(
            f"{steps} steps, guided below 0.7",
            {"num_steps": steps, "reuse": "none", "guidance_interval": (0.0, 0.7)},
        )
        for steps in (10, 8)
    ),
    # Whole, only a call without reuse would be compiled.
    Arm("10 steps, reuse 1:2, compiled", {"num_steps": 10, "reuse": "1:2"}, compile="blocks"),
)
LARGE_ARMS = (
    Arm("paper-style: fp32, two calls", {}, apart=True, batch_size=500),
    Arm("ours: one call, our batches", {}),
    Arm("ours, auto precision", {"mixed_precision": "auto"}),
    Arm("ours, auto precision, compiled", {"mixed_precision": "auto"}, compile="model"),
)
LARGE_STEPS = 5


class InTwoCalls(nn.Module):
    """A network that takes a batch of conditional and unconditional halves in two calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self.network(*half) for half in zip(*(part.chunk(2) for part in (x, timesteps, y)))])


def network_of(arm: Arm, model: UViT) -> Any:
    """Prepares an arm's own copy of the network."""
    network = copy.deepcopy(model).eval()
    compile_model(network, arm.compile)
    return InTwoCalls(network) if arm.apart else network


def draw(arm: Arm, config: Config, network: Any, labels: Sequence[int], seed: int) -> Tensor:
    """Draws the images of an arm."""
    given: SampleConfig = dataclasses.replace(config.sample, **arm.sampling)
    return generate(network, dataclasses.replace(config, sample=given), labels, seed, arm.batch_size)


def time_large(num_images: int, guidance: float, rounds: int, device: torch.device) -> dict[str, float]:
    """Returns the images/s of S/2 by each arm, at equal evaluations."""
    torch.manual_seed(0)
    config = Config(
        model=UViTConfig(**SIZES["small"], num_classes=10, null_class=True),
        sample=SampleConfig(num_steps=LARGE_STEPS, guidance=guidance),
    )
    model, labels = UViT(config.model).to(device), [0] * num_images
    arms = {}
    for arm in LARGE_ARMS:
        arms[arm.name] = functools.partial(draw, arm, config, network_of(arm, model), labels, 0)
    times = median_times(arms, rounds, warm_up=1)
    return {name: num_images / seconds for name, seconds in times.items()}


def time_digits(given: Arguments, device: torch.device) -> dict[str, list[dict[str, float]]]:
    """Returns images/s of a digits run and what they are like, by each arm and seed."""
    config, model = load_run(given.checkpoint, "auto", device)
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, guidance=given.guidance))
    set_up_process(config.train.num_threads)
    judge = Judge(config, given.num_images)

    runs: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in ARMS}
    networks = {arm.name: network_of(arm, model) for arm in ARMS}
    for arm in ARMS:  # warms up, and compiles for whole batches and the last
        few = given.num_images if arm.compile != "no" else 1
        draw(arm, config, networks[arm.name], judge.labels[:few], 0)
    with tqdm(total=len(ARMS) * len(given.seeds), unit="set") as progress:
        for seed in given.seeds:
            for arm in ARMS:
                started = time.perf_counter()
                images = draw(arm, config, networks[arm.name], judge.labels, seed)
                seconds = time.perf_counter() - started
                runs[arm.name].append({"images_per_second": len(images) / seconds, **judge(images)})
                progress.update()
    return runs


def main(arguments: list[str]) -> None:
    """Draws with all arms and writes the figures."""
    given = parse(Arguments, arguments, __doc__)
    device = best_device()
    if given.threads:
        torch.set_num_threads(given.threads)
    figures: dict[str, Any] = {"guidance": given.guidance, "runs": {}}
    if given.large_images:  # first, for the run may ask for threads of its own
        figures["S/2 threads"] = torch.get_num_threads()
        figures["S/2 images/s"] = time_large(given.large_images, given.guidance, given.large_rounds, device)
        save_result("sample", figures)
        print(f"| S/2, guided, {LARGE_STEPS} steps | images/s | x the first |\n|---|---|---|")
        for name, rate in figures["S/2 images/s"].items():
            print(f"| {name} | {rate:.3g} | {rate / figures['S/2 images/s'][LARGE_ARMS[0].name]:.2f} |")
    if given.num_images:
        figures["runs"] = time_digits(given, device)
        save_result("sample", figures)
        print("\n| arm | Fréchet / real | recognised | images/s | x the first |\n|---|---|---|---|---|")
        first = figures["runs"][ARMS[0].name]
        for name, rounds in figures["runs"].items():
            ratio, right, rate = (
                statistics.median(each[figure] for each in rounds)
                for figure in ("frechet_ratio", "recognised", "images_per_second")
            )
            speed = statistics.median(a["images_per_second"] / b["images_per_second"] for a, b in zip(rounds, first))
            print(f"| {name} | {ratio:.3f} | {right:.1%} | {rate:.0f} | {speed:.1f} |")


if __name__ == "__main__":
    run(main)
