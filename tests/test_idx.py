from __future__ import annotations

import gzip

import numpy as np
import pytest
from helpers.idx import save_idx, write_idx

from uvit import UViTConfig
from uvit.common.errors import InputError
from uvit.config import DataConfig
from uvit.data.batch import ImageSpec, read_all
from uvit.data.datasets import load_images
from uvit.data.loader import load_data

RNG = np.random.default_rng(0)
GREY = UViTConfig(img_size=(8, 6), in_chans=1, num_classes=10)
ANY = ImageSpec(None, labels=None, captions=None)


@pytest.mark.parametrize("names", ["-{}-ubyte", "-{}-ubyte.gz", ".{}-ubyte", ".{}-ubyte.gz"])
def test_both_parts_are_read_as_they_were_written(names, tmp_path):
    saved = save_idx(tmp_path, 30, 20, (8, 6), names)
    for train, prefix in ((True, "train"), (False, "t10k")):
        images, labels, captions, *_ = read_all(load_data(DataConfig(name=str(tmp_path)), GREY, train))
        assert np.array_equal(images[:, 0], saved[prefix][0]) and images.shape[1:] == (1, 8, 6)
        assert np.array_equal(labels, saved[prefix][1]) and captions == []


def test_items_are_read_in_the_order_asked_for(tmp_path):
    images = save_idx(tmp_path)["train"][0]
    data = load_images(DataConfig(name=str(tmp_path)), ANY)
    batch = data.read([7, 2], RNG)
    assert data.shape == (1, 8, 8) and len(data) == 20
    assert np.array_equal(batch.images[:, 0], images[[7, 2]]) and batch.labels.tolist() == [7, 2]


def test_labels_are_named_by_the_config_or_by_numbers(tmp_path):
    save_idx(tmp_path)
    assert load_images(DataConfig(name=str(tmp_path)), ANY).class_names == tuple("0123456789")
    named = DataConfig(name=str(tmp_path), class_names=tuple("abcdefghijk"))  # the last has no images here
    assert load_images(named, ANY).class_names == tuple("abcdefghijk")
    with pytest.raises(InputError, match=r"idx1-ubyte must be 0 to 2, which data.class_names names, got 9"):
        load_images(DataConfig(name=str(tmp_path), class_names=("a", "b", "c")), ANY)


def test_grey_is_repeated_for_colour_models(tmp_path):
    images, _ = save_idx(tmp_path)["train"]
    data = load_data(DataConfig(name=str(tmp_path)), UViTConfig(img_size=8, in_chans=3, num_classes=10))
    read = data.read([3], RNG).images
    assert data.shape == (3, 8, 8) and np.array_equal(read[0], np.stack([images[3]] * 3))


def test_models_without_labels_need_no_file_of_labels(tmp_path):
    save_idx(tmp_path)
    plain = UViTConfig(img_size=8, in_chans=1)
    assert load_data(DataConfig(name=str(tmp_path)), plain).class_names == ()
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    assert load_images(DataConfig(name=str(tmp_path)), ANY).class_names == ()
    assert read_all(load_data(DataConfig(name=str(tmp_path)), plain)).labels.tolist() == [0] * 20
    with pytest.raises(InputError, match=r"labels of .*train-images-idx3-ubyte must be train-labels-idx1-ubyte, plain"):
        load_data(DataConfig(name=str(tmp_path)), UViTConfig(img_size=8, in_chans=1, num_classes=10))


def test_a_missing_part_is_named(tmp_path):
    save_idx(tmp_path, num_test=0)
    name = str(tmp_path)
    with pytest.raises(InputError, match=r"split 'test' of data .* must be t10k-images-idx3-ubyte, plain or .gz"):
        load_images(DataConfig(name=name), ANY, train=False)
    with pytest.raises(InputError, match=r"split 'val' of data .* must be val-images-idx3-ubyte"):
        load_images(DataConfig(name=name, train_split="val"), ANY)


def test_what_does_not_fit_the_model_is_refused(tmp_path):
    save_idx(tmp_path, size=(8, 6))
    data = DataConfig(name=str(tmp_path))
    with pytest.raises(InputError, match=r"images of data .* are 8x6, got a model for 8x8"):
        load_data(data, UViTConfig(img_size=8, in_chans=1, num_classes=10))
    with pytest.raises(InputError, match=r"can have 1 \(grey\) or 3 \(RGB\) channels, got 4"):
        load_data(data, UViTConfig(img_size=(8, 6), in_chans=4, num_classes=10))
    with pytest.raises(InputError, match=r"num_classes must be 10 for data .*, got 9"):
        load_data(data, UViTConfig(img_size=(8, 6), in_chans=1, num_classes=9))
    with pytest.raises(InputError, match="must have captions, got IDX files"):
        load_data(data, UViTConfig(img_size=(8, 6), in_chans=1, context_dim=8, num_context_tokens=4))


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    save_idx(tmp_path)
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(19, np.uint8))
    with pytest.raises(InputError, match=r"train-labels-idx1-ubyte must have a label for each of 20 images, got 19"):
        load_images(DataConfig(name=str(tmp_path)), ANY)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((1, 8, 8), np.uint8))
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte must have 2 images or more, got 1"):
        load_images(DataConfig(name=str(tmp_path)), ANY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], "must have 20x8x8 bytes after its header, got 1279: copy it again"),
        (lambda content: content + b"!", "must have 20x8x8 bytes after its header, got 1281: copy it again"),
        (lambda content: content[:10], "must have a header of 16 bytes, got 10: copy it again"),
        (lambda content: content[:3], "must begin with 00 00 08 03, .*, got 00 00 08$"),
        (lambda content: b"", "must begin with 00 00 08 03, .*, got an empty file"),
        (lambda content: b"\x89PNG" + content[4:], "must begin with 00 00 08 03, .*, got 89 50 4e 47"),
        (lambda content: content[:3] + b"\1" + content[4:], "must begin with 00 00 08 03, .*, got 00 00 08 01"),
        (lambda content: content[:2] + b"\x0d" + content[3:], "must begin with 00 00 08 03, .*, got 00 00 0d 03"),
        (lambda content: content[:4] + b"\xff" * 12 + content[16:], "must have 4294967295x4294967295x4294967295 bytes"),
        (gzip.compress, "must begin with 00 00 08 03, .*, got 1f 8b"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_broken_files_are_refused(change, message, suffix, tmp_path):
    save_idx(tmp_path, names="-{}-ubyte" + suffix)
    file = tmp_path / f"train-images-idx3-ubyte{suffix}"
    content = change(gzip.decompress(file.read_bytes()) if suffix else file.read_bytes())
    file.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(InputError, match=f"{file.name} {message}"):
        load_images(DataConfig(name=str(tmp_path)), ANY)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-9],
        lambda content: content + b"!",
        lambda content: content[:20] + b"\xff" * 9 + content[29:],
        lambda content: b"plain",
    ],
)
def test_broken_gzip_is_refused(change, tmp_path):
    save_idx(tmp_path, names="-{}-ubyte.gz")
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(InputError, match=r"cannot read .*train-images-idx3-ubyte.gz: "):
        load_images(DataConfig(name=str(tmp_path)), ANY)
