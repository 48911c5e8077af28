"""Exports a network to a file that runs without this package: torch.export's `.pt2`, or ONNX.

An exported file gives the prediction alone, of the shape of x, without a network's own channels after it; or, of a run
with an average velocity, images from noise.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from uvit.common.errors import InputError, missing_package
from uvit.common.files import atomic_write_group
from uvit.config import NUM_GUIDANCE, Config, to_json
from uvit.diffusion.process import schedule_of
from uvit.diffusion.samplers import guided_denoiser, sampling_times
from uvit.diffusion.solvers import average
from uvit.networks.contract import Network

ExportFormat = Literal["onnx", "pt2"]

TOLERANCE = 1e-4
"""Largest allowed difference of an exported file's output from the model's, relative to the largest value above 1."""
EXAMPLE_BATCH = 2  # an exporter would take a batch of 1 for a constant
CONFIG_KEY = "uvit_config"
"""Key of the model's config in an ONNX file's metadata."""
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def example_inputs(network: Network, batch: int, draws: bool = False) -> dict[str, Tensor]:
    """Returns example inputs by name: x, timesteps, and conditions (the null label included) that the network takes.

    Args:
        network: the network.
        batch: B.
        draws: whether for a file that draws, which takes `noise` instead of x, and no times.

    Returns:
        x (B, C, H, W), timesteps (B,) and interval (B,) in float32, y (B,) in int64, context (B, tokens, width) and
        guidance (B, 3) in float32.
    """
    config, generator = network.config, torch.Generator().manual_seed(0)
    inputs = {"noise" if draws else "x": torch.randn(batch, config.in_chans, *config.image_shape, generator=generator)}
    if not draws:
        inputs["timesteps"] = torch.linspace(1000, 1, batch)
        if config.takes_interval:
            inputs["interval"] = torch.linspace(500, 0, batch)
    if config.num_classes:
        inputs["y"] = torch.arange(batch).flip(0) % (config.num_classes + config.null_class)
    if config.context_dim:
        shape = (batch, config.num_context_tokens, config.context_dim)
        inputs["context"] = torch.randn(shape, generator=generator)
    if config.takes_guidance:
        inputs["guidance"] = torch.rand(batch, NUM_GUIDANCE, generator=generator) + torch.tensor([1.0, 0.0, 0.0])
    return inputs


class Exported(nn.Module):
    """What is exported of a network: only its prediction, or images from noise.

    Args:
        network: the network.
        run: what it was trained on, and the settings of `average` to draw with; None predicts.

    Raises:
        InputError: an attention backend that cannot be exported, or a run whose solver is another.
    """

    def __init__(self, network: Network, run: Config | None = None) -> None:
        super().__init__()
        if network.config.attention == "xformers":
            raise InputError("attention 'xformers' cannot be exported, its kernels are its own: use 'sdpa' or 'math'")
        if run is not None and run.sample.sampler != "average":
            raise InputError(f"a file draws with sampler 'average' alone, got {run.sample.sampler!r}")
        self.network, self.run = network, run
        # Outside what is traced, in which numbers must not come from tensors.
        self.times = None if run is None else sampling_times(run.process, run.sample)
        self.train(cast(nn.Module, network).training)

    @property
    def output_name(self) -> str:
        """Name of the output."""
        return "prediction" if self.run is None else "images"

    def forward(
        self,
        x: Tensor | None = None,
        timesteps: Tensor | None = None,
        y: Tensor | None = None,
        context: Tensor | None = None,
        interval: Tensor | None = None,
        guidance: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Predicts as the network, or draws; (B, C, H, W)."""
        given = {"y": y, "context": context, "interval": interval, "guidance": guidance}
        cond = {name: value for name, value in given.items() if value is not None}
        if self.run is None or self.times is None:
            network: Any = self.network
            return network(x, timesteps, **cond)[:, : network.config.in_chans]
        process = self.run.process
        denoise = guided_denoiser(self.network, process, self.run.sample, cond, None)
        return average(denoise, noise, schedule_of(process), self.times)

    def example_inputs(self, batch: int) -> dict[str, Tensor]:
        """Returns example inputs by name."""
        return example_inputs(self.network, batch, draws=self.run is not None)

    def traced_inputs(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns example inputs, and their dynamic dimensions: the batch size."""
        inputs = self.example_inputs(EXAMPLE_BATCH)
        return inputs, {name: {0: torch.export.Dim("batch")} for name in inputs}


@torch.no_grad()
def export_program(network: Network, run: Config | None = None) -> torch.export.ExportedProgram:
    """Captures a network with torch.export, for any batch size and the model's image size.

    Args:
        network: in eval mode, on the CPU; `resize` it first for another image size.
        run: as for Exported.

    Raises:
        InputError: as Exported.
    """
    exported = Exported(network, run)
    inputs, dynamic_shapes = exported.traced_inputs()
    return torch.export.export(exported, (), inputs, dynamic_shapes=dynamic_shapes)


def _save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    buffer = io.BytesIO()  # writing to the file directly, torch aborts the process on a full disk
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


@torch.no_grad()
def export_onnx(network: Network, run: Config | None = None) -> torch.onnx.ONNXProgram:
    """Captures a network as ONNX, for any batch size and the model's image size.

    Args:
        network: in eval mode, on the CPU; `resize` it first for another image size.
        run: as for Exported.

    Returns:
        The program; its `save` puts weights that are too large for one file (2 GB) in a second one beside it.

    Raises:
        InputError: as Exported, or a package that is not installed.
    """
    exported = Exported(network, run)
    for package in ONNX_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise missing_package("ONNX", package)
    inputs, dynamic_shapes = exported.traced_inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns that all inputs share one batch size
        program = torch.onnx.export(
            exported,
            (),
            kwargs=inputs,
            dynamic_shapes=dynamic_shapes,
            output_names=[exported.output_name],
            verbose=False,
        )
    assert program is not None  # only the old exporter returns None
    program.model.metadata_props[CONFIG_KEY] = to_json(network.config)
    return program


def load_exported(path: Path) -> Callable[..., Tensor]:
    """Loads an exported file to run on the CPU: a function from inputs by name to the prediction."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def call(**inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])

    return call


def save_exported(network: Network, path: Path, run: Config | None = None) -> float:
    """Exports a network to a file, which is only written if its output is that of the model.

    Args:
        network: in eval mode, on the CPU.
        path: ends in `.onnx` or `.pt2`, which determines the format. ONNX weights too large for it are in PATH.data.
        run: as for Exported.

    Returns:
        The largest difference from the model's output, for batches of 1 and 3.

    Raises:
        InputError: as export_program and export_onnx; a path that cannot be written; an output that is not the model's.
    """
    with atomic_write_group(path) as temporary:
        if path.suffix == ".pt2":
            _save_program(export_program(network, run), temporary)
        else:
            export_onnx(network, run).save(temporary)
        loaded, original, difference = load_exported(temporary), Exported(network, run), 0.0
        for batch in (1, 3):
            inputs = original.example_inputs(batch)
            with torch.no_grad():
                expected, given = original(**inputs), loaded(**inputs)
            difference = max(difference, (given - expected).abs().max().item())
            if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
                raise InputError(f"{path} would differ from the model by {difference:.1e}, expected {TOLERANCE:g}")
        is_one_file = not Path(f"{temporary}.data").exists()
    if path.suffix == ".onnx" and is_one_file:
        with contextlib.suppress(OSError):
            Path(f"{path.resolve()}.data").unlink()  # of an earlier, larger model
    return difference


def describe_inputs(network: Network, draws: bool = False) -> str:
    """Describes the inputs of an exported model: names, shapes, and the null label."""
    null = "" if network.config.null_label is None else f" ({network.config.null_label} is no label)"
    described = []
    for name, value in example_inputs(network, 1, draws).items():
        sizes = ", ".join(["B", *map(str, value.shape[1:])])
        described.append(f"{name} ({sizes})" + (null if name == "y" else ""))
    return ", ".join(described)
