from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.commands import run_python
from helpers.images import DIGITS, save_folder
from helpers.runs import ROOT, TINY, files_of, losses_of
from PIL import Image

from uvit import UViT
from uvit.commands import evaluate, sample, train
from uvit.common.errors import InputError
from uvit.training.checkpoint import load_checkpoint


def test_a_run_writes_config_metrics_events_grid_and_weights(trained):
    run_dir = trained / "runs" / "tiny"
    config = json.loads((run_dir / "config.json").read_text())
    assert config["model"]["embed_dim"] == 16 and config["process"]["schedule"] == "flow"
    assert config["data"]["class_names"][3] == "three"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["loss"] > 0 and line["images_per_second"] > 0 for line in lines)
    assert [line["lr"] for line in lines] == pytest.approx([0.005, 0.01])
    assert list(run_dir.glob("uvit/events.out.tfevents.*"))
    assert Image.open(run_dir / "samples" / "step_00000004.png").size[0] > 8 * 64
    ema = load_checkpoint(run_dir)["ema"]
    loaded = UViT.from_pretrained(run_dir).state_dict()
    assert all(torch.equal(loaded[name], ema[name]) for name in ema)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, trained):
    config = str(trained / "tiny.py")
    for steps in ("2", "3", "4"):
        train.main([config, "--train.run_dir", str(tmp_path / "parts"), "--train.num_steps", steps])
    parts, whole = load_checkpoint(tmp_path / "parts"), load_checkpoint(trained / "runs" / "tiny")
    assert parts["step"] == whole["step"] == 4
    for part in ("model", "ema"):
        assert all(torch.equal(parts[part][name], tensor) for name, tensor in whole[part].items())


def test_a_run_in_pixels_resumes_draws_and_is_measured(tmp_path, trained, capsys):
    """Large patches through a bottleneck, which predict the image with a clamped divisor."""
    options = "--model.patch_size 4 --model.patch_bottleneck 3 --process.prediction data --process.loss_space flow"
    shared = [str(trained / "tiny.py"), *options.split(), "--process.min_divisor", "0.05", "--train.run_dir"]
    for run, lengths in {"whole": ("4",), "parts": ("2", "4")}.items():
        for steps in lengths:
            train.main([*shared, str(tmp_path / run), "--train.num_steps", steps])
    whole, parts = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "parts")
    assert parts["step"] == whole["step"] == 4
    for part in ("model", "ema"):
        assert all(torch.equal(parts[part][name], tensor) for name, tensor in whole[part].items())
    with pytest.raises(InputError, match=r"holds a run with process.min_divisor 0.05, got 0.1"):
        train.main([*shared, str(tmp_path / "parts"), "--process.min_divisor", "0.1"])
    sampling = ["--checkpoint", str(tmp_path / "whole"), "--num_per_class", "1", "--output"]
    sample.main([*sampling, str(tmp_path / "grid.png")])
    assert len(np.unique(np.asarray(Image.open(tmp_path / "grid.png")))) > 10
    evaluate.main(["--checkpoint", str(tmp_path / "whole"), "--num_images", "20"])
    assert "recognised " in capsys.readouterr().out


def test_metrics_are_not_repeated_after_a_lost_checkpoint(tmp_path, trained):
    arguments = [str(trained / "tiny.py"), "--train.run_dir", str(tmp_path / "run")]
    train.main(arguments)
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000004")
    train.main(arguments)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


def test_skipped_images_are_listed_once(tmp_path, trained, capsys):
    save_folder(tmp_path / "photos", classes=DIGITS, count=2)
    (tmp_path / "photos/3/0.png").write_bytes(b"not an image")
    shared = [str(trained / "tiny.py"), "--train.run_dir", str(tmp_path / "run"), "--train.sample_every", "0"]
    overrides = ["--data.name", str(tmp_path / "photos"), "--model.img_size", "8", "--data.crop", "random"]
    train.main([*shared, *overrides, "--data.on_error", "skip", "--train.num_steps", "6"])
    (line,) = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert "3/0.png) cannot be read" in line
    printed = capsys.readouterr()
    assert printed.err.count("skipped: image ") == 1 and "; 1 could not be read, listed in" in printed.out
    with pytest.raises(InputError, match=r"3/0.png\) cannot be read"):
        train.main([*shared, *overrides, "--train.run_dir", str(tmp_path / "stops")])


def test_harmless_options_may_change_on_resume(tmp_path, trained):
    arguments = [str(trained / "tiny.py"), "--train.run_dir", str(tmp_path / "run")]
    train.main(arguments)
    harmless = "--model.attention math --model.gradient_checkpointing True --train.num_steps 6 --train.log_every 3"
    train.main([*arguments, *harmless.split()])
    assert load_checkpoint(tmp_path / "run")["step"] == 6


def test_a_finished_run_says_so_and_changes_nothing(workdir, capsys):
    before = files_of(workdir / "runs")
    train.main(["tiny.py"])
    assert "nothing to do: runs/tiny has 4 steps" in capsys.readouterr().out
    assert files_of(workdir / "runs") == before


def test_photos_train(tmp_path):
    """The config for photographs, made quick: colours, 257 tokens."""
    quick = "--model.embed_dim 16 --train.batch_size 4 --train.num_steps 2 --train.sample_every 0 --train.tracker none"
    run_dir = str(tmp_path / "run")
    train.main([str(ROOT / "configs/photos.py"), *quick.split(), "--train.run_dir", run_dir])
    output = str(tmp_path / "photos.png")
    sample.main(["--checkpoint", run_dir, "--num_per_class", "1", "--steps", "2", "--output", output])
    assert Image.open(output).size[1] > 2 * 64


@pytest.mark.parametrize(
    "overrides",
    [
        ["--train.accumulation_steps", "2"],
        ["--train.mixed_precision", "bf16", "--model.qk_norm", "True"],
        ["--data.flip", "True", "--data.num_workers", "2"],
        [
            "--model.num_classes",
            "0",
            "--model.null_class",
            "False",
            "--train.label_dropout",
            "0",
            "--sample.guidance",
            "1",
        ],
        [
            "--process.schedule",
            "ldm",
            "--process.prediction",
            "noise",
            "--optim.name",
            "adamw",
            "--train.tracker",
            "none",
        ],
    ],
)
def test_options_of_the_loop(overrides, tmp_path, trained):
    train.main([str(trained / "tiny.py"), "--train.run_dir", str(tmp_path / "run"), *overrides])
    assert load_checkpoint(tmp_path / "run")["step"] == 4
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert np.isfinite([json.loads(line)["loss"] for line in lines]).all()
    output = str(tmp_path / "grid.png")
    sample.main(["--checkpoint", str(tmp_path / "run"), "--output", output, "--num_per_class", "1"])


def test_guidance_by_a_null_class_that_was_never_seen_is_a_warning(tmp_path, trained, capsys):
    options = "--train.label_dropout 0 --sample.guidance 1 --train.run_dir"
    train.main([str(trained / "tiny.py"), *options.split(), str(tmp_path / "run")])
    drawn = ["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "grid.png"), "--num_per_class", "1"]
    for guidance, warnings in (("1", 0), ("2", 1)):
        sample.main([*drawn, "--guidance", guidance])
        assert capsys.readouterr().err.count("warning: train.label_dropout 0 never showed") == warnings


def test_training_learns(tmp_path, trained):
    """The loss of a few dozen steps falls well below that of predicting zero."""
    arguments = ["--train.run_dir", str(tmp_path / "run"), "--train.num_steps", "60", "--train.batch_size", "32"]
    train.main([str(trained / "tiny.py"), *arguments, "--train.sample_every", "0", "--train.tracker", "none"])
    losses = losses_of(tmp_path / "run")
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_other_sharding_engines_are_refused(engine, workdir, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(InputError, match=f"by --train.shard True, got {engine}: launch without it"):
        train.main(["tiny.py"])


def test_accelerate_launch(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", str(ROOT / "train.py")]
    result = run_python(*launch, "tiny.py", "--optim.lr", "1e-3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "4 steps done" in result.stdout and "images/s" in result.stderr
    assert json.loads((tmp_path / "runs/tiny/config.json").read_text())["optim"]["lr"] == 1e-3
