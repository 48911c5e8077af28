"""What each idea of training is worth in wall time, against a recipe without it: `python benchmarks/recipe.py`.

Arms of configs/NAME.py: the plain recipe, which is the config's without any of these ideas, each idea added to it, and
the ideas of `--together` at once. Each trains for the time of the plain recipe, by steps that were timed with the arms
in turn. Averages from along the way draw unguided images, which are judged as by evaluate.py. What an idea is worth is
how much sooner it is as good as the plain recipe half way, at three quarters and at the end, by the distance and by
what is recognised. Writes benchmarks/results/recipe.json and .md, and for each data set and size of network a picture
of quality over time. The same command goes on where it was stopped, from the JSON and from runs/recipe.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from judged_runs import (
    Run,
    do_all,
    draw_quality,
    give_points,
    plan,
    public_json,
    same_settings,
    study_config,
    take_points,
    time_steps,
)
from measure import RESULTS, ROOT, load_result, result_path, save_result, spread
from quality import Judge

from uvit import Config
from uvit.common.cli import parse, run
from uvit.common.files import lock_folder, make_directory, write_text
from uvit.common.messages import tell
from uvit.config import from_dict, replace_fields
from uvit.data.loader import load_data
from uvit.networks.runtime import set_up_process
from uvit.training.sparse import at_step, num_sparse_steps

RUNS = ROOT / "runs" / "recipe"
NAME = "recipe"
PLAIN, TOGETHER = "plain", "together"
Idea = Literal["sparse", "layersync", "dispersive", "image", "no_conv"]
# Fields of a config by its sections; colours are Okabe and Ito's.
IDEAS: dict[Idea, tuple[dict[str, dict[str, Any]], str]] = {
    "sparse": ({"model": {"outer_pairs": 1}, "train": {"token_keep": 0.25}}, "#D55E00"),
    "layersync": ({"train": {"alignment": "layersync"}}, "#009E73"),
    "dispersive": ({"train": {"alignment": "dispersive"}}, "#CC79A7"),
    "image": ({"process": {"prediction": "data", "loss_space": "flow", "min_divisor": 0.05}}, "#E69F00"),
    "no_conv": ({"model": {"conv": "none"}}, "#56B4E9"),
}
STYLES = {
    PLAIN: {"color": "#000000", "marker": "o"},
    **{idea: {"color": color, "marker": "s"} for idea, (_, color) in IDEAS.items()},
    TOGETHER: {"color": "#0072B2", "marker": "D"},
}
LEVELS = {"half way": 0.5, "at three quarters": 0.75, "at the end": 1.0}
"""Shares of the time after which the quality of the plain recipe is a level to reach."""
COSTS: dict[str, Callable[[float], float]] = {"frechet_ratio": math.log, "recognised": float.__neg__}
"""Qualities to reach, and what of them falls about evenly with time."""
KEY = ("seed", "arm")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    data: tuple[Literal["digits", "photos", "fashion"], ...] = ("photos",)
    """Configs to compare on, one after the other."""
    fashion: str | None = None
    """Folder of Fashion-MNIST's IDX files; None is the name in configs/fashion.py."""
    ideas: tuple[Idea, ...] = tuple(IDEAS)
    """Ideas to add to the plain recipe, each alone."""
    together: tuple[Idea, ...] = ()
    """Ideas to add at once, in one more arm; none without any."""
    patch_size: int | None = None
    """Side of a patch in pixels; None is the config's."""
    depth: int | None = None
    """Depth of the network; None is the config's."""
    scale: float = 1.0
    """Time of training, as a multiple of the config's."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training; without any, steps are timed and nothing is trained."""
    num_points: int = 8
    """Steps of a run, evenly spaced, whose averages are judged."""
    num_images: int = 1_000
    """Images of each."""
    rounds: int = 30
    """Timed steps of each arm."""
    jobs: int = 1
    """Runs at a time, each in a process; they share a GPU."""
    output: str = str(RESULTS)
    """Folder for the results."""


def with_ideas(base: Config, ideas: Sequence[str]) -> Config:
    """Returns a recipe with ideas added; where patches are in no squares, those that are kept are any."""
    for idea in ideas:
        for section, fields in IDEAS[idea][0].items():
            if "token_keep" in fields and any(side % 2 for side in base.model.grid_shape):
                fields = {**fields, "token_choice": "random"}
            base = replace(base, **{section: replace_fields(getattr(base, section), fields)})
    return base


def arms_of(base: Config, given: Arguments) -> dict[str, Config]:
    """Returns the recipe of each arm."""
    arms = {PLAIN: base, **{idea: with_ideas(base, [idea]) for idea in given.ideas}}
    return {**arms, TOGETHER: with_ideas(base, given.together)} if given.together else arms


class Study:
    """The comparison on one data set.

    Args:
        name: of the data's config.
        given: the options.
    """

    def __init__(self, name: str, given: Arguments) -> None:
        self.name, self.given, self.output = name, given, Path(given.output)
        base = study_config(name, given.fashion)
        sizes = {field: getattr(given, field) for field in ("patch_size", "depth") if getattr(given, field) is not None}
        self.title = ", ".join([name, *(f"{field} {value}" for field, value in sizes.items())])
        self.base = replace(base, model=replace_fields(base.model, sizes))
        self.arms = arms_of(self.base, given)
        lengths = ("patch_size", "depth", "scale", "num_points", "num_images", "rounds")
        settings = {field: getattr(given, field) for field in lengths} | {"config": public_json(self.base, name)}
        self.figures: dict[str, Any] = load_result(NAME, self.output).get("data", {}).get(self.title, {})
        if not same_settings(self.figures.get("settings"), settings):
            self.figures = {"settings": settings, "arms": {}, "runs": []}
        self.planned: dict[tuple[int, str], Run] = {}

    def time_arms(self) -> None:
        """Times the steps of arms that are new, in turn with those of the plain recipe, whose time is the unit."""
        known = self.figures["arms"]
        configs = {arm: public_json(config, self.name) for arm, config in self.arms.items()}
        kept = {arm: {"config": each["config"]} for arm, each in known.items()}
        new = {
            arm: self.arms[arm]
            for arm, config in configs.items()
            if not same_settings(kept.get(arm), {"config": config})
        }
        if not new:
            return
        # The last steps of an arm may see more patches than the others.
        last = {f"{arm}, last steps": at_step(config, config.train.num_steps) for arm, config in new.items()}
        last = {name: config for name, config in last.items() if config not in new.values()}
        data = load_data(self.base.data, self.base.model)
        seconds = time_steps({PLAIN: self.base, **new, **last}, data, self.given.rounds)
        unit = known.get(PLAIN, {}).get("step_seconds", seconds[PLAIN]) / seconds[PLAIN]
        for arm, config in new.items():
            first, last_seconds = (unit * seconds.get(key, seconds[arm]) for key in (arm, f"{arm}, last steps"))
            dense = 1 - num_sparse_steps(config) / config.train.num_steps
            mean = (1 - dense) * first + dense * last_seconds
            times = {"step_seconds": mean, "first_seconds": first, "last_seconds": last_seconds}
            known[arm] = {"config": configs[arm], **times}
            self.figures["runs"] = [each for each in self.figures["runs"] if each["arm"] != arm]
            tell(f"{self.title}, {arm}: {1000 * first:.1f} ms a step, {1000 * last_seconds:.1f} ms in the last ones")
        self.save()  # other times would plan other runs

    def plan(self, arm: str, seed: int) -> Run:
        """Returns a run of an arm, as long in time as that of the plain recipe."""
        arms, budget = self.figures["arms"], self.given.scale * self.base.train.num_steps
        num_steps = max(1, round(budget * arms[PLAIN]["step_seconds"] / arms[arm]["step_seconds"]))
        lengths = {"num_steps": num_steps, "num_points": self.given.num_points, "num_images": self.given.num_images}
        return plan(self.arms[arm], arm, RUNS / self.name, seed=seed, **lengths)

    def do(self) -> None:
        """Trains all arms, and shows what there is, also when it is stopped."""
        judge = Judge(self.base, self.given.num_images)  # which trains a network for the processes to find
        self.figures["real"] = {"frechet": judge.real, "recognised": judge.recognised_real}
        self.time_arms()
        self.planned = {(seed, arm): self.plan(arm, seed) for seed in self.given.seeds for arm in self.arms}
        give_points(self.figures["runs"], self.planned, KEY)
        try:
            do_all([*self.planned.values()], self.given.jobs, self.title, self.save)
        finally:
            self.save()

    def save(self) -> None:
        """Writes the figures of what is done, their table and their picture."""
        self.figures["runs"] = take_points(self.figures["runs"], self.planned, KEY)
        data = {**load_result(NAME, self.output).get("data", {}), self.title: self.figures}
        path = save_result(NAME, {"data": data}, self.output)
        write_text(path.with_suffix(".md"), "\n".join(line for item in data.items() for line in table_of(*item)))
        name = re.sub(r"\W+", "_", f"{path.stem}_{self.title}")
        if self.figures["runs"]:
            draw_curves(self.title, self.figures, path.with_name(f"{name}.png"))


def curves_of(figures: Mapping[str, Any], arm: str) -> list[list[dict[str, float]]]:
    """Returns the points of each seed that has been trained, with the seconds of training up to each."""
    each = figures["arms"][arm]
    config, curves = from_dict(Config, each["config"]), []
    for points in (done["points"] for done in figures["runs"] if done["arm"] == arm):
        train = replace(config.train, num_steps=int(points[-1]["step"]))
        sparse = num_sparse_steps(replace(config, train=train))
        curves.append([{**point, "seconds": seconds_at(point["step"], sparse, each)} for point in points])
    return curves


def seconds_at(step: float, num_first: int, each: Mapping[str, float]) -> float:
    """Returns the time of an arm's steps up to one of them; the first ones and the last ones may differ."""
    first = min(step, num_first)
    return first * each["first_seconds"] + (step - first) * each["last_seconds"]


def time_to(quality: str, level: float, points: Sequence[Mapping[str, float]]) -> float:
    """Returns when a run is as good as a level, between its points; infinite where it never is."""
    cost = COSTS[quality]
    for before, point in itertools.pairwise([None, *points]):
        if cost(point[quality]) > cost(level):
            continue
        if before is None:
            return point["seconds"]
        share = (cost(before[quality]) - cost(level)) / (cost(before[quality]) - cost(point[quality]))
        return before["seconds"] + share * (point["seconds"] - before["seconds"])
    return math.inf


def levels_of(figures: Mapping[str, Any], quality: str) -> dict[str, float]:
    """Returns the levels, the median over seeds of the recipe's own quality."""
    curves = curves_of(figures, PLAIN)
    levels = {}
    for name, share in LEVELS.items():
        found = [min(each, key=lambda p: abs(p["seconds"] - share * each[-1]["seconds"])) for each in curves]
        levels[name] = statistics.median(point[quality] for point in found)
    return levels


def whole_seconds(times: Sequence[float]) -> str:
    """Returns the median of the seeds' times to a level for a table."""
    median = statistics.median(times)
    return f"{median:.0f}" if math.isfinite(median) else "never"


def table_of(title: str, figures: Mapping[str, Any]) -> list[str]:
    """Returns a table of what each arm reaches, and how soon, the median and range of the seeds, in Markdown."""
    settings, real, arms = figures["settings"], figures["real"], figures["arms"]
    done = [arm for arm in arms if curves_of(figures, arm)]
    if PLAIN not in done:
        return []
    levels = {quality: levels_of(figures, quality) for quality in COSTS}
    reached = [f"{levels['frechet_ratio'][name]:.2f} and {levels['recognised'][name]:.1%} {name}" for name in LEVELS]
    seconds = curves_of(figures, PLAIN)[0][-1]["seconds"]
    lines = [
        f"## {title}",
        "",
        f"{seconds:.0f} seconds of training steps, with batches of {settings['config']['train']['batch_size']}. "
        f"{settings['num_images']} unguided images, median and range of the seeds. {real['recognised']:.1%} of "
        "held-out images are recognised. The last columns are the seconds until the distance, and until the recognised "
        f"share, that the plain recipe has: {'; '.join(reached)}.",
        "",
        f"| recipe | ms/step | steps | seeds | recognised | Fréchet / real | {' | '.join(LEVELS)} |",
        "|---" * (6 + len(LEVELS)) + "|",
    ]
    for arm in done:
        curves = curves_of(figures, arm)
        ends = [points[-1] for points in curves]
        cells = [arm, f"{1000 * arms[arm]['step_seconds']:.1f}", f"{ends[0]['step']:,}", str(len(ends))]
        for quality, form in (("recognised", ".1%"), ("frechet_ratio", ".2f")):
            cells.append(spread([end[quality] for end in ends], form))
        for level in LEVELS:
            times = [[time_to(quality, levels[quality][level], points) for points in curves] for quality in COSTS]
            cells.append(" / ".join(map(whole_seconds, times)))
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def draw_curves(title: str, figures: Mapping[str, Any], path: Path) -> None:
    """Plots quality over time."""
    known = [arm for arm in STYLES if arm in figures["arms"]]
    arms = {arm: {"runs": curves_of(figures, arm), "x_of": itemgetter("seconds"), **STYLES[arm]} for arm in known}
    draw_quality(path, title, "seconds of training steps", arms)


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
