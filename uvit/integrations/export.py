"""A backbone as a file that runs without this package: torch.export's `.pt2`, or ONNX."""

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
"""How far an exported file's output may be from the model's, over the largest value where that is above 1."""
EXAMPLE_BATCH = 2  # a batch of 1 would be taken for a constant
OUTPUT_NAME = "prediction"
CONFIG_KEY = "uvit_config"
"""Where an ONNX file's metadata hold the model's config."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def example_inputs(network: Network, batch: int) -> dict[str, Tensor]:
    """Returns inputs of the model by name: x, timesteps, and the labels (the last is the null label) or context it has.

    Args:
        network: the backbone.
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


def _check_exportable(network: Network) -> None:
    if network.config.attention == "xformers":
        raise InputError("attention 'xformers' cannot be exported, its kernels are its own: use 'sdpa' or 'math'")


def _traced(network: Network) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Example inputs, and which of their sizes are free: the batch's."""
    inputs = example_inputs(network, EXAMPLE_BATCH)
    return inputs, {name: {0: torch.export.Dim("batch")} for name in inputs}


@torch.no_grad()
def export_program(network: Network) -> torch.export.ExportedProgram:
    """Captures a backbone with torch.export, for any batch size, at the model's image size.

    Args:
        network: in eval mode, on the CPU; `resize` it first for another image size.

    Raises:
        InputError: an attention backend that cannot be exported.
    """
    _check_exportable(network)
    inputs, dynamic_shapes = _traced(network)
    return torch.export.export(cast(nn.Module, network), (), inputs, dynamic_shapes=dynamic_shapes)


def _save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    held = io.BytesIO()  # torch's own writer ends the process on a full disk
    torch.export.save(program, held)
    path.write_bytes(held.getbuffer())


@torch.no_grad()
def export_onnx(network: Network) -> torch.onnx.ONNXProgram:
    """Captures a backbone as ONNX, for any batch size, at the model's image size.

    Args:
        network: in eval mode, on the CPU; `resize` it first for another image size.

    Returns:
        The program; its `save` puts weights too large for one file (2 GB) into another beside it.

    Raises:
        InputError: an attention backend that cannot be exported, or a package that is not installed.
    """
    _check_exportable(network)
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise missing_package("ONNX", package)
    inputs, dynamic_shapes = _traced(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all inputs share one batch size, which the exporter warns of
        program = torch.onnx.export(
            cast(nn.Module, network),
            (),
            kwargs=inputs,
            dynamic_shapes=dynamic_shapes,
            output_names=[OUTPUT_NAME],
            verbose=False,
        )
    assert program is not None  # it is None for the exporter of old
    program.model.metadata_props[CONFIG_KEY] = to_json(network.config)
    return program


def load_exported(path: Path) -> Callable[..., Tensor]:
    """Loads an exported file to run it on the CPU: inputs by name to the prediction."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def call(**inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])

    return call


def save_exported(network: Network, path: Path) -> float:
    """Exports a backbone to a file, which takes its place once it has given the model's output.

    Args:
        network: in eval mode, on the CPU.
        path: ends in `.onnx` or `.pt2`, which says the format. ONNX weights too large for it lie in PATH.data.

    Returns:
        The largest difference from the model's output, at batches of 1 and 3.

    Raises:
        InputError: as export_program and export_onnx; a path that cannot be written; an output that is not the model's.
    """
    with atomic_write_group(path) as aside:
        if path.suffix == ".pt2":
            _save_program(export_program(network), aside)
        else:
            export_onnx(network).save(aside)
        exported, difference = load_exported(aside), 0.0
        for batch in (1, 3):
            inputs = example_inputs(network, batch)
            with torch.no_grad():
                expected, given = network(**inputs), exported(**inputs)
            difference = max(difference, (given - expected).abs().max().item())
            if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
                raise InputError(f"{path} would differ from the model by {difference:.1e}, expected {TOLERANCE:g}")
        alone = not Path(f"{aside}.data").exists()
    if path.suffix == ".onnx" and alone:
        with contextlib.suppress(OSError):
            Path(f"{path.resolve()}.data").unlink()  # of a larger model that was here before
    return difference


def describe_inputs(network: Network) -> str:
    """Names the inputs of an exported model, their shapes and what the last label means."""
    null = "" if network.config.null_label is None else f" ({network.config.null_label} is no label)"
    described = []
    for name, value in example_inputs(network, 1).items():
        sizes = ", ".join(["B", *map(str, value.shape[1:])])
        described.append(f"{name} ({sizes})" + (null if name == "y" else ""))
    return ", ".join(described)
