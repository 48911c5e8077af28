"""Backbones as torch.export's files and ONNX, and under torch.compile."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import resource

import onnx
import onnxruntime
import pytest
import torch
from helpers.golden import with_golden_weights

from uvit import UNet, UViT
from uvit.commands import export
from uvit.common.errors import InputError
from uvit.integrations.export import example_inputs, export_onnx, export_program, load_exported, save_exported

LABELS = {"num_classes": 3, "null_class": True}
CONTEXT = {"context_dim": 16, "num_context_tokens": 5}
OPTIONS = {
    "time_conditioning": "adaln",
    "attention": "math",
    "pos_embed": "sincos2d",
    "conv": "tokens",
    "patch_embed": "conv",
    "qk_norm": True,
    "mlp_time_embed": True,
    "gradient_checkpointing": True,
    "skip": "linear_add",
}
UNET = {
    "backbone": "unet",
    "img_size": 8,
    "in_chans": 1,
    "out_chans": 2,
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_sizes": (),
    "head_dim": 32,
}
KINDS = pytest.mark.parametrize("fields", [LABELS, OPTIONS, {**UNET, **LABELS}], ids=["labels", "options", "unet"])


@pytest.fixture
def make(tiny):
    def build(**fields) -> UViT | UNet:
        torch.manual_seed(0)
        if "backbone" in fields:
            return with_golden_weights(UNet(**fields)).eval()
        return UViT(tiny, depth=2, **fields).eval()

    return build


@torch.no_grad()
def largest_difference(model, exported, batch):
    inputs = example_inputs(model, batch)
    prediction = model(**inputs)[:, : model.config.in_chans]
    assert exported(**inputs).shape == prediction.shape
    return (exported(**inputs) - prediction).abs().max().item()


@pytest.mark.parametrize(
    "fields",
    [LABELS, CONTEXT, OPTIONS, {"patch_bottleneck": 3}, {**UNET, **CONTEXT}],
    ids=["labels", "context", "options", "narrow", "unet"],
)
def test_onnxruntime_gives_the_models_output_at_every_batch_and_after_resize(make, fields, tmp_path):
    model, path = make(**fields).resize((12, 16)), tmp_path / "model.onnx"
    assert save_exported(model, path) < 1e-4
    exported = load_exported(path)
    assert all(largest_difference(model, exported, batch) < 1e-4 for batch in (1, 4))
    assert exported(**example_inputs(model, 2)).std() > 0.01
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


@KINDS
def test_an_exported_program_gives_the_models_output_at_every_batch(make, fields, tmp_path):
    model, path = make(**fields).resize((12, 16)), tmp_path / "model.pt2"
    assert save_exported(model, path) < 1e-6
    assert largest_difference(model, load_exported(path), 5) < 1e-6
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt2"]


@KINDS
def test_compiling_breaks_no_graph(make, fields):
    torch._dynamo.reset()  # compiling one function too often is an error of its own
    model = make(**fields)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = example_inputs(model, 3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), model(**inputs))
    model.train()
    compiled(**inputs).square().mean().backward()
    assert all(each.grad is not None for each in model.blocks[len(model.blocks) // 2].parameters())


def test_an_onnx_file_has_named_inputs_and_the_config(make, tmp_path):
    model, path = make(**LABELS), tmp_path / "model.onnx"
    save_exported(model, path)
    session = onnxruntime.InferenceSession(path)
    shapes = {each.name: (each.shape, each.type) for each in session.get_inputs()}
    assert shapes == {
        "x": (["batch", 1, 8, 8], "tensor(float)"),
        "timesteps": (["batch"], "tensor(float)"),
        "y": (["batch"], "tensor(int64)"),
    }
    config = json.loads(session.get_modelmeta().custom_metadata_map["uvit_config"])
    assert config == dataclasses.asdict(model.config)


def test_the_null_label_is_compared_too(make):
    model = make(**LABELS)
    assert 3 in example_inputs(model, 4)["y"]
    assert example_inputs(make(num_classes=3), 4)["y"].max() == 2


def test_weights_too_large_for_one_file_are_saved_beside_it(make, tmp_path, monkeypatch):
    module = importlib.import_module("torch.onnx._internal.exporter._onnx_program")
    monkeypatch.setattr(module, "_LARGE_MODEL_THRESHOLD", 1000)
    model, path = make(**LABELS), tmp_path / "model.onnx"
    for _ in range(2):  # the second time over the first
        save_exported(model, path)
        assert sorted(each.name for each in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    num_parameters = sum(each.numel() for each in model.parameters())
    assert (tmp_path / "model.onnx.data").stat().st_size > 0.9 * 4 * num_parameters
    (moved := tmp_path / "elsewhere").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).rename(moved / name)
    assert largest_difference(model, load_exported(moved / "model.onnx"), 3) < 1e-4
    onnx.checker.check_model(moved / "model.onnx")
    monkeypatch.undo()
    save_exported(model, moved / "model.onnx")  # whole in one file, where two were
    assert [each.name for each in moved.iterdir()] == ["model.onnx"]


class Unsteady(UViT):
    """Its output is another one at each call, so that no file can have it."""

    calls = itertools.count()

    def forward(self, x, timesteps, y=None, context=None):
        return super().forward(x, timesteps) + next(self.calls)


def test_a_file_that_differs_from_the_model_does_not_take_its_place(tiny, tmp_path):
    path = tmp_path / "model.pt2"
    path.write_text("before")
    with pytest.raises(InputError, match="would differ from the model by"):
        save_exported(Unsteady(tiny).eval(), path)
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_full_disk_leaves_the_old_file(make, suffix, tmp_path):
    model, path = make(), tmp_path / f"model{suffix}"
    path.write_text("before")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write to .*: File too large"):
            save_exported(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("form", [export_program, export_onnx])
def test_kernels_of_xformers_cannot_be_exported(make, form):
    with pytest.raises(InputError, match="attention 'xformers' cannot be exported"):
        form(make(attention="xformers"))


def test_a_package_that_is_not_installed(make, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(
        InputError, match="needs the package onnxscript, which is not installed: pip install onnxscript"
    ):
        export_onnx(make())


def test_the_command_exports_to_a_file(make, tmp_path, capsys):
    make(**LABELS, attention="xformers").save_pretrained(tmp_path / "weights")
    source, output = str(tmp_path / "weights"), tmp_path / "small.pt2"
    command = [source, "--format", "pt2", "--output", str(output), "--img_size", "16", "12"]
    with pytest.raises(InputError, match="use 'sdpa' or 'math'"):
        export.main(command)
    assert not output.exists()
    export.main([*command, "--attention", "sdpa"])
    assert "x (B, 1, 16, 12), timesteps (B), y (B) (3 is no label); at most 0 from" in capsys.readouterr().out
    model = UViT.from_pretrained(source, attention="sdpa").resize((16, 12))
    assert largest_difference(model, load_exported(output), 2) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "jit"], "jit"),
        (["--output", "model.png"], r"output must be a path ending in .onnx, got 'model.png'"),
        (["--img_size", "9", "9"], "img_size must be divisible by patch_size 2"),
    ],
)
def test_invalid_options_are_refused(make, arguments, message, tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        export.main([str(tmp_path), *arguments])
