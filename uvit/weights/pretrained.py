"""Loading, saving and publishing a network.

A folder of weights holds `config.json` and `model.safetensors`. A run folder is one, too (its config.json holds the
whole run, the network's under "model"), so it loads like any other. Published `.pth` files load as they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from uvit.common.errors import InputError
from uvit.common.files import write_text
from uvit.config import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Backend,
    NetworkConfig,
    config_kind,
    read_json,
    read_network_config,
    replace_fields,
    to_json,
)
from uvit.networks.contract import Network
from uvit.weights.card import CARD_FILE, model_card
from uvit.weights.published import infer_config
from uvit.weights.tensors import read_pth, read_weights, write_weights

if TYPE_CHECKING:
    from typing import Self

    from typing_extensions import Unpack

    from uvit.common.hub import HubOptions

    class PretrainedOptions(HubOptions, total=False):
        """What `from_pretrained` takes besides a name: how to fetch, and fields of the network's config.

        The fields are those that change no weight, and for a published file those that its tensors do not tell. Any
        other field is taken, too, if the weights still fit.
        """

        attention: Backend
        gradient_checkpointing: bool
        num_heads: int
        img_size: int | tuple[int, int]
        num_context_tokens: int
        null_class: bool


REFERENCE_FILE = "nnet_ema.pth"
"""Name of the averaged weights in a checkpoint folder of the reference code."""


def find_pretrained(name_or_path: str | Path, **options: Unpack[HubOptions]) -> Path:
    """Returns what holds the weights: a published `.pth` file, or a folder with config.json and model.safetensors.

    What is not on disk is fetched from the hub.

    Args:
        name_or_path: which.
        **options: HubOptions.

    Raises:
        InputError: nothing on disk by that name, and no hub model that can be had, or a revision of what is on disk.
    """
    from uvit.common.hub import find_folder

    path = Path(name_or_path)
    if options.get("revision") is None and isfile(path):
        return path
    folder = find_folder(str(name_or_path), "checkpoint", (CONFIG_FILE, WEIGHTS_FILE), **options)
    reference = folder / REFERENCE_FILE
    return reference if isfile(reference) and not isfile(folder / WEIGHTS_FILE) else folder


def read_pretrained(path: Path, fields: Mapping[str, Any]) -> tuple[NetworkConfig, dict[str, Tensor]]:
    """Reads a network's config and weights.

    Args:
        path: what find_pretrained found.
        fields: fields of the config to replace; of a published file those that its tensors do not tell.

    Raises:
        InputError: files that are not there, or not what they should be.
    """
    if path.is_file():
        weights = read_pth(path)
        try:
            return infer_config(weights, **fields), weights
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    return replace_fields(read_network_config(path), fields), read_weights(path / WEIGHTS_FILE)


def find_mismatch(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """Says where a state dict first differs in names or shapes from that of a network, or returns None where it fits.

    Args:
        expected: the network's own.
        given: the weights.
    """
    for name, tensor in expected.items():
        if name not in given:
            return f"there is no {name}"
        if given[name].shape != tensor.shape:
            return f"{name} is {list(given[name].shape)}, expected {list(tensor.shape)}"
    unknown = [name for name in given if name not in expected]
    return f"the network has no {unknown[0]}" if unknown else None


def restore(
    network_class: Callable[..., Any], config: NetworkConfig, weights: Mapping[str, Tensor], source: str
) -> Any:
    """Builds a network of weights, in eval mode, on the default device and in the default dtype.

    Args:
        network_class: the class, as `uvit.networks.contract` describes it.
        config: its sizes and options.
        weights: its state dict.
        source: where they are from, for the error.

    Raises:
        InputError: weights that do not fit the config.
    """
    with torch.device("meta"):  # spends no time, memory or random numbers on weights that are replaced
        network = network_class(config)
    if (mismatch := find_mismatch(network.state_dict(), weights)) is not None:
        raise InputError(f"weights in {source} do not fit their config: {mismatch}")
    # Copies: what reads a file may give views of it, or of one storage for all.
    own: dict[str, Any] = {"device": torch.get_default_device(), "dtype": torch.get_default_dtype()}
    own |= {"copy": True, "memory_format": torch.contiguous_format}
    network.load_state_dict({name: tensor.detach().to(**own) for name, tensor in weights.items()}, assign=True)
    network.reset_buffers()
    return network.eval()


def save_pretrained(network: Network, directory: str | Path) -> None:
    """Writes a network's config.json, model.safetensors and, where there is none yet, a model card to a folder.

    Args:
        network: whole.
        directory: the folder; made where there is none.

    Raises:
        InputError: a folder that cannot be written to, or that holds a run, whose config would go.
    """
    network.require_whole()
    config_file = Path(directory) / CONFIG_FILE
    if isfile(config_file):
        before = read_json(config_file)
        if (kind := config_kind(before)) != "network":
            what = "a run" if kind == "run" else "something else"
            raise InputError(f"{directory} holds {what}, whose {CONFIG_FILE} would go: use another folder")
    write_weights(Path(directory), network.state_dict())
    if not isfile(Path(directory) / CARD_FILE):
        write_text(Path(directory) / CARD_FILE, model_card(network.config, network.num_parameters))
    write_text(config_file, to_json(network.config))


class PretrainedMixin:
    """Loading, saving and publishing, for a network of the contract: mixed in before its class."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **options: Unpack[PretrainedOptions]) -> Self:
        """Loads a network in eval mode from a folder, a run, the hub, or a published `.pth` file.

        Args:
            name_or_path: a folder with config.json and model.safetensors, a hub name such as `user/model`, a file
                of the reference code such as `imagenet256_uvit_huge.pth`, or its checkpoint folder with nnet_ema.pth.
            **options: PretrainedOptions.

        Raises:
            InputError: (a ValueError) nothing there, broken files, or weights of another shape.
        """
        from uvit.common.hub import HubOptions

        fields: dict[str, Any] = dict(options)
        fetching: Any = {name: fields.pop(name) for name in HubOptions.__annotations__ if name in fields}
        config, weights = read_pretrained(find_pretrained(name_or_path, **fetching), fields)
        return restore(cls, config, weights, str(name_or_path))

    def save_pretrained(self: Network, directory: str | Path) -> None:
        """Writes config.json and model.safetensors to a folder that `from_pretrained` loads.

        A model card goes beside them as README.md. One that is there is kept, for it may be yours: remove it where it
        tells of another model.

        Raises:
            InputError: (a ValueError) a folder that cannot be written to, or that holds a run, whose config would go.
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

        `python -m uvit push` pushes a run, with its recipe and figures.

        Args:
            repo_id: `user/model`; the repository is made where there is none.
            private: as for `push_folder` of uvit.common.hub, like the next two.
            revision: branch.
            token: of the hub.

        Returns:
            The address of the commit.

        Raises:
            InputError: (a ValueError) a name that is none, no login, no permission, or no way to the hub.
        """
        from uvit.common.hub import push_folder

        with tempfile.TemporaryDirectory() as folder:
            write_text(Path(folder) / CARD_FILE, model_card(self.config, self.num_parameters, repo_id))
            save_pretrained(self, Path(folder))
            return push_folder(Path(folder), repo_id, private, revision, token)
