"""Loads, saves and publishes a network.

A folder of weights has `config.json` and `model.safetensors`. A run folder has both too (its config.json describes the
whole run, with the network under "model"), so it loads like any other, and so does the average in one of its
checkpoints. Published `.pth` files load unchanged.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from os.path import isfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import Self, Unpack

from uvit.common.errors import InputError, short_repr
from uvit.common.files import write_text
from uvit.common.messages import notify
from uvit.common.options import HubOptions
from uvit.config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Backend,
    NetworkConfig,
    check_fields,
    config_kind,
    read_json,
    read_network_config,
    replace_fields,
    save_json,
)
from uvit.networks.backbone import count_parameters
from uvit.networks.contract import Network
from uvit.weights.card import CARD_FILE, model_card
from uvit.weights.published import config_class_of, infer_config
from uvit.weights.state import STATE_FILE, read_average
from uvit.weights.tensors import read_pth, read_weights, write_weights


class PretrainedOptions(HubOptions, total=False):
    """Keyword arguments of `from_pretrained`: how to fetch, and fields of the network's config.

    The fields listed are those that change no weights, and those that cannot be inferred from the tensors of a
    published file. Any other field is accepted too, if the weights still fit.
    """

    attention: Backend
    gradient_checkpointing: bool
    num_heads: int
    head_dim: int
    qkv_order: str
    img_size: int | tuple[int, int]
    num_context_tokens: int
    null_class: bool


WRAPPERS = "module.", "_orig_mod."
"""What DistributedDataParallel and torch.compile put before the names of a network's weights."""
REFERENCE_FILE = "nnet_ema.pth"
"""Name of the averaged weights in a checkpoint folder of the paper's code."""


def find_pretrained(name_or_path: str | Path, **options: Unpack[HubOptions]) -> Path:
    """Returns the path of the weights: a published `.pth` file, or a folder with config.json and model.safetensors.

    A checkpoint of a run, such as runs/digits/checkpoints/step_00000500, stands for the average in it.

    What is not on disk is fetched from the hub.

    Args:
        name_or_path: file, folder or hub name.
        **options: HubOptions.

    Raises:
        InputError: nothing found by that name on disk or the hub, or a revision given for something on disk.
    """
    from uvit.common.hub import find_folder

    if not isinstance(name_or_path, str | Path) or not str(name_or_path).strip():
        raise InputError(f"a checkpoint must be a path or a hub name, got {short_repr(name_or_path)}")
    path = Path(name_or_path)
    if options.get("revision") is None and isfile(path):
        return path
    folder = find_folder(str(name_or_path), "checkpoint", (CONFIG_FILE, WEIGHTS_FILE), **options)
    reference = folder / REFERENCE_FILE
    return reference if isfile(reference) and not isfile(folder / WEIGHTS_FILE) else folder


def read_pretrained(
    path: Path, fields: Mapping[str, Any], expected: type[NetworkConfig] = NetworkConfig
) -> tuple[NetworkConfig, dict[str, Tensor]]:
    """Reads a network's config and weights.

    Args:
        path: as returned by find_pretrained.
        fields: fields of the config to replace; for a published file, those that its tensors do not determine.
        expected: the kind of network; by default any.

    Raises:
        InputError: missing or invalid files, or another kind of network.
    """

    def require(found: type[NetworkConfig]) -> None:
        if not issubclass(found, expected):
            raise InputError(f"{path} has the weights of a {found.title}, expected those of a {expected.title}")

    if path.is_file():
        weights = strip_wrappers(read_pth(path), path)
        require(config_class_of(weights))
        try:
            return infer_config(weights, **fields), weights
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    config = read_network_config(path)
    require(type(config))
    is_checkpoint = isfile(path / STATE_FILE) and not isfile(path / WEIGHTS_FILE)
    return replace_fields(config, fields), read_average(path) if is_checkpoint else read_weights(path / WEIGHTS_FILE)


def strip_wrappers(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Removes what wrappers put before all names, and says so."""
    stripped = weights
    while prefix := next((each for each in WRAPPERS if stripped and all(n.startswith(each) for n in stripped)), None):
        stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
        notify(f"{path}: {prefix!r} before all names is left out")
    return stripped


def find_mismatch(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """Describes the first difference in names, kinds or shapes between two state dicts; None where there is none.

    Args:
        expected: the network's own.
        given: the one to load.
    """
    for name, tensor in expected.items():
        if name not in given:
            return f"there is no {name}"
        if tensor.is_floating_point() and not given[name].is_floating_point():
            return f"{name} is {given[name].dtype}, expected floating point"
        if given[name].shape != tensor.shape:
            return f"{name} is {list(given[name].shape)}, expected {list(tensor.shape)}"
    unknown = [name for name in given if name not in expected]
    return f"the network has no {unknown[0]}" if unknown else None


def restore(
    network_class: Callable[..., Any], config: NetworkConfig, weights: Mapping[str, Tensor], source: str
) -> Any:
    """Builds a network with given weights, in eval mode, on the default device and in the default dtype.

    Args:
        network_class: a class that follows `uvit.networks.contract`.
        config: its sizes and options.
        weights: its state dict.
        source: where the weights are from, for the error.

    Raises:
        InputError: weights that do not fit the config.
    """
    with torch.device("meta"):  # no time, memory or random numbers for initial weights that are replaced
        network = network_class(config)
    if (mismatch := find_mismatch(network.state_dict(), weights)) is not None:
        raise InputError(f"weights in {source} do not fit their config: {mismatch}")
    # Copies, since tensors read from a file may be views of it, or share one storage.
    options: dict[str, Any] = {"device": torch.get_default_device(), "dtype": torch.get_default_dtype()}
    options |= {"copy": True, "memory_format": torch.contiguous_format}
    network.load_state_dict({name: tensor.detach().to(**options) for name, tensor in weights.items()}, assign=True)
    network.reset_buffers()
    return network.eval()


def save_pretrained(network: Network, directory: str | Path) -> None:
    """Writes a network's config.json, model.safetensors and, if there is none yet, a model card to a folder.

    Args:
        network: the network, with all its blocks.
        directory: the folder; created if it does not exist.

    Raises:
        InputError: a folder that cannot be written to, or that holds a run, whose config would be overwritten.
    """
    network.require_whole()
    config_file = Path(directory) / CONFIG_FILE
    if isfile(config_file):
        before = read_json(config_file)
        if (kind := config_kind(before)) != "network":
            what = "a run" if kind == "run" else "something else"
            raise InputError(f"{directory} holds {what}, whose {CONFIG_FILE} would be overwritten: use another folder")
    write_weights(Path(directory), network.state_dict())
    if not isfile(Path(directory) / CARD_FILE):
        write_text(Path(directory) / CARD_FILE, model_card(network.config, count_parameters(network.parameters())))
    save_json(config_file, network.config)


class PretrainedMixin:
    """Adds loading, saving and publishing to a network; comes before the network's class in the bases."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options: Unpack[PretrainedOptions]) -> Self:
        """Loads a network in eval mode from a folder, a run, the hub, or a published `.pth` file.

        Args:
            name_or_path: a folder with config.json and model.safetensors, a hub name such as `user/model`, a file of
                the paper's code such as `imagenet256_uvit_huge.pth`, or its checkpoint folder with nnet_ema.pth; for a
                U-Net, a file of ADM such as `256x256_diffusion.pt`.
            **options: `revision`, `token`, `cache_dir` and `local_files_only` of the hub, as HubOptions describes them;
                and fields of the network's config, as PretrainedOptions does, such as `attention`.

        Raises:
            InputError: (a ValueError) an unknown field, nothing there, broken files, or weights of another shape.
        """
        fields: dict[str, Any] = dict(options)
        fetching: Any = {name: fields.pop(name) for name in HubOptions.__annotations__ if name in fields}
        config_class = cast(Any, cls).config_class
        check_fields(config_class, fields)
        config, weights = read_pretrained(find_pretrained(name_or_path, **fetching), fields, config_class)
        return restore(cls, config, weights, str(name_or_path))

    def save_pretrained(self: Network, directory: str | Path) -> None:
        """Writes config.json and model.safetensors to a folder that `from_pretrained` loads.

        A model card is written beside them as README.md. An existing one is kept, since it may be yours: remove it if
        it describes another model.

        Raises:
            InputError: (a ValueError) a folder that cannot be written to, or that holds a run, whose config would be
                overwritten.
        """
        save_pretrained(self, directory)

    def push_to_hub(
        self: Network,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Pushes config.json, model.safetensors and a model card to the hub.

        To push a run with its recipe and figures, use `python -m uvit push`.

        Args:
            repo_id: `user/model`; the repository is created if it does not exist.
            private: as for `uvit.common.hub.push_folder`, like the next two.
            revision: branch.
            token: access token.

        Returns:
            The URL of the commit.

        Raises:
            InputError: (a ValueError) an invalid name, no login, no permission, or no connection.
        """
        from uvit.common.hub import push_folder

        with tempfile.TemporaryDirectory() as folder:
            write_text(Path(folder) / CARD_FILE, model_card(self.config, count_parameters(self.parameters()), repo_id))
            save_pretrained(self, Path(folder))
            return push_folder(Path(folder), repo_id, "Push a network", private, revision, token)
