"""The paper's ablations, on digits or another config: `python benchmarks/ablations.py --study skip`.

Trains each choice of one option from scratch, for each seed, by the config's recipe, and measures the Fréchet distance
of pixels to the held-out images along the way. Writes a table (JSON) and a picture to benchmarks/results/.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from measure import RESULTS, ROOT, plot_range, spread
from quality import averages_of

from uvit import Config
from uvit.common.cli import parse, run
from uvit.common.errors import InputError
from uvit.common.files import make_directory
from uvit.config import CONFIG_FILE, METRICS_FILE, load_config
from uvit.data.batch import read_all
from uvit.data.images import to_unit_range
from uvit.data.loader import load_data
from uvit.evaluation.metrics import Gaussian, Moments, frechet_distance
from uvit.sampling.conditions import resolve_conditions
from uvit.sampling.generate import generate

NUM_IMAGES = 1000

# The option of each study in figure 2 of the paper, and its choices in the paper's order.
STUDIES = {
    "skip": ("model.skip", ("concat", "add", "linear_add", "add_linear", "none")),
    "time": ("model.time_conditioning", ("token", "adaln")),
    "conv": ("model.conv", ("image", "tokens", "none")),
    "patch_embed": ("model.patch_embed", ("linear", "conv")),
    "pos_embed": ("model.pos_embed", ("learned", "sincos2d")),
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    study: Literal["skip", "time", "conv", "patch_embed", "pos_embed"] = "skip"
    """Which of the paper's five studies."""
    config: str = "configs/digits.py"
    """Recipe, such as configs/cifar10.py where CIFAR-10 can be had."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training."""
    num_steps: int = 1000
    """Steps of each run."""
    measure_every: int = 250
    """Steps between measurements."""
    output: str = str(RESULTS)
    """Folder for the table and the picture."""
    jobs: int = 1
    """Runs at the same time, one CPU thread each."""


def data_name(given: Arguments) -> str:
    """Names the data by the config."""
    return Path(given.config).stem


def pixel_gaussian(images: torch.Tensor) -> Gaussian:
    """Fits (N, C, H, W) uint8 images as vectors in [-1, 1]."""
    vectors = to_unit_range(images).flatten(1)
    return Moments(vectors.shape[1]).update(vectors).gaussian


def distances(run_dir: Path, config: Config) -> dict[int, float]:
    """Returns the Fréchet distance of every checkpoint's averaged weights, over that of the real training part."""
    train_part, held_out = (
        pixel_gaussian(read_all(load_data(config.data, config.model, train=part)).images) for part in (True, False)
    )
    conditions = resolve_conditions(config)
    wanted = [each for each in conditions for _ in range(NUM_IMAGES // len(conditions))]
    found = {}
    for step, model in averages_of(run_dir, config):
        drawn = pixel_gaussian(generate(model, config, wanted, seed=0, batch_size=200))
        found[step] = frechet_distance(drawn, held_out) / frechet_distance(train_part, held_out)
    return found


def train_and_measure(given: Arguments, choice: str, seed: int) -> dict:
    """Trains one choice with one seed; returns its losses and distances by step."""
    option = STUDIES[given.study][0]
    overrides = {
        option: choice,
        "train.seed": seed,
        "train.num_steps": given.num_steps,
        "train.save_every": given.measure_every,
        "train.keep": given.num_steps,
        "train.sample_every": 0,
        "train.tracker": "none",
        "sample.guidance": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        flags = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, "train.py", given.config, "--train.run_dir", folder, *flags]
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise InputError(f"{option} {choice}, seed {seed}: {done.stderr.splitlines()[-1].removeprefix('error: ')}")
        lines = [json.loads(line) for line in Path(folder, METRICS_FILE).read_text().splitlines()]
        found = distances(Path(folder), load_config(Path(folder, CONFIG_FILE)))
    print(f"{choice}, seed {seed}: {found}", flush=True)
    return {
        "choice": choice,
        "seed": seed,
        "loss": {x["step"]: x["loss"] for x in lines if "skipped" not in x},
        "frechet_ratio": found,
    }


def draw(given: Arguments, runs: list[dict], path: Path) -> None:
    """Draws distance and loss over steps, the median of the seeds with their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name, label in zip(
        figure.subplots(1, 2), ("frechet_ratio", "loss"), ("Fréchet distance / real", "training loss")
    ):
        for choice in STUDIES[given.study][1]:
            curves = [entry[name] for entry in runs if entry["choice"] == choice]
            plot_range(axes, list(curves[0]), [list(curve.values()) for curve in curves], choice, marker=".")
        axes.set(xlabel="steps", ylabel=label, yscale="log")
        axes.legend()
    figure.suptitle(f"{STUDIES[given.study][0]} on {data_name(given)}, median and range of {len(given.seeds)} seeds")
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str]) -> None:
    """Runs the study and writes its table and picture."""
    given = parse(Arguments, arguments, __doc__)
    torch.set_num_threads(1)
    wanted = [(choice, seed) for seed in given.seeds for choice in STUDIES[given.study][1]]
    with ThreadPoolExecutor(given.jobs) as pool:
        runs = list(pool.map(lambda pair: train_and_measure(given, *pair), wanted))
    results = Path(given.output)
    make_directory(results)
    name = "_".join(["ablation", *([] if data_name(given) == "digits" else [data_name(given)]), given.study])
    protocol = f"{given.config}, {given.num_steps} steps, {NUM_IMAGES} images, unguided, against the held-out fifth"
    table = {"protocol": protocol, "torch": torch.__version__, "runs": runs}
    (results / f"{name}.json").write_text(json.dumps(table, indent=1) + "\n")
    draw(given, runs, results / f"{name}.png")

    print(f"{protocol}\n\n| {STUDIES[given.study][0]} | Fréchet / real | loss |\n|---|---|---|")
    for choice in STUDIES[given.study][1]:
        ends = [
            (list(entry["frechet_ratio"].values())[-1], list(entry["loss"].values())[-1])
            for entry in runs
            if entry["choice"] == choice
        ]
        cells = [spread(values, ".3g") for values in zip(*ends)]
        print(f"| {choice} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run(main)
