"""The layout of a run folder: its file names, and reading its config.

A folder of weights has a config.json too, which describes only the network: `config_kind` distinguishes the two.
"""

from __future__ import annotations

import runpy
from collections.abc import Iterable
from glob import glob
from os.path import isfile
from pathlib import Path
from typing import Any, Literal

from uvit.common.errors import InputError, did_you_mean, one_line
from uvit.config.network import NetworkConfig
from uvit.config.run import AnyNetworkConfig, Config
from uvit.config.section import from_dict, read_json

CONFIG_FILE = "config.json"
"""All options of the run, or of the network."""
WEIGHTS_FILE = "model.safetensors"
"""The averaged weights."""
METRICS_FILE = "metrics.jsonl"
"""The metrics of training, one JSON object per line."""
EVALUATION_FILE = "evaluation.json"
"""Figures and their protocol, as evaluate.py saves them."""
INCEPTION = "inception"
"""The name of the FID's features in EVALUATION_FILE."""
AVERAGE_FOLDER = "averages"
"""Snapshots of the averages of `train.average_widths`."""
AVERAGE_FILE = "average.json"
"""How the weights were made, in a folder with an average that was rebuilt."""
CHECKPOINT_FOLDER = "checkpoints"
"""What a run resumes from."""
GRID_FOLDER = "samples"
STEP_PREFIX = "step_"
"""For a checkpoint's folder, `step_00000100`, and a grid's file, `step_00000100.png`."""
GRID_PATTERN = f"{STEP_PREFIX}*.png"
SNAPSHOT_SUFFIX = ".safetensors"


def step_name(step: int) -> str:
    """Returns the name of a step's checkpoint or grid."""
    return f"{STEP_PREFIX}{step:08d}"


def step_of(name: str) -> int | None:
    """Returns the step in the name of a checkpoint, grid or snapshot, or None."""
    digits = name.removeprefix(STEP_PREFIX).removesuffix(".png").removesuffix(SNAPSHOT_SUFFIX)
    return int(digits) if name.startswith(STEP_PREFIX) and digits.isdecimal() else None


def _by_step(paths: Iterable[Path]) -> list[Path]:
    numbered = ((step_of(path.name), path) for path in paths)
    return [path for _, path in sorted((step, path) for step, path in numbered if step is not None)]


def checkpoint_dirs(run_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, oldest first."""
    return _by_step((run_dir / CHECKPOINT_FOLDER).glob(f"{STEP_PREFIX}*"))


def average_files(run_dir: Path) -> list[Path]:
    """Returns the snapshots of averages of a run, oldest first."""
    return _by_step((run_dir / AVERAGE_FOLDER).glob(f"{STEP_PREFIX}*{SNAPSHOT_SUFFIX}"))


def average_path(run_dir: Path, step: int) -> Path:
    """Returns the path of a step's snapshot of averages."""
    return run_dir / AVERAGE_FOLDER / f"{step_name(step)}{SNAPSHOT_SUFFIX}"


def grid_files(run_dir: Path) -> list[Path]:
    """Returns the grids of samples of a run, oldest first."""
    return _by_step((run_dir / GRID_FOLDER).glob(GRID_PATTERN))


def grid_path(run_dir: Path, step: int) -> Path:
    """Returns the path of a step's grid of samples."""
    return run_dir / GRID_FOLDER / f"{step_name(step)}.png"


def config_kind(raw: Any) -> Literal["run", "network", "unknown"]:
    """Returns what a config.json describes: a whole run, or only a network.

    Args:
        raw: the file's content.
    """
    if not isinstance(raw, dict):
        return "unknown"
    return "run" if "process" in raw else "network" if "img_size" in raw else "unknown"


def read_network_config(folder: Path) -> NetworkConfig:
    """Reads the network's config from a folder of weights, or from a run folder.

    Raises:
        InputError: no config there, or an invalid one.
    """
    path = folder / CONFIG_FILE
    raw = read_json(path)
    return from_dict(AnyNetworkConfig, raw["model"] if config_kind(raw) == "run" and "model" in raw else raw, path)


def load_config(path: str | Path) -> Config:
    """Loads a run's config from a Python file that defines `config`, or from a run's config.json.

    Raises:
        InputError: no such file, a file without a Config named `config`, or invalid values.
    """
    path = Path(path)
    if not isfile(path):
        known = [str(path.parent / name) for name in sorted(glob("*.py", root_dir=path.parent))]
        raise InputError(f"config file not found: {path}{did_you_mean(str(path), known)}")
    if path.suffix == ".json":
        return from_dict(Config, read_json(path), path)
    try:
        config = runpy.run_path(str(path)).get("config")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:  # a user's Python file may fail in any way
        raise InputError(f"{path} cannot be read as Python: {type(error).__name__}: {one_line(error)}") from None
    if not isinstance(config, Config):
        raise InputError(f"{path} must define `config = Config(...)`, got {type(config).__name__}")
    return config
