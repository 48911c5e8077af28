from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState

from uvit.common.errors import InputError
from uvit.evaluation.measure import MeasureArguments, measure


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"checkpoint": "runs/x"}, "runs/x/evaluation.json"),
        ({"checkpoint": "runs/x", "output": "out.json"}, "out.json"),
        ({"checkpoint": "user/model"}, "evaluation.json"),
        ({"checkpoint": "weights.pth"}, "weights.pth.evaluation.json"),
        ({"images": "photos", "reference": "digits"}, "photos.evaluation.json"),
        ({"images": "photos/", "reference": "digits"}, "photos.evaluation.json"),
        ({"images": "user/data", "reference": "digits"}, "evaluation.json"),
    ],
)
def test_the_file_of_the_figures_is_beside_the_images(given, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/x", "photos"):
        Path(folder).mkdir(parents=True)
    Path("weights.pth").touch()
    assert MeasureArguments(**given).output_file == Path(path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give --checkpoint or --images, got neither"),
        ({"checkpoint": "x", "images": "y"}, "give --checkpoint or --images, got both"),
        ({"images": "y"}, "--reference 'test' needs --checkpoint"),
        ({"images": "y", "reference": "z", "seed": 3}, "--seed is for images to draw from a --checkpoint, got 3"),
        ({"images": "y", "reference": "z", "label_mode": "random"}, "--label_mode is for images to draw"),
        ({"checkpoint": "x", "num_images": 1}, "num_images must be at least 2, got 1"),
    ],
)
def test_contradictory_arguments_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        MeasureArguments(**given)


def save_images(path, count, classes=0, seed=0):
    rng = np.random.default_rng(seed)
    labels = {"arr_1": np.arange(count) % classes} if classes else {}
    np.savez(path, arr_0=rng.integers(0, 256, (count, 4, 4, 1)).astype(np.uint8), **labels)
    return str(path)


def test_figures_are_finite_and_their_protocol_is_text(tmp_path):
    images, reference = save_images(tmp_path / "a.npz", 40), save_images(tmp_path / "b.npz", 40, seed=1)
    figures, protocol = measure(MeasureArguments(images=images, reference=reference), PartialState())
    assert figures.keys() == {"frechet"} and 0 < figures["frechet"] < 100
    assert all(isinstance(value, str) for value in protocol.values()) and json.dumps(protocol)
    assert protocol["features"] == "pixels" and protocol["classifier"] == "none"
    assert protocol["images"].startswith(f"40 of {images}, hash ")
    again, _ = measure(MeasureArguments(images=images, reference=images), PartialState())
    assert again["frechet"] == pytest.approx(0, abs=1e-6)


def test_few_images_give_a_warning(tmp_path, capsys):
    images = save_images(tmp_path / "a.npz", 10)
    measure(MeasureArguments(images=images, reference=images), PartialState())
    assert "warning: 10 images for 16 features: " in capsys.readouterr().err


def test_a_classifier_needs_labels(tmp_path, vit):
    images = save_images(tmp_path / "a.npz", 10)
    given = {"images": images, "reference": images, "classifier": "timm:test_vit", "classifier_weights": str(vit)}
    with pytest.raises(InputError, match=r"a classifier needs labels to recognise, got none of .*a.npz"):
        measure(MeasureArguments(**given), PartialState())
