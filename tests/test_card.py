from __future__ import annotations

import resource

import pytest
import torch
from helpers.commands import refused
from helpers.measured_run import MODEL, NAME
from huggingface_hub import ModelCard

from uvit import Config, UNet, UViT, UViTConfig
from uvit.commands import card as card_command
from uvit.config import DataConfig
from uvit.weights.card import describe_figures, model_card
from uvit.weights.published import PUBLISHED, PUBLISHED_UVIT


def test_the_card_has_recipe_figures_and_how_to_load(measured_run, tmp_path):
    card_command.main([str(measured_run), str(tmp_path / "out"), "--name", NAME])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "frechet": 2.0,
        "recognised": 0.5,
    }
    assert card.data.library_name == "uvit" and "class-conditional-image-generation" in card.data.tags
    for text in (
        f'model = UViT.from_pretrained("{NAME}")\noutput = model(x, timesteps, y)',
        f"python -m uvit sample --checkpoint {NAME}",
        "![samples](grid.png)\n\nDrawn at step 10 of the training.",
        "| optimizer | adamw, learning rate 0.0002",
        "seed 0, alignment repa with weight 0.5 |",
        "- Fréchet distance 2.00 x real (2.000 against 1.000)",
        "| reference | ./ref.npz: mu and sigma, hash 12 |",
        '3 classes, one label for "no label"',
    ):
        assert text in card.text


@pytest.mark.parametrize("name", [*PUBLISHED_UVIT, "adm_imagenet64"])
def test_the_example_in_a_card_runs(name):
    """What a card says to call has the names of what the backbone takes."""
    model = PUBLISHED[name]
    card = ModelCard(model_card(model, 1, name="user/model"))
    lines = card.text.partition("```python\n")[2].partition("\n```")[0].splitlines()
    assert len(lines) == 3
    if name.startswith("adm"):
        small: UViT | UNet = UNet(model, model_channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=1, head_dim=32)
        assert "from uvit import UNet" in lines[0] and "The first 3 of its 6 channels are the prediction." in card.text
    else:
        small = UViT(model, embed_dim=8, depth=2, num_heads=1)
    x = torch.zeros(1, model.in_chans, *model.image_shape)
    given = {"model": small, "x": x, "timesteps": torch.zeros(1), "y": torch.zeros(1, dtype=torch.long)}
    given["context"] = torch.zeros(1, model.num_context_tokens, model.context_dim)
    exec(lines[2], given)
    assert given["output"][:, : model.in_chans].shape == x.shape


def test_a_card_says_which_encoders_are_not_on_the_hub():
    latent = Config(model=MODEL, data=DataConfig(autoencoder="./vae"))
    assert "a local copy of vae: give yours with `--autoencoder`" in model_card(MODEL, 1, config=latent)
    text = UViTConfig(context_dim=8, num_context_tokens=4)
    captions = Config(model=text, data=DataConfig(text_encoder="./clip", autoencoder="user/model/vae"))
    card = model_card(text, 1, config=captions)
    assert "a local copy of clip: give yours with `--text_encoder`" in card and "--autoencoder" not in card


def test_an_existing_card_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    UViT(MODEL).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_figures_are_not_divided_by_a_distance_of_zero():
    results = {"frechet": 2.0, "frechet_real": 0.0}
    assert describe_figures(results, {"features": "pixels"}) == ["Fréchet distance 2.000"]


def test_a_card_overwrites_nothing(measured_run, tmp_path, monkeypatch, capsys):
    (link := tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for output in (measured_run, link):
        line = refused("card", [measured_run, output], monkeypatch, capsys)
        assert "the output must be a new folder, got " in line
    assert link.is_symlink()


def test_a_card_that_cannot_be_written_is_one_line(measured_run, tmp_path, monkeypatch, capsys):
    line = refused("card", [measured_run, tmp_path / ("n" * 300)], monkeypatch, capsys)
    assert "cannot write to " in line and "File name too long" in line
    (measured_run / "samples" / "step_00000010.png").write_bytes(bytes(100_000))
    before = sorted(tmp_path.iterdir())
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        line = refused("card", [measured_run, tmp_path / "out"], monkeypatch, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "cannot write to " in line and "grid.png: File too large" in line
    assert sorted(tmp_path.iterdir()) == before
