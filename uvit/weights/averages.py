"""Power-function averages of weights (EDM2, arXiv 2312.02696, section 3 and appendix C), and any width rebuilt.

After T updates, the average of exponent γ gives the weights after update k a share that is the integral of the density
(γ + 1) / T · (τ / T)^γ over τ in [k - 1, k]. Its name is its relative width: the standard deviation of that density, in
parts of T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from os.path import isdir, isfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from uvit.common.errors import InputError
from uvit.config import (
    AVERAGE_FILE,
    CONFIG_FILE,
    Config,
    Section,
    are_widths,
    average_files,
    from_dict,
    load_config,
    read_json,
    save_json,
    step_of,
)
from uvit.weights.build import NETWORKS
from uvit.weights.pretrained import restore
from uvit.weights.tensors import hash_weights, open_weights, read_weights, write_weights

UPDATES = "updates"
"""In a snapshot, beside WIDTH/NAME for each weight: the number of updates that its averages are over."""


@dataclass(frozen=True, kw_only=True)
class RebuiltAverage(Section):
    """Where the weights of a folder come from."""

    run: str
    """The run."""
    width: float
    """Relative width."""
    step: int
    """Training step of the last snapshot."""
    num_snapshots: int
    """How many snapshots it was fitted to."""
    error: float
    """Distance of the fitted density over the updates from that of the width, in parts of the latter's norm."""
    weights: str
    """Hash of the weights."""


def find_average(folder: Path, weights_hash: str) -> RebuiltAverage | None:
    """Returns how the average was made that a folder's weights are; None for that of `train.ema_decay`.

    Raises:
        InputError: an AVERAGE_FILE that is broken.
    """
    path = folder / AVERAGE_FILE
    if not isfile(path):
        return None
    how = from_dict(RebuiltAverage, read_json(path), path)
    return how if how.weights == weights_hash else None


@cache
def exponent_of(width: float) -> float:
    """Returns the exponent γ of a relative width σ in (0, 1/√12], the inverse of σ² = (γ + 1) / ((γ + 2)² (γ + 3))."""
    # With u = γ + 2, it is σ² u³ + σ² u² - u + 1 = 0, whose largest root has γ at least 0.
    return float(np.roots([width**2, width**2, -1, 1]).real.max()) - 2


def decay_at(width: float, update: int) -> float:
    """Returns how much of an average stays at an update, of which the first is 1: (1 - 1 / update)^(γ + 1)."""
    return (1 - 1 / update) ** (exponent_of(width) + 1)


def _inner_products(
    exponents: np.ndarray, ends: np.ndarray, other_exponents: np.ndarray, other_ends: np.ndarray
) -> np.ndarray:
    """Returns the integral over all τ of the products of two densities, (N,) and (M,) of them: (N, M)."""
    a, s, b, t = exponents[:, None], ends[:, None], other_exponents[None], other_ends[None]  # (N, 1), (1, M)
    # Both densities are positive until the smaller end, where the one that goes on has (end / its end)^exponent.
    low = np.minimum(s, t)
    tail = (low / t) ** b * (low / s) ** a
    return (a + 1) * (b + 1) / (a + b + 1) * tail / np.maximum(s, t)


def fit(widths: Sequence[float], ends: Sequence[float], width: float, end: float) -> tuple[np.ndarray, float]:
    """Fits the density of an average by a sum of those of others, by least squares (algorithm 3), in float64.

    Args:
        widths: (N,) of the given averages.
        ends: (N,) number of updates that each is over.
        width: of the average to rebuild.
        end: number of updates that it is over.

    Returns:
        (N,) coefficients, whose sum is 1, and the distance from the density that they reach, in parts of its norm.
    """
    exponents, times = np.array([exponent_of(each) for each in widths]), np.array(ends, dtype=np.float64)
    wanted = np.array([exponent_of(width)]), np.array([end], dtype=np.float64)
    products = _inner_products(exponents, times, exponents, times)
    targets = _inner_products(exponents, times, *wanted)[:, 0]
    # The last row and column are of the multiplier that makes the sum 1; all are scaled, since ends differ widely.
    scale = 1 / np.sqrt(np.append(products.diagonal(), 1.0))
    system = np.pad(products, (0, 1), constant_values=1.0)
    system[-1, -1] = 0.0
    solution = np.linalg.lstsq(scale[:, None] * system * scale, scale * np.append(targets, 1.0), rcond=None)[0]
    coefficients = (scale * solution)[:-1]
    norm = _inner_products(*wanted, *wanted).item()
    distance = coefficients @ products @ coefficients - 2 * coefficients @ targets + norm
    return coefficients, float(np.sqrt(max(distance, 0.0) / norm))


def _read_profiles(path: Path) -> tuple[dict[float, dict[str, list[int]]], int]:
    """Reads what a snapshot holds: the names and shapes of the weights of each width, and its number of updates.

    Raises:
        InputError: a broken file, or another one.
    """
    shapes: dict[str, dict[str, list[int]]] = {}
    with open_weights(path) as file:
        for key in sorted({*file.keys()} - {UPDATES}):
            width, _, name = key.partition("/")
            shapes.setdefault(width, {})[name] = file.get_slice(key).get_shape()
        try:
            profiles = {float(width): each for width, each in shapes.items()}
            updates = int(file.get_tensor(UPDATES))
        except (ValueError, SafetensorError):
            profiles, updates = {}, 0
    if updates < 1 or not profiles or not are_widths([*profiles]):
        raise InputError(f"{path} must hold averages by their width and name, got other tensors")
    return profiles, updates


def rebuild(run_dir: Path, width: float, step: int | None = None) -> tuple[dict[str, Tensor], RebuiltAverage]:
    """Rebuilds the average of any width from the snapshots in RUN/averages.

    Args:
        run_dir: folder of a run that was trained with `train.average_widths`.
        width: relative width, MIN_WIDTH to MAX_WIDTH.
        step: training step of the snapshot where the average ends; None is the newest.

    Returns:
        The weights in float32, and how they were made.

    Raises:
        InputError: no such folder, no snapshots, none of that step, broken ones, or some that are not finite.
    """
    if not isdir(run_dir):
        raise InputError(f"run folder not found: {run_dir}")
    files = {step_of(path.name) or 0: path for path in average_files(run_dir)}
    if not files:
        wanted = "train it with --train.average_widths 0.05 0.1"
        raise InputError(f"{run_dir} has no averages to rebuild a width from: {wanted}")
    last = max(files) if step is None else step
    if last not in files:
        nearest = min(files, key=lambda each: abs(each - last))
        raise InputError(f"step must be one of a snapshot in {run_dir}, such as {nearest}, got {last}")
    used = [path for number, path in files.items() if number <= last]
    found = [_read_profiles(path) for path in used]
    expected = next(iter(found[0][0].values()))
    for path, (profiles, _) in zip(used, found):
        if any(each != expected for each in profiles.values()):
            raise InputError(f"{path} must hold the same weights for each width as {used[0].name}, got others")
    widths = [each for profiles, _ in found for each in profiles]
    ends = [updates for profiles, updates in found for _ in profiles]
    coefficients, error = fit(widths, ends, width, ends[-1])
    sums = {name: torch.zeros((), dtype=torch.float64) for name in expected}
    remaining = iter(coefficients)
    for path, (profiles, _) in zip(used, found):
        weights = read_weights(path)
        for each in profiles:
            factor = float(next(remaining))
            for name in expected:
                sums[name] = sums[name] + factor * weights[f"{each}/{name}"].double()
    weights = {name: tensor.float() for name, tensor in sums.items()}
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise InputError(f"averages in {run_dir} must be finite, got NaN or infinity: its training went wrong")
    made = {"run": str(run_dir), "width": width, "step": last, "num_snapshots": len(used), "error": error}
    return weights, from_dict(RebuiltAverage, {**made, "weights": hash_weights(weights)})


def write_average(run_dir: Path, folder: Path, width: float, step: int | None = None) -> RebuiltAverage:
    """Writes a run folder with an average of another run's weights: its config, the weights and how they were made.

    Args:
        run_dir: as for `rebuild`, like the last two.
        folder: an empty folder.
        width: relative width.
        step: training step.

    Raises:
        InputError: as rebuild, or no valid config of a run.
    """
    weights, how = rebuild(run_dir, width, step)
    config: Config = load_config(run_dir / CONFIG_FILE)
    restore(NETWORKS[type(config.model)], config.model, weights, f"the averages of {run_dir}")  # checks that they fit
    write_weights(folder, weights)
    save_json(folder / AVERAGE_FILE, how)
    save_json(folder / CONFIG_FILE, config)
    return how
