from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.edited import edit_json
from helpers.encoders import make_autoencoder
from helpers.images import read_npz
from PIL import Image

from uvit import UViT
from uvit.commands import sample
from uvit.common.errors import InputError
from uvit.diffusion.solvers import SOLVERS


def test_sample_draws_a_row_for_each_class(workdir, capsys):
    sample.main("--checkpoint runs/tiny --classes 0 seven --num_per_class 3 --steps 2 --output two.png".split())
    assert "2 steps" in capsys.readouterr().out
    picture = Image.open("two.png")
    assert picture.size[1] < 3 * 66 < picture.size[0] + 66


def test_an_npz_has_the_format_of_adm_and_does_not_depend_on_the_batch(workdir):
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


def test_the_scale_of_the_paper_is_w_minus_one(workdir, capsys):
    shared = "--checkpoint runs/tiny --num_per_class 2 --classes 3".split()
    sample.main([*shared, "--guidance", "1.4", "--output", "w.npz"])
    sample.main([*shared, "--paper_scale", "0.4", "--output", "s.npz"])
    assert capsys.readouterr().out.count("guidance w = 1.4 (the paper's s = 0.4)") == 2
    assert np.array_equal(read_npz("w.npz")[0], read_npz("s.npz")[0])


@pytest.mark.usefixtures("trained_on_text")
def test_a_text_run_draws_prompts(workdir, capsys):
    config = json.loads((workdir / "runs/text/config.json").read_text())
    assert len(config["sample"]["prompts"]) == 10  # the data's ten captions, for the rows of its grids
    assert "a handwritten three" in config["sample"]["prompts"]
    shared = "--checkpoint runs/text --num_per_class 2".split()
    sample.main([*shared, "--prompt", "a handwritten three", "two cats", "--output", "two.npz"])
    sample.main([*shared, "--prompt", "two cats", "--output", "one.npz", "--batch_size", "1"])
    (images, prompts), (alone, _) = read_npz("two.npz"), read_npz("one.npz")
    assert prompts.tolist() == ["a handwritten three"] * 2 + ["two cats"] * 2
    assert np.abs(images[2:].astype(int) - alone).max() <= 1 and (images[2] != images[3]).any()
    sample.main([*shared, "--prompt", "two cats", "--output", "guided.npz", "--guidance", "3"])
    assert (read_npz("guided.npz")[0] != alone).any()
    sample.main([*shared, "--output", "rows.png"])
    assert Image.open("rows.png").size[1] > 10 * 64


@pytest.mark.usefixtures("trained_on_text")
def test_a_moved_text_encoder_can_be_given(workdir, monkeypatch):
    shutil.copytree("clip", "moved")
    shared = "--checkpoint runs/text --prompt x --num_per_class 1".split()
    sample.main([*shared, "--output", "before.npz"])
    config = Path("runs/text/config.json")
    kept = config.read_text()
    edit_json(config, data__text_encoder="gone")
    try:
        sample.main([*shared, "--text_encoder", "moved", "--output", "after.npz"])
    finally:
        config.write_text(kept)
    assert np.array_equal(read_npz("before.npz")[0], read_npz("after.npz")[0])


def test_latents_are_decoded(tmp_path, monkeypatch):
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


def test_published_weights_are_sampled_with_a_config(workdir, capsys):
    """The same weights under the reference code's file name draw the same images."""
    torch.save(UViT.from_pretrained("runs/tiny").state_dict(), "nnet_ema.pth")
    shared = "--num_per_class 2 --classes 3".split()
    sample.main(["--checkpoint", "runs/tiny", "--output", "run.npz", *shared])
    sample.main(["--checkpoint", "nnet_ema.pth", "--config", "tiny.py", "--output", "published.npz", *shared])
    assert np.array_equal(read_npz("run.npz")[0], read_npz("published.npz")[0])


@pytest.mark.parametrize("sampler", SOLVERS)
def test_every_sampler_by_name(sampler, workdir, capsys):
    sample.main(f"--checkpoint runs/tiny --sampler {sampler} --steps 3 --output x.png".split())
    assert sampler in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("reuse", ["none", "1:2"])
def test_compiled_and_half_precise_networks_draw_nearly_the_same(reuse, workdir):
    common = f"--checkpoint runs/tiny --steps 4 --num_per_class 1 --reuse {reuse}".split()
    sample.main([*common, "--output", "plain.npz"])
    sample.main([*common, "--output", "compiled.npz", "--compile", "model"])
    sample.main([*common, "--output", "half.npz", "--mixed_precision", "bf16"])
    plain, compiled, half = (read_npz(f"{name}.npz")[0].astype(int) for name in ("plain", "compiled", "half"))
    assert np.abs(plain - compiled).max() <= 1
    assert np.abs(plain - half).max() > 0 and np.abs(plain - half).mean() < 3


def test_deep_features_are_reused(workdir, capsys):
    sample.main("--checkpoint runs/tiny --steps 8 --output whole.npz".split())
    sample.main("--checkpoint runs/tiny --steps 8 --output reused.npz --reuse 1:3".split())
    assert "reuse 1:3, precision no, seed 0" in capsys.readouterr().out
    whole, reused = (read_npz(f"{name}.npz")[0].astype(float) for name in ("whole", "reused"))
    assert 0 < np.abs(whole - reused).mean() < 10
