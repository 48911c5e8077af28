"""Exports a network to a file that runs without this package, for any batch size and one image size.

Its inputs are x (B, C, H, W), timesteps (B,) in the network's units (999 t, 1000 t or 1000 t - 1), and, if the model
has them, y, (B,) labels in int64 with num_classes for the null label, context (B, tokens, width), interval (B,) and
guidance (B, 3). Its output is the model's prediction. With `--evaluations`, a run with an average velocity becomes a
file that draws by itself: from noise (B, C, H, W) and the conditions to images in about [-1, 1], or to latents, guided
if guidance is an input of the network. The exported file is compared with the model before it replaces an older one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from uvit.common.cli import parse
from uvit.common.errors import InputError
from uvit.config import CONFIG_FILE, Backend, Config, SampleConfig, Section, config_kind, load_config, read_json
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
    evaluations: int = 0
    """Draw images in this many evaluations, of a run that was trained with process.objective average; 0 is the
    prediction alone."""
    img_size: tuple[int, int] | None = None
    """Height and width in pixels of the image (or latent) to resize the model to; by default its own."""
    attention: Backend | None = None
    """Attention backend, `sdpa` or `math`; by default the model's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.output is None or Path(self.output).suffix == f".{self.format}"
        self._require("output", fits, f"a path ending in .{self.format}")
        self._require("evaluations", self.evaluations >= 0, "at least 0")


def load_drawing(source: str, path: Path, num_steps: int) -> Config:
    """Returns the config of a run, with the settings of a file that draws: guidance is an input, or none.

    Raises:
        InputError: no run, or one without an average velocity.
    """
    needs = "--evaluations needs a run with process.objective 'average'"
    if not path.is_dir() or config_kind(read_json(path / CONFIG_FILE)) != "run":
        raise InputError(f"{needs}, got {source}")
    run = load_config(path / CONFIG_FILE)
    if run.process.objective != "average":
        raise InputError(f"{needs}, got {source} with {run.process.objective!r}")
    return replace(run, sample=SampleConfig(sampler="average", num_steps=num_steps))


def main(arguments: Sequence[str]) -> None:
    """Exports a network to a file and prints its inputs."""
    given = parse(Arguments, arguments, __doc__)
    fields: dict[str, Any] = {"attention": given.attention} if given.attention else {}
    path, run = find_pretrained(given.source), None
    if given.evaluations:
        run = load_drawing(given.source, path, given.evaluations)
    network = load_network(path, fields)
    if given.img_size is not None:
        network.resize(given.img_size)
    output = Path(given.output or f"model.{given.format}")
    difference = save_exported(network, output, run)
    inputs = describe_inputs(network, given.evaluations > 0)
    print(f"{given.source} to {output}: {inputs}; at most {difference:.1g} from the model's output")
