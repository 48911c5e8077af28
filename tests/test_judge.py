from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import PartialState
from helpers.images import save_captions

from uvit.common.errors import InputError
from uvit.config import DataConfig
from uvit.data.batch import Batch, ImageSpec, read_all
from uvit.data.datasets import load_images
from uvit.data.embedded import Digits
from uvit.evaluation.features import build_features
from uvit.evaluation.judge import (
    Classifier,
    ImageStatistics,
    build_classifier,
    choose_captions,
    choose_labels,
    read_with_progress,
)
from uvit.evaluation.metrics import ImageHash

CPU = torch.device("cpu")


class Captioned:
    """Captions of images that nobody reads, with labels or not."""

    def __init__(self, texts, labels, class_names):
        self.texts, self.labels, self.class_names = texts, labels, class_names

    def __len__(self):
        return len(self.texts)

    def read(self, indices, rng):
        labels = torch.tensor([self.labels[index] for index in indices])
        return Batch(torch.zeros(len(labels), 1), labels, [[self.texts[index], "another"] for index in indices])


def test_labels_are_balanced_or_random():
    assert choose_labels(6, 3, "balanced", seed=0) == [0, 0, 1, 1, 2, 2]
    drawn = choose_labels(3000, 3, "random", seed=0)
    assert drawn == choose_labels(3000, 3, "random", seed=0) != choose_labels(3000, 3, "random", seed=1)
    assert all(900 < count < 1100 for count in Counter(drawn).values())
    with pytest.raises(InputError, match="num_images must be a multiple of 3 classes, got 7"):
        choose_labels(7, 3, "balanced", seed=0)


def test_captions_are_chosen_by_label_and_repeated():
    data = Captioned(["a cat", "a dog", "two cats"], [0, 1, 0], ("cat", "dog"))
    captions, labels = choose_captions(data, 6, "balanced", seed=0)
    assert captions == ["a cat", "two cats", "a cat", "a dog", "a dog", "a dog"] and labels == [0, 0, 0, 1, 1, 1]
    captions, labels = choose_captions(data, 100, "random", seed=0)
    assert {*zip(captions, labels)} == {("a cat", 0), ("two cats", 0), ("a dog", 1)}
    with pytest.raises(InputError, match="the reference must have a caption of every label, got none of bird"):
        choose_captions(Captioned(["a cat"], [0], ("cat", "bird")), 2, "balanced", seed=0)


def test_captions_are_chosen_in_order_or_shuffled_without_labels():
    data = Captioned([f"text {number}" for number in range(300)], [0] * 300, ())
    assert choose_captions(data, 3, "balanced", seed=0) == (["text 0", "text 1", "text 2"], None)
    more, _ = choose_captions(data, 301, "balanced", seed=0)
    assert more[300] == "text 0" and len({*more}) == 300
    shuffled, labels = choose_captions(data, 300, "random", seed=0)
    assert labels is None and sorted(shuffled) == sorted(data.texts) and shuffled != data.texts


def test_data_without_captions_are_refused(tmp_path):
    name = save_captions(tmp_path / "some", ["a"] * 3).name
    data = load_images(DataConfig(name=name), ImageSpec((1, 8, 8), labels=None, captions=False))
    with pytest.raises(InputError, match="measured on the captions of a reference data set, got one without captions"):
        choose_captions(data, 2, "balanced", seed=0)


def test_an_svm_learns_to_recognise_digits():
    classifier = build_classifier("svm", None, Digits.load(train=True), CPU)
    assert classifier.num_classes == 10 and classifier.description == "svm on the pixels of 1437 training images"
    held_out = read_all(Digits.load(train=False))
    assert (classifier.classify(held_out.images) == held_out.labels).float().mean() > 0.97


def test_unknown_classifiers_are_refused():
    with pytest.raises(InputError, match="classifier must be 'svm', 'judge', 'timm:MODEL' or 'none', got 'svn'"):
        build_classifier("svn", None, None, CPU)
    with pytest.raises(InputError, match="'svm' needs the labelled images"):
        build_classifier("svm", None, None, CPU)


@pytest.mark.parametrize("batch_size", [7, 500])
def test_statistics_do_not_depend_on_the_batch_size(batch_size):
    data, state = Digits.load(train=False), PartialState()
    batches = [*read_with_progress(data, batch_size, 0, state)]
    assert len(batches) == -(-360 // batch_size)
    network = build_features("pixels", None, data.shape)
    statistics = ImageStatistics(network, len(data), state)
    assert statistics.update(iter(batches)) is statistics
    pixels = read_all(data).images.flatten(1).double().numpy() / 127.5 - 1
    assert statistics.moments.count == 360
    np.testing.assert_allclose(statistics.moments.gaussian.mean, pixels.mean(0), atol=1e-6)
    assert statistics.hash == ImageHash().update(read_all(data).images).compute(state.device)
    assert statistics.recognised is None  # nobody was asked


def test_some_of_the_images_are_chosen_at_random_and_always_the_same():
    data, state = Digits.load(train=False), PartialState()
    some, again = ([*read_with_progress(data, 7, 0, state, num_images=20)] for _ in range(2))
    images = torch.cat([each for each, _ in some])
    assert len(images) == 20 and torch.equal(images, torch.cat([each for each, _ in again]))
    labels = torch.cat([each for _, each in some])
    assert not torch.equal(images, data.images[:20]) and len(labels.unique()) > 4
    assert len(torch.cat([each for each, _ in read_with_progress(data, 500, 0, state, num_images=361)])) == 360


def test_the_share_of_images_that_are_recognised():
    data, state = Digits.load(train=False), PartialState()
    zero = Classifier(lambda images: torch.zeros(len(images)), 10, "takes all for zeros")
    statistics = ImageStatistics(build_features("pixels", None, data.shape), len(data), state)
    statistics.update(read_with_progress(data, 50, 0, state), zero)
    assert statistics.recognised == (data.labels == 0).float().mean()
