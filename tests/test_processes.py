"""Two processes over gloo against one, at the same global batch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import ROOT, TINY, command, deterministic_loss

from uvit.checkpoint import load_checkpoint
from uvit.weights import read_weights

pytestmark = pytest.mark.slow
OPTIONS = "--optim.name adamw --train.num_steps 2 --train.sample_every 0 --train.tracker none --optim.grad_clip 0"


def main() -> None:
    """Trains with a loss that does not depend on how a batch is shared, and writes what the gradients were."""
    import train

    grads = []
    original = torch.optim.AdamW.step

    def spy(self, *arguments, **named):
        parts = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads.append(torch.cat(parts).clone())
        return original(self, *arguments, **named)

    torch.optim.AdamW.step = spy
    train.training_loss = deterministic_loss
    train.main(sys.argv[1:])
    torch.save(torch.stack(grads), Path(sys.argv[sys.argv.index("--train.run_dir") + 1]) / "grads.pt")


def train_on(count, folder, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/tests")
    launch = [] if count == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    arguments = ["tiny.py", *OPTIONS.split(), "--train.run_dir", str(folder / f"run_{count}")]
    result = command(*launch, __file__, *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr
    run_dir = folder / f"run_{count}"
    losses = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return torch.load(run_dir / "grads.pt", weights_only=True), losses, run_dir


def test_gradients_weights_and_losses_are_those_of_one_process(tmp_path, monkeypatch):
    (tmp_path / "tiny.py").write_text(TINY)
    (one, losses, alone), (two, shared, together) = (train_on(count, tmp_path, monkeypatch) for count in (1, 2))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6)
    assert shared == pytest.approx(losses, rel=1e-5)
    ours, theirs = (load_checkpoint(run_dir) for run_dir in (together, alone))
    for part in ("model", "ema"):
        assert list(ours[part]) == list(theirs[part])  # no prefix of the engine's
        for name, tensor in theirs[part].items():
            torch.testing.assert_close(ours[part][name], tensor, rtol=1e-3, atol=1e-5)
    assert set(read_weights(together / "model.safetensors")) == set(theirs["ema"])


def figures_of(count, cwd, *arguments):
    """What evaluate.py prints, shows as progress and saves, on so many processes."""
    launch = [] if count == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    output = cwd / "figures.json"
    result = command(*launch, str(ROOT / "evaluate.py"), *arguments, "--output", str(output), cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr, json.loads(output.read_text())


def test_two_processes_evaluate_alike(tmp_path, monkeypatch):
    """The same images, whoever draws them, and one sum over all."""
    (tmp_path / "tiny.py").write_text(TINY)
    *_, run_dir = train_on(1, tmp_path, monkeypatch)
    found = []
    for count in (1, 2):
        printed, progress, figures = figures_of(
            count, tmp_path, "--checkpoint", str(run_dir), "--num_images", "50", "--steps", "2"
        )
        assert printed.count("recognised ") == 1  # one figure of all, not a figure of each
        assert f"{360 // count}/{360 // count}" in progress  # each read its share of the held-out part
        found.append(figures)
    assert found[0]["protocol"]["reference"] == found[1]["protocol"]["reference"]
    assert found[1]["frechet"] == pytest.approx(found[0]["frechet"], rel=1e-3)
    assert found[1]["recognised"] == found[0]["recognised"]
    assert found[1]["frechet_real"] == pytest.approx(found[0]["frechet_real"], rel=1e-6)


def test_three_processes_measure_five_images_as_one_does(tmp_path, inception):
    """Not every process has as many images; samples and splits are those of one process."""
    rng = np.random.default_rng(0)
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", arr_0=rng.integers(0, 256, (5, 8, 8, 3)).astype(np.uint8))
    weights = ["--features", "inception", "--feature_weights", str(inception)]
    shared = ["--images", "a.npz", "--reference", "b.npz", *weights, "--batch_size", "2"]
    (*_, alone), (*_, together) = (figures_of(count, tmp_path, *shared) for count in (1, 3))
    assert alone.pop("protocol") == together.pop("protocol")
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-6)


if __name__ == "__main__":
    main()
