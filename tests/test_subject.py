from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.images import DIGITS, save_captions, save_folder

from uvit import Config, UViT, UViTConfig
from uvit.common.errors import InputError
from uvit.config import DataConfig
from uvit.data.batch import read_all
from uvit.evaluation.features import build_features
from uvit.evaluation.metrics import Gaussian, Moments, save_statistics
from uvit.evaluation.subject import (
    DrawnImages,
    choose_conditions,
    find_images,
    find_other_part,
    find_own_part,
    find_reference,
)
from uvit.networks.encoders import NO_ENCODERS

MODEL = UViTConfig(img_size=8, in_chans=1, embed_dim=8, depth=2, num_heads=1, num_classes=10)
PIXELS = build_features("pixels", None, (1, 8, 8))


def run_of(**data):
    """A run of such data, without training."""
    config = Config(model=MODEL, data=DataConfig(**data))
    return DrawnImages(name="runs/x", config=config, model=UViT(MODEL), encoders=NO_ENCODERS)


def test_given_images(tmp_path):
    save_folder(tmp_path / "photos")
    given = find_images(str(tmp_path / "photos"), "train")
    assert (given.shape, given.num_classes, len(given.data)) == ((3, 16, 24), 2, 6)


def test_drawn_images():
    run = run_of()
    assert (run.shape, run.num_classes) == ((1, 8, 8), 10)


def test_the_parts_of_a_runs_data():
    run = run_of()
    train, test = find_own_part(run, "train"), find_own_part(run, "test")
    assert (len(train), len(test)) == (1437, 360)
    assert len(find_other_part(run, "test")) == 1437 and len(find_other_part(run, "train")) == 360
    assert find_other_part(run, "digits") is None
    assert len(find_reference(run, "test", "train", None, "pixels", PIXELS)) == 360


def test_data_with_one_part_has_no_other(tmp_path):
    save_folder(tmp_path / "photos", DIGITS, count=2)
    run = run_of(name=str(tmp_path / "photos"))
    assert len(find_own_part(run, "train")) == 20 and find_other_part(run, "train") is None
    with pytest.raises(InputError, match=r"; --reference can be the data's other part, a data set or an .npz"):
        find_own_part(run, "test")


def test_a_reference_is_cropped_at_the_centre_even_if_training_crops_at_random(tmp_path):
    save_folder(tmp_path / "photos", DIGITS, count=2)
    parts = (find_own_part(run_of(name=str(tmp_path / "photos"), crop=crop), "train") for crop in ("center", "random"))
    first, second = (read_all(part).images for part in parts)
    assert torch.equal(first, second)


def test_latents_are_refused_as_reference():
    with pytest.raises(InputError, match=r"--reference 'test' of 'latents' is latents: give a data set or an .npz"):
        find_own_part(run_of(name="latents", autoencoder="vae"), "test")
    assert find_other_part(run_of(name="latents", autoencoder="vae"), "test") is None


def test_statistics_and_other_data_are_references(tmp_path):
    gaussian = Moments(64).update(torch.randn(80, 64)).gaussian
    save_statistics(tmp_path / "ref.npz", gaussian, features="pixels", image_size=(8, 8))
    found = find_reference(run_of(), str(tmp_path / "ref.npz"), "train", None, "pixels", PIXELS)
    assert isinstance(found, Gaussian) and found.hash == gaussian.hash
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((3, 8, 8, 1), np.uint8))
    assert len(find_reference(run_of(), str(tmp_path / "images.npz"), "train", None, "pixels", PIXELS)) == 3


def test_conditions_are_labels_captions_or_nothing(tmp_path):
    run = run_of()
    labels = [label for label in range(10) for _ in range(2)]
    assert choose_conditions(run, None, "ref.npz", 20, "balanced", 0) == (labels, labels)
    plain = DrawnImages(name="x", config=Config(), model=UViT(MODEL), encoders=NO_ENCODERS)
    assert choose_conditions(plain, None, "ref.npz", 3, "balanced", 0) == ([None] * 3, None)
    text = Config(model=UViTConfig(img_size=8, in_chans=1, context_dim=2, num_context_tokens=1))
    text_run = DrawnImages(name="x", config=text, model=UViT(MODEL), encoders=NO_ENCODERS)
    name = save_captions(tmp_path / "some", ["a", "b", "c"]).name
    captioned = find_reference(text_run, name, "train", "text", "pixels", PIXELS)
    assert choose_conditions(text_run, captioned, name, 4, "balanced", 0) == (["a", "b", "c", "a"], None)
    with pytest.raises(InputError, match=r"draws the captions of a reference data set, got statistics 'ref.npz'"):
        choose_conditions(text_run, None, "ref.npz", 3, "balanced", 0)
