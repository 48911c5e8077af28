"""U-Net or U-ViT, with and without skips, at equal FLOPs and at equal time: `python benchmarks/backbones.py`.

Each arm is the data's config with another network: the same images, process, optimizer and solver, and an average over
the same share of the run. Its learning rate comes from short runs, by their Fréchet distance from training images
alone. Then each arm trains for each seed until it has spent the training FLOPs of the config, and again until it has
spent its time, by steps that were timed on this machine with the arms in turn. Averages from along the way draw
unguided images, which are judged as by evaluate.py. Writes benchmarks/results/backbones.json and .md, and for each data
set pictures of quality over FLOPs and over time, and of samples from the same noise.

The same command goes on where it was stopped, from the JSON and from folders in runs/backbones, each named by its
run's config; with other --seeds or --lrs it adds theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from judged_runs import (
    Run,
    do_all,
    draw_samples,
    give_points,
    plan,
    plot_quality,
    public_json,
    same_settings,
    study_config,
    take_points,
    time_steps,
)
from matplotlib.figure import Figure
from measure import (
    RESULTS,
    ROOT,
    TRAINING_PASSES,
    forward_flops,
    load_result,
    log_scale,
    result_path,
    save_result,
    spread,
)
from quality import Judge

from uvit import Config, UNetConfig, UViTConfig
from uvit.common.cli import parse, run
from uvit.common.errors import TrainingError
from uvit.common.files import atomic_write, lock_folder, make_directory, write_text
from uvit.config import Compile
from uvit.data.loader import load_data
from uvit.networks.runtime import set_up_process
from uvit.weights.build import build_network

RUNS = ROOT / "runs" / "backbones"
NAME = "backbones"
BASE = "U-ViT"
"""The arm with the kind of network that the configs have, whose steps are the budget."""
# Okabe and Ito's colours; dashed where there are no skips.
STYLES = {
    "U-Net": {"color": "#0072B2", "marker": "o"},
    "U-Net, no skips": {"color": "#56B4E9", "marker": "o", "linestyle": "--"},
    BASE: {"color": "#D55E00", "marker": "s"},
    "U-ViT, no skips": {"color": "#E69F00", "marker": "s", "linestyle": "--"},
    "DiT-like (adaLN, no skips)": {"color": "#009E73", "marker": "^", "linestyle": "--"},
}
BUDGETS = {"flops": "equal training FLOPs", "time": "equal training time"}
ATTENTION_SIDE = 16
"""Feature maps of a U-Net up to this side have attention, as in DDPM's and ADM's."""
KEY = ("seed", "budget", "arm")
LR_RATIO = 10 ** (1 / 3)
"""Between the learning rates of a search that goes on."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    data: tuple[Literal["digits", "photos", "fashion"], ...] = ("digits",)
    """Configs to compare on, one after the other."""
    fashion: str | None = None
    """Folder of Fashion-MNIST's IDX files; None is the name in configs/fashion.py."""
    only: Literal["both", "flops", "time"] = "both"
    """Budgets to train for."""
    scale: float = 1.0
    """The budget, as a multiple of what the data's config spends."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training."""
    lrs: tuple[float, ...] = (4.3e-3, 9.3e-3, 2e-2, 4.3e-2)
    """Learning rates to search; an arm whose best is the first or last searches on from there."""
    search_share: float = 0.2
    """Length of a run of the search, as a share of the arm's steps at equal FLOPs."""
    num_points: int = 3
    """Steps of a run, evenly spaced, whose averages are judged."""
    num_images: int = 1_000
    """Images of each."""
    rounds: int = 30
    """Timed steps of each arm."""
    compile: Compile = "no"
    """How networks are compiled to train."""
    jobs: int = 1
    """Runs at a time, each in a process; they share a GPU."""
    output: str = str(RESULTS)
    """Folder for the results."""


def arms_of(model: UViTConfig) -> dict[str, UViTConfig | UNetConfig]:
    """Returns the network of each arm, for the images and labels of the config's own."""
    side = min(model.image_shape)
    channel_mult = (1, 1) if side <= 8 else (1, 2, 2)
    # Group norm allows no narrower one.
    unet = UNetConfig(
        **{name: getattr(model, name) for name in ("img_size", "in_chans", "num_classes", "null_class")},
        model_channels=32,
        channel_mult=channel_mult,
        num_res_blocks=1,
        head_dim=32,
        attention_sizes=tuple(side >> n for n in range(len(channel_mult)) if side >> n <= ATTENTION_SIDE),
    )
    networks = unet, replace(unet, skips=False), model, replace(model, skip="none")
    return dict(zip(STYLES, (*networks, replace(model, skip="none", time_conditioning="adaln"))))


def measure_arms(base: Config, rounds: int) -> dict[str, dict[str, Any]]:
    """Measures parameters, FLOPs and the time of a whole training step of each arm."""
    arms = arms_of(base.model)
    configs = {arm: replace(base, model=model) for arm, model in arms.items()}
    seconds = time_steps(configs, load_data(base.data, base.model), rounds)
    return {
        arm: {
            "parameters": build_network(model).num_parameters,
            # The counter does not know all fused kernels.
            "gflops": forward_flops(build_network(replace(model, attention="math")), model) / 1e9,
            "step_seconds": seconds[arm],
        }
        for arm, model in arms.items()
    }


def best_lr(found: Mapping[str, float | None]) -> float:
    """Returns the learning rate of the least distance; that of one at which training fails is None.

    Raises:
        TrainingError: it fails at all.
    """
    distances = {lr: distance for lr, distance in found.items() if distance is not None}
    if not distances:
        raise TrainingError(f"training fails at all of the learning rates {', '.join(found)}: give lower --lrs")
    return float(min(distances, key=lambda lr: distances[lr]))


def lrs_to_search(lrs: Sequence[float], found: Mapping[str, float | None]) -> list[float]:
    """Returns those not searched yet, or else what lies beyond if the best one is an end."""
    if left := [lr for lr in lrs if str(lr) not in found]:
        return left
    best, tried = best_lr(found), [float(lr) for lr in found]
    beyond = [best / LR_RATIO] * (best == min(tried)) + [best * LR_RATIO] * (best == max(tried))
    return [float(f"{lr:.2g}") for lr in beyond]


class Study:
    """The comparison on one data set.

    Args:
        name: of the data's config.
        given: the options.
    """

    def __init__(self, name: str, given: Arguments) -> None:
        self.name, self.given, self.output = name, given, Path(given.output)
        self.base = study_config(name, given.fashion, given.compile)
        self.arms = arms_of(self.base.model)
        self.planned: dict[tuple[int, str, str], Run] = {}
        changeable = ("data", "fashion", "only", "seeds", "lrs", "jobs", "output")
        settings = {key: value for key, value in asdict(given).items() if key not in changeable}
        settings = json.loads(json.dumps({**settings, "config": public_json(self.base, name)}))
        self.figures: dict[str, Any] = load_result(NAME, self.output).get("data", {}).get(name, {})
        if not same_settings(self.figures.get("settings"), settings):
            self.figures = {"settings": settings, "arms": measure_arms(self.base, given.rounds), "runs": []}

    def steps(self, arm: str, budget: str, share: float = 1.0) -> int:
        """Returns how many steps an arm takes for a share of a budget."""
        cost = {"flops": "gflops", "time": "step_seconds"}[budget]
        ratio = self.figures["arms"][BASE][cost] / self.figures["arms"][arm][cost]
        return max(1, round(share * self.given.scale * self.base.train.num_steps * ratio))

    def plan(self, arm: str, num_steps: int, lr: float, seed: int, num_points: int) -> Run:
        """Returns a run of an arm, whose average covers the same share of it as that of the data's config."""
        optim = replace(self.base.optim, lr=lr)
        return plan(
            replace(self.base, model=self.arms[arm], optim=optim),
            arm,
            RUNS / self.name,
            num_steps=num_steps,
            seed=seed,
            num_points=num_points,
            num_images=self.given.num_images,
        )

    def do(self) -> None:
        """Searches learning rates, trains all arms, and shows what there is, also when it is stopped."""
        judge = Judge(self.base, self.given.num_images)  # which trains a network for the processes to find
        self.figures["real"] = {"frechet": judge.real, "recognised": judge.recognised_real}
        self.search()
        self.planned = {
            (seed, budget, arm): self.plan(
                arm, self.steps(arm, budget), self.figures["arms"][arm]["lr"], seed, self.given.num_points
            )
            for seed in self.given.seeds
            for budget in BUDGETS
            for arm in self.arms
        }
        give_points(self.figures["runs"], self.planned, KEY)
        wanted = [each for (_, budget, _), each in self.planned.items() if self.given.only in ("both", budget)]
        try:
            do_all([*dict.fromkeys(wanted)], self.given.jobs, self.name, self.save)
        finally:
            self.save()
            path = result_path(NAME, self.output)
            runs = {arm: self.planned[self.given.seeds[0], "flops", arm] for arm in self.arms}
            draw_samples(runs, path.with_name(f"{path.stem}_{self.name}_samples.png"))

    def search(self) -> None:
        """Chooses each arm's learning rate by short runs; figures of an arm at another one are dropped."""
        steps = {arm: self.steps(arm, "flops", self.given.search_share) for arm in self.arms}
        found: dict[str, dict[str, float | None]] = {
            arm: figures.setdefault("search", {}) for arm, figures in self.figures["arms"].items()
        }
        while wanted := [(arm, lr) for arm in self.arms for lr in lrs_to_search(self.given.lrs, found[arm])]:
            searches = {(arm, lr): self.plan(arm, steps[arm], lr, 0, num_points=1) for arm, lr in wanted}
            do_all([*searches.values()], self.given.jobs, f"{self.name}: learning rates", self.save)
            for (arm, lr), each in searches.items():
                found[arm][str(lr)] = each.points[-1]["frechet_train"] if each.points else None
        for arm, figures in self.figures["arms"].items():
            best = best_lr(found[arm])
            if figures.get("lr", best) != best:
                self.figures["runs"] = [each for each in self.figures["runs"] if each["arm"] != arm]
            figures["lr"] = best

    def save(self) -> None:
        """Writes the figures of what is done, their table and their picture."""
        self.figures["runs"] = take_points(self.figures["runs"], self.planned, KEY)
        data = {**load_result(NAME, self.output).get("data", {}), self.name: self.figures}
        path = save_result(NAME, {"data": data}, self.output)
        write_text(path.with_suffix(".md"), "\n".join(line for item in data.items() for line in table_of(*item)) + "\n")
        if budgets_of(self.figures):
            draw_curves(self.name, self.figures, path.with_name(f"{path.stem}_{self.name}.png"))


def budgets_of(figures: Mapping[str, Any]) -> list[str]:
    """Returns the budgets that any arm has trained for; those of the base arm's runs are the same."""
    trained = {each["budget"] for each in figures["runs"] if each["arm"] != BASE}
    return [budget for budget in BUDGETS if budget in trained]


def runs_of(figures: Mapping[str, Any], budget: str, arm: str) -> list[list[dict[str, float]]]:
    """Returns the points of each seed that has been trained."""
    return [each["points"] for each in figures["runs"] if (each["budget"], each["arm"]) == (budget, arm)]


def table_of(name: str, figures: Mapping[str, Any]) -> list[str]:
    """Returns a table of the last averages, the median and range of the seeds, in Markdown."""
    config, real, budgets = figures["settings"]["config"], figures["real"], budgets_of(figures)
    headings = [f"steps, {BUDGETS[budget]} | recognised | Fréchet / real" for budget in budgets]
    lines = [
        f"## {name}",
        "",
        f"Budget: {figures['settings']['scale']:g} × {config['train']['num_steps']} steps of {BASE} with batches of "
        f"{config['train']['batch_size']}. {figures['settings']['num_images']} unguided images, median and range of "
        f"the seeds. {real['recognised']:.1%} of held-out images are recognised.",
        "",
        " | ".join(["| arm | parameters | GFLOPs/image | ms/step | lr", *headings]) + " |",
        "|---" * (5 + 3 * len(headings)) + "|",
    ]
    for arm, each in figures["arms"].items():
        cells = [arm, f"{each['parameters']:,}", f"{each['gflops']:.3g}", f"{1000 * each['step_seconds']:.1f}"]
        cells.append(f"{each['lr']:g}" if "lr" in each else "")
        for budget in budgets:
            ends = [points[-1] for points in runs_of(figures, budget, arm)]
            cells += [f"{end['step']:,}" for end in ends[:1]] or [""]
            for quality, form in (("recognised", ".1%"), ("frechet_ratio", ".2f")):
                cells.append(spread([end[quality] for end in ends], form) if ends else "")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def draw_curves(name: str, figures: Mapping[str, Any], path: Path) -> None:
    """Plots quality over FLOPs and over time, the median and range of the seeds."""
    batch_size = figures["settings"]["config"]["train"]["batch_size"]
    figure = Figure(figsize=(10, 7), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    present = budgets_of(figures)
    for column, axis in enumerate(BUDGETS):
        budget = axis if axis in present else present[0]
        for arm, style in STYLES.items():
            each, runs = figures["arms"][arm], runs_of(figures, budget, arm)
            if not runs:
                continue
            tflops = TRAINING_PASSES * each["gflops"] * batch_size / 1000
            unit = tflops if axis == "flops" else each["step_seconds"]
            axes_of = dict(zip(("frechet_ratio", "recognised"), grid[:, column]))
            plot_quality(axes_of, runs, lambda point, unit=unit: unit * point["step"], arm, **style)
        grid[0, column].set(title=BUDGETS[budget])
        grid[1, column].set(xlabel={"flops": "training TFLOPs", "time": "seconds of training steps"}[axis])
        log_scale(grid[0, column], subs=(1, 2, 5))
    grid[0, 0].set(ylabel="Fréchet distance / real")
    grid[1, 0].set(ylabel="recognised as the class asked for")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    handles = {label: line for axes in grid[0] for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(STYLES))
    figure.suptitle(f"{name}: median and range of the seeds")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(arguments: Sequence[str]) -> None:
    """Compares the arms on each data set and prints the tables."""
    given = parse(Arguments, arguments, __doc__)
    set_up_process(1)
    for name in given.data:
        make_directory(RUNS / name)
        with lock_folder(RUNS / name):
            Study(name, given).do()
    print(result_path(NAME, Path(given.output)).with_suffix(".md").read_text())


if __name__ == "__main__":
    run(main)
