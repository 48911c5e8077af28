"""Two processes over gloo against one, at the same global batch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

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


def test_two_processes_evaluate_alike(tmp_path, monkeypatch):
    """The same images, whoever draws them, and one sum over all."""
    (tmp_path / "tiny.py").write_text(TINY)
    *_, run_dir = train_on(1, tmp_path, monkeypatch)
    found = []
    for count in (1, 2):
        launch = [] if count == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
        script = [str(ROOT / "evaluate.py"), "--checkpoint", str(run_dir), "--num_images", "50", "--steps", "2"]
        output = tmp_path / f"{count}.json"
        result = command(*launch, *script, "--output", str(output), cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("recognised ") == 1  # one figure of all, not a figure of each
        assert f"{360 // count}/{360 // count}" in result.stderr  # each read its share of the held-out part
        found.append(json.loads(output.read_text()))
    assert found[1]["frechet"] == pytest.approx(found[0]["frechet"], rel=1e-3)
    assert found[1]["recognised"] == found[0]["recognised"]
    assert found[1]["frechet_real"] == pytest.approx(found[0]["frechet_real"], rel=1e-6)


if __name__ == "__main__":
    main()
