"""Two processes over gloo against one, at the same global batch."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.commands import run_python
from helpers.runs import ROOT, TINY, TINY_AVERAGE, TINY_DIFFERENCES, TINY_LAYERSYNC, TINY_REPA, TINY_SPARSE, TINY_UNET

from uvit.training.checkpoint import load_checkpoint
from uvit.weights.averages import rebuild
from uvit.weights.tensors import read_weights

# Once in more than a thousand runs, PyTorch or gloo freed memory twice. A run that glibc aborted so is tried again.
ABORTED = r"(double free|free\(\)|malloc\(\)|corrupted)[\s\S]*Signal 6 .* received by PID"
pytestmark = [pytest.mark.slow, pytest.mark.flaky(reruns=1, only_rerun=[ABORTED])]
OPTIONS = "--optim.name adamw --train.num_steps 2 --train.sample_every 0 --train.tracker none --optim.grad_clip 0"


def run_on(count, program, cwd, *arguments):
    """Runs a script, or `-m` and a module, in one process or several."""
    launch = [] if count == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    result = run_python(*launch, *map(str, program), *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a small config; processes are started on the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/tests")
    (tmp_path / "tiny.py").write_text(TINY)
    return tmp_path


def test_two_processes_share_a_run(folder):
    run_on(2, [ROOT / "train.py"], folder, "tiny.py")
    assert load_checkpoint(folder / "runs/tiny")["step"] == 4
    assert len((folder / "runs/tiny/metrics.jsonl").read_text().splitlines()) == 2


def train_on(count, folder, options=OPTIONS):
    """What each process saw, the losses, and the run."""
    run_dir = folder / f"run_{count}"
    run_on(count, ("-m", "helpers.training"), folder, "tiny.py", *options.split(), "--train.run_dir", str(run_dir))
    losses = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [torch.load(run_dir / f"seen_{rank}.pt") for rank in range(count)], losses, run_dir


@pytest.mark.parametrize(
    ("share", "config"),
    [
        (1, TINY),
        (2, TINY),
        (2, TINY_UNET),
        (1, TINY_AVERAGE),
        (2, TINY_AVERAGE),
        (1, TINY_DIFFERENCES),
        (2, TINY_DIFFERENCES),
        (1, TINY_SPARSE),
        (2, TINY_SPARSE),
        (1, TINY_REPA),
        (2, TINY_REPA),
        (2, TINY_LAYERSYNC),
    ],
    ids=[
        "ddp",
        "fsdp",
        "fsdp-unet",
        "ddp-average",
        "fsdp-average",
        "ddp-differences",
        "fsdp-differences",
        "ddp-sparse",
        "fsdp-sparse",
        "ddp-repa",
        "fsdp-repa",
        "fsdp-layersync",
    ],
)
def test_gradients_weights_and_losses_equal_those_of_one_process(share, config, folder, vit):
    (folder / "tiny.py").write_text(config.replace("WEIGHTS", str(vit)))
    [one], losses, alone = train_on(1, folder)
    two, shared, together = train_on(2, folder, f"{OPTIONS} --train.shard {share > 1}")
    for seen in two:
        torch.testing.assert_close(seen["grads"], one["grads"], rtol=1e-4, atol=1e-6)
        assert seen["size"] == pytest.approx(one["size"] / share, rel=0.05)  # what a process holds of them
    assert shared == pytest.approx(losses, rel=1e-5)
    ours, theirs = (load_checkpoint(run_dir) for run_dir in (together, alone))
    for part in ("model", "ema"):
        assert list(ours[part]) == list(theirs[part])  # no prefix of the engine's
        for name, tensor in theirs[part].items():
            torch.testing.assert_close(ours[part][name], tensor, rtol=1e-3, atol=1e-5)
    assert set(read_weights(together / "model.safetensors")) == set(theirs["ema"])


@pytest.mark.parametrize("share", [False, True], ids=["ddp", "fsdp"])
def test_averages_are_those_of_one_process(share, folder):
    options = f"{OPTIONS} --train.average_widths 0.05 0.2 --train.average_every 1"
    *_, alone = train_on(1, folder, options)
    *_, together = train_on(2, folder, f"{options} --train.shard {share}")
    for name in ("step_00000001.safetensors", "step_00000002.safetensors"):
        ours, theirs = (read_weights(run_dir / "averages" / name) for run_dir in (together, alone))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert rebuild(together, 0.1)[0].keys() == read_weights(together / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("optimizer", "share"),
    # What Muon makes of a gradient of low rank is mostly rounding, which differs where matrices are cut.
    [("adamw", False), ("muon", True)],
)
def test_a_sharded_run_resumes(optimizer, share, folder):
    """As if it had not been interrupted; grids are drawn from an unsharded network."""

    def train(name, share):
        options = (
            f"{OPTIONS} --optim.name {optimizer} --train.shard {share} --train.save_every 1 --train.sample_every 1"
            " --train.average_widths 0.1"
        )
        run_on(2, [ROOT / "train.py"], folder, "tiny.py", *options.split(), "--train.run_dir", name)
        return load_checkpoint(folder / name)

    expected = train("straight", True)
    assert len(list((folder / "straight" / "samples").glob("*.png"))) == 2
    shutil.copytree(folder / "straight", folder / "again", ignore=shutil.ignore_patterns("step_00000002"))
    found = train("again", share)
    assert found["step"] == 2
    for part in ("model", "ema", "averages"):
        torch.testing.assert_close(found[part], expected[part], rtol=1e-4, atol=1e-6)


def figures_of(count, cwd, *arguments):
    """What evaluate.py prints, shows as progress and saves, on so many processes."""
    output = cwd / "figures.json"
    result = run_on(count, [ROOT / "evaluate.py"], cwd, *arguments, "--output", str(output))
    return result.stdout, result.stderr, json.loads(output.read_text())


def test_two_processes_evaluate_alike(folder):
    """The same images, whoever draws them, and one sum over all."""
    *_, run_dir = train_on(1, folder)
    found = []
    for count in (1, 2):
        printed, progress, figures = figures_of(
            count, folder, "--checkpoint", str(run_dir), "--num_images", "50", "--steps", "2"
        )
        assert printed.count("recognised ") == 1  # one figure of all, not a figure of each
        assert f"{360 // count}/{360 // count}" in progress  # each read its share of the held-out part
        found.append(figures)
    assert found[0]["protocol"]["reference"] == found[1]["protocol"]["reference"]
    assert found[1]["frechet"] == pytest.approx(found[0]["frechet"], rel=1e-3)
    assert found[1]["recognised"] == found[0]["recognised"]
    assert found[1]["frechet_real"] == pytest.approx(found[0]["frechet_real"], rel=1e-6)


def test_three_processes_measure_five_images_as_one_does(folder, inception):
    """Not every process has as many images; samples and splits are those of one process."""
    rng = np.random.default_rng(0)
    for name in "ab":
        np.savez(folder / f"{name}.npz", arr_0=rng.integers(0, 256, (5, 8, 8, 3)).astype(np.uint8))
    weights = ["--features", "inception", "--feature_weights", str(inception)]
    shared = ["--images", "a.npz", "--reference", "b.npz", *weights, "--batch_size", "2"]
    (*_, alone), (*_, together) = (figures_of(count, folder, *shared) for count in (1, 3))
    assert alone.pop("protocol") == together.pop("protocol")
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-6)
