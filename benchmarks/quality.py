"""How good drawn digits are: their Fréchet distance from held-out ones, and whether a classifier recognises them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from uvit import Config
from uvit.data.batch import read_all
from uvit.data.loader import load_data
from uvit.evaluation.features import PixelFeatures
from uvit.evaluation.judge import build_classifier, choose_labels
from uvit.evaluation.metrics import Gaussian, Moments, frechet_distance


class Judge:
    """Judges images of the digits as evaluate.py does.

    Args:
        config: a run of the digits.
        num_images: images of each set, as many of each class.
    """

    def __init__(self, config: Config, num_images: int) -> None:
        train_part, held_out = (load_data(config.data, config.model, train=part) for part in (True, False))
        self.features = PixelFeatures(train_part.shape)
        self.target = self._gaussian(read_all(held_out).images)
        self.real = frechet_distance(self._gaussian(read_all(train_part).images), self.target)
        self.classifier = build_classifier("svm", None, train_part, torch.device("cpu"))
        self.labels: Sequence[int] = choose_labels(num_images, config.model.num_classes, "balanced", seed=0)

    def _gaussian(self, images: Tensor) -> Gaussian:
        return Moments(self.features.num_features).update(self.features(images)[0]).gaussian

    def __call__(self, images: Tensor) -> dict[str, float]:
        """Judges images of `labels`.

        Args:
            images: (num_images, C, H, W) uint8.

        Returns:
            The Fréchet distance over that of real images, and the share that is recognised as its label.
        """
        right = (self.classifier.classify(images) == torch.tensor(self.labels)).double().mean().item()
        return {
            "frechet_ratio": frechet_distance(self._gaussian(images), self.target) / self.real,
            "recognised": right,
        }
