"""How a run goes on: only with a config that fits, and from its newest whole checkpoint."""

from __future__ import annotations

import dataclasses
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from uvit.common.errors import InputError
from uvit.common.messages import warn
from uvit.config import CHECKPOINT_FOLDER, CONFIG_FILE, Config, from_dict, read_json
from uvit.training.checkpoint import find_checkpoint, read_state
from uvit.training.optim import load_optimizer_state
from uvit.training.sharding import reshard

# What may change when a run goes on; anything else would make it another run.
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
        "save_every",
        "keep",
        "max_bad_steps",
        "resume_anyway",
        "tracker",
    },
    "sample": {field.name for field in dataclasses.fields(Config().sample)},
}


def changes(before: Config, now: Config) -> tuple[list[str], list[str]]:
    """Returns what differs between two configs, each as `section.field WAS, got NOW`.

    Returns:
        Changes that make it another run, and harmless ones. More steps are harmless, though with a decay they change
        the learning rate of the steps to come: who trains on after a decay wants that.
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
    """Stops where the run folder holds a run that this config cannot go on with.

    Args:
        config: of the run to be.
        run_dir: its folder.
        config_file: what the folder's newest checkpoint was made with; None where there is none.

    Returns:
        What differs and is let pass: harmless changes, and with train.resume_anyway all.

    Raises:
        InputError: changes that make it another run.
    """
    before = None
    if (run_dir / CHECKPOINT_FOLDER).is_dir() and (run_dir / CONFIG_FILE).is_file():
        before = from_dict(Config, read_json(run_dir / CONFIG_FILE))  # a broken one is reported, not replaced
    if config_file is not None:
        before = from_dict(Config, read_json(config_file))
    if before is None:
        return []
    other_run, harmless = changes(before, config)
    if other_run and not config.train.resume_anyway:
        held = f"{run_dir} holds a run with {'; '.join(other_run)}"
        raise InputError(f"{held}: use another --train.run_dir, or --train.resume_anyway True")
    if config.optim.decay != "constant" and before.train.num_steps != config.train.num_steps:
        harmless.append(f"so the {config.optim.decay} decay of the learning rate ends at another step")
    return other_run + harmless


def open_checkpoint(accelerator: Accelerator, run_dir: Path) -> dict[str, Any] | None:
    """Reads the newest whole checkpoint, the same in every process, or returns None where there is none.

    Broken ones are reported and renamed, so that none is taken for a good one later.
    """
    found: list[Path | None] = [None]
    if accelerator.is_main_process:
        found[0], broken = find_checkpoint(run_dir)
        for folder, fault in broken.items():
            warn(f"{folder} is not a whole checkpoint ({fault}): passed over")
            aside = folder.with_name(f"broken_{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            with suppress(OSError):
                folder.rename(aside)
    (folder,) = broadcast_object_list(found)
    return None if folder is None else read_state(folder)


def load_state(state: dict[str, Any], stateful: dict[str, Any], run_dir: Path) -> int:
    """Puts every part of a run back to where a checkpoint has it; returns the steps that it has done.

    Raises:
        InputError: the checkpoint does not fit.
    """
    try:
        for name, part in stateful.items():
            if name == "optimizer":
                load_optimizer_state(part, state[name])
            else:
                part.load_state_dict(reshard(state[name], part.state_dict()))
        if type(state["step"]) is not int or state["step"] < 0:
            raise TypeError(f"step {state['step']!r:.80}")
        return state["step"]
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"the checkpoint in {run_dir} does not fit the config: {error!s:.200}") from None


def last_checkpoint(step: int) -> str:
    """Names the last good checkpoint; step 0 is none."""
    return f"the last good checkpoint is that of step {step}" if step else "there is no checkpoint yet"
