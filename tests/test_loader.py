from __future__ import annotations

import itertools
import sys

import datasets
import pytest
import torch
from helpers.images import save_captions, save_folder
from PIL import Image

from uvit import Config, UViTConfig
from uvit.common.cli import run
from uvit.common.errors import InputError
from uvit.common.signals import kill_workers
from uvit.config import DataConfig, TrainConfig
from uvit.data.loader import StepSampler, build_loader, load_data

DIGITS = UViTConfig(img_size=8, in_chans=1, num_classes=10)


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


def test_random_keys_depend_on_batch_and_process():
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
        images, labels, captions, *_ = next(batches)
        assert captions == [[f"a handwritten {data.class_names[label]}"] for label in labels]
        assert torch.equal(images, data.images[indices]) and torch.equal(labels, data.labels[indices])


def test_a_batch_that_is_not_divisible_by_the_processes_is_refused():
    config = Config(model=DIGITS, train=TrainConfig(batch_size=6))
    with pytest.raises(InputError, match="divisible by 4 processes, got 6"):
        build_loader(load_data(config.data, config.model), config, 0, 0, 4, False)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_in_a_worker_is_one_line_too(num_workers, tmp_path, monkeypatch, capsys):
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
    kill_workers()  # as at the end of a command


def test_broken_items_are_replaced_by_others(tmp_path):
    save_folder(tmp_path / "broken")
    (tmp_path / "broken" / "cat" / "1.png").write_bytes(b"not an image")
    model = UViTConfig(img_size=8, num_classes=2)
    data_config = DataConfig(name=str(tmp_path / "broken"), on_error="skip")
    config = Config(model=model, data=data_config, train=TrainConfig(batch_size=6))
    batches = build_loader(load_data(data_config, model), config, 0, 0, 1, False)
    for batch in itertools.islice(batches, 3):
        assert batch.images.shape == (6, 3, 8, 8) and any("cat/1.png) cannot be read" in line for line in batch.skipped)
        assert (batch.images[:, 0, 0, 0] == 200 * batch.labels).all()  # what stands in comes with its own label
    for file in (tmp_path / "broken").rglob("*.png"):
        file.write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"too many broken images, \d+ for one batch, the last: image \d"):
        next(iter(build_loader(load_data(data_config, model), config, 0, 0, 1, False)))


def test_one_of_several_captions_is_drawn(tmp_path):
    name = save_captions(tmp_path / "some", [["a", "b", "c"]] * 4).name
    model = UViTConfig(img_size=8, in_chans=1, context_dim=8, num_context_tokens=4)
    config = Config(model=model, data=DataConfig(name=name, caption_column="text"), train=TrainConfig(batch_size=4))

    def drawn(start, count):
        batches = build_loader(load_data(config.data, model), config, start, 0, 1, False)
        return [[caption for (caption,) in batch.captions] for batch in itertools.islice(batches, count)]

    whole = drawn(0, 10)
    assert {caption for batch in whole for caption in batch} == {"a", "b", "c"}
    assert drawn(4, 6) == whole[4:]
