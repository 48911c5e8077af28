from __future__ import annotations

import numpy as np
import pytest
import torch

from uvit import UViTConfig
from uvit.common.errors import InputError
from uvit.config import DataConfig
from uvit.data.batch import ImageSpec, read_all
from uvit.data.datasets import load_images
from uvit.data.loader import load_data

RNG = np.random.default_rng(0)
DIGITS = UViTConfig(img_size=8, in_chans=1, num_classes=10)


def test_the_split_of_digits_is_fixed():
    train, held_out = (load_data(DataConfig(), DIGITS, train=part) for part in (True, False))
    assert (len(train), len(held_out)) == (1437, 360)
    (images, labels, captions, *_), (other, other_labels, *_) = (read_all(part) for part in (train, held_out))
    assert images.dtype == torch.uint8 and images.shape[1:] == (1, 8, 8)
    assert (images.min(), images.max()) == (0, 255)
    assert torch.bincount(other_labels).min() >= 34
    assert captions[0] == (f"a handwritten {train.class_names[labels[0]]}",) and len(captions) == 1437
    # together they are scikit-learn's whole set: 17 grey levels, undone by the same factor
    from sklearn.datasets import load_digits

    whole = torch.cat([images, other]).double().flatten(1) * 16 / 255
    expected = load_digits()
    assert sorted(whole.round().sum(1).tolist()) == sorted(expected.data.sum(1).tolist())
    assert torch.bincount(torch.cat([labels, other_labels])).tolist() == np.bincount(expected.target).tolist()


def test_photos_are_coloured_crops_without_overlap():
    train, held_out = (load_data(DataConfig(name="photos"), UViTConfig(num_classes=2), train=part) for part in (1, 0))
    assert (len(train), len(held_out)) == (4000, 1000) and train.class_names == ("temple", "flower")
    images, labels, captions, *_ = read_all(train)
    assert images.shape == (4000, 3, 32, 32) and labels.bincount().tolist() == [2000, 2000]
    assert captions[1] == ("a photograph of a flower",)
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    for data, first, last in ((train, 0, 512), (held_out, 512, 640)):
        for index in (0, 1, len(data) - 1):
            top, left = data.corners[index]
            crop = photos[index % 2][:, first:last][top : top + 32, left : left + 32]
            assert np.array_equal(data.read([index], RNG).images[0].permute(1, 2, 0), crop)


def test_images_of_an_npz(tmp_path):
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.savez(tmp_path / "a.npz", arr_0=images, arr_1=np.array([3, 1]))
    data = load_images(DataConfig(name=str(tmp_path / "a.npz")), ImageSpec(None, labels=None, captions=False))
    batch = data.read([1], RNG)
    assert data.shape == (3, 4, 4) and len(data.class_names) == 4 and batch.labels.tolist() == [1]
    assert np.array_equal(batch.images[0].permute(1, 2, 0), images[1])
    for labels in (np.array([0, 2**40]), np.array([-1, 0])):
        np.savez(tmp_path / "b.npz", arr_0=images, arr_1=labels)
        with pytest.raises(InputError, match="must be labels of 0 to 99999, got"):
            load_images(DataConfig(name=str(tmp_path / "b.npz")), ImageSpec(None, labels=None, captions=False))
    np.savez(tmp_path / "c.npz", arr_0=images.astype(np.float32))
    with pytest.raises(InputError, match=r"must be uint8 images .* got \(2, 4, 4, 3\) float32"):
        load_images(DataConfig(name=str(tmp_path / "c.npz")), ImageSpec(None, labels=None, captions=False))
