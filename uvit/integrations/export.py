"""Exports a network to a file that runs without this package: torch.export's `.pt2`, or ONNX.

An exported file gives the prediction alone, of the shape of x, without a network's own channels after it.
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
from uvit.config import to_json
from uvit.networks.contract import Network

ExportFormat = Literal["onnx", "pt2"]

TOLERANCE = 1e-4
"""Largest allowed difference of an exported file's output from the model's, relative to the largest value above 1."""
EXAMPLE_BATCH = 2  # an exporter would take a batch of 1 for a constant
OUTPUT_NAME = "prediction"
CONFIG_KEY = "uvit_config"
"""Key of the model's config in an ONNX file's metadata."""
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def example_inputs(network: Network, batch: int) -> dict[str, Tensor]:
    """Returns example inputs by name: x, timesteps, and labels (the null label included) or context if it takes them.

    Args:
        network: the network.
        batch: B.

    Returns:
        x (B, C, H, W) and timesteps (B,) in float32, y (B,) in int64, context (B, tokens, width) in float32.
    """
    config, generator = network.config, torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(batch, config.in_chans, *config.image_shape, generator=generator),
        "timesteps": torch.linspace(1000, 1, batch),
    }
    if config.num_classes:
        inputs["y"] = torch.arange(batch).flip(0) % (config.num_classes + config.null_class)
    if config.context_dim:
        shape = (batch, config.num_context_tokens, config.context_dim)
        inputs["context"] = torch.randn(shape, generator=generator)
    return inputs


class Predictor(nn.Module):
    """A network of which only the prediction is returned.

    Args:
        network: the network.

    Raises:
        InputError: an attention backend that cannot be exported.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        if network.config.attention == "xformers":
            raise InputError("attention 'xformers' cannot be exported, its kernels are its own: use 'sdpa' or 'math'")
        self.network = network
        self.train(cast(nn.Module, network).training)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Predicts as the network; (B, C, H, W)."""
        return self.network(x, timesteps, y, context)[:, : self.network.config.in_chans]


def _traced(network: Network) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns example inputs, and their dynamic dimensions: the batch size."""
    inputs = example_inputs(network, EXAMPLE_BATCH)
    return inputs, {name: {0: torch.export.Dim("batch")} for name in inputs}


@torch.no_grad()
def export_program(network: Network) -> torch.export.ExportedProgram:
    """Captures a network with torch.export, for any batch size and the model's image size.

    Args:
        network: in eval mode, on the CPU; `resize` it first for another image size.

    Raises:
        InputError: an attention backend that cannot be exported.
    """
    predictor = Predictor(network)
    inputs, dynamic_shapes = _traced(network)
    return torch.export.export(predictor, (), inputs, dynamic_shapes=dynamic_shapes)


def _save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    buffer = io.BytesIO()  # writing to the file directly, torch aborts the process on a full disk
    torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


@torch.no_grad()
def export_onnx(network: Network) -> torch.onnx.ONNXProgram:
    """Captures a network as ONNX, for any batch size and the model's image size.

    Args:
        network: in eval mode, on the CPU; `resize` it first for another image size.

    Returns:
        The program; its `save` puts weights that are too large for one file (2 GB) in a second one beside it.

    Raises:
        InputError: an attention backend that cannot be exported, or a package that is not installed.
    """
    predictor = Predictor(network)
    for package in ONNX_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise missing_package("ONNX", package)
    inputs, dynamic_shapes = _traced(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns that all inputs share one batch size
        program = torch.onnx.export(
            predictor,
            (),
            kwargs=inputs,
            dynamic_shapes=dynamic_shapes,
            output_names=[OUTPUT_NAME],
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


def save_exported(network: Network, path: Path) -> float:
    """Exports a network to a file, which is only written if its output is that of the model.

    Args:
        network: in eval mode, on the CPU.
        path: ends in `.onnx` or `.pt2`, which determines the format. ONNX weights too large for it are in PATH.data.

    Returns:
        The largest difference from the model's output, for batches of 1 and 3.

    Raises:
        InputError: as export_program and export_onnx; a path that cannot be written; an output that is not the model's.
    """
    with atomic_write_group(path) as temporary:
        if path.suffix == ".pt2":
            _save_program(export_program(network), temporary)
        else:
            export_onnx(network).save(temporary)
        exported, predictor, difference = load_exported(temporary), Predictor(network), 0.0
        for batch in (1, 3):
            inputs = example_inputs(network, batch)
            with torch.no_grad():
                expected, given = predictor(**inputs), exported(**inputs)
            difference = max(difference, (given - expected).abs().max().item())
            if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
                raise InputError(f"{path} would differ from the model by {difference:.1e}, expected {TOLERANCE:g}")
        is_one_file = not Path(f"{temporary}.data").exists()
    if path.suffix == ".onnx" and is_one_file:
        with contextlib.suppress(OSError):
            Path(f"{path.resolve()}.data").unlink()  # of an earlier, larger model
    return difference


def describe_inputs(network: Network) -> str:
    """Describes the inputs of an exported model: names, shapes, and the null label."""
    null = "" if network.config.null_label is None else f" ({network.config.null_label} is no label)"
    described = []
    for name, value in example_inputs(network, 1).items():
        sizes = ", ".join(["B", *map(str, value.shape[1:])])
        described.append(f"{name} ({sizes})" + (null if name == "y" else ""))
    return ", ".join(described)
