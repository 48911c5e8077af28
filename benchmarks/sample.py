"""Quality and speed of sampling a digits run: `python benchmarks/sample.py --checkpoint runs/digits`.

Every arm draws the same labels from the same noise with the same guidance, one round after the other, so that what
else the machine does falls on all alike. The first arm is what the reference code does: 50 evaluations, with and
without the label in two calls. Writes benchmarks/results/sample.json and prints the table.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from torch import Tensor, nn
from tqdm import tqdm

from uvit.cli import parse, run
from uvit.config import Config, SampleConfig
from uvit.data import read_all
from uvit.evaluation import build_classifier, choose_labels
from uvit.features import PixelFeatures
from uvit.generate import generate, load_run, set_threads
from uvit.loader import load_data
from uvit.metrics import Gaussian, Moments, frechet_distance

RESULT = Path(__file__).parent / "results" / "sample.json"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    checkpoint: str = "runs/digits"
    """Run of the digits."""
    guidance: float = 1.5
    """Guidance w of every arm."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of drawing, a round for each."""
    num_images: int = 2000
    """Images of an arm and a round."""
    batch_size: int = 500
    """Images at a time."""


@dataclass(frozen=True)
class Arm:
    name: str
    sampling: dict[str, Any]
    apart: bool = False
    """Whether the network is called with and without the label apart."""


ARMS = (
    Arm("the paper's: 50 x 2 calls", {"sampler": "dpm_solver_fast", "num_steps": 50}, apart=True),
    Arm("50 steps", {"num_steps": 50}),
    *(Arm(f"{steps} steps", {"num_steps": steps}) for steps in (20, 14, 10, 8)),
    *(
        Arm(f"{steps} steps, reuse {reuse}", {"num_steps": steps, "reuse": reuse})
        for steps, reuse in ((20, "2:3"), (20, "1:2"), (20, "1:3"), (20, "1:4"), (14, "1:2"), (14, "1:3"), (10, "1:2"))
    ),
)


class InTwoCalls(nn.Module):
    """A network that takes a batch of conditional and unconditional halves in two calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self.network(*half) for half in zip(*(part.chunk(2) for part in (x, timesteps, y)))])


def draw(arm: Arm, config: Config, model: nn.Module, labels: Sequence[int], seed: int, batch_size: int) -> Tensor:
    """Draws the images of an arm."""
    given: SampleConfig = dataclasses.replace(config.sample, **arm.sampling)
    network: Any = InTwoCalls(model) if arm.apart else model
    return generate(network, dataclasses.replace(config, sample=given), labels, seed, batch_size)


def gaussian_of(features: PixelFeatures) -> Callable[[Tensor], Gaussian]:
    """Returns what the Fréchet distance sees of images."""
    return lambda images: Moments(features.num_features).update(features(images)[0]).gaussian


def main(arguments: list[str]) -> None:
    """Draws with all arms and writes the figures."""
    given = parse(Arguments, arguments, "benchmarks/sample.py", __doc__ or "")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, model = load_run(given.checkpoint, "auto", device)
    config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, guidance=given.guidance))
    set_threads(config)
    train_part, held_out = (load_data(config.data, config.model, train=part) for part in (True, False))
    to_gaussian = gaussian_of(PixelFeatures(train_part.shape))
    target = to_gaussian(read_all(held_out).images)
    real = frechet_distance(to_gaussian(read_all(train_part).images), target)
    classifier = build_classifier("svm", None, train_part, device)
    labels = choose_labels(given.num_images, config.model.num_classes, "balanced", seed=0)

    runs: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in ARMS}
    draw(ARMS[0], config, model, labels[: given.batch_size], 0, given.batch_size)  # warms up
    with tqdm(total=len(ARMS) * len(given.seeds), unit="set") as progress:
        for seed in given.seeds:
            for arm in ARMS:
                started = time.perf_counter()
                images = draw(arm, config, model, labels, seed, given.batch_size)
                seconds = time.perf_counter() - started
                right = (classifier.classify(images) == torch.tensor(labels)).double().mean().item()
                ratio = frechet_distance(to_gaussian(images), target) / real
                rate = len(images) / seconds
                runs[arm.name].append({"images_per_second": rate, "frechet_ratio": ratio, "recognised": right})
                progress.update()

    RESULT.write_text(json.dumps({**describe_machine(), "guidance": given.guidance, "runs": runs}, indent=2) + "\n")
    print("| arm | Fréchet / real | recognised | images/s | x the first |\n|---|---|---|---|---|")
    first = runs[ARMS[0].name]
    for name, rounds in runs.items():
        ratio, right, rate = (
            statistics.median(each[figure] for each in rounds)
            for figure in ("frechet_ratio", "recognised", "images_per_second")
        )
        speed = statistics.median(a["images_per_second"] / b["images_per_second"] for a, b in zip(rounds, first))
        print(f"| {name} | {ratio:.3f} | {right:.1%} | {rate:.0f} | {speed:.1f} |")


if __name__ == "__main__":
    run(main)
