"""Runs as folders that anyone may see, and on a hub: pushed, and loaded again."""

from __future__ import annotations

import json

import pytest
from helpers.commands import refused
from helpers.hub_server import READER, WRITER
from helpers.measured_run import MODEL, NAME
from helpers.same_runs import assert_equal_weights

from uvit import UViT
from uvit.commands import card, push, sample
from uvit.integrations.publish import public_name


def test_a_run_is_published_by_one_command_and_drawn_from(hub, logged_in, measured_run, tmp_path, capsys):
    push.main([str(measured_run), NAME])
    assert f"{hub.url}/{NAME}/commit/" in capsys.readouterr().out
    files = hub.repositories[NAME]["main"]
    assert files.keys() - {".gitattributes"} == {"README.md", "config.json", "model.safetensors", "grid.png"}
    assert files["grid.png"] == (measured_run / "samples" / "step_00000010.png").read_bytes()
    assert_equal_weights(UViT.from_pretrained(measured_run), UViT.from_pretrained(NAME))
    pictures = {}
    for checkpoint in (str(measured_run), NAME, f"{NAME}@main"):
        sample.main(["--checkpoint", checkpoint, "--num_per_class", "1", "--output", str(tmp_path / "grid.png")])
        pictures[checkpoint] = (tmp_path / "grid.png").read_bytes()
    assert len({*pictures.values()}) == 1


def test_nothing_that_is_published_names_a_folder_of_this_machine(measured_run, tmp_path):
    card.main([str(measured_run), str(tmp_path / "out")])
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
        (
            "w = 2 (the paper's s = 1) away from /home/me/bad run, hash 1",
            "w = 2 (the paper's s = 1) away from ./bad run, hash 1",
        ),
        ("svm on the pixels of 9 training images", "svm on the pixels of 9 training images"),
    ],
)
def test_public_names_have_no_folders(text, public):
    assert public_name(text) == public


def test_an_existing_folder_is_named_without_its_parents(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "client" / "photos").mkdir(parents=True)
    assert public_name("client/photos") == "./photos" and public_name("client/other") == "client/other"


def test_a_folder_of_weights_is_published(hub, logged_in, tmp_path):
    UViT(MODEL).save_pretrained(tmp_path / "bare")
    push.main([str(tmp_path / "bare"), NAME, "--private", "True", "--revision", "v1"])
    assert hub.private[NAME] and UViT.from_pretrained(NAME, revision="v1").config == MODEL
    assert "config.json" not in hub.repositories[NAME]["main"]


def test_a_private_push_does_not_go_to_a_public_model(hub, logged_in, measured_run, monkeypatch, capsys):
    UViT(MODEL).push_to_hub(NAME)
    before = hub.repositories[NAME]["main"]
    line = refused("push", [measured_run, NAME, "--private", "True"], monkeypatch, capsys)
    assert "cannot push 'me/digits' to the hub: private must be None or False for a repository that is public" in line
    assert hub.repositories[NAME]["main"] == before
    hub.private[NAME] = True
    push.main([str(measured_run), NAME, "--private", "True"])
    assert hub.repositories[NAME]["main"] != before


def test_an_unknown_name_is_one_line(hub, tmp_path, monkeypatch, capsys):
    line = refused("card", ["me/nothing", tmp_path / "out"], monkeypatch, capsys)
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
def test_a_push_that_is_refused_is_one_line(token, name, message, hub, measured_run, monkeypatch, capsys):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert message in refused("push", [measured_run, name], monkeypatch, capsys)
    assert not hub.repositories


def test_a_push_to_an_invalid_branch_creates_no_repository(hub, logged_in, measured_run, monkeypatch, capsys):
    expected = "a revision must be a branch, tag or commit of the hub's, got 'a..b'"
    assert expected in refused("push", [measured_run, NAME, "--revision", "a..b"], monkeypatch, capsys)
    assert not hub.repositories


def test_no_way_to_the_hub_is_one_line(logged_in, measured_run, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "cannot push 'me/digits' to the hub: " in refused("push", [measured_run, NAME], monkeypatch, capsys)


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
def test_figures_of_other_weights_are_refused(change, message, measured_run, tmp_path, monkeypatch, capsys):
    path = measured_run / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert message in refused("card", [measured_run, tmp_path / "out"], monkeypatch, capsys)
    assert not (tmp_path / "out").exists()
