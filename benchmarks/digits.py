"""The digits recipe against the paper's, equal network, steps and batch: `python benchmarks/digits.py`.

Each arm trains from scratch for each seed through train.py and is measured by evaluate.py on the held-out images.
Writes benchmarks/results/digits.json and prints the table.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from measure import ROOT, save_result, spread

from uvit.common.cli import parse, run

# The paper's process, optimizer and sampler; the EMA is that of our config, since 0.9999 has hardly left the start by
# the end.
PAPER = (
    "--process.schedule vp --process.prediction noise --process.time_distribution uniform "
    "--optim.name adamw --optim.lr 2e-4 --optim.betas 0.99 0.999 --optim.weight_decay 0.03 --optim.decay constant "
    "--model.qk_norm False "
    "--sample.sampler dpm_solver_fast --sample.num_steps 50 --sample.spacing log_snr --sample.t_end 1e-4 "
    "--sample.reuse none"
)
ARMS = {"ours": [], "paper": PAPER.split()}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training; evaluation always draws with seed 0."""
    arms: tuple[Literal["ours", "paper"], ...] = ("ours", "paper")
    """Recipes to train."""


def train_and_measure(overrides: list[str], seed: int, folder: str) -> dict[str, float]:
    """Trains one arm with one seed; returns the seconds of the whole training command and the two figures."""
    common = ["--train.seed", str(seed), "--train.run_dir", folder, "--train.sample_every", "0"]
    started = time.perf_counter()
    subprocess.run([sys.executable, "train.py", "configs/digits.py", *common, *overrides], cwd=ROOT, check=True)
    seconds = time.perf_counter() - started
    subprocess.run([sys.executable, "evaluate.py", "--checkpoint", folder], cwd=ROOT, check=True)
    result = json.loads(Path(folder, "evaluation.json").read_text())
    ratio = result["frechet"] / result["frechet_real"]
    return {"seed": seed, "seconds": seconds, "recognised": result["recognised"], "frechet_ratio": ratio}


def main(arguments: list[str]) -> None:
    """Runs the arms and writes the results."""
    given = parse(Arguments, arguments, __doc__)
    results = {}
    for arm in given.arms:
        runs = []
        for seed in given.seeds:
            with tempfile.TemporaryDirectory() as folder:
                runs.append(train_and_measure(ARMS[arm], seed, f"{folder}/{arm}"))
        results[arm] = runs
    save_result("digits", {"runs": results})
    print("| recipe | train.py, s | recognised | Fréchet / real |\n|---|---|---|---|")
    for arm, runs in results.items():
        seconds, recognised, ratio = (
            spread([entry[name] for entry in runs], form)
            for name, form in (("seconds", ".0f"), ("recognised", ".1%"), ("frechet_ratio", ".2f"))
        )
        print(f"| {arm} | {seconds} | {recognised} | {ratio} |")


if __name__ == "__main__":
    run(main)
