"""How figures are measured, kept and shown: on what machine, with the arms in turn, as JSON in benchmarks/results/."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import LogLocator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from uvit import Config
from uvit.common.files import write_text
from uvit.config import load_config, replace_fields
from uvit.config.run import AnyNetworkConfig

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
TRAINING_PASSES = 3  # in FLOPs of a forward pass: the backward pass has two products for each one of the forward pass


def best_device() -> torch.device:
    """Returns the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_machine() -> dict[str, str]:
    """Names the processor, or the GPU, and the version of PyTorch."""
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    processor = found[1] if found else platform.processor()
    return {"device": f"{processor}, {os.cpu_count()} cores", "torch": torch.__version__}


def plain_config(name: str) -> Config:
    """Returns the recipe of configs/NAME.py without a sparse middle, which only a U-ViT has."""
    config = load_config(ROOT / "configs" / f"{name}.py")
    model = replace_fields(config.model, {"outer_pairs": 0})
    return replace(config, model=model, train=replace(config.train, token_keep=1.0))


def result_path(name: str, folder: Path = RESULTS) -> Path:
    """Returns FOLDER/NAME.json, or NAME_DEVICE.json for a GPU."""
    device = re.sub(r"\W+", "_", describe_machine()["device"].lower()) if torch.cuda.is_available() else ""
    return folder / f"{name}{device and '_' + device}.json"


def load_result(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Returns the figures that this machine has written under a name, by this version of PyTorch; {} if none."""
    path = result_path(name, folder)
    figures = json.loads(path.read_text()) if path.is_file() else {}
    return figures if describe_machine().items() <= figures.items() else {}


def save_result(name: str, figures: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Writes figures, with what they were measured on."""
    path = result_path(name, folder)
    write_text(path, json.dumps({**describe_machine(), **figures}, indent=2) + "\n")
    return path


def forward_flops(network: nn.Module, config: AnyNetworkConfig) -> int:
    """Counts the FLOPs of a forward pass of one image, 2 for a multiply-add of a matrix product or a convolution.

    Args:
        network: on any device, also `meta`; fused kernels of attention are not all counted.
        config: of the images and labels that it takes.
    """
    device = next(network.parameters()).device
    x, timesteps = torch.zeros(1, config.in_chans, *config.image_shape, device=device), torch.zeros(1, device=device)
    labels = {"y": torch.zeros(1, dtype=torch.long, device=device)} if config.num_classes else {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, timesteps, **labels)
    return counter.get_total_flops()


def seconds_of(call: Callable[[], object]) -> float:
    """Times one call, to the end of what it started on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def median_times(
    arms: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2, on_round: Callable[[], object] = int
) -> dict[str, float]:
    """Times arms in turn, so that what else the machine does falls on all alike.

    Args:
        arms: what to time.
        rounds: timings of each.
        warm_up: calls of each before, not timed.
        on_round: called after each round, for a progress bar.

    Returns:
        Each arm's median, in seconds.
    """
    for call in arms.values():
        for _ in range(warm_up):
            call()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, call in arms.items():
            times[name].append(seconds_of(call))
        on_round()
    return {name: statistics.median(each) for name, each in times.items()}


def spread(values: Sequence[float], form: str) -> str:
    """Formats `median (lowest to highest)`."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def log_scale(axes: Any, subs: Sequence[float] = (1, 1.5, 2, 3, 5)) -> None:
    """Gives axes of matplotlib a logarithmic y axis whose ticks are plain numbers, these times powers of 10."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def plot_range(axes: Any, x: Sequence[float], curves: Sequence[Sequence[float]], label: str, **style: Any) -> None:
    """Plots the median of several runs' curves, and the range between the lowest and the highest.

    Args:
        axes: of matplotlib.
        x: where they were measured.
        curves: a value for each x, for each run.
        label: for the legend.
        **style: of the median's line.
    """
    values = [*zip(*curves)]
    (line,) = axes.plot(x, [statistics.median(each) for each in values], label=label, **style)
    axes.fill_between(x, [*map(min, values)], [*map(max, values)], alpha=0.15, color=line.get_color())
