"""The command lines, end to end."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from encoders import make_autoencoder, make_text_encoder
from PIL import Image
from test_data import save_folder

import encode
import evaluate
import sample
import train
from uvit import UViT, checkpoint
from uvit.common.cli import run
from uvit.common.errors import InputError
from uvit.common.files import atomic_write
from uvit.config import load_config
from uvit.diffusion.solvers import SOLVERS
from uvit.evaluation.features import TimmFeatures
from uvit.training.checkpoint import load_checkpoint, save_checkpoint
from uvit.weights.tensors import read_weights, write_weights

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train": train, "sample": sample, "evaluate": evaluate, "encode": encode}

TINY = """
from uvit.config import *

config = Config(
    model=UViTConfig(img_size=8, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=10, null_class=True),
    optim=OptimConfig(name="muon", lr=1e-2, warmup_steps=2, grad_clip=1.0),
    train=TrainConfig(
        num_steps=4, batch_size=8, label_dropout=0.2, ema_decay=0.5, log_every=2, sample_every=4, save_every=2
    ),
    sample=SampleConfig(num_steps=2, guidance=1.5),
)
"""


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything in a folder; of folders inside, that they are there."""
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in found}


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A folder with tiny.py and a finished run of it, runs/tiny."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.py").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main(["tiny.py"])
    return folder


TEXT = "--model.num_classes 0 --model.null_class False --model.context_dim 8 --model.num_context_tokens 24".split()


@pytest.fixture(scope="session")
def told(finished) -> Path:
    """The same folder, with a finished run of a text model, runs/told, and its encoder, clip."""
    make_text_encoder(finished / "clip", num_tokens=24, width=8)
    arguments = ["--train.run_dir", "runs/told", "--data.text_encoder", "clip", "--train.tracker", "none"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(finished)
        train.main(["tiny.py", *TEXT, *arguments])
    AcceleratorState._reset_state(reset_partial_state=True)
    return finished


@pytest.fixture
def inside(finished, monkeypatch) -> Path:
    monkeypatch.chdir(finished)
    return finished


def test_a_run_leaves_what_it_promises(finished):
    run_dir = finished / "runs" / "tiny"
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


def test_resumed_equals_uninterrupted(tmp_path, finished):
    config = str(finished / "tiny.py")
    for steps in ("2", "3", "4"):
        train.main([config, "--train.run_dir", str(tmp_path / "parts"), "--train.num_steps", steps])
    parts, whole = load_checkpoint(tmp_path / "parts"), load_checkpoint(finished / "runs" / "tiny")
    assert parts["step"] == whole["step"] == 4
    for part in ("model", "ema"):
        assert all(torch.equal(parts[part][name], tensor) for name, tensor in whole[part].items())


def losses_of(run_dir):
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_average_follows_the_weights(tmp_path, finished):
    """EMA of decay 0.5 over the weights after each step, each from a run that ends there."""
    after = []
    for steps in ("1", "2", "3", "4"):
        train.main([str(finished / "tiny.py"), "--train.run_dir", str(tmp_path / "run"), "--train.num_steps", steps])
        after.append(load_checkpoint(tmp_path / "run"))
    name = "mid_block.attn.qkv.weight"
    expected = after[0]["ema"][name]
    for state in after[1:]:
        expected = 0.5 * expected + 0.5 * state["model"][name]
        torch.testing.assert_close(state["ema"][name], expected, rtol=1e-6, atol=1e-8)
    assert not torch.equal(after[-1]["ema"][name], after[-1]["model"][name])


def train_with(monkeypatch, finished, run_dir, loss, *overrides):
    """Trains the tiny config with a loss of the test's own, one AdamW step; returns the gradient's norms by step."""
    norms = []
    original = torch.optim.AdamW.step

    def spy(self, *arguments, **named):
        grads = [p.grad.flatten() for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat(grads).norm().item())
        return original(self, *arguments, **named)

    shared = "--optim.name adamw --train.num_steps 2 --train.sample_every 0 --train.tracker none".split()
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        patch.setattr(train, "training_loss", loss)
        train.main([str(finished / "tiny.py"), "--train.run_dir", str(run_dir), *shared, *overrides])
    return norms


def deterministic_loss(network, config, encoders, batch, generator):
    """A mean over the batch without randomness, so that parts of a batch add up to the whole."""
    x = batch.images.float() / 127.5 - 1
    return (network(x, torch.full((len(x),), 500.0), y=batch.labels) - x).square().mean()


def test_accumulated_parts_equal_one_batch(monkeypatch, tmp_path, finished):
    whole = train_with(monkeypatch, finished, tmp_path / "whole", deterministic_loss, "--optim.grad_clip", "0")
    split = "--optim.grad_clip 0 --train.accumulation_steps 4".split()
    parts = train_with(monkeypatch, finished, tmp_path / "parts", deterministic_loss, *split)
    assert parts == pytest.approx(whole, rel=1e-4)
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-4)


def test_gradients_are_clipped(monkeypatch, tmp_path, finished):
    free = train_with(monkeypatch, finished, tmp_path / "free", deterministic_loss, "--optim.grad_clip", "0")
    clipped = train_with(monkeypatch, finished, tmp_path / "clipped", deterministic_loss, "--optim.grad_clip", "0.01")
    assert min(free) > 0.02
    assert clipped == pytest.approx([0.01, 0.01], rel=1e-3)


def test_every_step_has_its_own_randomness(monkeypatch, tmp_path, finished):
    drawn = []

    def loss(network, config, encoders, batch, generator):
        drawn.append(torch.rand(1, generator=generator).item())
        return deterministic_loss(network, config, encoders, batch, generator)

    train_with(monkeypatch, finished, tmp_path / "run", loss, "--train.accumulation_steps", "2")
    assert len(set(drawn)) == 4


def test_metrics_are_not_repeated_after_a_lost_checkpoint(tmp_path, finished):
    arguments = [str(finished / "tiny.py"), "--train.run_dir", str(tmp_path / "run")]
    train.main(arguments)
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000004")
    train.main(arguments)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


def test_skipped_images_are_listed_once(tmp_path, finished, capsys):
    save_folder(tmp_path / "photos", classes=[str(digit) for digit in range(10)], count=2)
    (tmp_path / "photos/3/0.png").write_bytes(b"not an image")
    shared = [str(finished / "tiny.py"), "--train.run_dir", str(tmp_path / "run"), "--train.sample_every", "0"]
    overrides = ["--data.name", str(tmp_path / "photos"), "--model.img_size", "8", "--data.crop", "random"]
    train.main([*shared, *overrides, "--data.on_error", "skip", "--train.num_steps", "6"])
    (line,) = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert "3/0.png) cannot be read" in line
    printed = capsys.readouterr()
    assert printed.err.count("skipped: image ") == 1 and "; 1 could not be read, listed in" in printed.out
    with pytest.raises(InputError, match=r"3/0.png\) cannot be read"):
        train.main([*shared, *overrides, "--train.run_dir", str(tmp_path / "stops")])


def test_harmless_options_may_change(tmp_path, finished):
    arguments = [str(finished / "tiny.py"), "--train.run_dir", str(tmp_path / "run")]
    train.main(arguments)
    harmless = "--model.attention math --model.gradient_checkpointing True --train.num_steps 6 --train.log_every 3"
    train.main([*arguments, *harmless.split()])
    assert load_checkpoint(tmp_path / "run")["step"] == 6


def test_a_finished_run_says_so_and_changes_nothing(inside, capsys):
    before = files_of(inside / "runs")
    train.main(["tiny.py"])
    assert "nothing to do: runs/tiny has 4 steps" in capsys.readouterr().out
    assert files_of(inside / "runs") == before


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
def test_options_of_the_loop(overrides, tmp_path, finished):
    train.main([str(finished / "tiny.py"), "--train.run_dir", str(tmp_path / "run"), *overrides])
    assert load_checkpoint(tmp_path / "run")["step"] == 4
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert np.isfinite([json.loads(line)["loss"] for line in lines]).all()
    output = str(tmp_path / "grid.png")
    sample.main(["--checkpoint", str(tmp_path / "run"), "--output", output, "--num_per_class", "1"])


def test_training_learns(tmp_path, finished):
    """The loss of a few dozen steps falls well below that of predicting zero."""
    arguments = ["--train.run_dir", str(tmp_path / "run"), "--train.num_steps", "60", "--train.batch_size", "32"]
    train.main([str(finished / "tiny.py"), *arguments, "--train.sample_every", "0", "--train.tracker", "none"])
    losses = losses_of(tmp_path / "run")
    assert losses[-1] < 0.8 * losses[0]


def test_sample_draws_a_row_for_each_class(inside, capsys):
    sample.main("--checkpoint runs/tiny --classes 0 seven --num_per_class 3 --steps 2 --output two.png".split())
    assert "2 steps" in capsys.readouterr().out
    picture = Image.open("two.png")
    assert picture.size[1] < 3 * 66 < picture.size[0] + 66


def read_npz(path):
    with np.load(path) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def test_npz_is_what_adm_reads_and_does_not_depend_on_the_batch(inside):
    shared = "--checkpoint runs/tiny --num_per_class 3 --guidance 2 --seed 3".split()
    sample.main([*shared, "--output", "a.npz", "--batch_size", "7"])
    sample.main([*shared, "--output", "b.npz", "--batch_size", "64"])
    sample.main([*shared, "--output", "c.npz", "--classes", "9", "4"])
    (images, labels), (others, _), (chosen, _) = (read_npz(f"{name}.npz") for name in "abc")
    assert images.dtype == np.uint8 and images.shape == (30, 8, 8, 1)
    assert labels.tolist() == [label for label in range(10) for _ in range(3)]
    assert np.abs(images.astype(int) - others).max() <= 1  # equal but for rounding
    assert np.abs(images[[27, 28, 29, 12, 13, 14]].astype(int) - chosen).max() <= 1
    sample.main([*shared, "--output", "d.npz", "--seed", "4"])
    assert np.abs(images.astype(int) - read_npz("d.npz")[0]).max() > 1


def test_the_papers_scale_is_w_minus_one(inside, capsys):
    shared = "--checkpoint runs/tiny --num_per_class 2 --classes 3".split()
    sample.main([*shared, "--guidance", "1.4", "--output", "w.npz"])
    sample.main([*shared, "--paper_scale", "0.4", "--output", "s.npz"])
    assert capsys.readouterr().out.count("guidance w = 1.4 (the paper's s = 0.4)") == 2
    assert np.array_equal(read_npz("w.npz")[0], read_npz("s.npz")[0])


@pytest.mark.usefixtures("told")
def test_a_text_run_draws_prompts(inside, capsys):
    config = json.loads((inside / "runs/told/config.json").read_text())
    assert len(config["sample"]["prompts"]) == 10  # the data's ten captions, for the rows of its grids
    assert "a handwritten three" in config["sample"]["prompts"]
    shared = "--checkpoint runs/told --num_per_class 2".split()
    sample.main([*shared, "--prompt", "a handwritten three", "two cats", "--output", "two.npz"])
    sample.main([*shared, "--prompt", "two cats", "--output", "one.npz", "--batch_size", "1"])
    (images, prompts), (alone, _) = read_npz("two.npz"), read_npz("one.npz")
    assert prompts.tolist() == ["a handwritten three"] * 2 + ["two cats"] * 2
    assert np.abs(images[2:].astype(int) - alone).max() <= 1 and (images[2] != images[3]).any()
    sample.main([*shared, "--prompt", "two cats", "--output", "guided.npz", "--guidance", "3"])
    assert (read_npz("guided.npz")[0] != alone).any()
    sample.main([*shared, "--output", "rows.png"])
    assert Image.open("rows.png").size[1] > 10 * 64


@pytest.mark.usefixtures("told")
def test_a_moved_text_encoder_is_given_by_name(inside, monkeypatch):
    shutil.copytree("clip", "moved")
    shared = "--checkpoint runs/told --prompt x --num_per_class 1".split()
    sample.main([*shared, "--output", "before.npz"])
    config = Path("runs/told/config.json")
    kept = config.read_text()
    config.write_text(kept.replace('"clip"', '"gone"'))
    try:
        sample.main([*shared, "--text_encoder", "moved", "--output", "after.npz"])
    finally:
        config.write_text(kept)
    assert np.array_equal(read_npz("before.npz")[0], read_npz("after.npz")[0])


@pytest.mark.usefixtures("told")
def test_evaluate_draws_captions_of_every_class(inside, capsys):
    evaluate.main("--checkpoint runs/told --num_images 20 --steps 2".split())
    printed = capsys.readouterr().out
    assert "images 20 drawn, 10 different captions of the reference" in printed and "recognised " in printed


def test_latents_are_drawn_as_images(tmp_path, monkeypatch):
    """Weights under the reference code's file name, a config, and an autoencoder give decoded pictures."""
    monkeypatch.chdir(tmp_path)
    make_autoencoder(tmp_path / "vae")
    fields = "img_size=8, in_chans=4, embed_dim=16, depth=2, num_heads=2"
    text = f"config = Config(model=UViTConfig({fields}), sample=SampleConfig(num_steps=2))\n"
    Path("latent.py").write_text("from uvit.config import *\n" + text)
    torch.save(UViT(img_size=8, in_chans=4, embed_dim=16, depth=2, num_heads=2).state_dict(), "nnet_ema.pth")
    shared = "--checkpoint nnet_ema.pth --config latent.py --num_per_class 3 --output".split()
    sample.main([*shared, "images.npz", "--autoencoder", "vae"])
    with np.load("images.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 16, 16, 3) and arrays["arr_0"].std() > 0
    with pytest.raises(InputError, match=r"in_chans 4 needs data.autoencoder to make images, got None"):
        sample.main([*shared, "images.png"])


def test_published_weights_are_sampled_with_a_config(inside, capsys):
    """The same weights under the reference code's file name draw the same images."""
    torch.save(UViT.from_pretrained("runs/tiny").state_dict(), "nnet_ema.pth")
    shared = "--num_per_class 2 --classes 3".split()
    sample.main(["--checkpoint", "runs/tiny", "--output", "run.npz", *shared])
    sample.main(["--checkpoint", "nnet_ema.pth", "--config", "tiny.py", "--output", "published.npz", *shared])
    assert np.array_equal(read_npz("run.npz")[0], read_npz("published.npz")[0])


@pytest.mark.parametrize("sampler", SOLVERS)
def test_every_sampler_by_name(sampler, inside, capsys):
    sample.main(f"--checkpoint runs/tiny --sampler {sampler} --steps 3 --output x.png".split())
    assert sampler in capsys.readouterr().out


def test_evaluate_prints_two_figures_and_the_protocol(inside, capsys):
    evaluate.main("--checkpoint runs/tiny --num_images 50 --steps 2".split())
    recognised, frechet, protocol = capsys.readouterr().out.splitlines()
    assert recognised.startswith("recognised ") and "real images: 99" in recognised
    assert frechet.startswith("Fréchet distance ")
    assert (
        "images 50 drawn, 5 a class, hash " in protocol and "weights EMA of runs/tiny, step_00000004, hash " in protocol
    )
    assert "guidance w = 1 (the paper's s = 0); guidance_interval 0 to 1;" in protocol
    assert "sampler dpmpp_2m, 2 steps (uniform from t = 1 to 0)" in protocol
    assert "reference test part of digits: 360 images, centre crops of 8x8, hash " in protocol
    assert "classifier svm on the pixels of 1437 training images; versions uvit " in protocol
    saved = json.loads(Path("runs/tiny/evaluation.json").read_text())
    assert 0 <= saved["recognised"] <= 1 and saved["frechet"] > saved["frechet_real"] > 0
    assert saved["protocol"]["rounding"] == "uint8"


@pytest.mark.slow
@pytest.mark.parametrize("reuse", ["none", "1:2"])
def test_compiled_and_half_precise_networks_draw_nearly_the_same(reuse, inside):
    common = f"--checkpoint runs/tiny --steps 4 --num_per_class 1 --reuse {reuse}".split()
    sample.main([*common, "--output", "plain.npz"])
    sample.main([*common, "--output", "compiled.npz", "--compile", "model"])
    sample.main([*common, "--output", "half.npz", "--mixed_precision", "bf16"])
    plain, compiled, half = (read_npz(f"{name}.npz")[0].astype(int) for name in ("plain", "compiled", "half"))
    assert np.abs(plain - compiled).max() <= 1
    assert np.abs(plain - half).max() > 0 and np.abs(plain - half).mean() < 3


def test_deep_features_are_reused(inside, capsys):
    sample.main("--checkpoint runs/tiny --steps 8 --output whole.npz".split())
    sample.main("--checkpoint runs/tiny --steps 8 --output reused.npz --reuse 1:3".split())
    assert "reuse 1:3, precision no, seed 0" in capsys.readouterr().out
    whole, reused = (read_npz(f"{name}.npz")[0].astype(float) for name in ("whole", "reused"))
    assert 0 < np.abs(whole - reused).mean() < 10


def figures(arguments, output="figures.json"):
    evaluate.main([*arguments.split(), "--output", output])
    return json.loads(Path(output).read_text())


def test_a_checkpoint_and_its_saved_images_measure_alike(inside):
    """Drawn, read from an .npz, against the data or its statistics: one figure, whatever the batches."""
    evaluate.main(["stats", "digits", "--split", "train", "--features", "pixels", "--output", "train.npz"])
    sample.main("--checkpoint runs/tiny --num_per_class 5 --guidance 1 --output fifty.npz".split())
    drawn = figures("--checkpoint runs/tiny --num_images 50 --reference train --batch_size 7")
    for arguments in (
        "--checkpoint runs/tiny --num_images 50 --reference train.npz",
        "--images fifty.npz --reference train.npz",
        "--images fifty.npz --reference digits --batch_size 9",
    ):
        found = figures(arguments)
        assert found["frechet"] == pytest.approx(drawn["frechet"], rel=2e-3), arguments
        assert len({each["protocol"]["images"].rpartition("hash ")[2] for each in (drawn, found)}) == 1
    assert drawn["frechet_real"] > 0 and "frechet_real" not in found


def test_labels_at_random(inside):
    found = figures("--checkpoint runs/tiny --num_images 33 --label_mode random --steps 1")
    assert found["protocol"]["images"].startswith("33 drawn, labels at random, hash ") and "recognised" in found


def test_data_of_one_part_have_no_distance_of_real_images(inside, tmp_path):
    save_folder(tmp_path / "photos", classes=[str(digit) for digit in range(10)], count=2)
    overrides = ["--data.name", str(tmp_path / "photos"), "--train.sample_every", "0", "--train.tracker", "none"]
    train.main(["tiny.py", *overrides, "--train.run_dir", str(tmp_path / "run")])
    found = figures(f"--checkpoint {tmp_path}/run --num_images 20 --steps 1 --reference train")
    assert found["frechet"] > 0 and "recognised" in found and "frechet_real" not in found


def test_a_folder_against_itself(inside, tmp_path):
    save_folder(tmp_path / "photos", count=8)
    found = figures(f"--images {tmp_path}/photos --reference {tmp_path}/photos --features pixels")
    assert found["frechet"] == pytest.approx(0, abs=1e-6)
    images, reference = (found["protocol"][name] for name in ("images", "reference"))
    name, _, same = images.partition(", hash ")
    assert name == f"16 of {tmp_path}/photos"
    assert reference == f"{tmp_path}/photos, split train: 16 images, centre crops of 16x24, hash {same}"


def test_figures_are_saved_beside_what_they_are_of(inside, tmp_path):
    save_folder(tmp_path / "photos", count=4)
    shared = ["--reference", f"{tmp_path}/photos", "--features", "pixels"]
    evaluate.main(["--images", f"{tmp_path}/photos", *shared])
    assert "frechet" in json.loads((tmp_path / "photos.evaluation.json").read_text())
    assert not list((tmp_path / "photos").glob("*.json"))


def test_a_reference_is_cut_at_the_centre_even_where_training_cuts_at_random(inside, tmp_path):
    rng = np.random.default_rng(0)
    for split, name in itertools.product(("train", "test"), "0123456789"):
        folder = tmp_path / "photos" / split / name
        folder.mkdir(parents=True)
        for number in range(2):
            Image.fromarray(rng.integers(0, 256, (12, 15), np.uint8)).save(folder / f"{number}.png")
    overrides = f"--data.name {tmp_path}/photos --data.crop random --train.sample_every 0 --train.tracker none".split()
    train.main(["tiny.py", *overrides, "--train.run_dir", str(tmp_path / "run")])
    shared = f"--checkpoint {tmp_path}/run --num_images 20 --steps 1"
    one, two = (figures(f"{shared} --batch_size {size}")["protocol"]["reference"] for size in (3, 20))
    assert one == two and "20 images, centre crops of 8x8" in one


def test_inceptions_three_figures(inside, inception, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, brightest in (("a", 256), ("b", 128)):
        np.savez(tmp_path / f"{name}.npz", arr_0=rng.integers(0, brightest, (12, 8, 8, 3)).astype(np.uint8))
    shared = f"--features inception --feature_weights {inception}"
    found = figures(f"--images {tmp_path}/a.npz --reference {tmp_path}/b.npz {shared}")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "FID",
        "KID",
        "Inception",
        "protocol:",
    ]
    assert found["frechet"] > 0 and found["kid_deviation"] >= 0 and found["inception_score"] >= 1
    evaluate.main(["stats", f"{tmp_path}/b.npz", "--output", f"{tmp_path}/ref.npz", *shared.split()])
    again = figures(f"--images {tmp_path}/a.npz --reference {tmp_path}/ref.npz {shared}")
    assert again["frechet"] == pytest.approx(found["frechet"], rel=1e-6) and "kid" not in again


def test_any_classifier(inside, vit, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    network = TimmFeatures("test_vit", str(vit), classify=True)
    labels = network(torch.from_numpy(images).permute(0, 3, 1, 2))[0].argmax(1).numpy()
    labels[:2] = labels[:2] + 1
    np.savez(tmp_path / "six.npz", arr_0=images, arr_1=labels)
    shared = f"--features timm:test_vit --feature_weights {vit} --classifier timm:test_vit --classifier_weights {vit}"
    found = figures(f"--images {tmp_path}/six.npz --reference {tmp_path}/six.npz {shared}")
    assert found["recognised"] == pytest.approx(4 / 6) and found["frechet"] == pytest.approx(0, abs=1e-3)


BAD_INPUT = [
    ("train", "", "first argument must be a config file"),
    ("train", "nowhere.py", "config file not found: nowhere.py"),
    ("train", "tinny.py", "did you mean 'tiny.py'?"),
    ("train", "tiny.py --optim.lrr 1", "--optim.lrr"),
    ("train", "tiny.py --optim.lrr 1", "did you mean --optim.lr?"),
    ("train", "tiny.py --optim.lr fast", "could not convert string to float: 'fast'"),
    ("train", "tiny.py --optim.lr -1", "lr must be above 0, got -1"),
    ("train", "tiny.py --train.num_steps 1.5", "1.5"),
    ("train", "tiny.py --train.num_steps 0", "num_steps must be at least 1, got 0"),
    ("train", "tiny.py --train.num_steps", "--train.num"),
    ("train", "tiny.py --model.depth 3", "depth must be even and at least 2, got 3"),
    ("train", "tiny.py --model.num_heads 3", "embed_dim 16 must be divisible by num_heads 3"),
    ("train", "tiny.py --model.patch_size 3", "img_size must be divisible by patch_size 3, got 8"),
    ("train", "tiny.py --model.skip cat", "'cat'"),
    ("train", "tiny.py --model.attention xformers", "attention 'xformers' needs a CUDA device, got 'cpu'"),
    ("train", "tiny.py --model.img_size 16", "digits are 1x8x8 images, got a model for 1x16x16"),
    ("train", "tiny.py --model.num_classes 9", "num_classes must be 10 for data 'digits', got 9"),
    ("train", "tiny.py --model.null_class False", "needs model.null_class, got False"),
    ("train", "tiny.py --train.mixed_precision fp16", "needs a CUDA device, got 'cpu'"),
    ("train", "tiny.py --train.accumulation_steps 3", "batch_size 8 must be divisible by accumulation_steps 3"),
    ("train", "tiny.py --data.name empty", "data folder empty is empty"),
    ("train", "tiny.py --data.name no/such", "cannot load split 'train' of data 'no/such'"),
    ("train", "tiny.py --train.tracker wandb", "train.tracker 'wandb' needs the package wandb"),
    ("train", "tiny.py --train.run_dir tiny.py/run", "cannot write to tiny.py/run: tiny.py is not a folder"),
    ("train", "tiny.py --train.seed 99999999999999999999999", "seed must be below 9223372036854775808"),
    ("train", "tiny.py --model.context_dim 8 --model.num_context_tokens 4", "got both model.num_classes 10 and"),
    (
        "train",
        f"tiny.py {' '.join(TEXT)} --data.text_encoder nowhere --train.run_dir new",
        "text encoder not found: nowhere",
    ),
    (
        "train",
        f"tiny.py {' '.join(TEXT)} --data.text_encoder no/such --train.run_dir new",
        "text encoder 'no/such' is not a folder on disk",
    ),
    (
        "train",
        f"tiny.py {' '.join(TEXT)} --data.text_encoder clip --model.context_dim 9 --train.run_dir new",
        "gives 24 tokens of width 8, expected model.num_context_tokens 24 and model.context_dim 9",
    ),
    (
        "train",
        f"tiny.py {' '.join(TEXT)} --data.text_encoder clip --model.num_context_tokens 77 --train.run_dir new",
        "gives 24 tokens of width 8, expected model.num_context_tokens 77 and model.context_dim 8",
    ),
    (
        "train",
        "tiny.py --data.autoencoder vae --train.run_dir new",
        "data 'digits' is no folder of latents, got data.autoencoder 'vae': make it with encode.py",
    ),
    ("train", "tiny.py --data.name one --model.img_size 8 --train.run_dir new", "must have 2 images or more, got 1"),
    ("train", "tiny.py --data.scale_factor 0", "scale_factor must be above 0, got 0"),
    ("train", "tiny.py --data.class_names a b", "data.class_names must have model.num_classes 10 names, got 2"),
    ("train", "tiny.py --train.num_steps 8 --optim.lr 1e-5", "holds a run with optim.lr 0.01, got 1e-05"),
    ("train", "tiny.py --train.num_steps 8 --optim.name adamw", "holds a run with optim.name 'muon', got 'adamw'"),
    ("train", "tiny.py --train.num_steps 8 --data.name folder.png", "holds a run with data.name"),
    ("train", "tiny.py --train.run_dir foreign", "the checkpoint in foreign does not fit the config: 'model'"),
    ("train", "tiny.py --train.run_dir emptied", "Config must be a JSON object, got []"),
    ("train", "tiny.py --model.embed_dim 32", "runs/tiny holds a run with model.embed_dim 16, got 32"),
    ("sample", "", "--checkpoint"),
    ("sample", "--checkpoint nowhere", "checkpoint not found: nowhere"),
    ("sample", "--checkpoint runs/tini", "checkpoint not found: runs/tini, did you mean 'runs/tiny'?"),
    ("sample", "--checkpoint empty", "cannot read empty/config.json"),
    ("sample", "--checkpoint tiny.py", "tiny.py holds weights alone, expected a run"),
    ("sample", "--checkpoint tiny.py --config tiny.py", "tiny.py is not a valid weights-only file"),
    ("sample", "--checkpoint bare --config tiny.py", "bare is not the model of tiny.py: "),
    ("sample", "--checkpoint bare", "bare holds weights alone, expected a run: give the run's config with --config"),
    ("sample", "--checkpoint other", "do not fit their config"),
    ("sample", "--checkpoint runs/tiny --classes 10", "class must be 0 to 9 or a class name, got '10'"),
    ("sample", "--checkpoint runs/tiny --classes thre", "got 'thre', did you mean 'three'?"),
    ("sample", "--checkpoint runs/tiny --prompt cat", "a model with context_dim 0 takes no prompt, got 'cat'"),
    ("sample", "--checkpoint runs/told --classes 3", "a model with num_classes 0 takes no class, got '3'"),
    ("sample", "--checkpoint runs/told --text_encoder empty", "text encoder 'empty' has no config.json"),
    ("sample", "--checkpoint untold", "a model with context_dim 8 draws from prompts, got none"),
    ("sample", "--checkpoint discrete --t_end 1e-4", "schedule 'ldm' begins at time 0.001, got a grid with 0.0001"),
    ("sample", "--checkpoint discrete --steps 2000", "schedule 'ldm' begins at time 0.001, got a grid with 0.0005"),
    ("sample", "--checkpoint runs/tiny --t_end 0.6", "t_end must be in [0, 0.5), got 0.6"),
    ("sample", "--checkpoint runs/tiny --sampler dpm", "'dpm'"),
    ("sample", "--checkpoint runs/tiny --steps 0", "num_steps must be at least 1, got 0"),
    ("sample", "--checkpoint runs/tiny --steps many", "'many'"),
    ("sample", "--checkpoint runs/tiny --num_per_class 0", "num_per_class must be at least 1, got 0"),
    ("sample", "--checkpoint runs/tiny --guidance 1.4 --paper_scale 0.4", "got both: 1.4 and 0.4"),
    ("sample", "--checkpoint runs/tiny --seed -1", "seed must be at least 0, got -1"),
    ("sample", "--checkpoint runs/tiny --guidance_interval 0.7 0.2", "guidance_interval must be two times"),
    ("sample", "--checkpoint runs/tiny --output tiny.py/grid.png", "cannot write to tiny.py: tiny.py is not a folder"),
    (
        "sample",
        "--checkpoint runs/tiny --output grid.gifx",
        ".png, .jpg or .npz, got 'grid.gifx'",
    ),
    ("sample", "--checkpoint runs/tiny --output folder.png", "folder.png: it is a folder"),
    ("sample", "--checkpoint runs/tiny --output grid.psd", "output must be a path ending in .png, .jpg or .npz"),
    ("sample", "--checkpoint runs/tiny --batch_size 0", "batch_size must be at least 1, got 0"),
    ("sample", "--checkpoint runs/tiny --attention xformers", "needs a CUDA device, got 'cpu'"),
    ("sample", "--checkpoint runs/tiny --sampler euler_maruyama --spacing uniform", "needs spacing 'log_snr'"),
    ("evaluate", "--checkpoint nowhere", "checkpoint not found: nowhere"),
    ("evaluate", "--checkpoint runs/tiny --seed -1", "seed must be at least 0, got -1"),
    ("evaluate", "--checkpoint runs/tiny --num_images 7", "num_images must be a multiple of 10 classes"),
    ("sample", "--checkpoint nan", "weights of nan must be finite, got NaN or infinity"),
    ("evaluate", "--images texts --reference digits", "data 'texts' must have a column of images, got columns text"),
    ("sample", "--checkpoint runs/tiny --reuse 2:2", "K of model.depth / 2 = 1 at most, got K 2"),
    ("sample", "--checkpoint runs/tiny --reuse 1:1", "'none' or K:EVERY with K at least 1 and EVERY at least 2"),
    ("evaluate", "--checkpoint runs/tiny --steps 0", "num_steps must be at least 1, got 0"),
    ("evaluate", "", "give --checkpoint or --images, got neither"),
    ("evaluate", "--checkpoint runs/tiny --images x.npz --reference y", "give --checkpoint or --images, got both"),
    ("evaluate", "--images x.npz", "--reference 'test' needs --checkpoint"),
    ("evaluate", "--images x.npz --reference y.npz", "cannot read images (arr_0) of x.npz"),
    (
        "evaluate",
        "--images folder.png --reference digits --features pixels",
        "data 'digits' can have 1 (grey) channels, got 3",
    ),
    (
        "evaluate",
        "--checkpoint runs/tiny --reference other.npz",
        "of 3 features of 'inception', expected 64 of 'pixels'",
    ),
    ("evaluate", "--checkpoint runs/tiny --reference sized.npz", "images of size (4, 16), expected (8, 8)"),
    ("evaluate", "--checkpoint runs/tiny --reference tiny.py", "cannot load split 'train' of data 'tiny.py'"),
    ("evaluate", "--checkpoint runs/tiny --features dino", "features must be 'pixels', 'inception' or 'timm:MODEL'"),
    ("evaluate", "--checkpoint runs/tiny --classifier svn", "classifier must be 'svm', 'timm:MODEL' or 'none', got"),
    ("evaluate", "--checkpoint runs/tiny --features inception --feature_weights gone", "no weights at gone"),
    (
        "evaluate",
        "--checkpoint runs/told --reference fits.npz",
        "draws the captions of a reference data set, got stat",
    ),
    (
        "evaluate",
        "--images folder.png --reference folder.png --features pixels --classifier svm",
        "'svm' needs the labelled",
    ),
    ("evaluate", "--images folder.png --reference one --steps 3", "--steps is for images to draw from a --checkpoint"),
    ("evaluate", "--images big.npz --reference big.npz --features pixels", "must be 4096 or fewer, 3x64x64 images"),
    (
        "evaluate",
        "--checkpoint runs/tiny --reference folder.png --split test",
        "cannot load split 'test' of data 'folder.png'",
    ),
    ("evaluate", "--checkpoint runs/tiny --reference imaginary.npz", "must hold mu and sigma of real numbers, got"),
    ("evaluate", "--checkpoint runs/tiny --reference negative.npz", "must hold a positive semidefinite sigma"),
    (
        "evaluate",
        "--checkpoint runs/tiny --reference three.npz",
        "the classifier knows 10 classes, three.npz has labels of 13 classes: give --classifier none",
    ),
    ("evaluate", "stats", "Missing from evaluate.py stats: STR Data set"),
    ("evaluate", "stats digits --output ref.txt", "output must be a path ending in .npz, got 'ref.txt'"),
    ("evaluate", "stats nowhere --output ref.npz", "cannot load split 'train' of data 'nowhere'"),
    ("evaluate", "stats digits --features pixels --output tiny.py/ref.npz", "cannot write to tiny.py"),
    ("encode", "", "--data"),
    ("encode", "--data nowhere --output out", "cannot load split 'train' of data 'nowhere'"),
    ("encode", "--data photos --output out --image_size 0", "image_size must be at least 1, got 0"),
    ("encode", "--data photos --output out --image_size 1000000", "image_size must be at most 16,384, got 1000000"),
    ("encode", "--data photos --output out --image_size 8 --autoencoder nowhere", "autoencoder not found: nowhere"),
    ("encode", "--data photos --output out --image_size 8 --autoencoder empty", "cannot read empty/config.json"),
    ("encode", "--data one --output out --image_size 8", "must have 2 images or more, got 1"),
    ("encode", "--data photos --output out --on_error ignore", "'ignore'"),
    ("checkpoint", "", "the first argument must be one of convert, export, push, card, got 'nothing'"),
    ("checkpoint", "convert nowhere out", "checkpoint not found: nowhere"),
    ("checkpoint", "convert tiny.py out", "tiny.py is not a valid weights-only file"),
    ("checkpoint", "convert runs/tiny runs/told", "runs/told holds a run, whose config.json would be overwritten"),
    ("checkpoint", "convert runs/tiny out --num_heads 3", "embed_dim 16 must be divisible by num_heads 3"),
    ("train", "tiny.py --model.embed_dim 1000000000", "parameters, got up to 8.4e+19"),
    ("train", "tiny.py --data.num_workers 100000", "num_workers must be at most 1,024, got 100000"),
    ("sample", f"--checkpoint {'n' * 300}", "checkpoint not found: nnn"),
    ("sample", "--checkpoint user/model/../../..", "checkpoint not found: user/model/../../.."),
    ("sample", "--checkpoint runs/tiny --classes \x1b[31m", r"class must be 0 to 9 or a class name, got '\x1b[31m'"),
    ("evaluate", "--checkpoint runs/tiny --num_images 99999999999", "num_images must be at most 10,000,000"),
]


@pytest.fixture(scope="session")
def scenery(told) -> None:
    """What the bad inputs stumble over, beside the finished run."""
    finished = told
    shutil.copytree(finished / "runs/told", finished / "untold")
    config = json.loads((finished / "untold/config.json").read_text())
    config["sample"]["prompts"] = []
    (finished / "untold/config.json").write_text(json.dumps(config))
    shutil.copytree(finished / "runs/tiny", finished / "discrete")
    config = (finished / "runs/tiny/config.json").read_text()
    (finished / "discrete/config.json").write_text(config.replace('"schedule": "flow"', '"schedule": "ldm"'))
    for name in ("empty", "other"):
        (finished / name).mkdir()
    (finished / "other" / "config.json").write_text(config.replace('"embed_dim": 16', '"embed_dim": 32'))
    (finished / "other" / "model.safetensors").write_bytes((finished / "runs/tiny/model.safetensors").read_bytes())
    UViT(depth=2, embed_dim=8, num_heads=1).save_pretrained(finished / "bare")
    shutil.copytree(finished / "runs/tiny", finished / "nan")
    weights = read_weights(finished / "nan/model.safetensors")
    write_weights(finished / "nan", {name: tensor * torch.nan for name, tensor in weights.items()})
    (finished / "texts").mkdir()
    (finished / "texts/words.txt").write_text("a word\n")
    save_folder(finished / "folder.png", classes=[str(digit) for digit in range(10)], count=1)
    save_folder(finished / "one", classes="a", count=1)
    np.savez(finished / "other.npz", mu=np.zeros(3), sigma=np.eye(3), features="inception")
    np.savez(finished / "fits.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(finished / "big.npz", arr_0=np.zeros((2, 64, 64, 3), np.uint8))
    np.savez(finished / "three.npz", arr_0=np.zeros((2, 8, 8, 1), np.uint8), arr_1=np.array([0, 12]))
    np.savez(finished / "imaginary.npz", mu=np.zeros(64), sigma=np.eye(64) * 1j)
    np.savez(finished / "negative.npz", mu=np.zeros(64), sigma=-np.eye(64))
    np.savez(finished / "sized.npz", mu=np.zeros(64), sigma=np.eye(64), features="pixels", image_size=(4, 16))
    for name, text in (("foreign", config), ("emptied", "[]")):
        save_checkpoint(finished / name, load_config(finished / "runs/tiny/config.json"), 2, {}, keep=1)
        (finished / name / "config.json").write_text(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="some of these are fine with CUDA")
@pytest.mark.parametrize(("script", "arguments", "message"), BAD_INPUT)
@pytest.mark.usefixtures("scenery")
def test_bad_input_is_one_line_and_exit_2(script, arguments, message, inside, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments.split()])
    before = files_of(inside)
    with pytest.raises(SystemExit) as exit:
        run({**SCRIPTS, "checkpoint": checkpoint}[script].main)
    errors = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], errors
    assert files_of(inside) == before


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_engines_that_share_the_model_are_refused(engine, inside, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(InputError, match=f"by --train.shard True, got {engine}: launch without it"):
        train.main(["tiny.py"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, capsys):
    with pytest.raises(SystemExit) as exit:
        SCRIPTS[script].main(["--help"])
    assert exit.value.code == 0
    assert "--" in capsys.readouterr().out


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), **os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_importing_prints_nothing_and_starts_nothing(tmp_path):
    code = "import uvit, torch; assert not torch.cuda.is_initialized()"
    result = command("-c", code, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_accelerate_launch(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", str(ROOT / "train.py")]
    result = command(*launch, "tiny.py", "--optim.lr", "1e-3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "4 steps done" in result.stdout and "images/s" in result.stderr
    assert json.loads((tmp_path / "runs/tiny/config.json").read_text())["optim"]["lr"] == 1e-3


def test_a_shell_sees_one_line_and_exit_2(tmp_path):
    result = command(str(ROOT / "sample.py"), "--checkpoint", "nowhere", cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "error: checkpoint not found: nowhere\n"


@pytest.mark.slow
def test_a_launcher_that_starts_fewer_processes_is_told_of(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", str(ROOT / "train.py"), "tiny.py"]
    result = command(*launch, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "warning: 1 process runs where 2 were asked for: on a CPU use ACCELERATE_USE_CPU=true" in result.stderr


@pytest.mark.slow
def test_two_processes_share_a_run(tmp_path, monkeypatch):
    (tmp_path / "tiny.py").write_text(TINY)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "train.py"), "tiny.py"]
    result = command(*launch, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert load_checkpoint(tmp_path / "runs/tiny")["step"] == 4
    assert len((tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_leaves_nothing_half_written(signum, status, tmp_path, monkeypatch, capsys):
    def stopped(arguments):
        with atomic_write(tmp_path / "file.txt") as aside:
            aside.write_text("half")
            os.kill(os.getpid(), signum)
            signal.pause()

    # A shell starts what it puts into the background with SIGINT ignored.
    before = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(sys, "argv", ["stopped"])
    with pytest.raises(SystemExit) as exit:
        run(stopped)
    signal.signal(signal.SIGTERM, before[0])
    signal.signal(signal.SIGINT, before[1])
    assert exit.value.code == status
    assert list(tmp_path.iterdir()) == []
    assert "Traceback" not in capsys.readouterr().err
