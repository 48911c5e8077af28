from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.edited import edit_json
from helpers.faults import on_event
from helpers.forks import in_a_fork
from PIL import Image

from uvit import Config, UViT, UViTConfig
from uvit.commands import sample
from uvit.common.errors import InputError
from uvit.config import to_json
from uvit.integrations import page_drawing
from uvit.integrations.page_drawing import Drawing, draw, find_run, list_runs


def ignore(done: int, total: int) -> None:
    """A progress bar that nobody sees."""


def test_the_command_that_the_page_shows_draws_the_same_grid(runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    asked = Drawing(run="tiny", classes=("three", "7"), num_per_class=3, guidance=2.0, steps=3, sampler="heun", seed=5)
    seen = []
    drawn = draw(Path("runs"), asked, lambda *each: seen.append(each))
    assert seen == [(6 * k, 30) for k in range(1, 6)] and drawn.denoising is None
    command = drawn.command.split()
    assert command[:2] == ["python", "sample.py"]
    sample.main([*command[2:], "--output", "grid.png"])
    assert np.array_equal(np.asarray(Image.open("grid.png")), np.asarray(drawn.grid))
    assert "6 images" in drawn.summary and "guidance w = 2 " in drawn.summary


def test_a_text_model_draws_prompts(trained_on_text, monkeypatch):
    monkeypatch.chdir(trained_on_text)
    asked = Drawing(run="text", prompts=("a three", "a nine"), num_per_class=2, steps=2, denoising="strip")
    drawn = draw(Path("runs"), asked, ignore)
    assert drawn.denoising and "--prompt 'a three' 'a nine'" in drawn.command


def test_the_denoising_begins_in_noise_and_ends_in_the_images(runs):
    asked = {"run": "tiny", "classes": ("0", "1"), "num_per_class": 2, "steps": 12}
    drawn = draw(runs, Drawing(**asked, denoising="animation"), ignore)
    film = Image.open(io.BytesIO(drawn.denoising))
    assert film.n_frames == 13
    film.seek(12)
    assert np.array_equal(np.asarray(film.convert("RGB")), np.asarray(drawn.grid))

    again = draw(runs, Drawing(**asked, denoising="strip"), ignore)
    assert np.array_equal(np.asarray(again.grid), np.asarray(drawn.grid))
    strip, grid = np.asarray(Image.open(io.BytesIO(again.denoising)).convert("RGB")), np.asarray(drawn.grid)
    cell = 64  # the last of a row of the strip is the first image of that row of the grid
    assert strip.shape[1] - (grid.shape[1] - 2 * (cell + 2)) == page_drawing.STRIP_COLUMNS * (cell + 2)
    left = grid.shape[1] - 2 * (cell + 2)
    assert np.array_equal(strip[2 : 2 + cell, -cell - 2 : -2], grid[2 : 2 + cell, left : left + cell])
    assert not np.array_equal(strip[2 : 2 + cell, left : left + cell], grid[2 : 2 + cell, left : left + cell])


@pytest.mark.parametrize(("denoising", "together"), [("none", 4), ("strip", 6)])
def test_images_are_drawn_in_default_batches_unless_their_denoising_is_shown(tmp_path, denoising, together):
    """Of a network with many tokens, at least four; those that are followed are one batch."""
    model = UViTConfig(img_size=64, patch_size=1, in_chans=1, embed_dim=16, depth=2, num_heads=1, num_classes=3)
    UViT(model).save_pretrained(tmp_path / "large")
    (tmp_path / "large" / "config.json").write_text(to_json(Config(model=model)))
    seen = []
    asked = Drawing(run="large", classes=("1", "2"), num_per_class=3, steps=2, denoising=denoising)
    draw(tmp_path, asked, lambda *each: seen.append(each))
    assert seen[0] == (together, 12) and seen[-1] == (12, 12)


def test_a_film_too_large_for_webp_is_scaled_down():
    tall = [Image.new("RGB", (30, page_drawing.MAX_WEBP_SIDE + 1), colour) for colour in ("red", "blue")]
    film = Image.open(io.BytesIO(page_drawing._to_webp(tall)))
    assert film.n_frames == 2 and film.size == (30, page_drawing.MAX_WEBP_SIDE)


def test_runs_are_listed_newest_first_without_folders_of_weights(runs):
    shutil.copytree(runs / "tiny", runs / "group" / "second")
    os.utime(runs / "tiny" / "model.safetensors", (1, 1))
    shutil.copytree(runs / "tiny", runs / "weights")
    config = json.loads((runs / "tiny" / "config.json").read_text())
    (runs / "weights" / "config.json").write_text(json.dumps(config["model"]))
    assert list_runs(runs) == ["group/second", "tiny"]


def test_a_name_that_cannot_be_printed_is_left_out(runs):
    for name in ["two\nlines", *[os.fsdecode(b"\xff")] * (sys.platform == "linux")]:
        shutil.copytree(runs / "tiny", runs / name)
    assert list_runs(runs) == ["tiny"]


@in_a_fork
def test_a_run_deleted_while_runs_are_listed_is_left_out(runs):
    shutil.copytree(runs / "tiny", runs / "second")
    assert sorted(list_runs(runs)) == ["second", "tiny"]
    config = runs / "second" / "config.json"
    on_event("read", lambda path: path == config.resolve(), lambda path: shutil.rmtree(path.parent))
    assert list_runs(runs) == ["tiny"]


@in_a_fork
def test_a_run_deleted_before_it_is_loaded_is_not_looked_up_on_the_hub(runs, monkeypatch):
    for group in ("one", "two"):
        shutil.copytree(runs / "tiny", runs / group / "run")
    shutil.rmtree(runs / "tiny")
    monkeypatch.chdir(runs.parent)
    # Runs are found in the order of the file system: the first has been found when the config of the second is read.
    first, second = (Path(place) for place, _, files in os.walk(runs.resolve()) if "model.safetensors" in files)
    on_event("read", lambda path: path == second / "config.json", lambda _: shutil.rmtree(first.parent))
    with pytest.raises(InputError, match=r"^checkpoint not found: run$"):
        draw(Path("runs"), Drawing(run=f"{first.parent.name}/run"), ignore)
    assert not first.exists()


def test_errors_do_not_name_other_folders_of_the_machine(runs, tmp_path):
    (tmp_path / "encoders" / "vae-large").mkdir(parents=True)
    edit_json(runs / "tiny" / "config.json", data__autoencoder=str(tmp_path / "encoders" / "vae"))
    with pytest.raises(InputError, match=r"^autoencoder not found: vae$"):
        draw(runs, Drawing(run="tiny"), ignore)


def test_no_name_leads_out_of_the_folder(runs, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(runs / "tiny", outside)
    (runs / "linked").symlink_to(outside)
    (runs / "files").mkdir()
    for name in ("config.json", "model.safetensors"):
        (runs / "files" / name).symlink_to(outside / name)
    assert list_runs(runs) == ["tiny"]
    names = ["../outside", str(outside), "linked", "files", "tiny/../../outside", "tiny/", ".", "", None, 3, ["tiny"]]
    for name in names:
        with pytest.raises(InputError, match="run not found in"):
            find_run(runs, name)
    (tmp_path / "elsewhere").symlink_to(runs)  # the folder itself may be a link
    assert list_runs(tmp_path / "elsewhere") == ["tiny"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 251}, "steps must be at most 250, got 251"),
        ({"steps": 2.5}, "steps must be int, got 2.5"),
        ({"num_per_class": 0}, "num_per_class must be at least 1, got 0"),
        ({"num_per_class": 11}, "images must be at most 100 in all, got 10 × 11"),
        ({"guidance": -9.0}, "guidance must be at most 8 in size, got -9.0"),
        ({"sampler": "dim"}, "did you mean 'ddim'?"),
        ({"seed": None}, "seed must be int, got None"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"classes": "three"}, "classes must be"),
        ({"classes": ("thre",)}, "did you mean 'three'?"),
        ({"prompts": ("a three",)}, "takes no prompt, got 'a three'"),
        ({"denoising": "film"}, "denoising must be one of 'none', 'strip', 'animation', got 'film'"),
        ({"run": "tony"}, "run not found in .*: 'tony', did you mean 'tiny'?"),
    ],
)
def test_errors_of_a_request_are_one_line(runs, changed, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")) as caught:
        draw(runs, Drawing(**{"run": "tiny", "steps": 1, **changed}), ignore)
    assert "\n" not in str(caught.value)
