from __future__ import annotations

import itertools
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from uvit import Config, UViTConfig
from uvit.cli import run
from uvit.config import DataConfig, TrainConfig
from uvit.data import StepSampler, build_loader, load_data, random_flip, read_all, to_uint8, to_unit_range
from uvit.errors import InputError

RNG = np.random.default_rng(0)
DIGITS = UViTConfig(img_size=8, in_chans=1, num_classes=10)
RGB = UViTConfig(img_size=(8, 12), in_chans=3, num_classes=2)


def test_digits_are_split_once_and_for_all():
    train, held_out = (load_data(DataConfig(), DIGITS, train=part) for part in (True, False))
    assert (len(train), len(held_out)) == (1437, 360)
    (images, labels, captions), (other, other_labels, _) = (read_all(part) for part in (train, held_out))
    assert images.dtype == torch.uint8 and images.shape[1:] == (1, 8, 8)
    assert (images.min(), images.max()) == (0, 255)
    assert torch.bincount(other_labels).min() >= 34
    assert captions[0] == f"a handwritten {train.class_names[labels[0]]}" and len(captions) == 1437
    # together they are scikit-learn's whole set: 17 grey levels, undone by the same factor
    from sklearn.datasets import load_digits

    whole = torch.cat([images, other]).double().flatten(1) * 16 / 255
    expected = load_digits()
    assert sorted(whole.round().sum(1).tolist()) == sorted(expected.data.sum(1).tolist())
    assert torch.bincount(torch.cat([labels, other_labels])).tolist() == np.bincount(expected.target).tolist()


def save_folder(root, classes=("cat", "dog"), count=3):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.new("RGB", (24, 16), (number * 200, index, 7)).save(root / name / f"{index}.png")


def test_a_folder_of_images_a_class(tmp_path):
    save_folder(tmp_path / "photos")
    data = load_data(DataConfig(name=str(tmp_path / "photos")), RGB)
    images, labels, captions = data.read([0, 5], RNG)
    assert data.class_names == ("cat", "dog") and len(data) == 6
    assert images.shape == (2, 3, 8, 12) and labels.tolist() == [0, 1]
    assert images[1, 0].unique().tolist() == [200] and captions == []


def test_a_saved_data_set_and_grey_models(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    rows = datasets.Dataset.from_dict({"img": [Image.fromarray(pixels)] * 4, "label": [0, 1, 0, 1]}, features)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    data = load_data(DataConfig(name=str(tmp_path / "saved")), UViTConfig(img_size=8, in_chans=1, num_classes=2))
    images, labels, _ = data.read([1], RNG)
    assert torch.equal(images[0, 0], torch.from_numpy(pixels)) and labels.tolist() == [1]


TEXT = UViTConfig(img_size=8, in_chans=1, context_dim=8, num_context_tokens=4)


def save_captions(folder, captions, **columns):
    rows = {"img": [Image.new("L", (8, 8))] * len(captions), "file": ["x"] * len(captions), "text": captions, **columns}
    datasets.Dataset.from_dict(rows).cast_column("img", datasets.Image()).save_to_disk(folder)
    return DataConfig(name=str(folder), caption_column="text")


def test_captions(tmp_path):
    data = load_data(save_captions(tmp_path / "one", ["a cat", "a dog"]), TEXT)
    assert data.read([1, 0], RNG).captions == ["a dog", "a cat"]
    data = load_data(save_captions(tmp_path / "some", [["a", "b", "c"]] * 2), TEXT)
    drawn = [data.read([0, 1], np.random.default_rng((0, step))).captions for step in range(20)]
    assert {caption for pair in drawn for caption in pair} == {"a", "b", "c"}
    assert drawn == [data.read([0, 1], np.random.default_rng((0, step))).captions for step in range(20)]
    first = load_data(DataConfig(name=str(tmp_path / "one")), TEXT)  # unnamed, the first column of text
    assert first.read([0], RNG).captions == ["x"]


def test_bad_captions(tmp_path):
    config = save_captions(tmp_path / "gap", [["a cat"], None, [], ["a", None]])
    for index, found in ((1, "None"), (2, r"\[\]"), (3, r"\['a', None\]")):
        with pytest.raises(InputError, match=f"image {index} of the data must have a caption, got {found}"):
            load_data(config, TEXT).read([0, index], RNG)
    with pytest.raises(InputError, match="must have a column 'img' of captions, got columns img, file, text"):
        load_data(DataConfig(name=config.name, caption_column="img"), TEXT)
    save_folder(tmp_path / "photos")
    with pytest.raises(InputError, match="must have a column of captions, got columns image, label"):
        load_data(DataConfig(name=str(tmp_path / "photos")), TEXT)
    with pytest.raises(InputError, match=r"has images, got a model of latents \(autoencoder 'a/b'\)"):
        load_data(DataConfig(name=config.name, autoencoder="a/b"), TEXT)


def test_bad_data(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"data folder .*empty is empty"):
        load_data(DataConfig(name=str(tmp_path / "empty")), RGB)
    save_folder(tmp_path / "three", classes=("a", "b", "c"))
    with pytest.raises(InputError, match=r"num_classes must be 3 for data .*, got 2"):
        load_data(DataConfig(name=str(tmp_path / "three")), RGB)
    with pytest.raises(InputError, match=r"in_chans must be 1 \(grey\) or 3 \(RGB\) for images, got 4"):
        load_data(DataConfig(name=str(tmp_path / "three")), UViTConfig(in_chans=4))
    with pytest.raises(InputError, match="digits are 1x8x8 images, got a model for 1x16x16"):
        load_data(DataConfig(), UViTConfig(img_size=16, in_chans=1))
    with pytest.raises(InputError, match="num_classes must be 10 for data 'digits', got 7"):
        load_data(DataConfig(), UViTConfig(img_size=8, in_chans=1, num_classes=7))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(InputError, match="must have a column of images, got columns x, y"):
        load_data(DataConfig(name=str(tmp_path / "text")), RGB)


def test_broken_rows_name_themselves(tmp_path):
    save_folder(tmp_path / "broken")
    (tmp_path / "broken" / "cat" / "1.png").write_bytes(b"not an image")
    data = load_data(DataConfig(name=str(tmp_path / "broken")), RGB)
    with pytest.raises(InputError, match=r"image 1 of the data \(.*cat/1.png\) cannot be read"):
        data.read([0, 1], RNG)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_row_is_one_line_from_a_worker_too(num_workers, tmp_path, monkeypatch, capsys):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"img": [Image.new("L", (8, 8))] * 2, "label": [0, -1]}, features)
    rows.save_to_disk(tmp_path / "saved")
    model = UViTConfig(img_size=8, in_chans=1, num_classes=2)
    config = Config(model=model, data=DataConfig(name=str(tmp_path / "saved"), num_workers=num_workers))

    def read(arguments):
        next(iter(build_loader(load_data(config.data, model), config, 0, 0, 1, False)))

    monkeypatch.setattr(sys, "argv", ["read"])
    with pytest.raises(SystemExit):
        run(read)
    assert (
        capsys.readouterr().err.splitlines()[-1] == "error: image 1 of the data must have a label of at least 0, got -1"
    )


def draws(sampler, count):
    return list(itertools.islice(sampler, count))


def take(sampler, count):
    return [draw.indices for draw in draws(sampler, count)]


def test_an_epoch_sees_every_item_once():
    batches = take(StepSampler(10, 4, seed=0), 5)
    items = [item for batch in batches for item in batch]
    assert all(len(batch) == 4 for batch in batches)
    assert sorted(items[:10]) == sorted(items[10:]) == list(range(10))
    assert items[:10] != items[10:] != list(range(10))


def test_batches_larger_than_the_data_set():
    (batch,) = take(StepSampler(3, 8, seed=0), 1)
    assert len(batch) == 8 and set(batch) == {0, 1, 2}


def test_the_order_is_computed_from_the_step():
    whole = take(StepSampler(10, 4, seed=3), 9)
    for start in (1, 4, 7):
        assert take(StepSampler(10, 4, seed=3, start=start), 2) == whole[start : start + 2]
    assert take(StepSampler(10, 4, seed=4), 2) != whole[:2]


def test_chance_is_keyed_by_batch_and_process():
    """A resumed run draws the same crops and captions; no two batches share them."""
    whole = draws(StepSampler(10, 4, seed=3), 4)
    assert draws(StepSampler(10, 4, seed=3, start=2), 2) == whole[2:]
    other = draws(StepSampler(10, 4, seed=3, rank=1, world_size=2), 4)
    assert len({draw.key for draw in whole + other}) == 8


def test_processes_share_a_batch():
    whole = take(StepSampler(10, 4, seed=0), 3)
    shares = [take(StepSampler(10, 4, seed=0, rank=rank, world_size=2), 3) for rank in (0, 1)]
    for batch, first, second in zip(whole, *shares):
        assert sorted(batch) == sorted(first + second) and len(first) == len(second) == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_hands_out_the_samplers_batches(num_workers):
    config = Config(model=DIGITS, data=DataConfig(num_workers=num_workers), train=TrainConfig(batch_size=6))
    data = load_data(config.data, config.model)
    batches = iter(build_loader(data, config, start_step=5, rank=0, world_size=1, pin_memory=False))
    for indices in take(StepSampler(len(data), 6, seed=0, start=5), 3):
        images, labels, captions = next(batches)
        assert captions == [data.captions[index] for index in indices]
        assert torch.equal(images, data.images[indices]) and torch.equal(labels, data.labels[indices])


def test_a_batch_that_processes_do_not_divide():
    config = Config(model=DIGITS, train=TrainConfig(batch_size=6))
    with pytest.raises(InputError, match="divisible by 4 processes, got 6"):
        build_loader(load_data(config.data, config.model), config, 0, 0, 4, False)


def test_unit_range_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit_range(levels)), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_random_flip_mirrors_half():
    images = torch.arange(12.0).reshape(1, 1, 3, 4).expand(1000, -1, -1, -1)
    flipped = random_flip(images, torch.Generator().manual_seed(0))
    mirrored = (flipped == images.flip(-1)).all(dim=(1, 2, 3))
    assert torch.equal(flipped[~mirrored], images[~mirrored])
    assert 450 < mirrored.sum() < 550
