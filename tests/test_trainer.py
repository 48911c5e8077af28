from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.runs import losses_of
from helpers.training import RecordingTrainer, deterministic_loss

from uvit.commands import train
from uvit.training.checkpoint import load_checkpoint
from uvit.training.trainer import Trainer


def test_the_average_follows_the_weights(tmp_path, trained):
    """EMA of decay 0.5 over the weights after each step, each from a run that ends there."""
    after = []
    for steps in ("1", "2", "3", "4"):
        train.main([str(trained / "tiny.py"), "--train.run_dir", str(tmp_path / "run"), "--train.num_steps", steps])
        after.append(load_checkpoint(tmp_path / "run"))
    name = "mid_block.attn.qkv.weight"
    expected = after[0]["ema"][name]
    for state in after[1:]:
        expected = 0.5 * expected + 0.5 * state["model"][name]
        torch.testing.assert_close(state["ema"][name], expected, rtol=1e-6, atol=1e-8)
    assert not torch.equal(after[-1]["ema"][name], after[-1]["model"][name])


def norms_of(trained, run_dir, loss, *overrides):
    """Trains two steps of AdamW with a loss of the test's own; returns the norms of the gradients."""
    gradients = []
    shared = "--optim.name adamw --train.num_steps 2 --train.sample_every 0 --train.tracker none".split()
    arguments = [str(trained / "tiny.py"), "--train.run_dir", str(run_dir), *shared, *overrides]
    train.main(arguments, partial(RecordingTrainer, gradients, [], loss_of=loss))
    return [gradient.norm().item() for gradient in gradients]


def test_accumulated_parts_equal_one_batch(tmp_path, trained):
    whole = norms_of(trained, tmp_path / "whole", deterministic_loss, "--optim.grad_clip", "0")
    split = "--optim.grad_clip 0 --train.accumulation_steps 4".split()
    parts = norms_of(trained, tmp_path / "parts", deterministic_loss, *split)
    assert parts == pytest.approx(whole, rel=1e-4)
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-4)


def test_gradients_are_clipped(tmp_path, trained):
    free = norms_of(trained, tmp_path / "free", deterministic_loss, "--optim.grad_clip", "0")
    clipped = norms_of(trained, tmp_path / "clipped", deterministic_loss, "--optim.grad_clip", "0.01")
    assert min(free) > 0.02
    assert clipped == pytest.approx([0.01, 0.01], rel=1e-3)


def test_every_step_has_its_own_randomness(tmp_path, trained):
    drawn = []

    def loss(network, config, encoders, batch, generator):
        drawn.append(torch.rand(1, generator=generator).item())
        return deterministic_loss(network, config, encoders, batch, generator)

    norms_of(trained, tmp_path / "run", loss, "--train.accumulation_steps", "2")
    assert len(set(drawn)) == 4


STATIONS = ("build", "resume", "open_records", "step", "report", "draw", "save", "write", "find_ending", "end")


def recorded(name, passed):
    """A station that writes down its name, and is otherwise as it was."""

    def station(self, *arguments):
        passed.append(name)
        return getattr(Trainer, name)(self, *arguments)

    return station


def test_a_run_passes_the_stations_in_order(tmp_path, trained):
    passed = []
    watched = type("Watched", (Trainer,), {name: recorded(name, passed) for name in STATIONS})
    arguments = [str(trained / "tiny.py"), "--train.run_dir", str(tmp_path / "run"), "--train.num_steps", "3"]
    train.main([*arguments, "--train.tracker", "none"], watched)
    each = ["step", "report", "draw", "save", "find_ending"]
    with_checkpoint = ["step", "report", "draw", "save", "write", "find_ending"]
    assert passed == ["build", "resume", "open_records", *each, *with_checkpoint, *with_checkpoint, "end"]
    passed.clear()
    train.main([*arguments, "--train.tracker", "none"], watched)
    assert passed == ["build", "resume"]  # there is nothing to do


def test_sharding_with_one_process_gives_a_warning(tmp_path, trained, capsys):
    arguments = [str(trained / "tiny.py"), "--train.run_dir", str(tmp_path / "run"), "--train.num_steps", "1"]
    train.main([*arguments, "--train.shard", "True", "--train.tracker", "none", "--train.sample_every", "0"])
    assert "warning: train.shard True has no effect with one process: start more" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run")["step"] == 1
