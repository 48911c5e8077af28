"""A backbone as a file that runs without this package: torch.export's `.pt2`, or ONNX."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from uvit.backbone import UViT
from uvit.cli import parse
from uvit.config import Backend, Section, to_json
from uvit.errors import InputError
from uvit.files import write_together

ExportFormat = Literal["onnx", "pt2"]

TOLERANCE = 1e-4
"""How far an exported file's output may be from the model's, over the largest value where that is above 1."""
EXAMPLE_BATCH = 2  # a batch of 1 would be taken for a constant
OUTPUT_NAME = "prediction"
CONFIG_KEY = "uvit_config"
"""Where an ONNX file's metadata hold the model's config."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def example_inputs(model: UViT, batch: int) -> dict[str, Tensor]:
    """Returns inputs of the model by name: x, timesteps, and the labels (the last is the null label) or context it has.

    Args:
        model: the backbone.
        batch: B.

    Returns:
        x (B, C, H, W) and timesteps (B,) in float32, y (B,) in int64, context (B, tokens, width) in float32.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
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


def _check_exportable(model: UViT) -> None:
    if model.config.attention == "xformers":
        raise InputError("attention 'xformers' cannot be exported, its kernels are its own: use 'sdpa' or 'math'")


def _traced(model: UViT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Example inputs, and which of their sizes are free: the batch's."""
    inputs = example_inputs(model, EXAMPLE_BATCH)
    return inputs, {name: {0: torch.export.Dim("batch")} for name in inputs}


@torch.no_grad()
def export_program(model: UViT) -> torch.export.ExportedProgram:
    """Captures a backbone with torch.export, for any batch size, at the model's image size.

    Args:
        model: in eval mode, on the CPU; `resize` it first for another image size.

    Raises:
        InputError: an attention backend that cannot be exported.
    """
    _check_exportable(model)
    inputs, dynamic_shapes = _traced(model)
    return torch.export.export(model, (), inputs, dynamic_shapes=dynamic_shapes)


def _save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    held = io.BytesIO()  # torch's own writer ends the process on a full disk
    torch.export.save(program, held)
    path.write_bytes(held.getbuffer())


@torch.no_grad()
def export_onnx(model: UViT) -> torch.onnx.ONNXProgram:
    """Captures a backbone as ONNX, for any batch size, at the model's image size.

    Args:
        model: in eval mode, on the CPU; `resize` it first for another image size.

    Returns:
        The program; its `save` puts weights too large for one file (2 GB) into another beside it.

    Raises:
        InputError: an attention backend that cannot be exported, or a package that is not installed.
    """
    _check_exportable(model)
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"ONNX needs the package {package}, which is not installed: pip install {package}")
    inputs, dynamic_shapes = _traced(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all inputs share one batch size, which the exporter warns of
        program = torch.onnx.export(
            model, (), kwargs=inputs, dynamic_shapes=dynamic_shapes, output_names=[OUTPUT_NAME], verbose=False
        )
    assert program is not None  # it is None for the exporter of old
    program.model.metadata_props[CONFIG_KEY] = to_json(model.config)
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


def save_exported(model: UViT, path: Path) -> float:
    """Exports a backbone to a file, which takes its place once it has given the model's output.

    Args:
        model: in eval mode, on the CPU.
        path: ends in `.onnx` or `.pt2`, which says the format. ONNX weights too large for it lie in PATH.data.

    Returns:
        The largest difference from the model's output, at batches of 1 and 3.

    Raises:
        InputError: as export_program and export_onnx; a path that cannot be written; an output that is not the model's.
    """
    with write_together(path) as aside:
        if path.suffix == ".pt2":
            _save_program(export_program(model), aside)
        else:
            export_onnx(model).save(aside)
        exported, difference = load_exported(aside), 0.0
        for batch in (1, 3):
            inputs = example_inputs(model, batch)
            with torch.no_grad():
                expected, given = model(**inputs), exported(**inputs)
            difference = max(difference, (given - expected).abs().max().item())
            if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
                raise InputError(f"{path} would differ from the model by {difference:.1e}, expected {TOLERANCE:g}")
        alone = not Path(f"{aside}.data").exists()
    if path.suffix == ".onnx" and alone:
        with contextlib.suppress(OSError):
            Path(f"{path.resolve()}.data").unlink()  # of a larger model that was here before
    return difference


@dataclass(frozen=True, kw_only=True)
class ExportArguments(Section):
    source: tyro.conf.Positional[str]
    """Run folder, folder of weights, hub name, or published `.pth` file."""
    format: ExportFormat = "onnx"
    """ONNX for onnxruntime and others, or torch.export's file for torch.export.load."""
    output: str | None = None
    """File to write; where not given, model.onnx or model.pt2 here. ONNX weights above 1.5 GB, near what one
    file can hold, go to OUTPUT.data."""
    img_size: tuple[int, int] | None = None
    """Height and width in pixels of an image (or latent) to resize the model to; its own where not given."""
    attention: Backend | None = None
    """Attention backend, `sdpa` or `math`; the model's own where not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.output is None or Path(self.output).suffix == f".{self.format}"
        self._require("output", given, f"a path ending in .{self.format}")


def describe_inputs(model: UViT) -> str:
    """Names the inputs of an exported model, their shapes and what the last label means."""
    null = "" if model.config.null_label is None else f" ({model.config.null_label} is no label)"
    described = []
    for name, value in example_inputs(model, 1).items():
        sizes = ", ".join(["B", *map(str, value.shape[1:])])
        described.append(f"{name} ({sizes})" + (null if name == "y" else ""))
    return ", ".join(described)


def export(arguments: Sequence[str]) -> None:
    """Exports a backbone to a file that runs without this package, at any batch size and one image size.

    Its inputs are x (B, C, H, W), timesteps (B,) in the network's units (999 t or 1000 t), and as the model has them y,
    (B,) labels in int64 with num_classes for the null label, and context (B, tokens, width). Its output is what the
    model predicts. The file is compared with the model before it takes its place.
    """
    given = parse(ExportArguments, arguments, "python -m uvit.checkpoint export", inspect.getdoc(export) or "")
    fields: dict[str, Any] = {"attention": given.attention} if given.attention else {}
    model = UViT.from_pretrained(given.source, **fields)
    if given.img_size is not None:
        model.resize(given.img_size)
    output = Path(given.output or f"model.{given.format}")
    difference = save_exported(model, output)
    print(f"{given.source} to {output}: {describe_inputs(model)}; at most {difference:.1g} from the model's output")
