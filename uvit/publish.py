"""A run or a backbone as a folder that anyone may see: config, weights, card and grid, and nothing of this machine."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import tempfile
from os.path import exists
from pathlib import Path
from typing import Any

import torch

from uvit.backbone import UViT
from uvit.card import CARD_FILE, model_card
from uvit.config import CONFIG_FILE, Config, read_json, to_json
from uvit.errors import InputError
from uvit.files import RESULT_FILE, write_aside, write_text
from uvit.generate import load_run
from uvit.hub import push_folder
from uvit.weights import find_pretrained, hash_weights, write_weights

GRID_FILE = "grid.png"
NEEDED = {"weights", "reference", "features"}
PARTS = re.compile(r"((?:train|test) part of |EMA of )?(.*?)((?:: |, split |, step_|, hash ).*)?", re.DOTALL)
"""What a protocol says before a name, the name, and what it says after it."""
FOLDERS = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?(?:~[^/\\]*|\.{1,2})?[/\\].*[/\\]")
"""A path from the root, a home or the folder above, without what it ends in; greedy, since folders may have spaces."""


def public_name(text: str) -> str:
    """Takes the folders of this machine out of a name, or of a line of a protocol: `/home/me/photos` is `./photos`."""
    before, name, after = PARTS.fullmatch(text).groups("")  # type: ignore[union-attr]  # every text fits
    if "/" in name and exists(name):
        name = f"./{Path(name).name}"
    return FOLDERS.sub("./", before + name + after)


def public_config(config: Config) -> Config:
    """Returns a run's config without the folders of this machine."""
    data = dataclasses.replace(
        config.data,
        name=public_name(config.data.name),
        text_encoder=public_name(config.data.text_encoder),
        autoencoder=config.data.autoencoder and public_name(config.data.autoencoder),
    )
    return dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, run_dir=None))


def read_evaluation(path: Path, weights_hash: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads the figures that evaluate.py saved, and their protocol.

    Raises:
        InputError: not what evaluate.py saves, or figures of other weights.
    """
    raw = read_json(path)
    protocol = raw.pop("protocol", None) if isinstance(raw, dict) else None
    if (
        not isinstance(protocol, dict)
        or not protocol.keys() >= NEEDED
        or not all(isinstance(value, str) for value in protocol.values())
        or not all(isinstance(value, float) and math.isfinite(value) for value in raw.values())
        or not raw.keys() >= {"frechet", *(f"{key}_deviation" for key in ("kid", "inception_score") if key in raw)}
    ):
        raise InputError(f"{path} must hold figures and their protocol, as evaluate.py saves them")
    if not protocol["weights"].endswith(f"hash {weights_hash}"):
        raise InputError(
            f"{path} holds figures of other weights than {weights_hash}: run evaluate.py again, or remove it"
        )
    return raw, {key: public_name(value) for key, value in protocol.items()}


def write_published(source: str | Path, folder: Path, name: str) -> None:
    """Writes what is to be published of a run, or of a backbone alone.

    Args:
        source: run folder, folder of weights, published `.pth` file, or hub name.
        folder: gets config.json, model.safetensors and README.md, and of a run its newest grid of samples.
        name: of the model on the hub, for the card.

    Raises:
        InputError: nothing whole there, weights that are not finite, or figures that are not theirs.
    """
    path = find_pretrained(source)
    raw = {} if path.is_file() else read_json(path / CONFIG_FILE)
    if not isinstance(raw, dict) or "process" not in raw:
        model = UViT.from_pretrained(path)
        write_text(folder / CARD_FILE, model_card(model.config, model.num_parameters, name))
        model.save_pretrained(folder)
        return
    config, model = load_run(str(path), "auto", torch.device("cpu"))
    config = public_config(config)
    results, grids = path / RESULT_FILE, sorted(path.glob(f"samples/step_{'[0-9]' * 8}.png"))
    evaluation = read_evaluation(results, hash_weights(model.state_dict())) if results.is_file() else None
    grid = (GRID_FILE, int(grids[-1].stem.removeprefix("step_"))) if grids else None
    write_text(folder / CARD_FILE, model_card(config.model, model.num_parameters, name, config, evaluation, grid))
    if grids:
        with write_aside(folder / GRID_FILE) as aside:
            shutil.copyfile(grids[-1], aside)
    write_weights(folder, model.state_dict())
    write_text(folder / CONFIG_FILE, to_json(config))


def publish(source: str, name: str, private: bool | None = None, revision: str | None = None) -> str:
    """Pushes a run, or a backbone alone, to the hub.

    Args:
        source: as for write_published.
        name: `user/model`.
        private: as for push_folder.
        revision: branch to push to, made where there is none; None is the main one.

    Returns:
        The address of the commit.

    Raises:
        InputError: as write_published and push_folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_published(source, Path(folder), name)
        return push_folder(Path(folder), name, private, revision)
