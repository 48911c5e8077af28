"""Runs with an alignment, by the command line."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.runs import TINY, TINY_LAYERSYNC, TINY_REPA, lines_of_metrics, losses_of
from helpers.same_runs import assert_same, assert_same_run, metrics_of
from helpers.training import RecordingTrainer, deterministic_loss

from uvit import UViT
from uvit.commands import sample, train
from uvit.training.checkpoint import load_checkpoint
from uvit.weights.tensors import read_weights

QUIET = ["--train.tracker", "none"]


@pytest.fixture
def folder(tmp_path, monkeypatch, vit) -> Path:
    """A folder with small configs, as the current one."""
    monkeypatch.chdir(tmp_path)
    for name, config in (("tiny", TINY), ("layersync", TINY_LAYERSYNC), ("repa", TINY_REPA)):
        (tmp_path / f"{name}.py").write_text(config.replace("WEIGHTS", str(vit)))
    return tmp_path


@pytest.mark.parametrize("kind", ["repa", "irepa"])
def test_a_run_with_an_encoder_keeps_its_projector_and_exports_the_network_alone(kind, folder, capsys):
    train.main(["repa.py", *QUIET, "--train.alignment", kind])
    state = load_checkpoint(folder / "runs/repa")
    assert {"model", "ema", "optimizer", "projector", "progress", "step"} == {*state}
    network = UViT.from_pretrained(folder / "runs/repa")
    assert {*network.state_dict()} == {*state["model"]} == {*state["ema"]}
    assert {*read_weights(folder / "runs/repa/model.safetensors")} == {*state["model"]}
    assert len(state["projector"]) == {"repa": 6, "irepa": 2}[kind]
    moments = state["optimizer"]["state"]
    assert len(moments) == len(state["model"]) + len(state["projector"])
    for line in lines_of_metrics(folder / "runs/repa"):
        assert -1 <= line["alignment"] <= 1
    sample.main(["--checkpoint", "runs/repa", "--num_per_class", "1", "--output", "grid.png"])
    assert (folder / "grid.png").is_file()


@pytest.mark.parametrize("name", ["layersync", "repa"])
def test_a_resumed_run_is_the_uninterrupted_one(name, folder):
    train.main([f"{name}.py", *QUIET, "--train.run_dir", "straight"])
    shutil.copytree("straight", "again", ignore=shutil.ignore_patterns("step_00000004"))
    train.main([f"{name}.py", *QUIET, "--train.run_dir", "again"])
    shutil.rmtree("straight/checkpoints/step_00000002")
    shutil.rmtree("again/checkpoints/step_00000002")
    assert_same_run(folder / "again", folder / "straight")


@pytest.mark.parametrize("name", ["layersync", "repa"])
def test_weight_0_is_the_run_without_an_alignment(name, folder):
    train.main(["tiny.py", *QUIET])
    train.main([f"{name}.py", *QUIET, "--train.alignment_weight", "0"])
    assert_same_run(folder / "runs" / name, folder / "runs/tiny")


def test_an_alignment_changes_the_weights_and_not_what_the_loss_is(folder):
    """The first update has learning rate 0, so the second step has the loss of the other run, too."""
    train.main(["tiny.py", *QUIET, "--train.log_every", "1"])
    train.main(["layersync.py", *QUIET, "--train.log_every", "1"])
    ours, theirs = (losses_of(folder / f"runs/{name}") for name in ("layersync", "tiny"))
    assert ours[:2] == theirs[:2] and ours[2:] != theirs[2:]
    assert all(
        set(one) - set(other) == {"alignment"}
        for one, other in zip(*map(metrics_of, (folder / "runs/layersync", folder / "runs/tiny")))
    )


def test_accumulated_parts_equal_one_batch(folder):
    found = []
    for parts in ("1", "4"):
        gradients = []
        fixed = f"--optim.name adamw --optim.grad_clip 0 --train.num_steps 2 --train.accumulation_steps {parts}"
        arguments = ["repa.py", *QUIET, *fixed.split(), "--train.run_dir", f"run_{parts}"]
        train.main(arguments, partial(RecordingTrainer, gradients, [], loss_of=deterministic_loss))
        found.append(torch.stack(gradients))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


def test_gradients_of_network_and_projector_are_clipped_together(folder):
    gradients = []
    arguments = ["repa.py", *QUIET, "--optim.name", "adamw", "--optim.grad_clip", "0.01"]
    train.main(arguments, partial(RecordingTrainer, gradients, []))
    count = sum(
        tensor.numel()
        for part in ("model", "projector")
        for tensor in load_checkpoint(Path("runs/repa"))[part].values()
    )
    assert {gradient.numel() for gradient in gradients} == {count}
    assert [gradient.norm().item() for gradient in gradients] == pytest.approx([0.01] * 4, rel=1e-3)


def test_another_alignment_is_another_run(folder):
    train.main(["layersync.py", *QUIET])
    with pytest.raises(ValueError, match=r"holds a run with train\.alignment 'layersync', got 'dispersive'"):
        train.main(["layersync.py", *QUIET, "--train.alignment", "dispersive"])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["blocks", "model"])
@pytest.mark.parametrize("name", ["layersync", "repa"])
def test_a_compiled_run_is_nearly_the_same(name, how, folder):
    options = [f"{name}.py", *QUIET, "--train.sample_every", "0", "--optim.name", "adamw"]
    train.main([*options, "--train.run_dir", "plain"])
    train.main([*options, "--train.run_dir", "compiled", "--train.compile", how])
    plain, compiled = (metrics_of(folder / each) for each in ("plain", "compiled"))
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_two_runs_are_the_same(folder):
    """Nothing is drawn from a generator that is not seeded."""
    for name in ("one", "other"):
        train.main(["repa.py", *QUIET, "--train.run_dir", name, "--train.num_steps", "2"])
        torch.randn(3)
    assert_same(load_checkpoint(folder / "one"), load_checkpoint(folder / "other"))
