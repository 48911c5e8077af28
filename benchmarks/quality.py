"""How good drawn images are: their Fréchet distance from held-out ones, and whether a classifier recognises them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from uvit import Config
from uvit.config import checkpoint_dirs
from uvit.data.batch import read_all
from uvit.data.loader import load_data
from uvit.evaluation.features import JUDGE, PIXELS, build_features
from uvit.evaluation.judge import SVM, build_classifier, choose_labels
from uvit.evaluation.measure import MAX_SVM
from uvit.evaluation.metrics import Gaussian, Moments, frechet_distance
from uvit.networks.contract import Network
from uvit.training.checkpoint import read_state
from uvit.weights.build import build_network

BATCH_SIZE = 1_000


class Judge:
    """Judges images of a run's data as evaluate.py does: tiny ones by their pixels, others by a network's features.

    Args:
        config: a run with labels.
        num_images: images of each set, as many of each class.
        device: where networks go.
    """

    def __init__(self, config: Config, num_images: int, device: torch.device | str = "cpu") -> None:
        train_part, held_out = (load_data(config.data, config.model, train=part) for part in (True, False))
        self.device = torch.device(device)
        features, classifier = (PIXELS, SVM) if math.prod(train_part.shape) <= MAX_SVM else (JUDGE, JUDGE)
        self.features = build_features(features, None, train_part.shape, train_part).to(device)
        self.classifier = build_classifier(classifier, None, train_part, self.device)
        self.labels: Sequence[int] = choose_labels(num_images, config.model.num_classes, "balanced", seed=0)
        # Fewer images have a larger distance, so as many real ones are compared as are drawn.
        chosen = np.random.default_rng(0).permutation(len(train_part))[:num_images].tolist()
        self.train = self._gaussian(train_part.read(chosen, np.random.default_rng(0)).images)
        real = read_all(held_out)
        self.target = self._gaussian(real.images)
        self.real = frechet_distance(self.train, self.target)
        self.recognised_real = self._recognised(real.images, real.labels)

    @torch.no_grad()
    def _gaussian(self, images: Tensor) -> Gaussian:
        moments = Moments(self.features.num_features)
        for part in images.split(BATCH_SIZE):
            moments.update(self.features(part.to(self.device))[0])
        return moments.gaussian

    def _recognised(self, images: Tensor, labels: Tensor) -> float:
        found = torch.cat([self.classifier.classify(part).cpu() for part in images.split(BATCH_SIZE)])
        return (found == labels).double().mean().item()

    def __call__(self, images: Tensor) -> dict[str, float]:
        """Judges images of `labels`.

        Args:
            images: (num_images, C, H, W) uint8.

        Returns:
            The Fréchet distance from held-out images over that of real ones, that from training images, and the share
            that is recognised as its label.
        """
        drawn = self._gaussian(images)
        return {
            "frechet_ratio": frechet_distance(drawn, self.target) / self.real,
            "frechet_train": frechet_distance(drawn, self.train),
            "recognised": self._recognised(images, torch.tensor(self.labels)),
        }


def averages_of(run_dir: Path, config: Config, device: torch.device | str = "cpu") -> Iterator[tuple[int, Network]]:
    """Yields the step of each checkpoint of a run, oldest first, and the network with its averaged weights."""
    model = cast(Network, build_network(config.model).to(device).eval())
    for folder in checkpoint_dirs(run_dir):
        state = read_state(folder)
        model.load_state_dict(state["ema"])
        yield state["step"], model
