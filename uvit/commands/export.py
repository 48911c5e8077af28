"""Exports a network to a file that runs without this package, for any batch size and one image size.

Its inputs are x (B, C, H, W), timesteps (B,) in the network's units (999 t, 1000 t or 1000 t - 1), and, if the model
has them, y, (B,) labels in int64 with num_classes for the null label, and context (B, tokens, width). Its output is the
model's prediction. The exported file is compared with the model before it replaces an older one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from uvit.common.cli import parse
from uvit.config import Backend, Section
from uvit.integrations.export import ExportFormat, describe_inputs, save_exported
from uvit.weights.build import load_network
from uvit.weights.pretrained import find_pretrained


@dataclass(frozen=True, kw_only=True)
class Arguments(Section):
    source: tyro.conf.Positional[str]
    """Run folder, folder of weights, hub name, or published `.pth` file."""
    format: ExportFormat = "onnx"
    """`onnx`, for onnxruntime and other runtimes, or `pt2`, for torch.export.load."""
    output: str | None = None
    """File to write; by default model.onnx or model.pt2 in the current folder. ONNX weights above 1.5 GB, close to the
    limit of one file, go to OUTPUT.data."""
    img_size: tuple[int, int] | None = None
    """Height and width in pixels of the image (or latent) to resize the model to; by default its own."""
    attention: Backend | None = None
    """Attention backend, `sdpa` or `math`; by default the model's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.output is None or Path(self.output).suffix == f".{self.format}"
        self._require("output", fits, f"a path ending in .{self.format}")


def main(arguments: Sequence[str]) -> None:
    """Exports a network to a file and prints its inputs."""
    given = parse(Arguments, arguments, __doc__)
    fields: dict[str, Any] = {"attention": given.attention} if given.attention else {}
    network = load_network(find_pretrained(given.source), fields)
    if given.img_size is not None:
        network.resize(given.img_size)
    output = Path(given.output or f"model.{given.format}")
    difference = save_exported(network, output)
    print(f"{given.source} to {output}: {describe_inputs(network)}; at most {difference:.1g} from the model's output")
