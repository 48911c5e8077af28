"""Writes the tables of speed in README.md from benchmarks/results/: `python benchmarks/table.py`.

Only what has been measured is there: a GPU's files add rows of their own.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import RESULTS
from time_to_quality import describe

from uvit.common.cli import run
from uvit.common.errors import InputError

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- made by benchmarks/table.py -->\n", "<!-- end of what benchmarks/table.py made -->"
TRAIN_ARMS = ("paper-style", "ours", "ours, blocks compiled", "ours, model compiled", "DiT", "U-Net")
SAMPLE_ARMS = (
    "the paper's: 50 x 2 calls",
    "the same in one call, our batches",
    "the same, compiled",
    "20 steps",
    "14 steps, reuse 1:2",
    "10 steps",
    "10 steps, reuse 1:2",
    "10 steps, reuse 1:2, compiled",
    "8 steps, guided below 0.7",
)


def results(name: str) -> list[dict[str, Any]]:
    """Reads a benchmark's results of all devices, the CPU's first."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}*.json")) if path.stem == name or
            path.stem.startswith(f"{name}_nvidia")]  # fmt: skip


def speed(rate: float) -> str:
    """Formats images a second in three digits."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def row(*cells: str) -> str:
    """Returns a row of a table."""
    return f"| {' | '.join(cells)} |"


def train_cell(figures: dict[str, Any] | None) -> str:
    """Describes an arm; empty where it was not measured."""
    if figures is None:
        return ""
    if "out_of_memory" in figures:
        return "out of memory"
    return f"{speed(figures['images_per_second'])} ({figures['speed_ratio']:.2f} ×)"


def train_rows() -> Iterator[str]:
    """A row for each model, a column for each arm."""
    yield row("training, images/s", *TRAIN_ARMS)
    yield "|---" * (1 + len(TRAIN_ARMS)) + "|"
    for result in results("train"):
        for name, model in result["models"].items():
            precision = "fp32" if model["precision"] == "no" else model["precision"]
            cells = [train_cell(model["arms"].get(arm)) for arm in TRAIN_ARMS]
            yield row(f"{name}, batch {model['batch_size']}, {precision}, {result['device']}", *cells)


def sample_rows() -> Iterator[str]:
    """A row for each arm: medians over the seeds."""
    for result in results("sample"):
        if runs := result["runs"]:
            yield row(f"guided digits, {result['device']}", "Fréchet / real", "recognised", "images/s", "×")
            yield "|---|---|---|---|---|"
            first = runs[SAMPLE_ARMS[0]]
            for arm in filter(runs.__contains__, SAMPLE_ARMS):
                ratio, right, rate = (
                    statistics.median(each[figure] for each in runs[arm])
                    for figure in ("frechet_ratio", "recognised", "images_per_second")
                )
                ratios = [one["images_per_second"] / other["images_per_second"] for one, other in zip(runs[arm], first)]
                yield row(arm, f"{ratio:.2f}", f"{right:.1%}", f"{rate:.0f}", f"{statistics.median(ratios):.1f}")
            yield ""
        if rates := result.get("S/2 images/s"):
            first_rate, *_ = rates.values()
            yield row(f"guided S/2, random weights, 5 steps, {result['device']}", "images/s", "×")
            yield "|---|---|---|"
            for arm, rate in rates.items():
                yield row(arm, f"{rate:.3g}", f"{rate / first_rate:.2f}")
            yield ""


def quality_rows() -> Iterator[str]:
    """A row for each target: the median time of the seeds."""
    for result in results("time_to_quality"):
        limits = {arm: min(points[-1]["seconds"] for points in seeds) for arm, seeds in result["runs"].items()}
        yield row(f"digits until, {result['device']}", "ours", "the paper's recipe")
        yield "|---|---|---|"
        for target in result["times"]["ours"]:
            yield row(target, *(describe(result["times"][arm][target], limits[arm]) for arm in ("ours", "paper")))


def main(_: list[str]) -> None:
    """Replaces what stands between the marks in README.md."""
    parts = ("\n".join(rows()).strip() for rows in (train_rows, quality_rows, sample_rows))
    parts = (part for part in parts if part)
    text, count = re.subn(
        f"{re.escape(BEGIN)}.*{re.escape(END)}",
        lambda _: BEGIN + "\n" + "\n\n".join(parts) + "\n\n" + END,
        README.read_text(),
        flags=re.DOTALL,
    )
    if count != 1:
        raise InputError(f"{README.name} must hold the marks {BEGIN.strip()!r} and {END!r} once, found {count}")
    README.write_text(text)


if __name__ == "__main__":
    run(main)
