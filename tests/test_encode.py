"""encode.py, and training on what it makes, end to end."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.commands import refused, run_python
from helpers.encoders import make_autoencoder, make_text_encoder
from helpers.faults import on_event
from helpers.forks import run_forked
from helpers.images import save_captions, save_folder
from helpers.runs import ROOT, files_of
from PIL import Image

from uvit.commands import encode, sample, train
from uvit.common.errors import InputError
from uvit.config import DataConfig, UViTConfig
from uvit.data.batch import ImageSpec, read_all
from uvit.data.datasets import load_images
from uvit.data.images import to_unit_range
from uvit.data.latents import load_latents
from uvit.networks.encoders import Autoencoder, TextEncoder
from uvit.training.checkpoint import load_checkpoint

LATENT = """
from uvit.config import *

config = Config(
    model=UViTConfig(img_size=8, in_chans=4, embed_dim=16, depth=2, num_heads=2, num_classes=2, null_class=True),
    data=DataConfig(name="latents", autoencoder="vae", flip=True),
    train=TrainConfig(num_steps=4, batch_size=8, log_every=2, sample_every=4, save_every=2, label_dropout=0.2),
    sample=SampleConfig(num_steps=2),
)
"""
MODEL = UViTConfig(img_size=8, in_chans=4, num_classes=2)
SHARED = "--data photos --image_size 16 --autoencoder vae --shard_size 1000 --batch_size 250".split()


@pytest.fixture(scope="session")
def encoded(tmp_path_factory) -> Path:
    """A folder with encoders, a config, and the latents of `photos` with captions."""
    folder = tmp_path_factory.mktemp("encoded")
    make_autoencoder(folder / "vae")
    make_text_encoder(folder / "clip", num_tokens=30, width=8)
    (folder / "latent.py").write_text(LATENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        encode.main([*SHARED, "--text_encoder", "clip", "--output", "latents"])
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture
def workdir(encoded, monkeypatch) -> Path:
    monkeypatch.chdir(encoded)
    return encoded


def config_of(folder, **fields):
    return DataConfig(name=str(folder), autoencoder="vae", **fields)


def test_latents_equal_the_output_of_the_autoencoder(workdir):
    """Every image in its place, and its mirror image, to half precision."""
    photos = read_all(load_images(DataConfig(name="photos"), ImageSpec((3, 16, 16), True, True)))
    data = load_latents(config_of("latents"), MODEL)
    assert len(data) == 4000
    autoencoder = Autoencoder("vae", 1.0)
    batch = data.read(range(0, 4000, 97), np.random.default_rng(0))
    images = to_unit_range(photos.images[::97])
    torch.testing.assert_close(batch.images.float(), autoencoder.encode(images), rtol=2e-3, atol=2e-3)
    assert torch.equal(batch.labels, photos.labels[::97])
    mirrored = load_latents(config_of("latents", flip=True), MODEL).read([5] * 20, np.random.default_rng(0)).images
    expected = autoencoder.encode(torch.cat([images[:0], to_unit_range(photos.images[5:6])]).flip(-1))[0]
    assert any(torch.allclose(each.float(), expected, rtol=2e-3, atol=2e-3) for each in mirrored)


def test_captions_equal_the_output_of_the_text_encoder(workdir):
    text = UViTConfig(img_size=8, in_chans=4, context_dim=8, num_context_tokens=30)
    batch = load_latents(config_of("latents"), text).read([0, 1], np.random.default_rng(0))
    assert batch.captions == [["a photograph of a temple"], ["a photograph of a flower"]]
    expected = TextEncoder("clip")([texts[0] for texts in batch.captions] + [""])
    both = torch.cat([batch.context, batch.empty_context]).float()
    torch.testing.assert_close(both, expected, rtol=2e-3, atol=2e-3)


def test_training_on_latents(workdir):
    train.main(["latent.py"])
    losses = [json.loads(line)["loss"] for line in Path("runs/latent/metrics.jsonl").read_text().splitlines()]
    assert load_checkpoint(Path("runs/latent"))["step"] == 4 and np.isfinite(losses).all()
    assert Image.open("runs/latent/samples/step_00000004.png").size[1] > 2 * 64  # decoded, a row for each class
    sample.main("--checkpoint runs/latent --num_per_class 2 --output latent.npz".split())
    with np.load("latent.npz") as arrays:
        assert arrays["arr_0"].shape == (4, 16, 16, 3)


def test_training_on_text_latents(workdir):
    text = "--model.num_classes 0 --model.null_class False --model.context_dim 8 --model.num_context_tokens 30"
    train.main(["latent.py", *text.split(), "--data.text_encoder", "clip", "--train.run_dir", "runs/text"])
    assert load_checkpoint(Path("runs/text"))["step"] == 4
    prompts = json.loads(Path("runs/text/config.json").read_text())["sample"]["prompts"]
    assert prompts == ["a photograph of a temple", "a photograph of a flower"]
    sample.main(["--checkpoint", "runs/text", "--prompt", "a flower", "--num_per_class", "2", "--output", "text.png"])


def test_several_captions_and_broken_images(tmp_path, encoded, monkeypatch, capsys):
    monkeypatch.chdir(encoded)
    save_captions(tmp_path / "some", [["a", "b"], ["c"], ["d", "e", "f"]])
    shared = ["--image_size", "16", "--autoencoder", "vae", "--text_encoder", "clip", "--num_captions", "2"]
    encode.main(
        ["--data", str(tmp_path / "some"), "--caption_column", "text", "--output", str(tmp_path / "out"), *shared]
    )
    text = UViTConfig(img_size=8, in_chans=4, context_dim=8, num_context_tokens=30)
    data = load_latents(config_of(tmp_path / "out"), text)
    drawn = [data.read([0, 1, 2], np.random.default_rng(seed)).captions for seed in range(20)]
    assert [{texts[index][0] for texts in drawn} for index in range(3)] == [{"a", "b"}, {"c"}, {"d", "e"}]

    save_folder(tmp_path / "broken")
    (tmp_path / "broken/dog/1.png").write_bytes(b"not an image")
    shared = ["--data", str(tmp_path / "broken"), "--image_size", "16", "--autoencoder", "vae"]
    encode.main([*shared, "--output", str(tmp_path / "five"), "--on_error", "skip"])
    assert "; 1 could not be read, listed in" in capsys.readouterr().out
    data = load_latents(config_of(tmp_path / "five"), MODEL)
    assert data.labels.tolist() == [0, 0, 0, 1, 1] and data.class_names == ("cat", "dog")


def test_encoding_resumes_only_with_the_same_caption_column(tmp_path, workdir, monkeypatch, capsys):
    both = save_captions(tmp_path / "both", ["a", "b"], other=["x", "y"]).name
    arguments = f"--data {both} --output {tmp_path}/out --image_size 16 --autoencoder vae --text_encoder clip".split()
    encode.main(arguments)  # reads the one with a usual name
    encode.main([*arguments, "--caption_column", "text"])
    capsys.readouterr()
    line = refused("encode", [*arguments, "--caption_column", "other"], monkeypatch, capsys)
    assert "out was started with caption_column 'text', got 'other': use another --output" in line


def test_a_killed_command_resumes(encoded, tmp_path, monkeypatch):
    """Killed with SIGKILL once a shard is there; afterwards all is equal to what an uninterrupted command makes."""
    monkeypatch.chdir(encoded)
    arguments = [*SHARED, "--text_encoder", "clip", "--output", str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, str(ROOT / "encode.py"), *arguments], env=environment)
    first = tmp_path / "killed/shard-00000-of-00004.arrow"
    while not first.is_file() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = first.stat().st_mtime_ns
    assert len(list((tmp_path / "killed").glob("shard-*"))) < 4
    encode.main(arguments)
    assert first.stat().st_mtime_ns == done
    names = set(files_of(tmp_path / "killed"))
    assert names == set(files_of(encoded / "latents"))
    ours, whole = (load_latents(config_of(folder), MODEL) for folder in (tmp_path / "killed", "latents"))
    every = range(4000)
    ours, whole = (data.read(every, np.random.default_rng(0)).images for data in (ours, whole))
    torch.testing.assert_close(ours, whole, rtol=2e-3, atol=2e-3)


def test_encoding_does_not_resume_with_changed_data(tmp_path, encoded, monkeypatch):
    """As many images, but not the same: rows would be missing and others doubled."""
    monkeypatch.chdir(encoded)
    save_folder(tmp_path / "some")
    shared = ["--image_size", "16", "--autoencoder", "vae", "--output", str(tmp_path / "out"), "--shard_size", "2"]
    encode.main(["--data", f"{tmp_path}/some/", *shared])
    last = tmp_path / "out/shard-00002-of-00003.arrow"
    last.unlink()
    encode.main(["--data", f"{tmp_path}/some", *shared])
    whole = last.read_bytes()
    last.write_bytes(whole[:-8])
    encode.main(["--data", f"{tmp_path}/some", *shared])
    assert last.read_bytes() == whole  # a cut shard is made anew
    (tmp_path / "some/cat/0.png").rename(tmp_path / "some/dog/9.png")
    with pytest.raises(InputError, match=r"was started with fingerprint '.*', got '.*': use another --output"):
        encode.main(["--data", f"{tmp_path}/some", *shared])


def test_moments_that_half_precision_cannot_hold(tmp_path, workdir):
    network = make_autoencoder(tmp_path / "vae")
    torch.nn.init.constant_(network.quant_conv.bias, 1e6)
    network.save_pretrained(tmp_path / "vae")
    shared = ["--data", "photos", "--image_size", "16", "--output", f"{tmp_path}/out"]
    with pytest.raises(InputError, match=r"autoencoder '.*vae' gives moments that float16 cannot hold"):
        encode.main([*shared, "--autoencoder", f"{tmp_path}/vae"])
    assert not list((tmp_path / "out").glob("shard*"))


@pytest.mark.slow
def test_two_processes_share_the_work(encoded, tmp_path, monkeypatch):
    monkeypatch.chdir(encoded)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "encode.py")]
    result = run_python(*launch, *SHARED, "--output", str(tmp_path / "two"), cwd=encoded)
    assert result.returncode == 0, result.stderr
    assert "2000/2000" in result.stderr and "4000/4000" not in result.stderr  # each process had its half
    ours, whole = (load_latents(config_of(folder), MODEL) for folder in (tmp_path / "two", "latents"))
    every = range(4000)
    ours, whole = (data.read(every, np.random.default_rng(0)).images for data in (ours, whole))
    torch.testing.assert_close(ours, whole, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--output new", "--data"),
        ("--data nowhere --output new", "cannot load split 'train' of data 'nowhere'"),
        ("--data digits --output new", "data 'digits' can have 1 (grey) channels, got 3"),
        ("--data photos --output new --autoencoder gone", "autoencoder not found: gone"),
        ("--data photos --output new --autoencoder clip", "autoencoder 'clip' cannot be loaded"),
        ("--data photos --output new --autoencoder vae --text_encoder vae", "text encoder 'vae'"),
        ("--data photos --output new --autoencoder vae --image_size 17", "image_size must be divisible by 2, got 17"),
        ("--data photos --output new --autoencoder vae --image_size 1000", "got a model for 1000x1000 images"),
        ("--data photos --output new --autoencoder vae --batch_size 0", "batch_size must be at least 1, got 0"),
        ("--data photos --output new --caption_column text", "caption_column must be None without text_encoder"),
        ("--data photos --output new --num_captions 5", "num_captions must be 1 without text_encoder, got 5"),
        (
            "--data photos --output latents --autoencoder vae --image_size 32",
            "latents was started with shard_size 1000, got 2048: use another --output",
        ),
        ("--data photos --output latent.py/x --autoencoder vae", "cannot write to latent.py/x"),
    ],
)
@pytest.mark.usefixtures("offline")
def test_bad_input_is_one_line_and_exit_2(arguments, message, workdir, monkeypatch, capsys):
    before = files_of(workdir)
    assert message in refused("encode", arguments, monkeypatch, capsys)
    assert files_of(workdir) == before


def test_a_folder_in_the_place_of_a_shard_is_found_first(workdir, monkeypatch, capsys):
    Path("taken/shard-00003-of-00004.arrow").mkdir(parents=True)
    line = refused("encode", [*SHARED, "--output", "taken"], monkeypatch, capsys)
    assert line == "error: cannot write to taken/shard-00003-of-00004.arrow: it is a folder"
    assert not Path("taken/manifest.json").exists()


def test_latents_of_another_autoencoder_are_refused(workdir, monkeypatch, capsys):
    torch.manual_seed(1)
    other = make_autoencoder(workdir / "other")
    torch.nn.init.normal_(other.decoder.conv_out.weight)
    other.save_pretrained("decoder")  # another decoder is no other encoder
    shared = ["latent.py", "--train.run_dir", "runs/decoder", "--train.num_steps", "1"]
    train.main([*shared, "--data.autoencoder", "decoder"])
    torch.nn.init.normal_(other.encoder.conv_in.weight)
    other.save_pretrained("other")
    capsys.readouterr()
    line = refused("train", "latent.py --data.autoencoder other --train.run_dir new", monkeypatch, capsys)
    assert "data 'latents' was encoded by autoencoder 'vae' (weights " in line and ", got 'other' (weights " in line
    assert not Path("new").exists()


def test_a_full_disk_leaves_complete_shards(tmp_path, workdir):
    arguments = [*SHARED, "--output", str(tmp_path / "full")]

    def fill(_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    def prepare():  # the disk is full once the first shard is there
        on_event("os.rename", lambda path: path.name == "shard-00000-of-00004.arrow", fill)

    status, lines = run_forked(encode.main, arguments, tmp_path / "log", prepare)
    assert status == 2 and len(lines) == 1
    assert lines[0].startswith("error: cannot write to ") and "shard-0000" in lines[0] and "File too large" in lines[0]
    whole = sorted(files_of(tmp_path / "full"))
    assert "manifest.json" in whole and "shard-00000-of-00004.arrow" in whole and len(whole) <= 3
    encode.main(arguments)
    assert len(load_latents(config_of(tmp_path / "full"), MODEL)) == 4000
