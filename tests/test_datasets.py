from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
import torch
from helpers.images import save_captions, save_folder
from PIL import Image

from uvit import UViTConfig
from uvit.common.errors import InputError
from uvit.config import DataConfig
from uvit.data.batch import ImageSpec, read_all
from uvit.data.datasets import load_images
from uvit.data.loader import load_data

RNG = np.random.default_rng(0)
DIGITS = UViTConfig(img_size=8, in_chans=1, num_classes=10)
RGB = UViTConfig(img_size=(8, 12), in_chans=3, num_classes=2)


def test_a_folder_with_a_subfolder_for_each_class(tmp_path):
    save_folder(tmp_path / "photos")
    data = load_data(DataConfig(name=str(tmp_path / "photos")), RGB)
    images, labels, captions, *_ = data.read([0, 5], RNG)
    assert data.class_names == ("cat", "dog") and len(data) == 6
    assert images.shape == (2, 3, 8, 12) and labels.tolist() == [0, 1]
    assert images[1, 0].unique().tolist() == [200] and captions == []


def test_a_saved_data_set_and_grey_models(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    rows = datasets.Dataset.from_dict({"img": [Image.fromarray(pixels)] * 4, "label": [0, 1, 0, 1]}, features)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    data = load_data(DataConfig(name=str(tmp_path / "saved")), UViTConfig(img_size=8, in_chans=1, num_classes=2))
    images, labels, *_ = data.read([1], RNG)
    assert torch.equal(images[0, 0], torch.from_numpy(pixels)) and labels.tolist() == [1]


TEXT = UViTConfig(img_size=8, in_chans=1, context_dim=8, num_context_tokens=4)


def test_captions(tmp_path):
    data = load_data(save_captions(tmp_path / "one", ["a cat", "a dog"]), TEXT)
    assert data.read([1, 0], RNG).captions == [["a dog"], ["a cat"]]
    data = load_data(save_captions(tmp_path / "some", [["a", "b", "c"], ["d"]]), TEXT)
    assert data.read([0, 1], RNG).captions == [["a", "b", "c"], ["d"]]
    usual = load_data(DataConfig(name=str(tmp_path / "one")), TEXT)  # unnamed, the one with a usual name
    assert usual.read([0], RNG).captions == [["a cat"]]


def test_captions_beside_a_folders_images(tmp_path):
    """One each in a metadata.csv, which the library reads as large strings, or several in a metadata.jsonl."""
    for name in ("0.png", "1.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a cat\n1.png,a dog\n")
    assert load_data(DataConfig(name=str(tmp_path)), TEXT).read([0, 1], RNG).captions == [["a cat"], ["a dog"]]
    (tmp_path / "metadata.csv").unlink()
    lines = ({"file_name": name, "captions": [f"{name} {n}" for n in range(5)]} for name in ("0.png", "1.png"))
    (tmp_path / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    captions = load_data(DataConfig(name=str(tmp_path)), TEXT).read([1], RNG).captions
    assert captions == [["1.png 0", "1.png 1", "1.png 2", "1.png 3", "1.png 4"]]


def test_bad_captions(tmp_path):
    config = save_captions(tmp_path / "gap", [["a cat"], None, [], ["a", None]])
    for index, found in ((1, "None"), (2, r"\[\]"), (3, r"\['a', None\]")):
        with pytest.raises(InputError, match=f"image {index} of the data must have a caption, got {found}"):
            load_data(config, TEXT).read([0, index], RNG)
    several = save_captions(tmp_path / "several", ["a"] * 3, caption=["b"] * 3).name
    with pytest.raises(
        InputError, match=r"has several columns of captions, text, caption: choose one by caption_column"
    ):
        load_data(DataConfig(name=several), TEXT)
    with pytest.raises(InputError, match="must have a column 'img' of captions, got columns img, file, text"):
        load_data(DataConfig(name=config.name, caption_column="img"), TEXT)
    save_folder(tmp_path / "photos")
    with pytest.raises(InputError, match=r"photos' must have a caption, got 6 without, such as .*cat/0.png"):
        load_data(DataConfig(name=str(tmp_path / "photos")), TEXT)
    with pytest.raises(InputError, match=r"is not a folder of latents, got data.autoencoder 'a/b'"):
        load_data(DataConfig(name=config.name, autoencoder="a/b"), TEXT)


def test_bad_data(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"data folder .*empty is empty"):
        load_data(DataConfig(name=str(tmp_path / "empty")), RGB)
    save_folder(tmp_path / "three", classes=("a", "b", "c"))
    with pytest.raises(InputError, match=r"num_classes must be 3 for data .*, got 2"):
        load_data(DataConfig(name=str(tmp_path / "three")), RGB)
    with pytest.raises(InputError, match=r"three' can have 1 \(grey\) or 3 \(RGB\) channels, got 4"):
        load_data(DataConfig(name=str(tmp_path / "three")), UViTConfig(in_chans=4))
    with pytest.raises(InputError, match="digits are 1x8x8 images, got a model for 1x16x16"):
        load_data(DataConfig(), UViTConfig(img_size=16, in_chans=1))
    with pytest.raises(InputError, match="num_classes must be 10 for data 'digits', got 7"):
        load_data(DataConfig(), UViTConfig(img_size=8, in_chans=1, num_classes=7))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.csv").write_text("x,y\n1,2\n3,4\n")
    save_folder(tmp_path / "one", classes=("a",), count=1)
    with pytest.raises(InputError, match="must have 2 images or more, got 1"):
        load_data(DataConfig(name=str(tmp_path / "one")), RGB)
    with pytest.raises(InputError, match=r"data 'photos' can have 3 \(RGB\) channels, got 1"):
        load_data(DataConfig(name="photos"), UViTConfig(img_size=32, in_chans=1, num_classes=2))
    with pytest.raises(InputError, match="the held-out part of photos is 427x128, got a model for 256x256 images"):
        load_data(DataConfig(name="photos"), UViTConfig(img_size=256), train=False)
    with pytest.raises(InputError, match="must have a column of images, got columns x, y"):
        load_data(DataConfig(name=str(tmp_path / "text")), RGB)


def test_a_flat_folder_has_no_labels(tmp_path):
    for index in range(3):
        Image.new("RGB", (24, 16), (index, 0, 0)).save(tmp_path / f"{index}.jpg")
    data = load_data(DataConfig(name=str(tmp_path)), UViTConfig(img_size=8))
    assert len(data) == 3 and data.read([0, 2], RNG).images.shape == (2, 3, 8, 8)
    with pytest.raises(InputError, match="must have a folder for each class, got images in none"):
        load_data(DataConfig(name=str(tmp_path)), RGB)


def test_random_crops_follow_the_key(tmp_path):
    save_folder(tmp_path / "photos")
    Image.fromarray(RNG.integers(0, 256, (40, 60, 3)).astype(np.uint8)).save(tmp_path / "photos/cat/0.png")
    data = load_data(DataConfig(name=str(tmp_path / "photos"), crop="random"), RGB)
    crops = [data.read([0], np.random.default_rng(key)).images for key in ((0, 1), (0, 1), (0, 2))]
    assert torch.equal(crops[0], crops[1]) and not torch.equal(crops[0], crops[2])


def test_broken_images_can_be_skipped(tmp_path):
    save_folder(tmp_path / "broken")
    (tmp_path / "broken" / "cat" / "1.png").write_bytes(b"not an image")
    data = load_data(DataConfig(name=str(tmp_path / "broken"), on_error="skip"), RGB)
    batch = data.read([0, 1, 5], RNG)
    assert batch.images.shape == (2, 3, 8, 12) and batch.labels.tolist() == [0, 1]
    assert len(batch.skipped) == 1 and "cat/1.png) cannot be read" in batch.skipped[0]


def test_a_broken_image_is_named_in_the_error(tmp_path):
    save_folder(tmp_path / "broken")
    (tmp_path / "broken" / "cat" / "1.png").write_bytes(b"not an image")
    data = load_data(DataConfig(name=str(tmp_path / "broken")), RGB)
    with pytest.raises(InputError, match=r"image 1 of the data \(.*cat/1.png\) cannot be read"):
        data.read([0, 1], RNG)


def test_extreme_and_missing_images_are_named_in_the_error(tmp_path):
    save_folder(tmp_path / "strip")
    Image.new("RGB", (60_000, 1)).save(tmp_path / "strip/cat/1.png")
    data = load_data(DataConfig(name=str(tmp_path / "strip")), RGB)
    with pytest.raises(InputError, match=r"image 1 of the data \(.*cat/1.png\) cannot be read: its 1x60000 pixels"):
        data.read([1], RNG)
    rows = {"img": [Image.new("RGB", (8, 8)), None, Image.new("RGB", (8, 8))]}
    datasets.Dataset.from_dict(rows, datasets.Features({"img": datasets.Image()})).save_to_disk(tmp_path / "gap")
    data = load_data(DataConfig(name=str(tmp_path / "gap")), UViTConfig(img_size=8))
    with pytest.raises(InputError, match="image 1 of the data cannot be read: it is missing"):
        data.read([0, 1], RNG)


def test_images_are_not_cropped_unless_a_shape_is_given(tmp_path):
    """Where no shape is asked for, all must have that of the first."""
    save_folder(tmp_path / "photos")
    as_they_are = ImageSpec(None, labels=None, captions=False)
    data = load_images(DataConfig(name=str(tmp_path / "photos")), as_they_are)
    assert data.shape == (3, 16, 24) and len(read_all(data).images) == 6
    Image.new("RGB", (24, 24)).save(tmp_path / "photos/dog/0.png")
    data = load_images(DataConfig(name=str(tmp_path / "photos")), as_they_are)
    with pytest.raises(
        InputError, match=r"image 3 .*dog/0.png\) cannot be read: it is 24x24, the first image 16x24: exp"
    ):
        read_all(data)
    (tmp_path / "photos/cat/0.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"image 0 of the data \(.*cat/0.png\) cannot be read: not an image"):
        load_images(DataConfig(name=str(tmp_path / "photos")), as_they_are)
