"""Quality by number of evaluations, of an average velocity and of an instant's: `python benchmarks/few_steps.py`.

Trains configs/NAME_few_steps.py, and configs/NAME.py with its network for the same time, by steps that were timed with
the two in turn, and with those of derivatives in forward mode.
Then draws unguided images from both with few evaluations: the one by its average velocity, the other by
DPM-Solver++(2M). The last arm is what the paper's code does, with guidance: 50 evaluations, each in two calls. Writes
benchmarks/results/few_steps.json, a table and a picture for each data set. The same command goes on where it was
stopped, from runs/few_steps.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from judged_runs import public_json, same_settings, time_steps, unguided
from matplotlib.figure import Figure
from measure import ROOT, best_device, load_result, log_scale, plot_range, result_path, save_result, spread
from quality import Judge

from sample import ARMS, Arm, draw, network_of
from uvit import Config
from uvit.common.cli import parse, run
from uvit.common.files import atomic_write, lock_folder, make_directory, write_text
from uvit.config import load_config, replace_fields
from uvit.data.loader import load_data
from uvit.networks.encoders import NO_ENCODERS
from uvit.networks.runtime import set_up_process
from uvit.sampling.runs import load_run
from uvit.training.trainer import Trainer

RUNS = ROOT / "runs" / "few_steps"
NAME = "few_steps"
AVERAGE, INSTANT = "average velocity", "DPM-Solver++(2M)"
FORWARD = "average velocity, derivatives in forward mode"
STYLES = {AVERAGE: {"color": "#D55E00", "marker": "o"}, INSTANT: {"color": "#0072B2", "marker": "s"}}
EVALUATIONS = {AVERAGE: (1, 2, 4), INSTANT: (2, 4, 6, 10, 20)}
GUIDED = replace(ARMS[0], sampling={**ARMS[0].sampling, "guidance": 1.5})
"""What the paper's code does, which gives guided images."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    data: tuple[Literal["digits", "fashion"], ...] = ("digits",)
    """Configs to compare on."""
    fashion: str | None = None
    """Folder of Fashion-MNIST's IDX files; None is the name in its config."""
    scale: float = 1.0
    """Steps of training, as a multiple of those in configs/NAME_few_steps.py."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training."""
    num_images: int = 2_000
    """Images of each."""
    rounds: int = 30
    """Timed steps of training of each."""


def configs_of(name: str, given: Arguments) -> dict[str, Config]:
    """Returns the config of each arm, the second with the steps and, but for the interval, the network of the first."""
    configs = {}
    few, ordinary = (load_config(ROOT / "configs" / f"{each}.py") for each in (f"{name}_few_steps", name))
    instant = replace(ordinary, model=replace_fields(few.model, {"takes_interval": False}))
    num_steps = round(given.scale * few.train.num_steps)
    for arm, config in ((AVERAGE, few), (INSTANT, instant)):
        data = replace(config.data, name=given.fashion) if name == "fashion" and given.fashion else config.data
        train = replace(config.train, num_steps=num_steps, num_threads=1, sample_every=0, tracker="none")
        # At any scale over the same share of the steps.
        ema_decay = max(0.0, 1 - (1 - train.ema_decay) * few.train.num_steps / num_steps)
        train = replace(train, ema_decay=ema_decay)
        configs[arm] = replace(config, data=data, train=train, sample=unguided(config.sample))
    return configs


def arms_of(arm: str) -> dict[str, Arm]:
    """Returns the ways of drawing from a trained arm, by their number of evaluations."""
    ways = {str(count): Arm(f"{count} evaluations", {"num_steps": count}) for count in EVALUATIONS[arm]}
    return ways if arm == AVERAGE else {**ways, GUIDED.name: GUIDED}


def judge_run(arm: str, run_dir: Path, judge: Judge) -> dict[str, dict[str, float]]:
    """Draws from a trained run in each way; returns what the images are like, and how many are drawn in a second."""
    config, model = load_run(str(run_dir), "auto", best_device())
    found = {}
    for name, way in arms_of(arm).items():
        network = network_of(way, model)
        draw(way, config, network, judge.labels[:1], 0)  # warms up
        started = time.perf_counter()
        images = draw(way, config, network, judge.labels, 0)
        seconds = time.perf_counter() - started
        found[name] = {**judge(images), "images_per_second": len(images) / seconds}
    return found


def compare(name: str, given: Arguments) -> None:
    """Trains and judges all that is not done yet on one data set, and writes the figures after each run."""
    configs = configs_of(name, given)
    data = load_data(configs[AVERAGE].data, configs[AVERAGE].model)
    kept = load_result(NAME).get("data", {})
    figures: dict[str, Any] = kept.get(name, {})
    public = {arm: public_json(each, name) for arm, each in configs.items()}
    settings = {"num_images": given.num_images, "configs": public}  # figures of another recipe are measured anew
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    if not same_settings(figures.get("settings"), settings):
        few = configs[AVERAGE]
        forward = replace(few, process=replace(few.process, derivative="forward"))
        seconds = time_steps({**configs, FORWARD: forward}, data, given.rounds)
        num_steps = configs[AVERAGE].train.num_steps
        steps = {AVERAGE: num_steps, INSTANT: round(num_steps * seconds[AVERAGE] / seconds[INSTANT])}
        figures = {"settings": settings, "step_seconds": seconds, "steps": steps, "runs": []}
    judge = Judge(configs[AVERAGE], given.num_images, best_device())
    for seed in given.seeds:
        for arm, config in configs.items():
            if any((each["arm"], each["seed"]) == (arm, seed) for each in figures["runs"]):
                continue
            steps = figures["steps"][arm]
            run_dir = RUNS / f"{name}-{'average' if arm == AVERAGE else 'instant'}-{steps}-seed-{seed}-{digest}"
            make_directory(run_dir)
            train = replace(config.train, num_steps=steps, seed=seed)
            Trainer(replace(config, train=train), data, NO_ENCODERS, run_dir).train()
            figures["runs"].append({"arm": arm, "seed": seed, "drawn": judge_run(arm, run_dir, judge)})
            path = save_result(NAME, {"data": {**load_result(NAME).get("data", {}), name: figures}})
            write_text(path.with_suffix(".md"), tables_of(load_result(NAME)["data"]))
            draw_curves(figures, path.with_name(f"{path.stem}_{name}.png"))


def of_arm(figures: Mapping[str, Any], arm: str, way: str, quality: str) -> list[float]:
    """Returns a figure of each seed."""
    return [each["drawn"][way][quality] for each in figures["runs"] if each["arm"] == arm]


def tables_of(data: Mapping[str, Any]) -> str:
    """Returns a table for each data set, the median and range of the seeds, in Markdown."""
    lines = []
    for name, figures in data.items():
        ms = {arm: f"{1000 * seconds:.0f} ms" for arm, seconds in figures["step_seconds"].items()}
        trained = ", ".join(
            f"{num_steps:,} steps of {ms[arm]} for {arm}" for arm, num_steps in figures["steps"].items()
        )
        timed = f" With derivatives in forward mode, the first ones take {ms[FORWARD]}."
        lines += [f"## {name}", "", f"Trained for {trained}.{timed}", ""]
        lines += ["| drawn by | recognised | Fréchet / real | images/s |", "|---|---|---|---|"]
        for arm in STYLES:
            for way in arms_of(arm) if any(each["arm"] == arm for each in figures["runs"]) else ():
                label = way if way == GUIDED.name else f"{arm}, {way} evaluation{'s' if way != '1' else ''}"
                cells = [
                    spread(of_arm(figures, arm, way, quality), form)
                    for quality, form in (("recognised", ".1%"), ("frechet_ratio", ".2f"), ("images_per_second", ".0f"))
                ]
                lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def draw_curves(figures: Mapping[str, Any], path: Path) -> None:
    """Plots quality over evaluations, the median and range of the seeds."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for arm, style in STYLES.items():
        runs = [each["drawn"] for each in figures["runs"] if each["arm"] == arm]
        counts = EVALUATIONS[arm]
        curves = [[drawn[str(count)]["frechet_ratio"] for count in counts] for drawn in runs]
        if curves:
            plot_range(axes, counts, curves, f"{arm}, {figures['steps'][arm]:,} steps of training", **style)
    axes.set(xscale="log", xlabel="evaluations of the network", ylabel="Fréchet distance / real")
    ticks = sorted({count for counts in EVALUATIONS.values() for count in counts})
    axes.set_xticks(ticks, list(map(str, ticks)))
    log_scale(axes)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(arguments: Sequence[str]) -> None:
    """Compares on each data set and prints the tables."""
    given = parse(Arguments, arguments, __doc__)
    set_up_process(1)
    make_directory(RUNS)
    with lock_folder(RUNS):
        for name in given.data:
            compare(name, given)
    print(result_path(NAME).with_suffix(".md").read_text())


if __name__ == "__main__":
    run(main)
