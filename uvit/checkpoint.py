"""Training state to go on from, and the command line for weights.

`python -m uvit.checkpoint convert FILE.pth OUT` turns a published file into config.json and model.safetensors.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from uvit.backbone import UViT
from uvit.cli import parse, run
from uvit.errors import InputError
from uvit.files import make_directory

STATE_FILE = "training_state.pt"


def checkpoint_dirs(run_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step_*"))


def save_checkpoint(run_dir: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Writes RUN/checkpoints/step_NNNNNNNN and removes all but the `keep` newest.

    Args:
        run_dir: folder of the run.
        step: optimizer steps done.
        state: state dicts of everything that must go on where it stopped.
        keep: checkpoints to keep.
    """
    parent = run_dir / "checkpoints"
    make_directory(parent)
    target = parent / f"step_{step:08d}"
    aside = Path(tempfile.mkdtemp(dir=parent, prefix="."))
    try:
        torch.save({"step": step, **state}, aside / STATE_FILE)
        shutil.rmtree(target, ignore_errors=True)
        aside.replace(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in checkpoint_dirs(run_dir)[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    """Reads the newest checkpoint of a run, on the CPU, or returns None where there is none.

    Raises:
        InputError: the file is not a whole checkpoint.
    """
    found = checkpoint_dirs(run_dir)
    if not found:
        return None
    path = found[-1] / STATE_FILE
    try:
        with warnings.catch_warnings(action="ignore"):  # as in uvit.weights
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the broken bytes lead to
        raise InputError(
            f"{path} is not a whole checkpoint ({type(error).__name__}): remove its folder to go on"
        ) from None


@dataclass(frozen=True, kw_only=True)
class ConvertArguments:
    source: tyro.conf.Positional[str]
    """Published `.pth` file, or a checkpoint folder of the reference code with nnet_ema.pth."""
    output: tyro.conf.Positional[str]
    """Folder to write config.json and model.safetensors to."""
    num_heads: int | None = None
    """Attention heads, where the width is not a published one."""
    img_size: tuple[int, int] | None = None
    """Height and width in pixels of an image (or latent) that is not square."""
    num_context_tokens: int | None = None
    """Length of the context, where it is not CLIP's 77."""
    null_class: bool | None = None
    """Whether the last label means "no label"; where not given, it does for 1001 labels."""


def convert(arguments: Sequence[str]) -> None:
    """Turns published weights into a folder that `UViT.from_pretrained` and others read without a pickle."""
    given = parse(ConvertArguments, arguments, "python -m uvit.checkpoint convert", convert.__doc__ or "")
    known = {name: value for name, value in dataclasses.asdict(given).items() if value is not None}
    source, output = known.pop("source"), known.pop("output")
    model = UViT.from_pretrained(source, **known)
    model.save_pretrained(output)
    count = sum(parameter.numel() for parameter in model.parameters())
    blocks = f"{model.config.depth + 1} blocks of width {model.config.embed_dim}"
    print(f"{source}: {count:,} parameters, {blocks}, to {output}")


COMMANDS = {"convert": convert}


def main(arguments: Sequence[str]) -> None:
    """Runs the command that the first argument names."""
    if not arguments or arguments[0] not in COMMANDS:
        given = arguments[0] if arguments else "nothing"
        raise InputError(f"the first argument must be one of {', '.join(COMMANDS)}, got {given!r}")
    COMMANDS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    run(main)
