"""Publishes a run or a network: config, weights, card and grid, without paths of this machine."""

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

from uvit.common.errors import InputError
from uvit.common.files import atomic_write, write_text
from uvit.common.hub import push_folder
from uvit.config import CONFIG_FILE, EVALUATION_FILE, Config, config_kind, grid_files, read_json, save_json, step_of
from uvit.sampling.runs import load_run
from uvit.weights.averages import find_average
from uvit.weights.build import load_network
from uvit.weights.card import CARD_FILE, model_card
from uvit.weights.pretrained import find_pretrained, save_pretrained
from uvit.weights.tensors import hash_weights, write_weights

GRID_FILE = "grid.png"
NEEDED = {"weights", "reference", "features"}
PROTOCOL_LINE = re.compile(
    r"((?:train|test) part of |EMA of |w = .* away from )?(.*?)((?:: |, split |, step_|, width |, hash ).*)?", re.DOTALL
)
"""The text before a name in a line of a protocol, the name, and the text after it."""
FOLDER_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?(?:~[^/\\]*|\.{1,2})?[/\\].*[/\\]")
"""A path from the root, a home or a parent folder, without its last part; greedy, since folders may have spaces."""


def public_name(text: str) -> str:
    """Removes folders of this machine from a name, or a line of a protocol: `/home/me/photos` becomes `./photos`."""
    before, name, after = PROTOCOL_LINE.fullmatch(text).groups("")  # type: ignore[union-attr]  # matches any text
    if "/" in name and exists(name):
        name = f"./{Path(name).name}"
    return FOLDER_PATH.sub("./", before + name + after)


def public_config(config: Config) -> Config:
    """Returns a run's config without folders of this machine."""
    data = dataclasses.replace(
        config.data,
        name=public_name(config.data.name),
        text_encoder=public_name(config.data.text_encoder),
        autoencoder=config.data.autoencoder and public_name(config.data.autoencoder),
    )
    init, encoder = config.train.init, config.train.alignment_encoder_weights
    train = dataclasses.replace(
        config.train,
        run_dir=None,
        init=init and public_name(init),
        alignment_encoder_weights=encoder and public_name(encoder),
    )
    return dataclasses.replace(config, data=data, train=train)


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


def write_hub_folder(source: str | Path, folder: Path, name: str) -> None:
    """Writes what is to be published of a run, or of a network.

    Args:
        source: run folder, folder of weights, published `.pth` file, or hub name.
        folder: where to write config.json, model.safetensors, README.md and, for a run, its newest grid of samples.
        name: of the model on the hub, for the card.

    Raises:
        InputError: missing or invalid files, weights that are not finite, or figures of other weights.
    """
    path = find_pretrained(source)
    if path.is_file() or config_kind(read_json(path / CONFIG_FILE)) != "run":
        network = load_network(path, {})
        write_text(folder / CARD_FILE, model_card(network.config, network.num_parameters, name))
        save_pretrained(network, folder)
        return
    config, model = load_run(str(path), "auto", torch.device("cpu"))
    config = public_config(config)
    results, grids, weights_hash = path / EVALUATION_FILE, grid_files(path), hash_weights(model.state_dict())
    evaluation = read_evaluation(results, weights_hash) if results.is_file() else None
    average = find_average(path, weights_hash)
    width = None if average is None else average.width
    grid = (GRID_FILE, step_of(grids[-1].name) or 0) if grids else None
    write_text(
        folder / CARD_FILE,
        model_card(config.model, model.num_parameters, name, config, evaluation, grid, width),
    )
    if grids:
        with atomic_write(folder / GRID_FILE) as temporary:
            shutil.copyfile(grids[-1], temporary)
    write_weights(folder, model.state_dict())
    save_json(folder / CONFIG_FILE, config)


def publish(source: str, name: str, private: bool | None = None, revision: str | None = None) -> str:
    """Pushes a run, or a network, to the hub.

    Args:
        source: as for write_hub_folder.
        name: `user/model`.
        private: as for push_folder.
        revision: branch to push to, created if it does not exist; None is the main branch.

    Returns:
        The URL of the commit.

    Raises:
        InputError: as write_hub_folder and push_folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_hub_folder(source, Path(folder), name)
        return push_folder(Path(folder), name, "Push a run", private, revision)
