"""Do a U-ViT's long skips help with large patches of pixels? `python benchmarks/pixels.py --fashion FOLDER`.

JiT (arXiv 2511.13720) predicts the clean image from large patches, with the loss on the velocity, and its users asked
what the long skips of a U-ViT do there (JiT's issue 11). Arms of configs/fashion.py, with a quarter of its steps: the
network predicts the velocity, or the image, with times kept 0.001 from the ends or with the divisor t clamped at 0.05,
which at the config's times concerns one image in 600; and it has long skips, or none. There is no final convolution, as
in JiT, so that no arm has a lucky start of its few weights. All else is the config's, the learning rate too. Patches
are embedded without a bottleneck: one would take the noise of a patch from the network, which a velocity needs and an
image does not.

A patch of 7x7 has 49 values for a token of width 128, one of 14x14 (`--patches 14`) has 196: more than its token can
hold, as with JiT's larger patches. Averages from along the way draw unguided images, which are judged as by
evaluate.py. Writes benchmarks/results/pixels.json and .md, and for each size of patch pictures of quality over steps
and of samples from the same noise. The same command goes on where it was stopped, from the JSON and from runs/pixels;
with other --patches or --seeds it adds theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from judged_runs import (
    Run,
    do_all,
    draw_quality,
    draw_samples,
    give_points,
    plan,
    public_json,
    same_settings,
    study_config,
    take_points,
)
from measure import RESULTS, ROOT, load_result, result_path, save_result, spread
from quality import Judge

from uvit import Config
from uvit.common.cli import parse, run
from uvit.common.files import lock_folder, make_directory, write_text
from uvit.config import replace_fields
from uvit.networks.runtime import set_up_process
from uvit.weights.build import build_network

RUNS = ROOT / "runs" / "pixels"
NAME, DATA = "pixels", "fashion"
STEPS_SHARE = 0.25
"""Steps of a run, as a share of the config's, at scale 1: about four minutes on one core."""
DATA_PREDICTION = {"prediction": "data", "loss_space": "flow"}
# Okabe and Ito's colours; dashed where there are no skips.
PROCESSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "velocity": ({"prediction": "flow"}, {"color": "#0072B2", "marker": "o"}),
    "image": (DATA_PREDICTION, {"color": "#D55E00", "marker": "s"}),
    "image, divisor at least 0.05": ({**DATA_PREDICTION, "min_divisor": 0.05}, {"color": "#009E73", "marker": "^"}),
}
SKIPS: dict[str, tuple[str, dict[str, Any]]] = {
    "long skips": ("concat", {}),
    "no skips": ("none", {"linestyle": "--"}),
}
KEY = ("seed", "arm")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    fashion: str | None = None
    """Folder of Fashion-MNIST's IDX files; None is the name in configs/fashion.py."""
    patches: tuple[int, ...] = (7,)
    """Sides of patches in pixels to compare at, one after the other: divisors of 28."""
    scale: float = 1.0
    """Steps of a run, as a multiple of a quarter of the config's."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training."""
    num_points: int = 3
    """Steps of a run, evenly spaced, whose averages are judged."""
    num_images: int = 1_000
    """Images of each."""
    jobs: int = 1
    """Runs at a time, each in a process; they share a GPU."""
    output: str = str(RESULTS)
    """Folder for the results."""


def arms_of(base: Config) -> dict[str, Config]:
    """Returns the recipe of each arm."""
    arms = {}
    for (process, (fields, _)), (skips, (skip, _)) in itertools.product(PROCESSES.items(), SKIPS.items()):
        model = replace_fields(base.model, {"skip": skip})
        arms[f"{process}, {skips}"] = replace(base, model=model, process=replace(base.process, **fields))
    return arms


def compare(patch_size: int, given: Arguments) -> None:
    """Trains and judges all that is not done yet for one size of patch, and writes the figures after each run."""
    base, output = study_config(DATA, given.fashion), Path(given.output)
    base = replace(base, model=replace_fields(base.model, {"patch_size": patch_size, "conv": "none"}))
    num_steps = max(1, round(given.scale * STEPS_SHARE * base.train.num_steps))
    lengths = {"num_steps": num_steps, "num_points": given.num_points, "num_images": given.num_images}
    settings = {**lengths, "config": public_json(base, DATA)}
    figures: dict[str, Any] = load_result(NAME, output).get("patches", {}).get(str(patch_size), {})
    if not same_settings(figures.get("settings"), settings):
        figures = {"settings": settings, "runs": []}
    judge = Judge(base, given.num_images)  # which trains a network for the processes to find
    figures["real"] = {"frechet": judge.real, "recognised": judge.recognised_real}
    arms = arms_of(base)
    figures["parameters"] = {arm: build_network(config.model).num_parameters for arm, config in arms.items()}
    planned: dict[tuple, Run] = {
        (seed, arm): plan(config, arm, RUNS / str(patch_size), seed=seed, **lengths)
        for seed in given.seeds
        for arm, config in arms.items()
    }
    give_points(figures["runs"], planned, KEY)
    path = result_path(NAME, output)

    def save() -> None:
        figures["runs"] = take_points(figures["runs"], planned, KEY)
        patches = {**load_result(NAME, output).get("patches", {}), str(patch_size): figures}
        save_result(NAME, {"patches": patches}, output)
        write_text(path.with_suffix(".md"), "\n".join(line for each in patches.items() for line in table_of(*each)))
        if figures["runs"]:
            draw_curves(patch_size, figures, path.with_name(f"{path.stem}_{patch_size}.png"))

    try:
        do_all([*planned.values()], given.jobs, f"patches of {patch_size}x{patch_size}", save)
    finally:
        save()
        first = {arm: planned[given.seeds[0], arm] for arm in arms}
        draw_samples(first, path.with_name(f"{path.stem}_{patch_size}_samples.png"))


def points_of(figures: Mapping[str, Any], arm: str) -> list[list[dict[str, float]]]:
    """Returns the points of each seed that has been trained."""
    return [each["points"] for each in figures["runs"] if each["arm"] == arm]


def table_of(patch_size: str, figures: Mapping[str, Any]) -> list[str]:
    """Returns a table of the last averages, the median and range of the seeds, in Markdown."""
    settings, real = figures["settings"], figures["real"]
    lines = [
        f"## {DATA}, patches of {patch_size}x{patch_size}",
        "",
        f"{settings['num_steps']:,} steps with batches of {settings['config']['train']['batch_size']}. "
        f"{settings['num_images']} unguided images, median and range of the seeds. {real['recognised']:.1%} of "
        "held-out images are recognised.",
        "",
        "| the network predicts | parameters | seeds | recognised | Fréchet / real |",
        "|---|---|---|---|---|",
    ]
    for arm, parameters in figures["parameters"].items():
        ends = [points[-1] for points in points_of(figures, arm)]
        cells = [arm, f"{parameters:,}", str(len(ends))]
        for quality, form in (("recognised", ".1%"), ("frechet_ratio", ".2f")):
            cells.append(spread([end[quality] for end in ends], form) if ends else "")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def draw_curves(patch_size: int, figures: Mapping[str, Any], path: Path) -> None:
    """Plots quality over steps."""
    arms = {}
    for (process, (_, color)), (skips, (_, dashes)) in itertools.product(PROCESSES.items(), SKIPS.items()):
        arm = f"{process}, {skips}"
        arms[arm] = {"runs": points_of(figures, arm), "x_of": itemgetter("step"), **color, **dashes}
    draw_quality(path, f"{DATA}, patches of {patch_size}x{patch_size}", "steps of training", arms)


def main(arguments: Sequence[str]) -> None:
    """Compares the arms for each size of patch and prints the tables."""
    given = parse(Arguments, arguments, __doc__)
    set_up_process(1)
    make_directory(RUNS)
    with lock_folder(RUNS):
        for patch_size in given.patches:
            compare(patch_size, given)
    print(result_path(NAME, Path(given.output)).with_suffix(".md").read_text())


if __name__ == "__main__":
    run(main)
