"""Models on a hub: pushed, described and loaded again."""

from __future__ import annotations

import json
import resource
import sys

import pytest
import torch
from hub_server import READER, WRITER, serve_hub
from huggingface_hub import ModelCard
from PIL import Image

import sample
from uvit import Config, UViT, UViTConfig
from uvit.common.cli import run
from uvit.common.errors import InputError
from uvit.config import DataConfig, SampleConfig, TrainConfig, to_json
from uvit.integrations.publish import public_name
from uvit.training.checkpoint import main
from uvit.weights.card import describe_figures, model_card
from uvit.weights.published import PUBLISHED
from uvit.weights.tensors import hash_weights

NAME = "me/digits"
MODEL = UViTConfig(
    img_size=8, patch_size=2, in_chans=1, embed_dim=8, depth=2, num_heads=1, num_classes=3, null_class=True
)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serve_hub(monkeypatch, str(tmp_path / "cache")) as hub:
        yield hub


@pytest.fixture
def login(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)


@pytest.fixture
def run_dir(tmp_path):
    """A run of data in a folder of this machine, measured, with grids and a checkpoint."""
    folder = tmp_path / "My Runs" / "digits"
    torch.manual_seed(0)
    model = UViT(MODEL)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    data = DataConfig(name=str(tmp_path / "My Pictures" / "photos"), class_names=("a", "b", "c"))
    train = TrainConfig(run_dir=str(folder), num_steps=10, label_dropout=0.1)
    config = Config(model=MODEL, data=data, train=train, sample=SampleConfig(num_steps=2, guidance=1.5))
    (folder / "config.json").write_text(to_json(config))
    protocol = {
        "images": "20 drawn",
        "weights": f"EMA of {folder}, step_00000010, hash {hash_weights(model.state_dict())}",
        "reference": f"{tmp_path / 'My Pictures'}/ref.npz: mu and sigma, hash 12",
        "features": "pixels",
    }
    results = {"recognised": 0.5, "frechet": 2.0, "frechet_real": 1.0, "protocol": protocol}
    (folder / "evaluation.json").write_text(json.dumps(results))
    (folder / "samples").mkdir()
    for step in (5, 10):
        Image.new("RGB", (step, step)).save(folder / "samples" / f"step_{step:08d}.png")
    (folder / "checkpoints" / "step_00000010").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000010" / "training_state.pt").write_bytes(b"state")
    return folder


def assert_equal_weights(model, other):
    theirs = other.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


def one_line(arguments, monkeypatch, capsys):
    """Returns the line of the error that a command ends with."""
    monkeypatch.setattr(sys, "argv", ["checkpoint", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        run(main)
    printed = capsys.readouterr().err
    assert exit.value.code == 2 and printed.count("\n") == 1, printed
    return printed


def test_a_backbone_goes_to_the_hub_and_back(hub, login):
    model = UViT(MODEL)
    address = model.push_to_hub(NAME)
    files = hub.repositories[NAME]["main"]
    assert files.keys() - {".gitattributes"} == {"README.md", "config.json", "model.safetensors"}
    assert address.startswith(f"{hub.url}/{NAME}/commit/") and not hub.private[NAME]
    loaded = UViT.from_pretrained(NAME)
    assert loaded.config == MODEL and not loaded.training
    assert_equal_weights(model, loaded)
    assert f'UViT.from_pretrained("{NAME}")' in files["README.md"].decode()


def test_revisions_are_kept_apart(hub, login):
    first, second = UViT(MODEL), UViT(MODEL)
    address = first.push_to_hub(NAME, private=True)
    second.push_to_hub(NAME, revision="longer/training")
    assert hub.private[NAME]
    assert_equal_weights(first, UViT.from_pretrained(NAME))
    assert_equal_weights(first, UViT.from_pretrained(NAME, revision=address.rpartition("/")[2]))
    assert_equal_weights(second, UViT.from_pretrained(NAME, revision="longer/training"))
    assert_equal_weights(second, UViT.from_pretrained(f"{NAME}@longer/training"))
    with pytest.raises(InputError, match=r"'me/digits@v2' .* cannot be fetched from the hub: it has no such revision"):
        UViT.from_pretrained(NAME, revision="v2")
    for wrong in ("", "..", "/etc", "a/../b", "a b"):
        with pytest.raises(InputError, match=r"a revision must be a branch|not found"):
            UViT.from_pretrained(NAME, revision=wrong)


def test_what_was_fetched_once_loads_without_the_hub(hub, login, monkeypatch):
    model = UViT(MODEL)
    model.push_to_hub(NAME)
    UViT.from_pretrained(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_equal_weights(model, UViT.from_pretrained(NAME))


def test_a_private_model_loads_with_a_token_from_a_cache_of_ones_own(hub, tmp_path):
    model = UViT(MODEL)
    model.push_to_hub(NAME, private=True, token=WRITER)
    with pytest.raises(InputError, match="there is no such repository, or it is private"):
        UViT.from_pretrained(NAME)
    own = tmp_path / "own"
    assert_equal_weights(model, UViT.from_pretrained(NAME, token=READER, cache_dir=own))
    assert_equal_weights(model, UViT.from_pretrained(NAME, cache_dir=own, local_files_only=True))
    with pytest.raises(InputError, match="cannot be fetched from the hub: Cannot find an appropriate cached snapshot"):
        UViT.from_pretrained(NAME, token=READER, local_files_only=True)


def test_a_revision_of_a_folder_is_refused(run_dir):
    with pytest.raises(InputError, match="revision must be None for what is on disk, got 'v1' for "):
        UViT.from_pretrained(run_dir, revision="v1")


def test_a_run_is_published_by_one_command_and_drawn_from(hub, login, run_dir, tmp_path, capsys):
    main(["push", str(run_dir), NAME])
    assert f"{hub.url}/{NAME}/commit/" in capsys.readouterr().out
    files = hub.repositories[NAME]["main"]
    assert files.keys() - {".gitattributes"} == {"README.md", "config.json", "model.safetensors", "grid.png"}
    assert files["grid.png"] == (run_dir / "samples" / "step_00000010.png").read_bytes()
    assert_equal_weights(UViT.from_pretrained(run_dir), UViT.from_pretrained(NAME))
    pictures = {}
    for checkpoint in (str(run_dir), NAME, f"{NAME}@main"):
        sample.main(["--checkpoint", checkpoint, "--num_per_class", "1", "--output", str(tmp_path / "grid.png")])
        pictures[checkpoint] = (tmp_path / "grid.png").read_bytes()
    assert len({*pictures.values()}) == 1


def test_nothing_that_is_published_names_a_folder_of_this_machine(run_dir, tmp_path):
    main(["card", str(run_dir), str(tmp_path / "out")])
    for name in ("README.md", "config.json"):
        text = (tmp_path / "out" / name).read_text()
        assert str(tmp_path) not in text and "My " not in text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["data"]["name"] == "./photos"


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("uoft-cs/cifar10", "uoft-cs/cifar10"),
        ("CompVis/stable-diffusion-v1-4/vae, hash 1", "CompVis/stable-diffusion-v1-4/vae, hash 1"),
        ("/home/John Smith/a, b/photos", "./photos"),
        ("../secret/photos", "./photos"),
        ("~john/secret/photos", "./photos"),
        ("C:\\Users\\John\\photos", "./photos"),
        ("train part of /home/me/photos: 3 images", "train part of ./photos: 3 images"),
        ("data/x, split train: 3 images, centre crops of 8x8", "data/x, split train: 3 images, centre crops of 8x8"),
        ("svm on the pixels of 9 training images", "svm on the pixels of 9 training images"),
    ],
)
def test_names_lose_their_folders(text, public):
    assert public_name(text) == public


def test_a_folder_that_is_there_loses_those_above_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "client" / "photos").mkdir(parents=True)
    assert public_name("client/photos") == "./photos" and public_name("client/other") == "client/other"


def test_the_card_tells_recipe_figures_and_how_to_load(run_dir, tmp_path):
    main(["card", str(run_dir), str(tmp_path / "out"), "--name", NAME])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "frechet": 2.0,
        "recognised": 0.5,
    }
    assert card.data.library_name == "uvit" and "class-conditional-image-generation" in card.data.tags
    for text in (
        f'model = UViT.from_pretrained("{NAME}")\noutput = model(x, timesteps, y)',
        f"python sample.py --checkpoint {NAME}",
        "![samples](grid.png)\n\nDrawn at step 10 of the training.",
        "| optimizer | adamw, learning rate 0.0002",
        "- Fréchet distance 2.00 x real (2.000 against 1.000)",
        "| reference | ./ref.npz: mu and sigma, hash 12 |",
        '3 classes, one label for "no label"',
    ):
        assert text in card.text


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_lines_of_a_card_run(name):
    """What a card says to call has the names of what the backbone takes."""
    model = PUBLISHED[name]
    card = ModelCard(model_card(model, 1, name="user/model"))
    lines = card.text.partition("```python\n")[2].partition("\n```")[0].splitlines()
    assert len(lines) == 3
    small = UViT(model, embed_dim=8, depth=2, num_heads=1)
    x = torch.zeros(1, model.in_chans, *model.image_shape)
    given = {"model": small, "x": x, "timesteps": torch.zeros(1), "y": torch.zeros(1, dtype=torch.long)}
    given["context"] = torch.zeros(1, model.num_context_tokens, model.context_dim)
    exec(lines[2], given)
    assert given["output"].shape == x.shape


def test_a_card_says_which_encoders_are_not_on_the_hub():
    latent = Config(model=MODEL, data=DataConfig(autoencoder="./vae"))
    assert "a local copy of vae: give yours with `--autoencoder`" in model_card(MODEL, 1, config=latent)
    text = UViTConfig(context_dim=8, num_context_tokens=4)
    captions = Config(model=text, data=DataConfig(text_encoder="./clip", autoencoder="user/model/vae"))
    card = model_card(text, 1, config=captions)
    assert "a local copy of clip: give yours with `--text_encoder`" in card and "--autoencoder" not in card


def test_a_card_that_is_there_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    UViT(MODEL).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_weights_alone_are_published_too(hub, login, tmp_path):
    UViT(MODEL).save_pretrained(tmp_path / "bare")
    main(["push", str(tmp_path / "bare"), NAME, "--private", "True", "--revision", "v1"])
    assert hub.private[NAME] and UViT.from_pretrained(NAME, revision="v1").config == MODEL
    assert "config.json" not in hub.repositories[NAME]["main"]


def test_a_private_push_does_not_go_to_a_public_model(hub, login, run_dir, monkeypatch, capsys):
    UViT(MODEL).push_to_hub(NAME)
    before = hub.repositories[NAME]["main"]
    line = one_line(["push", run_dir, NAME, "--private", "True"], monkeypatch, capsys)
    assert "cannot push 'me/digits' to the hub: private must be None or False for a repository that is public" in line
    assert hub.repositories[NAME]["main"] == before
    hub.private[NAME] = True
    main(["push", str(run_dir), NAME, "--private", "True"])
    assert hub.repositories[NAME]["main"] != before


def test_a_name_that_is_not_there_is_one_line(hub, tmp_path, monkeypatch, capsys):
    line = one_line(["card", "me/nothing", tmp_path / "out"], monkeypatch, capsys)
    assert "'me/nothing' is not a folder on disk, and cannot be fetched from the hub: there is no such" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        (None, NAME, "pushing to 'me/digits' needs a login to the hub, got none: run `hf auth login`"),
        ("hf_stale", NAME, "cannot push 'me/digits' to the hub: the hub does not know this login"),
        (READER, NAME, "cannot push 'me/digits' to the hub: this login has no permission for it"),
        (WRITER, "digits", "the name on the hub must be USER/MODEL, got 'digits'"),
        (WRITER, "me/my digits", "cannot push 'me/my digits' to the hub: Repo id must"),
    ],
)
def test_a_push_that_is_refused_is_one_line(token, name, message, hub, run_dir, monkeypatch, capsys):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert message in one_line(["push", run_dir, name], monkeypatch, capsys)
    assert not hub.repositories


def test_a_push_to_what_is_no_branch_makes_no_repository(hub, login, run_dir, monkeypatch, capsys):
    expected = "a revision must be a branch, tag or commit of the hub's, got 'a..b'"
    assert expected in one_line(["push", run_dir, NAME, "--revision", "a..b"], monkeypatch, capsys)
    assert not hub.repositories


def test_no_way_to_the_hub_is_one_line(login, run_dir, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "cannot push 'me/digits' to the hub: " in one_line(["push", run_dir, NAME], monkeypatch, capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frechet": "low"}, "must hold figures and their protocol, as evaluate.py saves them"),
        ({"recognised": None}, "must hold figures and their protocol, as evaluate.py saves them"),
        ({"recognised": [0.5]}, "must hold figures and their protocol, as evaluate.py saves them"),
        ({"kid": 0.5}, "must hold figures and their protocol, as evaluate.py saves them"),
        ({"protocol": None}, "must hold figures and their protocol, as evaluate.py saves them"),
        (
            {"weights": 1.0, "protocol": {"reference": "", "features": ""}},
            "must hold figures and their protocol, as evaluate.py saves them",
        ),
        (
            {"protocol": {"weights": {}, "reference": "", "features": ""}},
            "must hold figures and their protocol, as evaluate.py saves them",
        ),
        ({"protocol": {"weights": "hash 1", "reference": "", "features": ""}}, "holds figures of other weights than"),
    ],
)
def test_figures_that_are_not_those_of_the_weights_are_refused(change, message, run_dir, tmp_path, monkeypatch, capsys):
    path = run_dir / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert message in one_line(["card", run_dir, tmp_path / "out"], monkeypatch, capsys)
    assert not (tmp_path / "out").exists()


def test_real_images_that_do_not_differ_are_no_measure():
    results = {"frechet": 2.0, "frechet_real": 0.0}
    assert describe_figures(results, {"features": "pixels"}) == ["Fréchet distance 2.000"]


def test_a_card_overwrites_nothing(run_dir, tmp_path, monkeypatch, capsys):
    (link := tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for output in (run_dir, link):
        line = one_line(["card", run_dir, output], monkeypatch, capsys)
        assert "the output must be a new folder, got " in line
    assert link.is_symlink()


def test_a_card_that_cannot_be_written_is_one_line(run_dir, tmp_path, monkeypatch, capsys):
    line = one_line(["card", run_dir, tmp_path / ("n" * 300)], monkeypatch, capsys)
    assert "cannot write to " in line and "File name too long" in line
    (run_dir / "samples" / "step_00000010.png").write_bytes(bytes(100_000))
    before = sorted(tmp_path.iterdir())
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        line = one_line(["card", run_dir, tmp_path / "out"], monkeypatch, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "cannot write to " in line and "grid.png: File too large" in line
    assert sorted(tmp_path.iterdir()) == before
