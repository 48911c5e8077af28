"""Resuming a run: only with a config that fits, and from its newest complete checkpoint."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from uvit.common.errors import InputError, one_line
from uvit.common.messages import warn
from uvit.config import (
    AVERAGE_FILE,
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    WEIGHTS_FILE,
    Config,
    config_kind,
    from_dict,
    read_json,
)
from uvit.data.manifest import is_latent_data
from uvit.training.checkpoint import find_checkpoint, read_state
from uvit.training.optim import load_optimizer_state
from uvit.training.sharding import reshard

# Fields that may change when a run is resumed; any other would change the result of training.
HARMLESS = {
    "model": {"attention", "gradient_checkpointing"},
    "process": set(),
    "data": {"num_workers", "test_split", "class_names", "on_error"},
    "optim": set(),
    "train": {
        "run_dir",
        "num_steps",
        "compile",
        "shard",
        "num_threads",
        "log_every",
        "sample_every",
        "average_every",
        "save_every",
        "keep",
        "max_bad_steps",
        "resume_anyway",
        "tracker",
    },
    "sample": {field.name for field in dataclasses.fields(Config().sample)},
}


def changes(before: Config, now: Config) -> tuple[list[str], list[str]]:
    """Lists the differences between two configs, each as `section.field WAS, got NOW`.

    Returns:
        Differences that make it another run, and harmless ones. The number of steps is harmless, although with a decay
        it changes the learning rate of the remaining steps: whoever extends such a run wants that.
    """
    other_run: list[str] = []
    harmless: list[str] = []
    for section, fields in HARMLESS.items():
        for field in dataclasses.fields(getattr(now, section)):
            was, value = (getattr(getattr(each, section), field.name) for each in (before, now))
            if was != value:
                (harmless if field.name in fields else other_run).append(
                    f"{section}.{field.name} {was!r}, got {value!r}"
                )
    return other_run, harmless


def check_same_run(config: Config, run_dir: Path, config_file: Path | None) -> list[str]:
    """Checks that a config can resume the run in its folder, if there is one.

    Args:
        config: of the run to start or resume.
        run_dir: its folder.
        config_file: the config in the folder's newest checkpoint; None where there is none.

    Returns:
        Differences that are accepted: harmless ones, and with train.resume_anyway all.

    Raises:
        InputError: differences that make it another run, or a folder of something else.
    """
    if is_latent_data(str(run_dir)):
        raise InputError(f"{run_dir} holds latents: use another --train.run_dir")
    if config_file is None and (run_dir / AVERAGE_FILE).is_file():
        advice = f"use another --train.run_dir, or start from it with --train.init {run_dir}"
        raise InputError(f"{run_dir} holds an average of another run: {advice}")
    before = None
    own, weights = run_dir / CONFIG_FILE, run_dir / WEIGHTS_FILE
    if own.is_file() and (weights.is_file() or (run_dir / CHECKPOINT_FOLDER).is_dir()):
        raw = read_json(own)
        if config_kind(raw) != "network":
            before = from_dict(Config, raw, own)  # a broken one is reported, not replaced
    if config_file is not None:
        before = from_dict(Config, read_json(config_file), config_file)
    if before is None and weights.is_file():
        raise InputError(f"{run_dir} holds weights that are no run's: use another --train.run_dir")
    if before is None:
        return []
    other_run, harmless = changes(before, config)
    if other_run and not config.train.resume_anyway:
        found = f"{run_dir} holds a run with {'; '.join(other_run)}"
        raise InputError(f"{found}: use another --train.run_dir, or --train.resume_anyway True")
    if config.optim.decay != "constant" and before.train.num_steps != config.train.num_steps:
        harmless.append(f"so the {config.optim.decay} decay of the learning rate ends at another step")
    if config.train.token_keep < 1 and before.train.num_steps != config.train.num_steps:
        harmless.append("so all blocks see all patches from another step on")
    return other_run + harmless


def open_checkpoint(accelerator: Accelerator, run_dir: Path) -> dict[str, Any] | None:
    """Reads the newest complete checkpoint, the same in all processes, or returns None where there is none.

    Broken ones are reported and renamed, so that they are not used later.
    """
    found: list[Path | None] = [None]
    if accelerator.is_main_process:
        found[0], broken = find_checkpoint(run_dir)
        for folder, fault in broken.items():
            warn(f"{folder} is not a complete checkpoint ({fault}): skipped")
            renamed = folder.with_name(f"broken_{folder.name}")
            shutil.rmtree(renamed, ignore_errors=True)
            with suppress(OSError):
                folder.rename(renamed)
    (folder,) = broadcast_object_list(found)
    return None if folder is None else read_state(folder)


def load_state(state: dict[str, Any], stateful: dict[str, Any], run_dir: Path) -> int:
    """Restores all parts of a run from a checkpoint; returns the number of steps done.

    Raises:
        InputError: the checkpoint does not fit.
    """
    try:
        if missing := [name for name in stateful if name not in state]:
            raise ValueError(f"it has no {missing[0]}")
        for name, part in stateful.items():
            if name == "optimizer":
                load_optimizer_state(part, state[name])
            else:
                part.load_state_dict(reshard(state[name], part.state_dict()))
        if type(state["step"]) is not int or state["step"] < 0:
            raise TypeError(f"step {state['step']!r:.80}")
        return state["step"]
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"the checkpoint in {run_dir} does not fit the config: {one_line(error, 200)}") from None


def last_checkpoint(step: int) -> str:
    """Describes the last good checkpoint; step 0 means none."""
    return f"the last good checkpoint is that of step {step}" if step else "there is no checkpoint yet"
