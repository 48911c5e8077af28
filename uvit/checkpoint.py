"""Training state to go on from, and the command line for weights.

`python -m uvit.checkpoint convert FILE.pth OUT` turns a published file into config.json and model.safetensors; `export
RUN --format onnx` writes a backbone that runs without this package; `push RUN user/model` publishes a run on the hub,
and `card RUN OUT` writes what it would publish.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path
from typing import Any

import torch
import tyro

from uvit.backbone import UViT
from uvit.cli import parse, run
from uvit.config import CONFIG_FILE, Config, Section, to_json
from uvit.errors import InputError
from uvit.files import aside_of, make_directory, remove_leftovers, sync
from uvit.integrations.export import export
from uvit.publish import publish, write_published
from uvit.weights import load_without_code

STATE_FILE = "training_state.pt"
MARKER_FILE = "complete.json"
"""Written last: its state file's size and hash, so that a torn copy is known from a whole one."""
PREFIX = "step_"


def checkpoint_dirs(run_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, oldest first."""
    found = [path for path in (run_dir / "checkpoints").glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[len(PREFIX) :]))


def _describe(path: Path, thorough: bool = True) -> dict[str, Any]:
    """Returns what the marker says of a state file; only what is known without reading it where not `thorough`."""
    if not thorough:
        return {"size": path.stat().st_size}
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def find_config(run_dir: Path) -> Path | None:
    """Returns the config that the newest checkpoint of a run was made with, or None where there is none."""
    found = [folder / CONFIG_FILE for folder in reversed(checkpoint_dirs(run_dir)) if (folder / CONFIG_FILE).is_file()]
    return found[0] if found else None


def save_checkpoint(run_dir: Path, config: Config, step: int, state: dict[str, Any], keep: int | None) -> None:
    """Writes RUN/checkpoints/step_NNNNNNNN, whole or not at all, and then removes all but the `keep` newest.

    Args:
        run_dir: folder of the run.
        config: what it was made with.
        step: optimizer steps done.
        state: state dicts of everything that must go on where it stopped.
        keep: checkpoints to keep; None keeps all.

    Raises:
        InputError: it cannot be written; the checkpoints before it are still there.
    """
    target = run_dir / "checkpoints" / f"{PREFIX}{step:08d}"
    make_directory(target.parent)
    remove_leftovers(target.with_name(f"{PREFIX}*"))
    aside = aside_of(target)
    try:
        aside.mkdir()
        with open(aside / STATE_FILE, "wb") as file:
            torch.save({"step": step, **state}, file)
        sync(aside / STATE_FILE)
        (aside / CONFIG_FILE).write_text(to_json(config))
        sync(aside / CONFIG_FILE)
        (aside / MARKER_FILE).write_text(json.dumps(_describe(aside / STATE_FILE)) + "\n")
        sync(aside / MARKER_FILE)
        sync(aside)
        shutil.rmtree(target, ignore_errors=True)  # a step that is saved again
        aside.replace(target)
        sync(target.parent)
    except (OSError, RuntimeError) as error:  # torch.save hides the reason behind a RuntimeError of its own
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise InputError(f"cannot write {target}: {getattr(reason, 'strerror', None) or reason}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if keep is None:
        return
    num_whole = 0
    for folder in reversed(checkpoint_dirs(run_dir)):
        if num_whole >= keep:
            shutil.rmtree(folder, ignore_errors=True)
        elif _find_fault(folder, thorough=False) is None:
            num_whole += 1


def _find_fault(folder: Path, thorough: bool = True) -> str | None:
    """Says what is wrong with a checkpoint, or returns None for a whole one; `thorough` reads all of it."""
    try:
        marker = json.loads((folder / MARKER_FILE).read_text())
        found = _describe(folder / STATE_FILE, thorough)
        if not thorough and isinstance(marker, dict):
            marker.pop("sha256", None)
    except FileNotFoundError as error:
        return f"it has no {Path(error.filename).name}"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (ValueError, RecursionError):
        return f"its {MARKER_FILE} is not JSON"
    return None if marker == found else f"its {STATE_FILE} is not what {MARKER_FILE} says"


def find_checkpoint(run_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """Returns the newest whole checkpoint of a run, and what is wrong with newer ones.

    Returns:
        Its folder, or None where there is no checkpoint at all; and the broken ones passed over, with their faults.

    Raises:
        InputError: there are checkpoints, but none is whole.
    """
    broken: dict[Path, str] = {}
    for folder in reversed(checkpoint_dirs(run_dir)):
        if (fault := _find_fault(folder)) is None:
            return folder, broken
        broken[folder] = fault
    if broken:
        folder, fault = next(iter(broken.items()))
        raise InputError(f"{folder} is not a whole checkpoint ({fault}), and no older one is: remove it to start anew")
    return None, broken


def read_state(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint on the CPU, without running what a pickle may hold.

    Raises:
        InputError: the file is not a whole checkpoint.
    """
    path = folder / STATE_FILE
    try:
        state = load_without_code(path)
    except Exception as error:
        raise InputError(f"{path} is not a whole checkpoint ({type(error).__name__}): remove its folder") from None
    if not isinstance(state, dict):
        raise InputError(f"{path} must hold a dict, got {type(state).__name__}")
    return state


def load_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    """Reads the newest whole checkpoint of a run, on the CPU, or returns None where there is none.

    Raises:
        InputError: as find_checkpoint and read_state.
    """
    folder, _ = find_checkpoint(run_dir)
    return None if folder is None else read_state(folder)


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
    blocks = f"{model.config.depth + 1} blocks of width {model.config.embed_dim}"
    print(f"{source}: {model.num_parameters:,} parameters, {blocks}, to {output}")


@dataclass(frozen=True, kw_only=True)
class PushArguments(Section):
    source: tyro.conf.Positional[str]
    """Run folder, such as runs/digits, or weights alone."""
    name: tyro.conf.Positional[str]
    """Where to: `user/model`, which is made where there is none."""
    private: bool | None = None
    """Whether a model that is made is private, the account's default where not given; True refuses a public one."""
    revision: str | None = None
    """Branch to push to, made where there is none; the main one where not given."""


def push(arguments: Sequence[str]) -> None:
    """Publishes a run on the hub: config, averaged weights, a card with its figures, and its newest grid."""
    given = parse(PushArguments, arguments, "python -m uvit.checkpoint push", push.__doc__ or "")
    print(f"{given.source} to {publish(given.source, given.name, given.private, given.revision)}")


@dataclass(frozen=True, kw_only=True)
class CardArguments(Section):
    source: tyro.conf.Positional[str]
    """Run folder, such as runs/digits, or weights alone."""
    output: tyro.conf.Positional[str]
    """New folder for what would be published."""
    name: str = "user/model"
    """What the card calls it."""


def card(arguments: Sequence[str]) -> None:
    """Writes the folder that push would publish, to look at it first."""
    given = parse(CardArguments, arguments, "python -m uvit.checkpoint card", card.__doc__ or "")
    output = Path(given.output)
    if lexists(output):
        raise InputError(f"the output must be a new folder, got {given.output}, which exists")
    make_directory(output.parent)
    aside = aside_of(output)
    try:
        aside.mkdir()
        write_published(given.source, aside, given.name)
        aside.replace(output)
    except OSError as error:
        raise InputError(f"cannot write to {output}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{given.source} to {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")


COMMANDS = {"convert": convert, "export": export, "push": push, "card": card}


def main(arguments: Sequence[str]) -> None:
    """Runs the command that the first argument names; `--help` in its place lists them."""
    if arguments[:1] in (["--help"], ["-h"]):
        for name, command in COMMANDS.items():
            print(f"{name:<8} {(inspect.getdoc(command) or '').splitlines()[0]}")
        print("python -m uvit.checkpoint COMMAND --help lists the options of each.")
        return
    if not arguments or arguments[0] not in COMMANDS:
        given = arguments[0] if arguments else "nothing"
        raise InputError(f"the first argument must be one of {', '.join(COMMANDS)}, got {given!r}")
    COMMANDS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    run(main)
