from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.images import DIGITS, save_folder
from PIL import Image

from uvit.commands import evaluate, sample, train
from uvit.evaluation.features import TimmFeatures


@pytest.mark.usefixtures("trained_on_text")
def test_evaluate_draws_captions_of_every_class(workdir, capsys):
    evaluate.main("--checkpoint runs/text --num_images 20 --steps 2".split())
    printed = capsys.readouterr().out
    assert "images 20 drawn, 10 different captions of the reference" in printed and "recognised " in printed


def test_evaluate_prints_two_figures_and_the_protocol(workdir, capsys):
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


def figures(arguments, output="figures.json"):
    evaluate.main([*arguments.split(), "--output", output])
    return json.loads(Path(output).read_text())


def test_a_checkpoint_and_its_saved_images_measure_alike(workdir):
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


def test_labels_at_random(workdir):
    found = figures("--checkpoint runs/tiny --num_images 33 --label_mode random --steps 1")
    assert found["protocol"]["images"].startswith("33 drawn, labels at random, hash ") and "recognised" in found


def test_data_with_one_part_have_no_distance_of_real_images(workdir, tmp_path):
    save_folder(tmp_path / "photos", classes=DIGITS, count=2)
    overrides = ["--data.name", str(tmp_path / "photos"), "--train.sample_every", "0", "--train.tracker", "none"]
    train.main(["tiny.py", *overrides, "--train.run_dir", str(tmp_path / "run")])
    found = figures(f"--checkpoint {tmp_path}/run --num_images 20 --steps 1 --reference train")
    assert found["frechet"] > 0 and "recognised" in found and "frechet_real" not in found


def test_a_folder_has_no_distance_to_itself(workdir, tmp_path):
    save_folder(tmp_path / "photos", count=8)
    found = figures(f"--images {tmp_path}/photos --reference {tmp_path}/photos --features pixels")
    assert found["frechet"] == pytest.approx(0, abs=1e-6)
    images, reference = (found["protocol"][name] for name in ("images", "reference"))
    name, _, same = images.partition(", hash ")
    assert name == f"16 of {tmp_path}/photos"
    assert reference == f"{tmp_path}/photos, split train: 16 images, centre crops of 16x24, hash {same}"


def test_figures_are_saved_beside_the_images(workdir, tmp_path):
    save_folder(tmp_path / "photos", count=4)
    shared = ["--reference", f"{tmp_path}/photos", "--features", "pixels"]
    evaluate.main(["--images", f"{tmp_path}/photos", *shared])
    assert "frechet" in json.loads((tmp_path / "photos.evaluation.json").read_text())
    assert not list((tmp_path / "photos").glob("*.json"))


def test_a_reference_is_cropped_at_the_centre_even_if_training_crops_at_random(workdir, tmp_path):
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


def test_inception_gives_three_figures(workdir, inception, tmp_path, capsys):
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


def test_any_timm_model_can_classify(workdir, vit, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    network = TimmFeatures("test_vit", str(vit), classify=True)
    labels = network(torch.from_numpy(images).permute(0, 3, 1, 2))[0].argmax(1).numpy()
    labels[:2] = labels[:2] + 1
    np.savez(tmp_path / "six.npz", arr_0=images, arr_1=labels)
    shared = f"--features timm:test_vit --feature_weights {vit} --classifier timm:test_vit --classifier_weights {vit}"
    found = figures(f"--images {tmp_path}/six.npz --reference {tmp_path}/six.npz {shared}")
    assert found["recognised"] == pytest.approx(4 / 6) and found["frechet"] == pytest.approx(0, abs=1e-3)
