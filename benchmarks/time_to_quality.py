"""Wall time until digits are good, by the paper's recipe and by ours: `python benchmarks/time_to_quality.py`.

The same network is trained by both recipes, for each seed, through train.py with its checkpoints kept; then each
checkpoint's average draws 2,000 unguided images with the recipe's own sampler, which are compared with the held-out
ones. Time is that of the steps alone. Writes benchmarks/results/time_to_quality.json and .png and prints the table.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from digits import ARMS
from measure import ROOT, save_result
from quality import Judge, averages_of

from uvit.common.cli import parse, run
from uvit.config import CONFIG_FILE, METRICS_FILE, load_config
from uvit.sampling.generate import generate

TARGETS = {
    **{
        f"Fréchet / real ≤ {ratio}": (lambda point, ratio=ratio: point["frechet_ratio"] <= ratio) for ratio in (4, 3, 2)
    },
    **{
        f"recognised ≥ {share:.0%}": (lambda point, share=share: point["recognised"] >= share)
        for share in (0.90, 0.95, 0.97)
    },
    "recognised ≥ 95% and Fréchet / real ≤ 2": lambda point: (
        point["recognised"] >= 0.95 and point["frechet_ratio"] <= 2
    ),
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training."""
    paper_steps: int = 10_000
    """Steps of the paper's recipe; ours has those of its config."""
    paper_points: int = 5
    """Checkpoints of a run of the paper's recipe that are judged."""
    points: int = 30
    """Checkpoints of a run of ours that are judged."""
    num_images: int = 2_000
    """Images of each."""
    jobs: int = 1
    """Runs at a time, each on one thread."""


def seconds_by_step(run_dir: Path) -> dict[int, float]:
    """Returns the time of the steps up to each log line."""
    seconds, before, found = 0.0, 0, {}
    batch_size = load_config(run_dir / CONFIG_FILE).train.batch_size
    for line in (run_dir / METRICS_FILE).read_text().splitlines():
        entry = json.loads(line)
        if "images_per_second" in entry:
            seconds += (entry["step"] - before) * batch_size / entry["images_per_second"]
            before = entry["step"]
            found[before] = seconds
    return found


def train_and_judge(arm: str, seed: int, num_steps: int, num_points: int, num_images: int) -> list[dict[str, float]]:
    """Trains an arm with a seed in a process of its own; returns step, time and quality of its checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        every = max(1, num_steps // num_points)
        options = {"seed": seed, "num_steps": num_steps, "save_every": every, "keep": num_steps}
        options |= {"log_every": every, "sample_every": 0, "tracker": "none", "run_dir": folder}
        words = [word for name, value in options.items() for word in (f"--train.{name}", str(value))]
        command = [sys.executable, "train.py", "configs/digits.py", *ARMS[arm], *words]
        subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
        seconds, config = seconds_by_step(Path(folder)), load_config(Path(folder) / CONFIG_FILE)
        config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, guidance=1.0))
        judge, points = Judge(config, num_images), []
        for step, model in averages_of(Path(folder), config):
            images = generate(model, config, judge.labels, 0)
            points.append({"step": step, "seconds": seconds[step], **judge(images)})
            print(f"{arm}, seed {seed}: {points[-1]}", flush=True)
    return points


def time_to(target: Callable[[dict[str, float]], bool], points: Sequence[dict[str, float]]) -> float | None:
    """Returns the time of the first point that meets a target, or None."""
    return next((point["seconds"] for point in points if target(point)), None)


def describe(times: Sequence[float | None], limit: float) -> str:
    """Formats the median of times, where the seeds that met the target are the most."""
    met = sorted(time for time in times if time is not None)
    if 2 * len(met) <= len(times):
        return f"not within {limit:.0f} s ({len(met)} of {len(times)} seeds)"
    return f"{statistics.median_low([*met, *[limit] * (len(times) - len(met))]):.0f} s"


def draw_picture(runs: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """Plots both figures over time."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), constrained_layout=True)
    for color, (arm, seeds) in zip(("tab:blue", "tab:orange"), runs.items()):
        for points in seeds:
            seconds = [point["seconds"] for point in points]
            label = arm if points is seeds[0] else None
            axes[0].plot(seconds, [point["frechet_ratio"] for point in points], color=color, label=label)
            axes[1].plot(seconds, [point["recognised"] for point in points], color=color)
    axes[0].set(ylabel="Fréchet distance / real", yscale="log")
    axes[1].set(ylabel="recognised as the class asked for", ylim=(0, 1))
    for axis in axes:
        axis.set(xlabel="seconds of training", xscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> None:
    """Trains all arms and writes the figures."""
    given = parse(Arguments, arguments, __doc__)
    torch.set_num_threads(1)
    num_steps = load_config(ROOT / "configs" / "digits.py").train.num_steps
    arms = {"ours": (num_steps, given.points), "paper": (given.paper_steps, given.paper_points)}
    with ThreadPoolExecutor(given.jobs) as pool:
        # The arms in turn, so that what else the machine does falls on both alike.
        futures = {
            (arm, seed): pool.submit(train_and_judge, arm, seed, *lengths, given.num_images)
            for seed in given.seeds
            for arm, lengths in arms.items()
        }
        runs: dict[str, Any] = {arm: [futures[arm, seed].result() for seed in given.seeds] for arm in arms}
    times = {arm: {name: [time_to(target, points) for points in seeds] for name, target in TARGETS.items()}
             for arm, seeds in runs.items()}  # fmt: skip
    path = save_result("time_to_quality", {"jobs": given.jobs, "seeds": given.seeds, "times": times, "runs": runs})
    draw_picture(runs, path.with_suffix(".png"))
    limits = {arm: min(points[-1]["seconds"] for points in seeds) for arm, seeds in runs.items()}
    print("| until | ours | the paper's recipe |\n|---|---|---|")
    for name in TARGETS:
        print(f"| {name} | " + " | ".join(describe(times[arm][name], limits[arm]) for arm in arms) + " |")


if __name__ == "__main__":
    run(main)
