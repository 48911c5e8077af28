"""Converts published weights of either backbone to config.json and model.safetensors, readable without a pickle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from uvit.common.cli import parse
from uvit.config import Section
from uvit.weights.build import load_network
from uvit.weights.pretrained import find_pretrained, save_pretrained


@dataclass(frozen=True, kw_only=True)
class Arguments(Section):
    source: tyro.conf.Positional[str]
    """Published `.pth` or `.pt` file, or a checkpoint folder of the paper's code with nnet_ema.pth."""
    output: tyro.conf.Positional[str]
    """Folder to write config.json and model.safetensors to."""
    num_heads: int | None = None
    """Number of attention heads, if the width is not a published one."""
    head_dim: int | None = None
    """Width of a U-Net's heads instead, if it is not a published one."""
    qkv_order: Literal["legacy", "new"] | None = None
    """How a U-Net's queries, keys and values are ordered, if it is not a published one."""
    img_size: tuple[int, int] | None = None
    """Height and width in pixels of the image (or latent), if it is not square."""
    num_context_tokens: int | None = None
    """Length of the context, if it is not CLIP's 77."""
    null_class: bool | None = None
    """Whether the last label means "no label"; by default it does if there are 1001 labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("output", bool(self.output.strip()), "a folder")


def main(arguments: Sequence[str]) -> None:
    """Reads the weights and writes the folder."""
    given = parse(Arguments, arguments, __doc__)
    known = {name: value for name, value in dataclasses.asdict(given).items() if value is not None}
    source, output = known.pop("source"), known.pop("output")
    network = load_network(find_pretrained(source), known)
    save_pretrained(network, output)
    print(f"{source}: {network.num_parameters:,} parameters, {network.config.description}, to {output}")
